"""Folders of one study that were written apart, put into one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.files import (
    alone_in,
    file_inside,
    find_folder,
    read_json,
    read_versioned,
    report_damage,
    report_unwritten,
    whole_folder,
    write_json,
)
from dit_lens.errors import OpError, StoreError, show, warn
from dit_lens.studies.shared.cells import FILES, REMEDY
from dit_lens.studies.shared.folders import DAMAGED, FORMAT, check_same_study, compare_studies, list_cells
from dit_lens.studies.shared.old_data import update_study

STUDY = "study.json"


@checked
def merge(folders: Sequence[str | Path], out: str | Path) -> list[str]:
    """Puts the finished cells of several folders into one: what shards wrote that did not share a folder.

    >>> import tempfile, dit_lens as dl
    >>> lens, place = dl.DiTLens.toy(), Path(tempfile.mkdtemp())
    >>> for i in range(2):
    ...     shard = dl.studies.write_attribution(
    ...         lens,
    ...         [
    ...             "a big red circle left on a plain blue background",
    ...             "a small white cross top on a plain red background",
    ...         ],
    ...         batch_size=1,
    ...         num_inference_steps=1,
    ...         out=place / str(i),
    ...         shard=(i, 2),
    ...     )
    >>> merge([place / "0", place / "1"], place / "both")
    ['2 of 2 cells of write_attribution']
    >>> dl.studies.Result.load(place / "both").study
    'write_attribution'

    Returns a line for every study: how many of its cells are there now, and which are not. StoreError where the folders
    hold different studies, settings or models. A cell that several have is taken from the first; a warning tells
    if its numbers differ, as they can where machines compute differently.

    folders: folders of one study, of one sweep, or that one ``dit-lens study`` wrote.
    out: the folder that gets all cells; it can hold some of them already.
    """
    if isinstance(folders, str) or not folders:
        raise OpError(f"merge takes several folders, at least one; it was given {show(folders)}. Name what out= was.")
    out, given = Path(out), [Path(folder) for folder in folders]
    found = [_find_studies(folder) for folder in given]
    sources: dict[Path, dict[Path, dict[str, Any]]] = {}  # place -> folder of a study -> what its file has
    for place in dict.fromkeys(place for places in found for place in places):
        having = [folder / place for folder, places in zip(given, found, strict=True) if place in places]
        sources[place] = {folder: _read_study(folder) for folder in having}
        _check_sources(out / place, sources[place])
    return [_merge_study(studies, out / place) for place, studies in sources.items()]


def _find_studies(folder: Path) -> list[Path]:
    """Where in a folder there are studies, by their paths inside it."""
    found = sorted(file.parent.relative_to(folder) for file in folder.rglob(STUDY))
    if not found:
        raise StoreError(f"{folder} holds no study that could be merged. Name what out= was.")
    return found


def _read_study(folder: Path) -> dict[str, Any]:
    with report_damage(folder, DAMAGED):
        data = {"values": {}, "meant": {}, **update_study(read_versioned(folder / STUDY, "study", FORMAT))}
        data["model"] = {"server": None, **data["model"]}
    return data


def _check_sources(out: Path, studies: Mapping[Path, dict[str, Any]]) -> None:
    """Raises StoreError where studies are not one, or not the one in ``out``; nothing has been written by then."""
    (first, study), *others = studies.items()
    for folder, data in others:
        compare_studies(first, study, data, folder)
    with report_unwritten(out):
        if (out / STUDY).exists():
            check_same_study(out, study, first)
        elif out.exists() and any(not one.name.startswith(".") for one in out.iterdir()):
            raise StoreError(f"{out} holds other files and no study. Choose a new folder to merge into.")


def _merge_study(studies: Mapping[Path, dict[str, Any]], out: Path) -> str:
    first, data = next(iter(studies.items()))
    with report_unwritten(out):
        out.mkdir(parents=True, exist_ok=True)
        with alone_in(out):
            if (out / STUDY).exists():  # another process may have begun there
                check_same_study(out, data, first)
            else:
                write_json(out / STUDY, data)
    differing = sum(_copy_cells(folder, out) for folder in studies)
    if differing:
        warn(
            f"{differing} cells of the {data['study']} in {out} are in several folders with other numbers, as machines "
            "of different kinds make them. The first folder's are kept."
        )
    return _describe(out, data)


def _copy_cells(folder: Path, out: Path) -> int:
    """Copies the cells that are not there yet; returns how many of the others have other numbers."""
    differing = 0
    for cell in _list_folders(folder):
        target = out / "cells" / cell.name
        with report_damage(cell, REMEDY.format(folder=cell)):
            data = read_json(file_inside(cell, "cell.json"), "a cell of a study", REMEDY.format(folder=cell))
            if find_folder(target).exists():
                kept = read_json(
                    find_folder(target) / "cell.json", "a cell of a study", REMEDY.format(folder=find_folder(target))
                )
                if kept["key"] != data["key"]:
                    raise StoreError(f"{cell} is the cell {data['key']!r}, and {target} is {kept['key']!r}.")
                differing += kept["lines"] != data["lines"]
                continue
            with whole_folder(target, mark="cell.json", own=FILES) as fresh:
                for file in sorted(cell.iterdir()):
                    if re.fullmatch(FILES, file.name):
                        shutil.copyfile(file_inside(cell, file.name), fresh / file.name)
    return differing


def _list_folders(folder: Path) -> Iterator[Path]:
    for number in list_cells(folder):
        yield folder / "cells" / f"{number:06d}"


def _describe(out: Path, data: dict[str, Any]) -> str:
    """How many cells of a study there are, and which are missing."""
    numbers = list_cells(out)
    total = data.get("cells") or (numbers[-1] + 1 if numbers else 0)
    missing = [f"{number:06d}" for number in sorted({*range(total)} - {*numbers})]
    if data["study"] == "sweep":
        return "sweep: its studies are in parts"
    shown = f"; missing: {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}" if missing else ""
    return f"{len(numbers)} of {total} cells of {data['study']}{shown}"
