"""The figure of stability: how far the sets of massive channels overlap over prompts, seeds, steps and sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, error_bars
from dit_lens.plots.theme import CI, INK, MASSIVE, Look, set_title, shorten_site

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# What a line compares the set of a site with, in the colours of Okabe & Ito.
_LINES = {
    "prompts": Look("other prompts", "#0072B2", "circle"),
    "seeds": Look("other seeds", "#009E73", "square"),
    "steps": Look("other steps", "#CC79A7", "diamond"),
    "sites": Look("other sites", "#E69F00", "triangle-up"),
    "scores": Look("another score", "#56B4E9", "cross"),
}
_TEXT = ("over", "site", "a", "b")


@carries_code
@checked
def stability_figure(summary: pd.DataFrame) -> go.Figure:
    """Overlap by site, overlap of the running aggregate, and the overlap of every two steps and every two sites.

    >>> import pandas as pd
    >>> rows = [("prompts", "blocks.0.img", None, None, 0.8), ("running", None, 2, None, 0.9)]
    >>> figure = stability_figure(
    ...     pd.DataFrame(rows, columns=["over", "site", "a", "b", "jaccard"]).assign(n=4, chance=0.05)
    ... )
    >>> [trace.name for trace in figure.data]
    ['other prompts', 'chance', 'running aggregate']

    summary: of ``studies.stability``; columns over, site, a, b, n, jaccard (0 to 1), chance, and intervals if known.
    """
    words = [name for name in _TEXT if name in summary]
    numbers = check_summary(summary.assign(**dict.fromkeys(words, 0.0)), (*_TEXT, "n", "jaccard", "chance"))
    table = numbers.assign(**summary[words])
    if not table["over"].isin([*_LINES, "running"]).any():
        raise OpError("The summary compares no sets: the study had one prompt, seed, step, site and score.")
    titles = ("by site", "of the set over the first prompts with the set before", "of two steps", "of two sites")
    figure = make_subplots(2, 2, vertical_spacing=0.2, horizontal_spacing=0.14, subplot_titles=titles)
    figure.update_annotations(font={"size": 12, "color": INK})
    _draw_curves(figure, table)
    _draw_running(figure, table[table["over"] == "running"])
    for column, over in ((1, "step x step"), (2, "site x site")):
        _draw_matrix(figure, table[table["over"] == over], column)
    for column in (1, 2):
        figure.update_yaxes(title="Jaccard overlap (0 to 1)", range=[0, 1.05], row=1, col=column)
    set_title(figure, "How stable are the massive channels?", f"Jaccard overlap of their sets; {CI}", height=720)
    return figure.update_layout(margin={"t": 88})


def _draw_curves(figure: go.Figure, table: pd.DataFrame) -> None:
    sites = list(dict.fromkeys(table["site"].dropna()))
    for over, look in _LINES.items():
        for other, rows in table[table["over"] == over].groupby("b", dropna=False, sort=False):
            name = f"by {other}" if over == "scores" else look.name
            figure.add_scatter(
                x=[sites.index(site) for site in rows["site"]],
                y=rows["jaccard"].to_numpy(),
                error_y=error_bars(rows, "jaccard", look),
                name=name,
                mode="lines+markers",
                line={"color": look.colour, "width": 2},
                marker={"symbol": look.symbol, "size": 7, "color": look.colour},
                customdata=rows["site"].to_numpy(),
                hovertemplate=f"%{{customdata}}, {name}<br>mean overlap %{{y:.3f}}<extra></extra>",
                row=1,
                col=1,
            )
    if sites:
        figure.add_scatter(
            x=[0, len(sites) - 1],
            y=[table["chance"].iloc[0]] * 2,
            name="chance",
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "dot"},
            hovertemplate="two random sets: %{y:.3f}<extra></extra>",
            row=1,
            col=1,
        )
    every = max(1, -(-len(sites) // 16))
    ticks = list(range(0, len(sites), every))
    figure.update_xaxes(title="block", tickvals=ticks, ticktext=[shorten_site(sites[i]) for i in ticks], row=1, col=1)


def _draw_running(figure: go.Figure, rows: pd.DataFrame) -> None:
    rows = rows.assign(a=rows["a"].astype(float)).sort_values("a")
    figure.add_scatter(
        x=rows["a"].to_numpy(),
        y=rows["jaccard"].to_numpy(),
        name="running aggregate",
        mode="lines+markers",
        line={"color": MASSIVE, "width": 2},
        hovertemplate="after %{x} prompts: %{y:.3f}<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_xaxes(title="prompts", row=1, col=2)


def _draw_matrix(figure: go.Figure, rows: pd.DataFrame, column: int) -> None:
    what = "step" if column == 1 else "block"
    figure.update_xaxes(title=what, type="category", row=2, col=column)
    figure.update_yaxes(title=what, type="category", autorange="reversed", row=2, col=column)
    if rows.empty:
        return
    names = list(dict.fromkeys(rows["a"]))
    labels = [shorten_site(name) for name in names]
    figure.add_heatmap(
        z=rows["jaccard"].to_numpy().reshape(len(names), len(names)),
        x=labels,
        y=labels,
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        showscale=column == 2,
        colorbar={"title": "overlap", "len": 0.4, "y": 0.2, "thickness": 14, "outlinewidth": 0},
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        row=2,
        col=column,
    )
