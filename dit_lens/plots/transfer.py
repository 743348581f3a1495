"""The figure of claim 3: nearer to the source, farther from the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.errors import OpError
from dit_lens.plots.tables import checked, errors, floats, n_of
from dit_lens.plots.theme import CI, INK, Look, looks, titled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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
    table = checked(summary, ("arm", "masked", "strength", "n", *needed))
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
    small = f"{n_of(table)}; {CI}{where}; numbers beside points: strength"
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
    return np.stack([floats(rows, name) for name in columns], axis=1)


def _distances(
    figure: go.Figure, rows: pd.DataFrame, look: Look, style: dict[str, Any], *, nudge: float, key: bool
) -> None:
    """Left: an arm's distance to the source above, to the target below."""
    for row, side in enumerate(("source", "target"), start=1):
        figure.add_scatter(
            x=rows["strength"].to_numpy() + nudge,
            y=rows[f"to_{side}"].to_numpy(),
            error_y=errors(rows, f"to_{side}", look),
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
