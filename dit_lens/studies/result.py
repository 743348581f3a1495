"""What a study returns: a table of every measurement, a summary with intervals, pictures, and the figure of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dit_lens.errors import StoreError
from dit_lens.metrics import bootstrap_ci
from dit_lens.store import read_versioned, settled, whole_folder, write_json
from dit_lens.studies import cells

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL.Image import Image

FORMAT = 1


@dataclass
class Result:
    """The data of one study; ``figure()`` draws it.

    study: its name. table: one line per measurement. summary: means and 95 % intervals per arm. settings: every choice
    that was made. pictures: key -> picture. masks: key -> bool [h, w]. notes: what a reader must know.
    """

    study: str
    table: pd.DataFrame
    summary: pd.DataFrame
    settings: dict[str, Any]
    pictures: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figure(self) -> go.Figure:
        """The study's figure (plotly); it is returned, not shown."""
        from dit_lens import plots

        return getattr(plots, f"{self.study}_figure")(self.summary)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes result.json, masks.safetensors and pictures/*.png into a new folder."""
        from safetensors.numpy import save_file

        with whole_folder(folder, overwrite=overwrite) as fresh:
            (fresh / "pictures").mkdir()
            names = {key: f"{i:04d}.png" for i, key in enumerate(self.pictures)}
            for key, name in names.items():
                self.pictures[key].save(fresh / "pictures" / name)
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
                    "pictures": names,
                    "notes": self.notes,
                },
            )
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Reads what :meth:`save` wrote, or the finished cells in a study's ``out`` folder; needs no model."""
        from PIL import Image, UnidentifiedImageError
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = settled(folder)
        if (folder / "study.json").exists():
            return cells.load(folder)
        data = read_versioned(folder / "result.json", "result", FORMAT)
        try:
            pictures = {key: Image.open(folder / "pictures" / name).copy() for key, name in data["pictures"].items()}
            masks = load_file(folder / "masks.safetensors")
            tables = {name: pd.DataFrame(**data[name]) for name in ("table", "summary")}
        except (OSError, KeyError, SafetensorError, UnidentifiedImageError) as damage:
            raise StoreError(
                f"{folder} is incomplete or damaged: {damage}. Restore it from a copy, or run the study again."
            ) from damage
        return cls(
            data["study"], **tables, settings=data["settings"], pictures=pictures, masks=masks, notes=data["notes"]
        )

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"{self.study}: {len(self.table)} measurements",
                str(self.summary),
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{note}</p>" for note in self.notes)
        summary = self.summary.to_html(index=False, float_format="{:.3g}".format, border=0)
        return f"<b>{self.study}</b>: {len(self.table)} measurements{summary}{notes}"


def summarise(table: pd.DataFrame, by: Sequence[str], measures: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Means of measures per group, with 95 % bootstrap intervals over prompts, then the seeds and draws within them.

    Adds n (measurements) and, for every measure, columns ``measure``, ``measure_low`` and ``measure_high``.
    Measurements that are missing everywhere in a group stay missing.
    """
    lines = []
    for _, group in table.groupby(list(by), sort=False, dropna=False):
        line: dict[str, Any] = {name: group[name].iloc[0] for name in by} | {"n": len(group)}
        for measure in measures:
            values = group[[measure, "prompt"]].dropna()
            interval = (
                bootstrap_ci(values[measure].to_numpy(float), groups=values["prompt"].to_numpy(), seed=seed)
                if len(values)
                else (np.nan,) * 3
            )
            line |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), map(float, interval), strict=True))
        lines.append(line)
    return pd.DataFrame(lines)


def _to_json(table: pd.DataFrame) -> dict[str, Any]:
    rows = [
        [None if isinstance(value, float) and np.isnan(value) else value for value in row]
        for row in table.astype(object).to_numpy().tolist()
    ]
    return {"data": rows, "columns": list(table.columns)}
