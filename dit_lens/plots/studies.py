"""Figures of the three studies, from their summaries: one look per arm, intervals always, n and units in small print.

``summary`` is a study's ``result.summary``; where an interval is NaN (a single sample) none is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit_lens.errors import OpError
from dit_lens.plots.theme import CI, INK, Look, faded, looks, titled

if TYPE_CHECKING:
    import pandas as pd


class _Panel(NamedTuple):
    """One measure of a study: its column, what its axis says, and how its values are written."""

    column: str
    axis: str
    form: str


_RMSE = _Panel("rmse", "RMSE to untouched picture<br>(0 to 255)", ".1f")
_FIDELITY = _Panel("fidelity", "prompt fidelity<br>(share of attributes right)", ".2f")


def disruption_figure(summary: pd.DataFrame) -> go.Figure:
    """How much pictures change, and how much of the prompt they keep, when k channels are zeroed.

    >>> import pandas as pd
    >>> figure = disruption_figure(
    ...     pd.DataFrame(
    ...         {"k": [4, 4], "arm": ["top", "bottom"], "n": [8, 8], "rmse": [60.0, 2.0]}
    ...         | {"rmse_low": [50.0, 1.0], "rmse_high": [70.0, 3.0], "energy_share": [0.7, 0.01]}
    ...     )
    ... )
    >>> [(bar.name, bar.y.tolist()) for bar in figure.data]
    [('top-k (massive)', [60.0]), ('bottom-k', [2.0])]

    summary: columns k, arm, n, rmse, rmse_low, rmse_high (0 to 255), energy_share, and, where a judge spoke, fidelity,
    fidelity_low, fidelity_high. Bars for one k, lines over several; the no-op arm, which has k = 0, is a dotted line.
    """
    table = _checked(summary, ("k", "arm", "n", "rmse", "rmse_low", "rmse_high"))
    panels = [panel for panel in (_RMSE, _FIDELITY) if panel.column in table and table[panel.column].notna().any()]
    ks = sorted(k for k in table["k"].unique() if k > 0)
    if not ks or not panels:
        raise OpError("The summary has no edited pictures to draw: it needs rows with k > 0 and an rmse.")
    figure = make_subplots(1, len(panels), horizontal_spacing=0.14)
    draw = _bars if len(ks) == 1 else _lines
    for column, panel in enumerate(panels, start=1):
        draw(figure, table, panel, ks, column)
        figure.update_yaxes(title=panel.axis, rangemode="tozero", row=1, col=column)
    if len(panels) > 1:
        figure.update_yaxes(range=[0, 1.05], row=1, col=2)
    what = f"Zeroing {ks[0]:g} channels" if len(ks) == 1 else "Zeroing k channels"
    return titled(figure, what, f"{_n(table)}; {CI}", height=400)


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
    table = _checked(summary, ("block", "arm", "n", "iou", "low", "high", "chance", "degenerate"))
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
    return titled(figure, "Do the channels find the subject?", f"{_n(table)}; shaded: {CI}{hollow}", height=420)


def transfer_figure(summary: pd.DataFrame) -> go.Figure:
    """What moving channels from a source into a target does: nearer to the source, farther from the target?

    >>> import pandas as pd
    >>> figure = transfer_figure(
    ...     pd.DataFrame(
    ...         {"arm": ["top"] * 2, "masked": [True] * 2, "strength": [0.5, 1.0], "n": [4, 4]}
    ...         | {"to_source": [60.0, 30.0], "to_source_low": [50.0, 20.0], "to_source_high": [70.0, 40.0]}
    ...         | {"to_target": [20.0, 50.0], "to_target_low": [10.0, 40.0], "to_target_high": [30.0, 60.0]}
    ...     )
    ... )
    >>> [(trace.name, trace.xaxis) for trace in figure.data]
    [('top-k (massive)', 'x'), ('top-k (massive)', 'x3'), ('top-k (massive)', 'x2')]

    summary: columns arm, masked (bool), strength (0 to 1), n, to_source, to_target (RMSE, 0 to 255), each with _low and
    _high; says_source and says_target (shares) go into the hover text. Left: both distances against strength. Right:
    one against the other, a curve per arm; low and left is near both. Rows with strength 0 are the untouched target:
    every curve then starts there, and a dotted line shows what blending the two pictures would give.
    """
    needed = [f"to_{side}{bound}" for side in ("source", "target") for bound in ("", "_low", "_high")]
    table = _checked(summary, ("arm", "masked", "strength", "n", *needed))
    table["masked"] = table["masked"].astype(bool)
    curves = table[table["strength"] > 0].sort_values("strength")
    if curves.empty:
        raise OpError("The summary has no transfer to draw: it needs rows with a strength above 0.")
    kinds = sorted(set(curves["masked"]), reverse=True)
    apart = [float(one) for one in table.loc[table["strength"] == 0, "to_source"].tolist()[:1]]
    figure = make_subplots(
        2,
        2,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        column_widths=[0.46, 0.54],
        horizontal_spacing=0.14,
        vertical_spacing=0.08,
    )
    drawn = looks(curves["arm"])
    for i, (arm, look) in enumerate(drawn.items()):
        for masked in kinds:
            rows = curves[(curves["arm"] == arm) & (curves["masked"] == masked)]
            if len(rows):
                style = _transfer_style(arm, look, "solid" if masked or len(kinds) == 1 else _DASH, _WHERE[masked])
                _distances(figure, rows, look, style, nudge=0.008 * (i - (len(drawn) - 1) / 2), key=masked == kinds[0])
                _trajectory(figure, rows, apart, style, named=i == 0)
    level = {"mode": "lines", "hoverinfo": "skip", "row": 1, "col": 2}
    for one in apart:
        dots = {"color": INK, "width": 1.5, "dash": "dot"}
        figure.add_scatter(x=[0, one], y=[one, 0], name="blend of the two pictures", line=dots, **level)
    for masked in kinds if len(kinds) == 2 else ():
        line = {"color": INK, "width": 1.8, "dash": "solid" if masked else _DASH}
        figure.add_scatter(x=[None], y=[None], name=_WHERE[masked], line=line, **level)
    _transfer_axes(figure, float(np.nanmax(table[["to_source", "to_target"]].to_numpy(float))) or 1.0)
    where = "" if len(kinds) == 2 else f"; {_WHERE[kinds[0]]}"
    small = f"{_n(table)}; {CI}{where}; numbers beside points: strength"
    return titled(figure, "Moving channels from a source into a target", small, height=500)


_DASH = "5px,3px"
_WHERE = {True: "subject's tokens only", False: "all tokens"}


def _transfer_style(arm: str, look: Look, dash: str, where: str) -> dict[str, Any]:
    return {
        "name": look.name,
        "legendgroup": arm,
        "line": {"color": look.colour, "width": 1.8, "dash": dash},
        "marker": {"symbol": look.symbol, "size": 7, "color": look.colour},
        "hovertemplate": f"{look.name}, {where}<br>strength %{{customdata[0]:g}}, n = %{{customdata[1]:.0f}}"
        "<br>RMSE to the source %{customdata[2]:.1f}, to the target %{customdata[3]:.1f}"
        "<br>right by the source's prompt %{customdata[4]:.0%}, by the target's %{customdata[5]:.0%}<extra></extra>",
    }


def _transfer_facts(rows: pd.DataFrame) -> np.ndarray:
    columns = ("strength", "n", "to_source", "to_target", "says_source", "says_target")
    return np.stack([_column(rows, name) for name in columns], axis=1)


def _distances(
    figure: go.Figure, rows: pd.DataFrame, look: Look, style: dict[str, Any], *, nudge: float, key: bool
) -> None:
    """Left: an arm's distance to the source above, to the target below."""
    for row, side in enumerate(("source", "target"), start=1):
        figure.add_scatter(
            x=rows["strength"].to_numpy() + nudge,
            y=rows[f"to_{side}"].to_numpy(),
            error_y=_errors(rows, f"to_{side}", look),
            mode="lines+markers",
            customdata=_transfer_facts(rows),
            showlegend=key and row == 1,
            row=row,
            col=1,
            **style,
        )


def _trajectory(
    figure: go.Figure, rows: pd.DataFrame, apart: list[float], style: dict[str, Any], *, named: bool
) -> None:
    """Right: an arm's way from the target, whose distance from the source is ``apart``, where that is known."""
    figure.add_scatter(
        x=[*[0.0] * len(apart), *rows["to_target"]],
        y=[*apart, *rows["to_source"]],
        customdata=[*[[0.0, np.nan, one, 0.0, np.nan, np.nan] for one in apart], *_transfer_facts(rows).tolist()],
        mode="lines+markers+text" if named else "lines+markers",
        text=[*[""] * len(apart), *(f"{strength:g}" for strength in rows["strength"])] if named else None,
        textposition="middle right",
        textfont={"size": 10},
        showlegend=False,
        row=1,
        col=2,
        **style,
    )


def _transfer_axes(figure: go.Figure, span: float) -> None:
    strength = {"range": [0, 1.08], "dtick": 0.25}
    figure.update_xaxes(**strength, matches="x3", showticklabels=False, row=1, col=1)
    figure.update_xaxes(**strength, title="strength", row=2, col=1)
    figure.update_xaxes(
        title="RMSE to the target (0 to 255)", range=[-0.04 * span, span * 1.12], showgrid=True, row=1, col=2
    )
    for row, side in enumerate(("source", "target"), start=1):
        figure.update_yaxes(title=f"RMSE to the {side}<br>(0 to 255)", range=[0, span * 1.12], row=row, col=1)
    figure.update_yaxes(title="RMSE to the source (0 to 255)", range=[0, span * 1.12], row=1, col=2)
    corner = {"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    figure.add_annotation(text="↙ near both", xref="x2 domain", yref="y2 domain", font={"size": 11}, **corner)


def _bars(figure: go.Figure, table: pd.DataFrame, panel: _Panel, ks: Sequence[float], column: int) -> None:
    """One bar per arm for a single k."""
    _reference(figure, table, panel, column, [-0.5, len(looks(table.loc[table["k"] > 0, "arm"])) - 0.5])
    names = []
    for i, (arm, look) in enumerate(looks(table.loc[table["k"] == ks[0], "arm"]).items()):
        rows = table[(table["arm"] == arm) & (table["k"] == ks[0])]
        share = _column(rows, "energy_share")[0]
        names.append(look.name.replace(" (", "<br>(").replace("-matched", "-<br>matched"))
        names[-1] += f"<br>{_percent(share)}" if np.isfinite(share) and column == 1 else ""
        figure.add_bar(
            x=[i],
            y=rows[panel.column].to_numpy(),
            name=look.name,
            error_y=_errors(rows, panel.column, Look("", INK, "")),
            # Pale, so that error bars show on them.
            marker={"color": faded(look.colour, 0.55), "line": {"color": look.colour, "width": 1.5}},
            customdata=_disruption_facts(rows, panel),
            hovertemplate=_disruption_hover(look, panel),
            showlegend=False,
            width=0.7,
            row=1,
            col=column,
        )
    shown = column == 1 and "energy_share" in table and table["energy_share"].notna().any()
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        tickangle=0,
        tickfont={"size": 10},
        title="%: energy the zeroed channels hold" if shown else None,
        range=[-0.5, len(names) - 0.5],
        row=1,
        col=column,
    )


def _percent(share: float) -> str:
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"


def _lines(figure: go.Figure, table: pd.DataFrame, panel: _Panel, ks: Sequence[float], column: int) -> None:
    """One line per arm over several k, side by side where they would hide each other."""
    _reference(figure, table, panel, column, [-0.3, len(ks) - 0.7])
    drawn = looks(table.loc[table["k"] > 0, "arm"])
    for i, (arm, look) in enumerate(drawn.items()):
        rows = table[(table["arm"] == arm) & (table["k"] > 0)].sort_values("k")
        figure.add_scatter(
            x=np.searchsorted(ks, rows["k"]) + 0.06 * (i - (len(drawn) - 1) / 2),
            y=rows[panel.column].to_numpy(),
            name=look.name,
            legendgroup=arm,
            showlegend=column == 1,
            mode="lines+markers",
            line={"color": look.colour, "width": 2},
            marker={"symbol": look.symbol, "size": 8, "color": look.colour},
            error_y=_errors(rows, panel.column, look),
            customdata=_disruption_facts(rows, panel),
            hovertemplate=_disruption_hover(look, panel),
            row=1,
            col=column,
        )
    figure.update_xaxes(
        title="k: how many channels are zeroed",
        tickvals=list(range(len(ks))),
        ticktext=[f"{k:g}" for k in ks],
        range=[-0.3, len(ks) - 0.7],
        row=1,
        col=column,
    )


def _reference(figure: go.Figure, table: pd.DataFrame, panel: _Panel, column: int, span: list[float]) -> None:
    """Arms that zero nothing are a level, not a point."""
    for arm, look in looks(table.loc[table["k"] == 0, "arm"]).items():
        level = float(table.loc[(table["arm"] == arm) & (table["k"] == 0), panel.column].iloc[0])
        figure.add_scatter(
            x=span,
            y=[level, level],
            name=f"{look.name} (nothing zeroed)",
            legendgroup=arm,
            showlegend=column == 1,
            mode="lines",
            line={"color": look.colour, "width": 1.5, "dash": "dot"},
            hovertemplate=f"{look.name}: %{{y:{panel.form}}}<extra></extra>",
            row=1,
            col=column,
        )


def _disruption_facts(rows: pd.DataFrame, panel: _Panel) -> np.ndarray:
    columns = ("k", "n", f"{panel.column}_low", f"{panel.column}_high", "energy_share")
    return np.stack([_column(rows, name) for name in columns], axis=1)


def _disruption_hover(look: Look, panel: _Panel) -> str:
    return (
        f"{look.name}, k = %{{customdata[0]:g}}, n = %{{customdata[1]:.0f}}"
        f"<br>{panel.column} %{{y:{panel.form}}} (%{{customdata[2]:{panel.form}}} to %{{customdata[3]:{panel.form}}})"
        "<br>the zeroed channels hold %{customdata[4]:.1%} of the energy<extra></extra>"
    )


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


def _errors(rows: pd.DataFrame, column: str, look: Look) -> dict[str, Any] | None:
    """Error bars for a column with bounds; none at all where every bound is missing."""
    mean, low, high = (_column(rows, name) for name in (column, f"{column}_low", f"{column}_high"))
    if not np.isfinite(high - low).any():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": high - mean,
        "arrayminus": mean - low,
        "thickness": 1.2,
        "width": 3,
        "color": look.colour,
    }


def _column(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64, NaN where the summary lacks it."""
    return rows[name].to_numpy(float) if name in rows else np.full(len(rows), np.nan)


def _checked(summary: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """A copy with numbers as floats (a loaded result has None for NaN), after checking that the columns are there."""
    if missing := [name for name in needed if name not in summary]:
        raise OpError(
            f"The summary lacks {', '.join(missing)}; it has {', '.join(map(str, summary.columns))}. "
            "Pass the summary of the study that this figure is of."
        )
    if summary.empty:
        raise OpError("The summary has no rows, so there is nothing to draw.")
    text = {"arm", "masked", "block"}
    return summary.assign(**{name: summary[name].astype(float) for name in summary if name not in text})


def _n(table: pd.DataFrame) -> str:
    low, high = int(table["n"].min()), int(table["n"].max())
    return f"n = {low} per point" if low == high else f"n = {low} to {high} per point"


def _whole(blocks: Any) -> bool:
    return all(isinstance(block, int | np.integer) for block in blocks)
