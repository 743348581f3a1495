"""The figure of the verdict: what the channels do beyond the control that decides, one panel for each question."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_columns, check_summary, error_bars
from dit_lens.plots.theme import CI, FAINT, INK, MASSIVE, Look, fade, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_PANELS = {
    "necessity": "<b>Needed?</b> share lost without them",
    "sufficiency": "<b>Movable?</b> share of the ceiling gained",
    "decoding": "Known? skill of a decoder on new prompts",
    "variance": "Do they vary with the prompt? share",
}
_PARTS = {"whole": "<b>whole</b>", "mean": "token mean", "residual": "residual"}
_ANSWERS = {"yes": MASSIVE, "no": "#0072B2", "undecided": "#8A8A8A"}
_NUMBERS = ["value", "control_value", "excess", "excess_low", "excess_high", "readable", "n"]
_LEAST, _MOST = -0.6, 1.1  # of the scale; an interval that goes on ends there


@carries_code
@checked
def carrier_or_detail_figure(summary: pd.DataFrame, *, bound: float = 0.1) -> go.Figure:
    """The two questions and their answers, for the massive channels and for their two parts.

    >>> import pandas as pd
    >>> lines = {"measure": ["verdict", "necessity"], "part": ["overall", "whole"], "says": ["undecided", "yes"]}
    >>> lines |= {name: [None, 0.9] for name in ("value", "excess", "excess_high", "readable", "n")}
    >>> lines |= {"control": [None, "bottom"], "control_value": [None, 0.1], "excess_low": [None, 0.7], "why": ["", ""]}
    >>> carrier_or_detail_figure(pd.DataFrame(lines)).layout.title.text
    '<b>Carrier or detail knob? Undecided</b>'

    summary: of ``studies.carrier_or_detail``; columns measure, part, says, why, control, value, control_value, excess
      with its bounds, readable, n.
    bound: excess that counts as an effect; within it, shaded, an effect counts as none.
    """
    if "strongest control" in summary:
        raise OpError(
            "this summary is of an earlier release of dit_lens, whose verdict followed other rules. Its tables and "
            "notes can be read; for today's figure run studies.carrier_or_detail again."
        )
    words = ["measure", "part", "says", "why", "control"]
    table = summary[check_columns(summary, words + _NUMBERS)]
    table = table.assign(**check_summary(summary[_NUMBERS], _NUMBERS))
    drawn = [name for name in _PANELS if (table["measure"] == name).any()]
    if not drawn:
        raise OpError("The summary has no evidence to draw yet: finish at least one cell of every arm.")
    columns = ("necessity", "sufficiency"), ("decoding", "variance")
    rows = [pair for pair in columns if set(pair) & set(drawn)]
    figure = make_subplots(
        len(rows), 2, horizontal_spacing=0.16, vertical_spacing=0.19,
        subplot_titles=[_PANELS[name] if name in drawn else "" for pair in rows for name in pair],
    )  # fmt: skip
    figure.update_annotations(font_size=12)  # the panels' titles
    for row, pair in enumerate(rows, start=1):
        for column, name in enumerate(pair, start=1):
            if name in drawn:
                _draw_panel(figure, table[table["measure"] == name], bound, row, column)
    figure.update_xaxes(title="more than the control that decides", row=len(rows))
    found = table[(table["measure"] == "verdict") & (table["part"] == "overall")]
    verdict = str(found["says"].iloc[0]) if len(found) else "none yet"
    if verdict == "undecided" and found["why"].iloc[0]:
        verdict += f" ({found['why'].iloc[0]})"
    title = f"Carrier or detail knob? {verdict[0].upper()}{verdict[1:]}"
    set_title(figure, title, _describe(table, bound), height=150 + 190 * len(rows))
    return figure.update_layout(margin={"t": 92, "l": 100})


def _draw_panel(figure: go.Figure, lines: pd.DataFrame, bound: float, row: int, column: int) -> None:
    lines = lines[lines["part"].isin(_PARTS)].iloc[::-1]
    for position, (_, line) in enumerate(lines.iterrows()):
        colour = _ANSWERS.get(str(line["says"]), INK)
        one = lines[lines["part"] == line["part"]]
        figure.add_scatter(
            x=[float(np.clip(line["excess"], _LEAST, _MOST))],
            y=[position],
            error_x=error_bars(_clip(one), "excess", Look("", colour, "")),
            mode="markers",
            marker={"symbol": "circle" if line["says"] != "undecided" else "circle-open", "size": 10, "color": colour},
            showlegend=False,
            hovertemplate=_hover(line),
            row=row,
            col=column,
        )
        figure.add_annotation(
            text=_tell(line), x=0, xref="x domain", y=position + 0.5, xanchor="left", yanchor="top", align="left",
            showarrow=False, font={"size": 10.5, "color": INK}, row=row, col=column,
        )  # fmt: skip
    figure.add_vrect(x0=-bound, x1=bound, fillcolor=fade(INK, 0.18), line_width=0, layer="below", row=row, col=column)
    figure.update_yaxes(
        tickvals=list(range(len(lines))), ticktext=[_label(line) for _, line in lines.iterrows()],
        range=[-0.45, len(lines) - 0.35], showgrid=False, zeroline=False, row=row, col=column,
    )  # fmt: skip
    figure.update_xaxes(
        range=[_LEAST - 0.03, _MOST + 0.03], zeroline=True, zerolinecolor=INK, showgrid=True, gridcolor=FAINT,
        dtick=0.5, row=row, col=column,
    )  # fmt: skip


def _label(line: pd.Series) -> str:
    """The name of a part, and the share of images in which it could be judged."""
    readable = "" if np.isnan(line["readable"]) else f"<br><sub>{line['readable']:.0%} readable</sub>"
    return f"{_PARTS[line['part']]}{readable}"


def _clip(line: pd.DataFrame) -> pd.DataFrame:
    names = ["excess", "excess_low", "excess_high"]
    return line.assign(**{name: line[name].clip(_LEAST, _MOST) for name in names})


def _tell(line: pd.Series) -> str:
    """The answer of a line of evidence and the numbers beside it, in a few words."""
    colour = _ANSWERS.get(str(line["says"]), INK)
    told = f'<b><span style="color:{colour}">{line["says"]}</span></b>  {line["value"]:.2f}'
    if isinstance(line["control"], str) and line["control"]:
        return f"{told} against {line['control_value']:.2f} ({line['control']})"
    return "<br>".join([told, *textwrap.wrap(str(line["why"] or ""), 40)])


def _hover(line: pd.Series) -> str:
    return (
        f"{line['says']}: {line['why']}<br>excess {line['excess']:.2f} ({line['excess_low']:.2f} to "
        f"{line['excess_high']:.2f}), n = {line['n']:.0f}<extra></extra>"
    )


def _describe(table: pd.DataFrame, bound: float) -> str:
    sides = table[table["measure"].isin(["necessity", "sufficiency"]) & (table["part"] == "whole")]
    counts = [f"{n:.0f}" for n in sides["n"].dropna()]
    if len(set(counts)) > 1:
        counts = [f"{n} ({name})" for n, name in zip(counts, ("needed", "movable"), strict=True)]
    told = [f"n = {' and '.join(dict.fromkeys(counts))} readable images"] if counts else []
    ceiling = table[table["measure"] == "ceiling"]
    if len(ceiling):
        line = ceiling.iloc[0]
        told.append(f"ceiling {line['value']:.2f} ({line['says']})")
    return "; ".join([*told, f"{CI}; grey: no effect (within {bound:g})"])
