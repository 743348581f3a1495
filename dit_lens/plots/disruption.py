"""The figure of claim 1: how much pictures change, and how much of the prompt they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.errors import OpError
from dit_lens.plots.tables import checked, errors, floats, n_of
from dit_lens.plots.theme import CI, INK, Look, faded, looks, titled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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
    table = checked(summary, ("k", "arm", "n", "rmse", "rmse_low", "rmse_high"))
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
    return titled(figure, what, f"{n_of(table)}; {CI}", height=400)


def _bars(figure: go.Figure, table: pd.DataFrame, panel: _Panel, ks: Sequence[float], column: int) -> None:
    """One bar per arm for a single k."""
    _reference(figure, table, panel, column, [-0.5, len(looks(table.loc[table["k"] > 0, "arm"])) - 0.5])
    names = []
    for i, (arm, look) in enumerate(looks(table.loc[table["k"] == ks[0], "arm"]).items()):
        rows = table[(table["arm"] == arm) & (table["k"] == ks[0])]
        share = floats(rows, "energy_share")[0]
        names.append(look.name.replace(" (", "<br>(").replace("-matched", "-<br>matched"))
        names[-1] += f"<br>{_percent(share)}" if np.isfinite(share) and column == 1 else ""
        figure.add_bar(
            x=[i],
            y=rows[panel.column].to_numpy(),
            name=look.name,
            error_y=errors(rows, panel.column, Look("", INK, "")),
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
            error_y=errors(rows, panel.column, look),
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
    return np.stack([floats(rows, name) for name in columns], axis=1)


def _disruption_hover(look: Look, panel: _Panel) -> str:
    return (
        f"{look.name}, k = %{{customdata[0]:g}}, n = %{{customdata[1]:.0f}}"
        f"<br>{panel.column} %{{y:{panel.form}}} (%{{customdata[2]:{panel.form}}} to %{{customdata[3]:{panel.form}}})"
        "<br>the zeroed channels hold %{customdata[4]:.1%} of the energy<extra></extra>"
    )
