"""The figure of basis: damage against the energy removed, one line for each basis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, column_values, describe_n, error_bars
from dit_lens.plots.theme import ARMS, CI, Look, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Colours of Okabe & Ito; channels are solid, other directions dashed.
_LINES = {
    "top": ARMS["top"],
    "relevant": Look("relevant channels", "#E69F00", "cross"),
    "random": Look("random channels", "#009E73", "diamond"),
    "rotation": Look("a random rotation's top", "#56B4E9", "square"),
    "components": Look("principal components", "#0072B2", "triangle-up"),
    "mean-direction": Look("the mean direction", "#CC79A7", "star"),
}
_CHANNELS = ("top", "relevant", "random")
_PANELS = {
    "rmse": "RMSE to untouched image<br>(0 to 255)",
    "fidelity": "prompt fidelity<br>(share of attributes right)",
    "clip": "CLIP score<br>(cosine of image and prompt)",
    "specificity": "moved: nearer to own source than others<br>(RMSE; a collapse: 0)",
}


@carries_code
@checked
def basis_figure(summary: pd.DataFrame) -> go.Figure:
    """How much images change when energy is removed along channels and along other directions, and what moving it does.

    >>> import pandas as pd
    >>> rows = [("top", 0.1, 20.0), ("top", 0.5, 60.0), ("mean-direction", 0.46, 75.0)]
    >>> figure = basis_figure(pd.DataFrame(rows, columns=["arm", "energy_share", "rmse"]).assign(n=8, k=1))
    >>> [(line.name, line.x.tolist()) for line in figure.data]
    [('top (massive)', [0.1, 0.5]), ('the mean direction', [0.46])]

    summary: of ``studies.basis``; columns arm, n, k, energy_share (0 to 1), rmse, and, with a judge, fidelity or clip,
      and specificity, where directions were moved; each with its bounds if known.
    """
    table = check_summary(summary, ("arm", "n", "k", "energy_share", "rmse"))
    drawn = {arm: look for arm, look in _LINES.items() if (table["arm"] == arm).any()}
    panels = [name for name in _PANELS if np.isfinite(column_values(table, name)).any()]
    if not drawn or not panels:
        raise OpError("The summary has no edited images to draw: it needs rows of a basis with an rmse.")
    figure = make_subplots(1, len(panels), horizontal_spacing=0.14)
    for column, measure in enumerate(panels, start=1):
        for arm, look in drawn.items():
            rows = table[table["arm"] == arm].sort_values("energy_share")
            _draw_line(figure, rows, measure, arm, look, column)
        figure.update_yaxes(title=_PANELS[measure], rangemode="tozero", row=1, col=column)
        if measure == "specificity":
            figure.add_hline(0, line={"color": "#888", "width": 1}, row=1, col=column)
        if measure == "fidelity":
            figure.update_yaxes(range=[0, 1.05], row=1, col=column)
    done = "removed or moved" if "specificity" in panels else "removed"
    figure.update_xaxes(title=f"share of the energy that is {done}", tickformat=".0%", rangemode="tozero")
    small = f"{describe_n(table[table['arm'].isin(drawn)])}; {CI}; solid: channels, dashed: other directions"
    return set_title(figure, "Channels or directions?", small, height=440)


def _draw_line(figure: go.Figure, rows: pd.DataFrame, measure: str, arm: str, look: Look, column: int) -> None:
    more = f"{measure}_top_minus"
    columns = ("k", "n", f"{measure}_low", f"{measure}_high", more, f"{more}_low", f"{more}_high")
    compared = (
        ""
        if arm == "top"
        else "<br>at this energy top has %{customdata[4]:.3g} more (%{customdata[5]:.3g} to %{customdata[6]:.3g})"
    )
    figure.add_scatter(
        x=rows["energy_share"].to_numpy(),
        y=rows[measure].to_numpy(),
        name=look.name,
        legendgroup=arm,
        showlegend=column == 1,
        mode="lines+markers" if len(rows) > 1 else "markers",
        line={"color": look.colour, "width": 2, "dash": "solid" if arm in _CHANNELS else "dash"},
        marker={"symbol": look.symbol, "size": 8 if len(rows) > 1 else 14, "color": look.colour},
        error_y=error_bars(rows, measure, look),
        customdata=np.stack([column_values(rows, name) for name in columns], axis=1),
        hovertemplate=f"{look.name}: %{{x:.1%}} of the energy"
        "<br>in %{customdata[0]:.3g} directions, n = %{customdata[1]}"
        f"<br>{measure} %{{y:.3g}} (%{{customdata[2]:.3g}} to %{{customdata[3]:.3g}}){compared}<extra></extra>",
        row=1,
        col=column,
    )
