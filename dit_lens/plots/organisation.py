"""The figure of claim 2: how well the clusters of each arm find the subject, block by block, and what else does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, column_values, describe_n
from dit_lens.plots.theme import ARMS, CI, INK, Look, fade, looks, set_title

if TYPE_CHECKING:
    import pandas as pd

# What top is compared with besides other channels; nulls, which do not depend on the block, are dashed.
BASELINES = {
    "attention": Look("attention to the word", "#0072B2", "square"),
    "norm": Look("norm of the token", "#009E73", "diamond"),
    "component": Look("first principal component", "#CC79A7", "triangle-up"),
    "centre": Look("centred disc", "#8A8A8A", "cross"),
    "noisy latent": Look("noisy latent", "#A6761D", "pentagon"),
    "x0": Look("predicted x0", "#7570B3", "hexagram"),
}
NULLS = ("centre", "noisy latent", "x0")
# Pixels: the height of a panel, and the room below it for ticks, title and legend (or scale).
PANEL, BELOW = 270, {"channels": 112, "baselines": 150, "map": 95}
OTHER_PROMPTS = Look("top, subjects of other prompts", ARMS["top"].colour, "circle")


@carries_code
@checked
def organisation_figure(summary: pd.DataFrame) -> go.Figure:
    """How well clusters of each arm's channels find the subject, block by block, and how well chance would.

    >>> import pandas as pd
    >>> figure = organisation_figure(
    ...     pd.DataFrame(
    ...         {"block": [0, 1], "arm": ["top"] * 2, "n": [8, 8], "iou": [0.2, 0.5], "low": [0.1, 0.4]}
    ...         | {"high": [0.3, 0.6], "chance": [0.2, 0.2], "degenerate": [0.0, 0.0]}
    ...     )
    ... )
    >>> [trace.name for trace in figure.data]
    ['top (massive), 95 % CI', 'top (massive)', 'chance: random masks of equal size']

    Arms of channels are in the first panel; if there are baselines and nulls, a second one sets them against top. Of
    several steps the last is drawn, and a map shows how far top is above chance at every step. A hollow marker means
    that half of the masks or more are degenerate. Chance is dotted: one line if all arms of a panel share it, else one
    per arm in its colour.

    summary: of ``studies.organisation``; columns block, arm, n, iou, low, high, chance (all IoU, 0 to 1), degenerate
      (share of masks with a cluster under 1 % of the tokens); optionally step and iou_other_prompts.
    """
    table = check_summary(summary, ("block", "arm", "n", "iou", "low", "high", "chance", "degenerate"))
    steps = sorted(table["step"].unique()) if "step" in table else []
    last = table[table["step"] == steps[-1]] if steps else table
    names = list(BASELINES)
    channels, beside = last[~last["arm"].isin(names)], last[last["arm"].isin([*names, "top"])]
    panels = {"channels": (channels, looks(channels["arm"]))}
    if beside["arm"].isin(names).any():
        drawn = {arm: look for arm, look in {"top": ARMS["top"], **BASELINES}.items() if arm in set(beside["arm"])}
        panels["baselines"] = (beside, drawn)
    hollow = "; hollow: half of the masks or more are degenerate" if (last["degenerate"] >= 0.5).any() else ""
    when = f"step {steps[-1]:g}; " if len(steps) > 1 else ""
    small = f"{when}{describe_n(last)}; shaded {CI}{hollow}"
    kinds = [*panels, *(["map"] if len(steps) > 1 else [])]
    figure = make_subplots(len(kinds), 1) if len(kinds) > 1 else go.Figure()
    set_title(figure, "Do the channels find the subject?", small, height=420)
    _stack_panels(figure, kinds)
    for number, (rows, looked) in enumerate(panels.values(), start=1):
        _draw_panel(figure, rows, looked, number if len(kinds) > 1 else None)
    if len(steps) > 1:
        _draw_steps(figure, table, steps, len(kinds))
    return figure


def _stack_panels(figure: go.Figure, kinds: list[str]) -> None:
    """Panels below each other, each with the room its legend needs; a figure of one panel is left as it is."""
    if len(kinds) == 1:
        return
    inner = sum(PANEL + BELOW[kind] for kind in kinds) - BELOW[kinds[-1]]
    figure.update_layout(height=inner + BELOW[kinds[-1]] + 64, margin={"t": 64, "b": BELOW[kinds[-1]]})
    top = 1.0
    for row, kind in enumerate(kinds, start=1):
        bottom = max(0.0, top - PANEL / inner)
        figure.update_yaxes(domain=[bottom, top], row=row, col=1)
        # Two lines of ticks and title come before the legend.
        legend = {"yref": "paper", "y": bottom - 46 / inner, "yanchor": "top", "itemsizing": "trace", "x": 0}
        figure.update_layout({"legend" if row == 1 else f"legend{row}": {**legend, "orientation": "h"}})
        top = bottom - BELOW[kind] / inner


def _draw_panel(figure: go.Figure, table: pd.DataFrame, drawn: Mapping[str, Look], row: int | None) -> None:
    """Lines over blocks with their intervals, and what chance would reach.

    figure: gets the lines.
    table: rows of the panel.
    drawn: arm -> look.
    row: number of the panel; None in a figure of one panel.
    """
    cell = {} if row is None else {"row": row, "col": 1}
    group: dict[str, Any] = {} if row is None else {"legend": "legend" if row == 1 else f"legend{row}"}
    for arm, look in drawn.items():
        rows = table[table["arm"] == arm].sort_values("block")
        if rows[["low", "high"]].notna().any(axis=None) and (arm == "top" or arm not in BASELINES):
            figure.add_scatter(**_make_band(rows, arm, look), **group, **cell)
    for arm, look in drawn.items():
        rows = table[table["arm"] == arm].sort_values("block")
        figure.add_scatter(**_make_line(rows, arm, look), **group, **cell)
    for trace in _make_references(table, drawn):
        figure.add_scatter(**trace, **group, **cell)
    blocks = table["block"].unique()
    figure.update_xaxes(title="block", **({"dtick": 1} if len(blocks) <= 32 and _are_whole(blocks) else {}), **cell)
    unit = "mean IoU with the subject (0 to 1)" if row is None else "mean IoU with the subject"
    figure.update_yaxes(title=unit, range=[0, 1], **cell)


def _make_line(rows: pd.DataFrame, arm: str, look: Look) -> dict[str, Any]:
    hollow = (rows["degenerate"] >= 0.5).to_numpy()
    facts = [column_values(rows, name) for name in ("low", "high", "n", "chance", "degenerate", "iou_other_prompts")]
    return {
        "x": rows["block"].to_numpy(),
        "y": rows["iou"].to_numpy(),
        "customdata": np.stack(facts, 1),
        "name": look.name,
        "legendgroup": arm,
        "mode": "lines+markers",
        "line": {"color": look.colour, "width": 2, "dash": "dash" if arm in NULLS else "solid"},
        "marker": {
            "symbol": [f"{look.symbol}-open" if empty else look.symbol for empty in hollow],
            "size": 7,
            "color": look.colour,
        },
        "hovertemplate": f"{look.name}, block %{{x}}, n = %{{customdata[2]:.0f}}"
        "<br>mean IoU %{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f}), chance %{customdata[3]:.3f}"
        "<br>with the subjects of other prompts: %{customdata[5]:.3f}"
        "<br>degenerate masks: %{customdata[4]:.0%}<extra></extra>",
    }


def _make_references(table: pd.DataFrame, drawn: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Dotted lines: chance, shared or per arm; and, beside baselines, top against the other prompts' subjects."""
    shared = bool(table.groupby("block", sort=False)["chance"].agg(np.ptp).max() < 1e-9)
    beside = any(arm in BASELINES for arm in drawn)
    arms = list(drawn.items())[: 1 if shared or beside else None]
    traces = []
    for arm, look in arms:
        rows = table[table["arm"] == arm].sort_values("block")
        one = shared or beside
        traces.append(
            {
                "x": rows["block"].to_numpy(),
                "y": rows["chance"].to_numpy(),
                "name": "chance: random masks of equal size" if one else f"{look.name}, chance",
                "legendgroup": "chance" if one else arm,
                "showlegend": one,
                "mode": "lines",
                "line": {"color": INK if one else look.colour, "width": 1.5, "dash": "dot"},
                "hovertemplate": "chance %{y:.3f}<extra></extra>",
            }
        )
    if len(arms) > 1:
        line = {"color": INK, "width": 1.5, "dash": "dot"}
        traces.append({"x": [None], "y": [None], "name": "chance of equal-sized masks", "mode": "lines", "line": line})
    top = table[table["arm"] == "top"].sort_values("block")
    if beside and np.isfinite(column_values(top, "iou_other_prompts")).any():
        traces.append(
            {
                "x": top["block"].to_numpy(),
                "y": column_values(top, "iou_other_prompts"),
                "name": OTHER_PROMPTS.name,
                "mode": "lines+markers",
                "line": {"color": OTHER_PROMPTS.colour, "width": 1.5, "dash": "dot"},
                "marker": {"symbol": f"{OTHER_PROMPTS.symbol}-open", "size": 6},
                "hovertemplate": f"{OTHER_PROMPTS.name}: %{{y:.3f}}<extra></extra>",
            }
        )
    return traces


def _draw_steps(figure: go.Figure, table: pd.DataFrame, steps: list[Any], row: int) -> None:
    """A map over steps and blocks of how far top lies above chance.

    figure: gets the map.
    table: the summary.
    steps: steps of the map.
    row: number of its panel.
    """
    top = table[table["arm"] == "top"].assign(above=lambda rows: rows["iou"] - rows["chance"])
    grid = top.pivot_table(index="step", columns="block", values="above")
    reach = max(0.01, float(np.nanmax(np.abs(grid.to_numpy()))))
    figure.add_heatmap(
        x=grid.columns.to_numpy(),
        y=[f"{step:g}" for step in grid.index],
        z=grid.to_numpy(),
        zmin=-reach,
        zmax=reach,
        colorscale=[[0, ARMS["bottom"].colour], [0.5, "#F4F4F4"], [1, ARMS["top"].colour]],
        colorbar={
            "title": {"text": "top: mean IoU above chance", "side": "top"},
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0.5,
            "len": 0.6,
            "thickness": 10,
        },
        hovertemplate="block %{x}, step %{y}: %{z:.3f} above chance<extra></extra>",
        row=row,
        col=1,
    )
    figure.update_xaxes(title="block", **({"dtick": 1} if len(grid.columns) <= 32 else {}), row=row, col=1)
    every = -(-len(steps) // 12)
    ticks = [f"{step:g}" for step in steps[::every]]
    figure.update_yaxes(title="step", type="category", tickvals=ticks, autorange="reversed", row=row, col=1)


def _make_band(rows: pd.DataFrame, arm: str, look: Look) -> dict[str, Any]:
    """The interval as a closed area for every stretch without gaps, as keywords of a scatter trace."""
    x, low, high = (rows[name].to_numpy() for name in ("block", "low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    around: list[Any] = []
    along: list[Any] = []
    for stretch in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known.astype(int))) + 1):
        if known[stretch].any():
            around += [*x[stretch].tolist(), *x[stretch][::-1].tolist(), None]
            along += [*low[stretch].tolist(), *high[stretch][::-1].tolist(), None]
    return {
        "x": around,
        "y": along,
        "name": f"{look.name}, 95 % CI",
        "legendgroup": arm,
        "showlegend": False,
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        # Controls overlap: theirs are paler, so that the one in question stays readable.
        "fillcolor": fade(look.colour, 0.18 if arm == "top" else 0.08),
        "hoverinfo": "skip",
    }


def _are_whole(blocks: Any) -> bool:
    return all(isinstance(block, int | np.integer) for block in blocks)
