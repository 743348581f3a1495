"""The figure of write_attribution: what writes massive channels, block by block, and where their gates stand out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, describe_n, error_bars
from dit_lens.plots.theme import CI, INK, Look, looks, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_POINTS = {
    "input": Look("input", "#8A8A8A", "x"),
    "attn_out": Look("attention", "#0072B2", "circle"),
    "attn2_out": Look("second attention", "#56B4E9", "circle"),
    "cross_out": Look("cross-attention", "#009E73", "square"),
    "mlp_out": Look("MLP", "#D55E00", "diamond"),
    "ip_out": Look("IP-Adapter", "#F0E442", "star"),
    "block": Look("block (not split)", "#CC79A7", "pentagon"),
    "rest": Look("not explained", "#E69F00", "cross"),
}


@carries_code
@checked
def write_attribution_figure(summary: pd.DataFrame) -> go.Figure:
    """The share that each write has in the massive channels, and the percentile of their gates.

    >>> import pandas as pd
    >>> rows = [("top", None, "input", 0.1), ("top", 0, "attn_out", 0.2), ("top", 0, "mlp_out", 0.7)]
    >>> figure = write_attribution_figure(pd.DataFrame(rows, columns=["arm", "block", "point", "share"]).assign(n=4))
    >>> [(bar.name, bar.y.tolist()) for bar in figure.data]
    [('input', [0.1]), ('attention', [0.2]), ('MLP', [0.7])]

    summary: of ``studies.write_attribution``; columns arm, block, point, n, share, and percentile if the family has
      gates.
    """
    plain = summary.assign(point=0.0) if "point" in summary else summary
    numbers = check_summary(plain, ("arm", "block", "point", "n", "share"))
    table = numbers.assign(point=summary["point"], block=summary["block"].astype(float))
    top = table[(table["arm"] == "top") & table["share"].notna()]
    if top.empty:
        raise OpError("The summary has no shares of the arm 'top' to draw.")
    gates = "percentile" in table and table["percentile"].notna().any()
    figure = make_subplots(2 if gates else 1, 1, shared_xaxes=True, vertical_spacing=0.08)
    # The input stands before the first block, what is not explained after the last.
    ends = {"input": -1.0, "rest": float(np.nanmax(table["block"])) + 1}
    for point, look in _POINTS.items():
        rows = top[top["point"] == point]
        if len(rows):
            figure.add_bar(
                x=rows["block"].fillna(ends.get(point, 0)).to_numpy(),
                y=rows["share"].to_numpy(),
                error_y=error_bars(rows, "share", Look("", INK, "")),
                name=look.name,
                marker={"color": look.colour},
                hovertemplate=f"block %{{x}}, {look.name}<br>share %{{y:.3f}}<extra></extra>",
                row=1,
                col=1,
            )
    figure.update_yaxes(title="share of the massive<br>channels' token mean", row=1, col=1)
    if gates:
        _add_gates(figure, table[table["percentile"].notna()])
    ticks = sorted({*table["block"].dropna()})[:: max(1, -(-table["block"].nunique() // 24))]
    figure.update_xaxes(tickvals=[-1.0, *ticks], ticktext=["input", *(f"{block:g}" for block in ticks)])
    figure.update_xaxes(title="block", row=2 if gates else 1, col=1)
    return set_title(
        figure, "Where massive channels are written", f"{describe_n(top)}; {CI}", height=560 if gates else 380
    )


def _add_gates(figure: go.Figure, table: pd.DataFrame) -> None:
    """One line per arm: the mean over a block's gates."""
    for arm, look in looks(table["arm"]).items():
        rows = table[table["arm"] == arm].groupby("block", as_index=False)["percentile"].mean()
        figure.add_scatter(
            x=rows["block"].to_numpy(),
            y=rows["percentile"].to_numpy(),
            name=f"gates, {look.name}",
            mode="lines+markers",
            line={"color": look.colour, "width": 2},
            marker={"symbol": look.symbol, "size": 7},
            hovertemplate=f"block %{{x}}, {look.name}<br>gate percentile %{{y:.3f}}<extra></extra>",
            row=2,
            col=1,
        )
    figure.update_yaxes(title="share of channels<br>with a smaller gate", range=[0, 1.05], row=2, col=1)
