"""What a study returns: a table of every measurement, a summary with intervals, images, and the figure of both."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics import bootstrap_ci
from dit_lens.core.runs.files import read_versioned, recovered, whole_folder, write_json
from dit_lens.errors import StoreError
from dit_lens.studies.shared import registry

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL.Image import Image

FORMAT = 1

SHOWN = 40  # lines of a summary that a result shows of itself


@dataclass
class Result:
    """The data of one study; ``figure()`` draws it.

    study: its name. table: one line per measurement. summary: means and 95 % intervals per arm. settings: every choice
    that was made. images: key -> image. masks: key -> bool [h, w]. notes: what a reader must know.
    """

    study: str
    table: pd.DataFrame
    summary: pd.DataFrame
    settings: dict[str, Any]
    images: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figure(self, **options: Any) -> go.Figure:
        """The study's figure (plotly); it is returned, not shown. options: of ``dit_lens.plots.{study}_figure``."""
        from dit_lens import plots

        if self.study == "sweep":
            options = {"over": list(self.settings["over"]), **options}
        figure = getattr(plots, f"{self.study}_figure")(self.summary, **options)
        return figure.update_layout(meta={"code": self.code})

    @property
    def code(self) -> str:
        """The call that made this result; figures carry it in ``layout.meta``."""
        from dit_lens.studies.shared.code import code_of_result

        return code_of_result(self)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes result.json, masks.safetensors and images/*.png into a new folder."""
        from safetensors.numpy import save_file

        with whole_folder(folder, overwrite=overwrite) as fresh:
            (fresh / "images").mkdir()
            names = {key: f"{i:04d}.png" for i, key in enumerate(self.images)}
            for key, name in names.items():
                self.images[key].save(fresh / "images" / name)
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
                    "images": names,
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

        folder = recovered(folder)
        if (folder / "study.json").exists():
            return registry.load(folder)
        data = read_versioned(folder / "result.json", "result", FORMAT)
        try:
            images = {key: Image.open(folder / "images" / name).copy() for key, name in data["images"].items()}
            masks = load_file(folder / "masks.safetensors")
            tables = {name: pd.DataFrame(**data[name]) for name in ("table", "summary")}
        except (OSError, KeyError, SafetensorError, UnidentifiedImageError) as damage:
            raise StoreError(
                f"{folder} is incomplete or damaged: {damage}. Restore it from a copy, or run the study again."
            ) from damage
        return cls(data["study"], **tables, settings=data["settings"], images=images, masks=masks, notes=data["notes"])

    def __repr__(self) -> str:
        summary = readable(self.summary).to_string(index=False, max_rows=SHOWN, justify="left")
        return "\n".join([self._heading(), summary, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        summary = readable(self.summary).to_html(index=False, border=0, max_rows=SHOWN)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        code = f"<details><summary>The code that made this</summary><pre>{html.escape(self.code)}</pre></details>"
        return f"<b>{html.escape(self._heading())}</b>{summary}{notes}{code}"

    def _heading(self) -> str:
        images = f", {len(self.images)} images" if self.images else ""
        return f"{self.study}: {len(self.table)} measurements{images}; intervals are 95 %"


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
            line |= _bounds(measure, values[measure], values["prompt"], seed)
        lines.append(line)
    return pd.DataFrame(lines)


def paired(
    table: pd.DataFrame, by: Sequence[str], measures: Sequence[str], base: str = "top", seed: int = 0
) -> pd.DataFrame:
    """By how much one arm exceeds every other, over pairs that share prompt and seed.

    >>> table = pd.DataFrame({"arm": ["top", "random", "random"], "draw": [0, 0, 1], "rmse": [9.0, 2.0, 4.0]})
    >>> paired(table.assign(prompt="a", seed=0, k=4), ["k"], ["rmse"])[["k", "arm", "rmse_top_minus"]].values.tolist()
    [[4, 'random', 6.0]]

    An arm's draws are averaged within a pair; the interval is bootstrapped over prompts, then the seeds within them
    (95 %). by: what else a group shares. Columns: by, arm, and for every measure ``measure_{base}_minus`` with its
    ``_low`` and ``_high``, missing where the arms share no pair.
    """
    lines = []
    for _, group in table.groupby(list(by), sort=False):
        pairs = group.groupby(["prompt", "seed", "arm"], sort=False)[list(measures)].mean().unstack("arm")
        for arm in group["arm"].unique():
            if arm == base or base not in group["arm"].to_numpy():
                continue
            line: dict[str, Any] = {name: group[name].iloc[0] for name in by} | {"arm": arm}
            for measure in measures:
                excess = (pairs[measure, base] - pairs[measure, arm]).dropna()
                line |= _bounds(f"{measure}_{base}_minus", excess, excess.index.get_level_values("prompt"), seed)
            lines.append(line)
    return pd.DataFrame(lines)


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary for people: three digits, and a mean with its bounds in one column.

    >>> readable(pd.DataFrame({"arm": ["top"], "rmse": [77.123], "rmse_low": [75.0], "rmse_high": [82.04]}))
       arm           rmse
    0  top  77 (75 to 82)
    """
    names, bounds = list(summary), {}
    for i, name in enumerate(names):
        if tuple(names[i + 1 : i + 3]) in ((f"{name}_low", f"{name}_high"), ("low", "high")):
            bounds[name] = names[i + 1 : i + 3]
    inside = {bound for pair in bounds.values() for bound in pair}
    return pd.DataFrame(
        {
            name: [_words(*line) for line in summary[[name, *bounds.get(name, [])]].itertuples(index=False, name=None)]
            for name in names
            if name not in inside
        }
    )


def _words(value: Any, low: Any = None, high: Any = None) -> str:
    return _number(value) + ("" if pd.isna(low) or pd.isna(high) else f" ({_number(low)} to {_number(high)})")


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return "" if np.isnan(value) else f"{value:.0f}" if abs(value) >= 10 else f"{value:.3g}"


def _bounds(name: str, values: pd.Series, prompts: Any, seed: int) -> dict[str, float]:
    """The mean of a measure with its interval, as three columns; missing where there are no values."""
    found: tuple[float, ...] = (np.nan,) * 3
    if len(values):
        found = bootstrap_ci(values.to_numpy(float), groups=np.asarray(prompts), seed=seed)
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(float, found), strict=True))


def _to_json(table: pd.DataFrame) -> dict[str, Any]:
    rows = [
        [None if isinstance(value, float) and np.isnan(value) else value for value in row]
        for row in table.astype(object).to_numpy().tolist()
    ]
    return {"data": rows, "columns": list(table.columns)}
