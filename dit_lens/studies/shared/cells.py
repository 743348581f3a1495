"""One finished part of a study, and how it is written to a folder: whole or not at all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.core.runs.files import (
    file_inside,
    find_folder,
    read_image,
    read_json,
    report_damage,
    whole_folder,
    write_json,
)
from dit_lens.errors import StoreError
from dit_lens.studies.shared.old_data import update_cell

if TYPE_CHECKING:
    from PIL.Image import Image


REMEDY = "Delete the folder {folder}, and the study makes this cell again; the others stay."  # where one is damaged
FILES = r"cell\.json|\w+\.safetensors|\d{4,}\.png"  # what the folder of a cell has


@dataclass
class Cell:
    """What one finished part of a study left.

    lines: rows of the study's table, each as column -> value.
    images: images for the result, under the texts of their keys (:class:`ImageKey`).
    masks: bool [h, w] for the result, under the texts of their keys.
    arrays: what later cells need, such as channel scores; not part of the result.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def clean_lines(self) -> None:
        """Makes the lines what JSON would give back: None instead of NaN, Python's numbers instead of numpy's."""
        self.lines = [{name: _to_json(value) for name, value in line.items()} for line in self.lines]


def write_cell(folder: Path, key: str, cell: Cell) -> None:
    """Writes a cell into a folder of its own.

    folder: a new folder.
    key: name of the cell in its study.
    cell: what to write.
    """
    from safetensors.numpy import save_file

    with whole_folder(folder, mark="cell.json", own=FILES) as fresh:
        files = {name: f"{i:04d}.png" for i, name in enumerate(cell.images)}
        for name, file in files.items():
            cell.images[name].save(fresh / file)
        parts = {part: values for part in ("masks", "arrays") if (values := getattr(cell, part))}
        for part, values in parts.items():
            # safetensors writes the memory behind a view in the order it has there.
            save_file(
                {name: np.asarray(value, order="C") for name, value in values.items()}, fresh / f"{part}.safetensors"
            )
        content = {"key": key, "lines": cell.lines, "images": files, "parts": list(parts)}
        write_json(fresh / "cell.json", content)


def read_cell(folder: Path, study: str, key: str | None = None) -> Cell:
    """Reads what :func:`write_cell` wrote, in this release or an earlier one.

    folder: the folder of the cell.
    study: name of the study that the cell belongs to.
    key: the key that the cell must have; any by default. Raises StoreError if it has another.
    """
    from safetensors.numpy import load_file

    folder = find_folder(folder)
    data = read_json(folder / "cell.json", "a cell of a study", REMEDY.format(folder=folder))
    with report_damage(folder, REMEDY.format(folder=folder)):
        data = update_cell(data, study)
        if key not in (None, data["key"]):
            raise StoreError(f"{folder} is the cell {data['key']!r}, and {key!r} was to come here. Start a new folder.")
        images = {name: read_image(folder, file) for name, file in data["images"].items()}
        parts = {part: load_file(file_inside(folder, f"{part}.safetensors")) for part in data["parts"]}
        return Cell(data["lines"], images, **parts)


def pack_cell(key: str, cell: Cell) -> dict[str, bytes]:
    """The files of a cell, by name: how it travels between processes. Arguments: as in :func:`write_cell`."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "cell"
        write_cell(folder, key, cell)
        return read_packed(folder)


def write_packed(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files of a cell into a new folder."""
    with whole_folder(folder, mark="cell.json", own=FILES) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)


def read_packed(folder: Path) -> dict[str, bytes]:
    """The files of a cell in its folder, by name."""
    folder = find_folder(folder)
    with report_damage(folder, REMEDY.format(folder=folder)):
        return {file.name: file.read_bytes() for file in folder.iterdir() if re.fullmatch(FILES, file.name)}


def unpack_cell(files: Mapping[str, bytes], study: str, key: str) -> Cell:
    """The cell in its files. study, key: as in :func:`read_cell`."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "cell"
        write_packed(folder, files)
        return read_cell(folder, study, key)


def number_folders(folder: Path) -> Iterator[Path]:
    """The folders 000000, 000001 ... inside a folder, as far as they go without a gap."""
    number = 0
    while find_folder(numbered := folder / f"{number:06d}").exists():
        yield numbered
        number += 1


def _to_json(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value
