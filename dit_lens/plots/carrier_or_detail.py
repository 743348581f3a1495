"""The figure of the verdict: every line of evidence on one scale, between what speaks for detail and for a carrier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_columns, check_summary, error_bars
from dit_lens.plots.theme import CI, INK, MASSIVE, Look, fade, set_title

if TYPE_CHECKING:
    import pandas as pd

_MEASURES = {
    "ablation": "removed: share of the prompt lost",
    "transport": "moved: share of the source gained",
    "decoding": "read out: skill on unseen prompts",
    "variance": "varies with the prompt: share",
}
_PARTS = {"whole": "whole", "mean": "token mean", "residual": "spatial residual"}
_CONTROL = Look("strongest equal-k control", "#0072B2", "diamond-open")


@carries_code
@checked
def carrier_or_detail_figure(summary: pd.DataFrame, *, carrier: float = 0.3, detail: float = 0.1) -> go.Figure:
    """Evidence for and against, for the massive channels and for their two parts.

    >>> import pandas as pd
    >>> lines = {"measure": ["ablation", "verdict"], "part": ["whole", "overall"], "value": [0.9, None]}
    >>> lines |= {
    ...     "value_low": [0.8, None],
    ...     "value_high": [1.0, None],
    ...     "control": [0.1, None],
    ...     "says": ["carrier", "carrier"],
    ... }
    >>> carrier_or_detail_figure(pd.DataFrame(lines)).layout.title.text
    '<b>Carrier or detail knob? Verdict: carrier</b>'

    summary: of ``studies.carrier_or_detail``; columns measure, part, value (with _low and _high), control, says.
    carrier: threshold from which on an edit speaks for a carrier, shaded.
    detail: threshold up to which an edit speaks for a detail knob, shaded.
    """
    numbers = ["value", "value_low", "value_high", "control"]
    words = ["measure", "part", "says"]
    table = summary[check_columns(summary, words + numbers)]
    table = table.assign(**check_summary(summary[numbers], numbers))
    lines = table[table["measure"] != "verdict"].iloc[::-1]
    if lines.empty:
        raise OpError("The summary has no evidence to draw yet: finish at least one cell of every arm.")
    found = table[table["measure"] == "verdict"].set_index("part")["says"]
    names = [f"{_MEASURES[m]}<br><b>{_PARTS[p]}</b>" for m, p in zip(lines["measure"], lines["part"], strict=True)]
    figure = go.Figure()
    for low, high, colour in ((-0.1, detail, _CONTROL.colour), (carrier, 1.05, MASSIVE)):
        figure.add_vrect(x0=low, x1=high, fillcolor=fade(colour, 0.08), line_width=0, layer="below")
    figure.add_scatter(
        x=lines["control"].clip(-0.1, 1.05).to_numpy(),
        y=names,
        mode="markers",
        name=_CONTROL.name,
        marker={"symbol": _CONTROL.symbol, "size": 9, "color": _CONTROL.colour},
        hovertemplate="control %{x:.2f}<extra></extra>",
    )
    figure.add_scatter(
        x=lines["value"].clip(-0.1, 1.05).to_numpy(),
        y=names,
        error_x=error_bars(lines, "value", Look("", MASSIVE, "")),
        mode="markers",
        name="massive channels",
        marker={"symbol": "circle", "size": 9, "color": MASSIVE},
        customdata=lines[["value", "value_low", "value_high", "says"]].to_numpy(),
        hovertemplate="%{customdata[0]:.2f} (%{customdata[1]:.2f} to %{customdata[2]:.2f}): %{customdata[3]}"
        "<extra></extra>",
    )
    figure.update_xaxes(
        title="effect or share (0: none, 1: all)", range=[-0.12, 1.07], zeroline=True, zerolinecolor=INK
    )
    figure.update_yaxes(tickfont={"size": 10})
    small = f"blue: speaks for detail, or information absent; red: for a carrier, or present; {CI}"
    return set_title(figure, f"Carrier or detail knob? Verdict: {found.get('overall', 'none yet')}", small, height=520)
