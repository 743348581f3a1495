"""The figure of causal sweeps: a map of what patches did, and of what attribution said they would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_columns, check_summary, column_values, describe_n
from dit_lens.plots.theme import CI, INK, bar_below, set_title, shorten_site

if TYPE_CHECKING:
    import pandas as pd

# What rows and columns of each map are.
_AXES = {
    "block x step": ("block", "step"),
    "block x channel group": ("block", "channels"),
    "block x head": ("block", "head"),
    "token region": ("row of tiles", "column of tiles"),
}
_PANELS = {"effect": "patched", "attribution_run": "attributed, whole run", "attribution_step": "attributed, one step"}


@carries_code
@checked
def patching_figure(summary: pd.DataFrame) -> go.Figure:
    """A map for patches and one for each attribution: how far every cell carries the target towards the source.

    >>> import pandas as pd
    >>> figure = patching_figure(
    ...     pd.DataFrame(
    ...         {"over": "block x step", "row": ["blocks.0.img", "blocks.1.img"], "column": [0, 0], "n": [2, 2]}
    ...         | {"effect": [0.9, 0.1], "effect_low": [0.8, 0.0], "effect_high": [1.0, 0.2]}
    ...     )
    ... )
    >>> figure.data[0].z.tolist()
    [[0.9], [0.1]]

    Every map has a colour scale of its own, symmetric about 0, and its correlation with the patched one in its title.
    Blocks run downwards, as depth does.

    summary: of ``studies.patching``; columns over, row, column, n, effect (with _low and _high), and attribution_run
      and attribution_step if they were measured; fidelity_source is shown on hovering.
    """
    axes = ("row", "column", "over")
    check_columns(summary, axes)
    numbers = check_summary(summary.drop(columns=list(axes)), ("n", "effect", "effect_low"))
    table = numbers.assign(**{name: summary[name] for name in axes})
    over = str(table["over"].iloc[0])
    beside, cells = table[table["row"] == "subject"], table[table["row"] != "subject"]
    panels = [name for name in _PANELS if name in cells and cells[name].notna().any()]
    titles = [_PANELS[name] + _describe_correlation(cells, name) for name in panels]
    gap = 0.05
    figure = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=gap)
    width = (1 - gap * (len(panels) - 1)) / len(panels)
    for i, name in enumerate(panels):
        figure.add_trace(_draw_map(cells, name, over, bar=(i * (width + gap) + width / 2, width)), row=1, col=i + 1)
    down, along = _AXES.get(over, ("row", "column"))
    rows = list(dict.fromkeys(cells["row"]))
    figure.update_xaxes(title=along, type="category", showgrid=False, showline=False, nticks=16)
    figure.update_yaxes(showgrid=False, showline=False, autorange="reversed", type="category", showticklabels=False)
    figure.update_yaxes(
        title=down,
        tickvals=rows[:: max(1, len(rows) // 30)],
        ticktext=[shorten_site(row) for row in rows][:: max(1, len(rows) // 30)],
        showticklabels=True,
        row=1,
        col=1,
    )
    figure.update_annotations(font={"size": 12, "color": INK})
    notes = [f"{line.column} the subject {line.effect:.2f}" for line in beside.itertuples()]
    small = "; ".join(["effect: 0 is the untouched target, 1 the source", *notes, describe_n(cells), CI])
    height = int(np.clip(24 * len(rows), 160, 560)) + 210
    set_title(figure, f"Patches from source to target, {over}", small, height=height)
    return figure.update_layout(margin={"t": 88, "b": 100})


def _draw_map(cells: pd.DataFrame, name: str, over: str, bar: tuple[float, float]) -> go.Heatmap:
    """One panel.

    cells: rows of the summary that are cells of the map.
    name: column to draw.
    over: what a cell of the map swaps.
    bar: middle and width of the colour bar, as shares of the figure.
    """
    grid = {
        column: cells.pivot(index="row", columns="column", values=column)
        for column in (name, *_FACTS)
        if column in cells
    }
    order = [list(dict.fromkeys(cells[axis])) for axis in ("row", "column")]
    laid = {column: values.loc[order[0], order[1]].to_numpy(float) for column, values in grid.items()}
    values = laid[name]
    largest = float(np.nanmax(np.abs(values))) or 1.0
    facts = np.stack([laid.get(fact, np.full(values.shape, np.nan)) for fact in _FACTS], axis=-1)
    down, along = _AXES.get(over, ("row", "column"))
    return go.Heatmap(
        z=values,
        y=order[0],
        x=[str(column) for column in order[1]],
        customdata=facts,
        colorscale="RdBu_r",
        zmin=-largest,
        zmax=largest,
        colorbar=bar_below(*bar),
        hovertemplate=f"{down} %{{y}}, {along} %{{x}}<br>{_PANELS[name]}: %{{z:.3f}}"
        "<br>patched %{customdata[1]:.3f} (%{customdata[2]:.3f} to %{customdata[3]:.3f}), n = %{customdata[0]:.0f}"
        "<br>shows the source's prompt %{customdata[4]:.0%}<extra></extra>",
    )


_FACTS = ("n", "effect", "effect_low", "effect_high", "fidelity_source")


def _describe_correlation(cells: pd.DataFrame, name: str) -> str:
    """How the mean map of an attribution correlates with the patched one."""
    if name == "effect" or len(cells) < 2:
        return ""
    found = np.corrcoef(column_values(cells, "effect"), column_values(cells, name))[0, 1]
    return "" if np.isnan(found) else f" (r = {found:.2f})"
