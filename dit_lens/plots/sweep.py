"""The figure of a sweep: any study's measure over the values of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError, nearest
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_columns, column_values, describe_n, error_bars
from dit_lens.plots.theme import CI, Look, looks, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NOTHING = ("no-op", "untouched")  # arms that edit nothing are not drawn
PANELS = 12


@carries_code
@checked
def sweep_figure(summary: pd.DataFrame, over: str | Sequence[str], measure: str | None = None) -> go.Figure:
    """Lines over the first swept argument, one per arm, and a panel for every combination of the others.

    >>> import pandas as pd
    >>> summary = pd.DataFrame({"site": ["early", "late"] * 2, "k": [4, 4, 8, 8], "arm": "top", "n": 3})
    >>> figure = sweep_figure(summary.assign(rmse=[9.0, 5.0, 12.0, 8.0]), ["site", "k"], "rmse")
    >>> [(line.name, line.y.tolist()) for line in figure.data]
    [('top (massive)', [9.0, 5.0]), ('top (massive)', [12.0, 8.0])]

    Raises OpError for a measure that the summary lacks, and for more than 12 panels.

    summary: of a sweep; further columns before n, such as the blocks of a study, add to the panels.
    over: the swept arguments.
    measure: column to draw; by default the first that has an interval.
    """
    over = [over] if isinstance(over, str) else over
    check_columns(summary, [*over, "arm", "n"])
    table, measure = _prepare(summary, measure)
    x, *others = dict.fromkeys([*over, *(name for name in table.columns[: list(table).index("n")] if name != "arm")])
    facets = [name for name in others if table[name].nunique() > 1]
    panels = _split_panels(table, facets)
    if len(panels) > PANELS:
        sizes = ", ".join(f"{name} ({table[name].nunique()})" for name in facets)
        raise OpError(
            f"{len(panels)} panels are too many: {sizes}. Draw a part, as in "
            f"plots.sweep_figure(result.summary.query('{facets[-1]} == ...'), {list(over)!r})."
        )
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = make_subplots(down, across, shared_yaxes=True, subplot_titles=list(panels), horizontal_spacing=0.04)
    values = list(dict.fromkeys(table[x]))
    for number, rows in enumerate(panels.values()):
        position = {"row": number // across + 1, "col": number % across + 1, "showlegend": number == 0}
        _draw_panel(figure, rows, looks(table["arm"]), x, values, measure, position)
    figure.update_xaxes(
        tickvals=list(range(len(values))), ticktext=[str(value) for value in values], range=[-0.4, len(values) - 0.6]
    )
    figure.update_xaxes(title=x, row=down).update_yaxes(title=measure, col=1)
    figure.update_layout(margin={"t": 90})  # titles of panels stand below the figure's own
    return set_title(figure, f"{measure} over {x}", f"{describe_n(table)}; {CI}", height=220 + 240 * down)


def _split_panels(table: pd.DataFrame, facets: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The rows of every combination of values: title -> rows."""
    if not facets:
        return {"": table}
    titles = [
        ", ".join(f"{name} {value}" for name, value in row.items()) for row in table[[*facets]].to_dict("records")
    ]
    return {str(title): rows for title, rows in table.groupby(titles, sort=False)}


def _draw_panel(
    figure: go.Figure,
    rows: pd.DataFrame,
    drawn: dict[str, Look],
    x: str,
    values: Sequence[object],
    measure: str,
    position: dict[str, Any],
) -> None:
    """Draws one line per arm, side by side if they would hide each other.

    figure: gets the lines.
    rows: rows of the panel.
    drawn: arm -> look.
    x: the argument on the horizontal axis.
    values: its values, in order.
    measure: column to draw.
    position: row and column of the panel, as keywords of plotly.
    """
    for i, (arm, look) in enumerate(drawn.items()):
        line = rows[rows["arm"] == arm]
        figure.add_scatter(
            x=[values.index(value) + 0.05 * (i - (len(drawn) - 1) / 2) for value in line[x]],
            y=line[measure].to_numpy(),
            name=look.name,
            legendgroup=arm,
            mode="lines+markers",
            line={"color": look.colour, "width": 2},
            marker={"symbol": look.symbol, "size": 7, "color": look.colour},
            error_y=error_bars(line, measure, look),
            customdata=_hover_data(line, x, measure),
            hovertemplate=_hover_text(look, x, measure),
            **position,
        )


def _prepare(summary: pd.DataFrame, asked: str | None) -> tuple[pd.DataFrame, str]:
    """The rows to draw, with the bounds of the measure named after it; and the name of the measure."""
    columns = list(summary)
    if "low" in columns:  # of the column before it
        main = columns[columns.index("low") - 1]
        summary = summary.rename(columns={"low": f"{main}_low", "high": f"{main}_high"})
    known = [name for name in summary if f"{name}_low" in summary]
    measure = asked or next(iter(known), "")
    if measure not in summary:
        raise OpError(f"The summary has no measure {measure!r}.{nearest(measure, known or columns)}")
    table = summary[~summary["arm"].isin(NOTHING) & summary[measure].notna()]
    if table.empty:
        raise OpError(f"The summary has no edited images with a {measure} to draw.")
    return table.assign(**{measure: table[measure].astype(float)}), measure


def _hover_data(line: pd.DataFrame, x: str, measure: str) -> np.ndarray:
    bounds = [column_values(line, name) for name in ("n", f"{measure}_low", f"{measure}_high")]
    return np.stack([line[x].astype(str).to_numpy(object), *bounds], axis=1)


def _hover_text(look: Look, x: str, measure: str) -> str:
    return (
        f"{look.name}, {x} %{{customdata[0]}}, n = %{{customdata[1]:.0f}}<br>{measure} %{{y:.3g}} "
        "(%{customdata[2]:.3g} to %{customdata[3]:.3g})<extra></extra>"
    )
