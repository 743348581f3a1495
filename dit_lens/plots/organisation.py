"""The figure of claim 2: how well the clusters of each arm find the subject, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from dit_lens.plots.tables import checked, n_of
from dit_lens.plots.theme import CI, INK, Look, faded, looks, titled

if TYPE_CHECKING:
    import pandas as pd


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
    ['top-k (massive), 95 % CI', 'top-k (massive)', 'chance: random masks of equal size']

    summary: columns block, arm, n, iou, low, high, chance (all IoU, 0 to 1), degenerate (the share of masks of which a
    cluster holds under 1 % of the tokens). A hollow marker says that half of its masks or more are degenerate. Chance
    is dotted: one line where all arms share it, else one per arm in its colour.
    """
    table = checked(summary, ("block", "arm", "n", "iou", "low", "high", "chance", "degenerate"))
    shared = bool(table.groupby("block", sort=False)["chance"].agg(np.ptp).max() < 1e-9)
    figure = go.Figure()
    drawn = looks(table["arm"])
    for arm, look in drawn.items():
        rows = table[table["arm"] == arm].sort_values("block")
        if rows[["low", "high"]].notna().any(axis=None):
            figure.add_scatter(**_band(rows, arm, look))
    for arm, look in drawn.items():
        rows = table[table["arm"] == arm].sort_values("block")
        hollow = (rows["degenerate"] >= 0.5).to_numpy()
        figure.add_scatter(
            x=rows["block"].to_numpy(),
            y=rows["iou"].to_numpy(),
            customdata=rows[["low", "high", "n", "chance", "degenerate"]].to_numpy(float),
            name=look.name,
            legendgroup=arm,
            mode="lines+markers",
            line={"color": look.colour, "width": 2},
            marker={
                "symbol": [f"{look.symbol}-open" if empty else look.symbol for empty in hollow],
                "size": 7,
                "color": look.colour,
            },
            hovertemplate=f"{look.name}, block %{{x}}, n = %{{customdata[2]:.0f}}"
            "<br>mean IoU %{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f}), chance %{customdata[3]:.3f}"
            "<br>degenerate masks: %{customdata[4]:.0%}<extra></extra>",
        )
    for arm, look in list(drawn.items())[: 1 if shared else None]:
        rows = table[table["arm"] == arm].sort_values("block")
        figure.add_scatter(
            x=rows["block"].to_numpy(),
            y=rows["chance"].to_numpy(),
            name="chance: random masks of equal size" if shared else f"{look.name}, chance",
            legendgroup="chance" if shared else arm,
            showlegend=shared,
            mode="lines",
            line={"color": INK if shared else look.colour, "width": 1.5, "dash": "dot"},
            hovertemplate="chance %{y:.3f}<extra></extra>",
        )
    if not shared:
        figure.add_scatter(
            x=[None],
            y=[None],
            name="chance of equal-sized masks",
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "dot"},
        )
    blocks = table["block"].unique()
    figure.update_xaxes(title="block", **({"dtick": 1} if len(blocks) <= 32 and _whole(blocks) else {}))
    figure.update_yaxes(title="mean IoU with the subject (0 to 1)", range=[0, 1])
    hollow = "; hollow: half of the masks or more are degenerate" if (table["degenerate"] >= 0.5).any() else ""
    return titled(figure, "Do the channels find the subject?", f"{n_of(table)}; shaded: {CI}{hollow}", height=420)


def _band(rows: pd.DataFrame, arm: str, look: Look) -> dict[str, Any]:
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
        "fillcolor": faded(look.colour, 0.18),
        "hoverinfo": "skip",
    }


def _whole(blocks: Any) -> bool:
    return all(isinstance(block, int | np.integer) for block in blocks)
