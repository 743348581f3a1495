"""What a study returns: a table of every measurement, a summary with intervals, images, and the figure of both."""

from __future__ import annotations

import difflib
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.files import (
    file_inside,
    find_folder,
    read_image,
    read_versioned,
    report_damage,
    whole_folder,
    write_json,
)
from dit_lens.errors import OpError
from dit_lens.old_names import OldName
from dit_lens.studies.shared.code import write_call
from dit_lens.studies.shared.folders import load_study
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.old_data import find_images, update_study
from dit_lens.studies.shared.registry import get_study
from dit_lens.studies.shared.tables import format_summary

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL.Image import Image

FORMAT = 1
FILES = r"result\.json|masks\.safetensors|(images|pictures)/\d{4,}\.png"  # what a saved result has

SHOWN = 40  # lines of a summary that a result shows of itself


@dataclass
class Result:
    """The data of one study; ``figure()`` draws it.

    study: name of the study.
    table: one row per measurement.
    summary: means and 95 % intervals per arm.
    settings: every choice that was made, by argument.
    images: key -> PIL image; see :class:`ImageKey` for the keys.
    masks: key -> bool [h, w].
    notes: what a reader must know.
    """

    study: str
    table: pd.DataFrame
    summary: pd.DataFrame
    settings: dict[str, Any]
    images: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    pictures = OldName("images")

    def figure(self, **options: Any) -> go.Figure:
        """The study's figure (plotly); it is returned, not shown. options: of ``dit_lens.plots.{study}_figure``."""
        record = get_study(self.study)
        decided = record.figure_options(self.settings) if record.figure_options else {}
        return record.figure(self.summary, **{**decided, **options}).update_layout(meta={"code": self.code})

    @property
    def code(self) -> str:
        """The call that made this result; figures carry it in ``layout.meta``."""
        return write_call(self.study, self.settings)

    @checked
    def image(self, item: int, seed: int, **which: Any) -> Image:
        """One image, such as ``result.image(0, 0, k=4, arm="top")``; OpError if there is none.

        item: number of the prompt, or of the pair of prompts.
        seed: seed of the noise.
        which: the other fields of :class:`ImageKey`.
        """
        return self._find("images", ImageKey(item, seed, **which))

    @checked
    def mask(self, item: int, seed: int, **which: Any) -> np.ndarray:
        """One mask, bool [h, w], such as ``result.mask(0, 0, arm="truth")``; OpError if there is none.

        item: number of the prompt, or of the pair of prompts.
        seed: seed of the noise.
        which: the other fields of :class:`ImageKey`.
        """
        return self._find("masks", ImageKey(item, seed, **which))

    @checked
    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes result.json, masks.safetensors and images/*.png into a new folder, and returns its path.

        folder: path of the folder.
        overwrite: whether a result that is there already is replaced; other files in its folder stay.
        """
        from safetensors.numpy import save_file

        with whole_folder(folder, mark="result.json", own=FILES, overwrite=overwrite) as fresh:
            (fresh / "images").mkdir()
            files = {key: f"{i:04d}.png" for i, key in enumerate(self.images)}
            for key, file in files.items():
                self.images[key].save(fresh / "images" / file)
            # safetensors would write the memory behind a view as it lies.
            save_file(
                {key: np.ascontiguousarray(mask) for key, mask in self.masks.items()}, fresh / "masks.safetensors"
            )
            tables = {name: _to_json(getattr(self, name)) for name in ("table", "summary")}
            write_json(
                fresh / "result.json",
                {
                    "format": FORMAT,
                    "study": self.study,
                    **tables,
                    "settings": self.settings,
                    "images": files,
                    "notes": self.notes,
                },
            )
        return Path(folder)

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> Result:
        """Reads what :meth:`save` wrote, or the finished cells in a study's ``out`` folder; needs no model."""
        from safetensors.numpy import load_file

        folder = find_folder(folder)
        if (folder / "study.json").exists():
            return load_study(folder)
        data = read_versioned(folder / "result.json", "result", FORMAT)
        with report_damage(folder, "Restore it from a copy, or run the study again."):
            data = update_study(data)
            images = {
                key: read_image(folder, file, under=find_images(folder).name) for key, file in data["images"].items()
            }
            masks = load_file(file_inside(folder, "masks.safetensors"))
            tables = {name: _from_json(data[name]) for name in ("table", "summary")}
            return cls(
                data["study"],
                **tables,
                settings=dict(data["settings"]),
                images=images,
                masks=masks,
                notes=list(data["notes"]),
            )

    def _find(self, kind: str, key: ImageKey) -> Any:
        known: Mapping[str, Any] = getattr(self, kind)
        if str(key) in known:
            return known[str(key)]
        close = "".join(f" Nearest: {name!r}." for name in difflib.get_close_matches(str(key), known, n=1))
        raise OpError(
            f"this result of {self.study} has no {kind.removesuffix('s')} {str(key)!r}.{close} "
            f"All keys are in result.{kind}."
        )

    def __repr__(self) -> str:
        summary = format_summary(self.summary).to_string(index=False, max_rows=SHOWN, justify="left")
        return "\n".join([self._heading(), summary, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        summary = format_summary(self.summary).to_html(index=False, border=0, max_rows=SHOWN)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        code = f"<details><summary>The code that made this</summary><pre>{html.escape(self.code)}</pre></details>"
        return f"<b>{html.escape(self._heading())}</b>{summary}{notes}{code}"

    def _heading(self) -> str:
        images = f", {len(self.images)} images kept" if self.images else ""
        return f"{self.study}: {len(self.table)} measurements{images}; intervals are 95 %"


def _from_json(data: Mapping[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(**data)
    # A whole number that is missing somewhere would come back as a float.
    for i, name in enumerate(data["columns"]):
        kinds = {type(row[i]) for row in data["data"]}
        if kinds == {int, type(None)}:
            table[name] = table[name].astype("Int64")
    # JSON has no NaN, so a column that is missing everywhere would be one of objects.
    missing = table.columns[table.isna().all()] if len(table) else []
    return table.astype(dict.fromkeys(missing, float))


def _to_json(table: pd.DataFrame) -> dict[str, Any]:
    rows = [
        [None if value is pd.NA or (isinstance(value, float) and np.isnan(value)) else value for value in row]
        for row in table.astype(object).to_numpy().tolist()
    ]
    return {"data": rows, "columns": list(table.columns)}
