"""The figure of claim 1: how much images change, and how much of the prompt they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, column_values, describe_n, error_bars
from dit_lens.plots.theme import ARMS, CI, INK, Look, fade, looks, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class _Panel(NamedTuple):
    """One measure of a study.

    column: column of the summary.
    axis: title of the axis.
    form: format of its values.
    """

    column: str
    axis: str
    form: str


_RMSE = _Panel("rmse", "RMSE to untouched image<br>(0 to 255)", ".1f")
_FIDELITY = _Panel("fidelity", "prompt fidelity (share of attributes<br>right; 0 where unreadable)", ".2f")
_CLIP = _Panel("clip", "CLIP score<br>(cosine of image and prompt)", ".3f")


@carries_code
@checked
def disruption_figure(summary: pd.DataFrame) -> go.Figure:
    """How much images change, and how much of the prompt they keep, when k channels are zeroed.

    >>> import pandas as pd
    >>> figure = disruption_figure(
    ...     pd.DataFrame(
    ...         {"k": [4, 4], "arm": ["top", "bottom"], "n": [8, 8], "rmse": [60.0, 2.0]}
    ...         | {"rmse_low": [50.0, 1.0], "rmse_high": [70.0, 3.0], "energy_share": [0.7, 0.01]}
    ...     )
    ... )
    >>> [(bar.name, bar.x.tolist()) for bar in figure.data]
    [('top (massive)', [60.0]), ('bottom', [2.0])]

    Bars for one k, lines over several; the no-op arm, which has k = 0, is a dotted line. By how much the top arm
    exceeds another (``rmse_top_minus``) shows on hovering.

    summary: of ``studies.disruption``; columns k, arm, n, rmse, rmse_low, rmse_high (0 to 255), energy_share, and, with
      a judge, fidelity or clip with their bounds.
    """
    table = check_summary(summary, ("k", "arm", "n", "rmse", "rmse_low", "rmse_high"))
    panels = [panel for panel in (_RMSE, _FIDELITY, _CLIP) if np.isfinite(column_values(table, panel.column)).any()]
    ks = sorted(k for k in table["k"].unique() if k > 0)
    if not ks or not panels:
        raise OpError("The summary has no edited images to draw: it needs rows with k > 0 and an rmse.")
    if len(ks) == 1:
        share = "; %: energy in the arm's channels" if "energy_share" in table else ""
        figure, what = _draw_bars(table, panels, ks[0]), f"Zeroing {ks[0]:g} channels"
    else:
        figure, what, share = _draw_lines(table, panels, ks), "Zeroing k channels", ""
    return set_title(figure, what, f"{describe_n(table)}; {CI}{share}", height=420)


def _draw_bars(table: pd.DataFrame, panels: Sequence[_Panel], k: float) -> go.Figure:
    """One bar per arm for a single k, the arms' names beside them."""
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.04)
    rows = table[table["k"] == k].set_index("arm", drop=False)
    drawn = looks(rows["arm"])
    for column, panel in enumerate(panels, start=1):
        levels = _find_levels(table, panel)
        for i, (arm, look) in enumerate(drawn.items()):
            row = rows.loc[[arm]]
            figure.add_bar(
                y=[i],
                x=row[panel.column].to_numpy(),
                orientation="h",
                name=look.name,
                error_x=error_bars(row, panel.column, Look("", INK, "")),
                # Pale, so that error bars show on them.
                marker={"color": fade(look.colour, 0.55), "line": {"color": look.colour, "width": 1.5}},
                customdata=_hover_data(row, panel),
                hovertemplate=_hover_text(look, panel, "x"),
                showlegend=False,
                width=0.7,
                row=1,
                col=column,
            )
        for arm, level in levels.items():
            figure.add_scatter(x=[level] * 2, y=[-0.5, len(drawn) - 0.5], **_style_level(arm, panel, column, "x"))
        figure.update_xaxes(title=panel.axis, showgrid=True, rangemode="tozero", row=1, col=column)
    if _FIDELITY in panels:
        figure.update_xaxes(range=[0, 1.05], row=1, col=panels.index(_FIDELITY) + 1)
    shares = dict(zip(rows["arm"], column_values(rows, "energy_share"), strict=True))
    names = [
        look.name + (f": {_format_percent(shares[arm])}" if shares[arm] >= 0 else "") for arm, look in drawn.items()
    ]
    return figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5], showgrid=False
    )


def _format_percent(share: float) -> str:
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"


def _draw_lines(table: pd.DataFrame, panels: Sequence[_Panel], ks: Sequence[float]) -> go.Figure:
    """One line per arm over several k, side by side if they would hide each other."""
    figure = make_subplots(1, len(panels), horizontal_spacing=0.14)
    drawn = looks(table.loc[table["k"] > 0, "arm"])
    for column, panel in enumerate(panels, start=1):
        for arm, level in _find_levels(table, panel).items():
            figure.add_scatter(x=[-0.3, len(ks) - 0.7], y=[level] * 2, **_style_level(arm, panel, column, "y"))
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
                error_y=error_bars(rows, panel.column, look),
                customdata=_hover_data(rows, panel),
                hovertemplate=_hover_text(look, panel, "y"),
                row=1,
                col=column,
            )
        figure.update_yaxes(title=panel.axis, rangemode="tozero", row=1, col=column)
    if _FIDELITY in panels:
        figure.update_yaxes(range=[0, 1.05], row=1, col=panels.index(_FIDELITY) + 1)
    return figure.update_xaxes(
        title="k: how many channels are zeroed",
        tickvals=list(range(len(ks))),
        ticktext=[f"{k:g}" for k in ks],
        range=[-0.3, len(ks) - 0.7],
    )


def _find_levels(table: pd.DataFrame, panel: _Panel) -> dict[str, float]:
    """Arms that zero nothing, which are drawn as a level: arm -> value."""
    rows = table[table["k"] == 0]
    return dict(zip(rows["arm"], rows[panel.column], strict=True))


def _style_level(arm: str, panel: _Panel, column: int, axis: str) -> dict[str, Any]:
    look = looks([arm])[arm]
    return {
        "name": f"{look.name} (nothing zeroed)",
        "legendgroup": arm,
        "showlegend": column == 1,
        "mode": "lines",
        "line": {"color": look.colour, "width": 1.5, "dash": "dot"},
        "hovertemplate": f"{look.name}: %{{{axis}:{panel.form}}}<extra></extra>",
        "row": 1,
        "col": column,
    }


def _hover_data(rows: pd.DataFrame, panel: _Panel) -> np.ndarray:
    more = f"{panel.column}_top_minus"
    columns = ("k", "n", f"{panel.column}_low", f"{panel.column}_high", "energy_share", more, f"{more}_low")
    return np.stack([column_values(rows, name) for name in (*columns, f"{more}_high")], axis=1)


def _hover_text(look: Look, panel: _Panel, axis: str) -> str:
    form, arm = panel.form, look.name
    compared = (
        ""
        if arm == ARMS["top"].name
        else f"<br>{ARMS['top'].name} has %{{customdata[5]:{form}}} more"
        f" (%{{customdata[6]:{form}}} to %{{customdata[7]:{form}}}, paired)"
    )
    return (
        f"{arm}, k = %{{customdata[0]:g}}, n = %{{customdata[1]:.0f}}"
        f"<br>{panel.column} %{{{axis}:{form}}} (%{{customdata[2]:{form}}} to %{{customdata[3]:{form}}})"
        f"{compared}<br>its channels hold %{{customdata[4]:.1%}} of the energy<extra></extra>"
    )
