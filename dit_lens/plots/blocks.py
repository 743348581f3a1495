"""The sheet of what each block is needed for: blocks downwards, attributes across, one panel a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError, check_choice
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_columns, check_summary, describe_n
from dit_lens.plots.theme import INK, MASSIVE, bar_below, fade, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WORDS = ("part", "measure", "needed", "specific")
CONTROLS = ("beyond_noise", "beyond_blocks", "beyond_attributes")
FACTS = ("n", "damage_low", "damage_high", "noise", *CONTROLS, *(f"{name}_n" for name in CONTROLS))
SCALE = [[0, fade(MASSIVE, 0)], [1, fade(MASSIVE, 1)]]  # nothing on any page, as nothing is lost
ROW, HEAD, FOOT, BAR = 20, 96, 180, 40  # pixels: of a block, above the panels, below them, and of the colour bar
MARKS = {
    "needed": ("circle", 5, "more than noise as large, and than other blocks do"),
    "specific": ("star", 9, "and more than other attributes lose"),
}


@carries_code
@checked
def blocks_figure(summary: pd.DataFrame, *, measure: str | None = None) -> go.Figure:
    """What images lose without each block or part of it: a panel for every part, or of one measure, a single one.

    >>> import pandas as pd
    >>> figure = blocks_figure(
    ...     pd.DataFrame(
    ...         {"part": "mlp", "block": [0, 1], "measure": "colour", "n": 8, "damage": [0.1, 0.9], "noise": [0.1, 0.2]}
    ...         | {"needed": ["undecided", "yes"], "specific": ["undecided", "yes"]}
    ...     )
    ... )
    >>> figure.data[0].z.tolist()
    [[0.1], [0.9]]

    Blocks run downwards, as depth does. Of a judge that knows attributes, columns are these, and the images that can be
    read back at all; of one that does not, columns are parts, and there is a panel for every measure.

    summary: of ``studies.blocks``; columns part, block, measure, n, damage, noise, needed, specific, and those
      of the comparisons, which are shown on hovering.
    measure: the one that is drawn, for all parts, heads among them; by default all measures, without heads.
    """
    check_columns(summary, [*WORDS, "block", "n", "damage", "noise"])
    words = summary[[*WORDS]].astype({"part": str, "measure": str})
    table = check_summary(summary.drop(columns=[*WORDS]), ["block", "n", "damage"]).join(words)
    if measure is not None:
        check_choice(measure, list(table["measure"].unique()), "measure")
        table = table[table["measure"] == measure]
        panels = {measure: table.assign(column=table["part"])}
    else:
        table = table[~table["part"].str.startswith("head ")]
        panels = _choose_panels(table)
    if table.empty:
        raise OpError("All parts are heads, of which one measure is drawn at a time. Give measure='rmse', or another.")
    blocks = sorted(table["block"].unique())
    widths = [rows["column"].nunique() for rows in panels.values()]
    gap = 0.03
    figure = make_subplots(
        1, len(panels), shared_yaxes=True, subplot_titles=list(panels), horizontal_spacing=gap, column_widths=widths
    )
    shared = all(_is_share(rows) for rows in panels.values())
    for i, rows in enumerate(panels.values(), start=1):
        _draw_panel(figure, rows, i, shared=shared)
    figure.update_xaxes(type="category", showgrid=False, showline=False, tickangle=-60, ticks="")
    figure.update_yaxes(showgrid=False, showline=False, zeroline=False, range=[max(blocks) + 0.5, min(blocks) - 0.5])
    figure.update_yaxes(title="block", dtick=max(1, len(blocks) // 20), row=1, col=1)
    figure.update_annotations(font={"size": 12, "color": INK})
    what = "share that is lost without it" if shared else "damage without it"
    height = int(np.clip(ROW * len(blocks), 160, 900)) + HEAD + FOOT
    set_title(figure, "What is each block needed for?", f"{what}; {describe_n(table)}", height=height)
    legend = {"y": BAR / height, "itemsizing": "trace"}  # above the colour bar
    return figure.update_layout(margin={"t": HEAD, "b": FOOT}, legend=legend)


def _choose_panels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> rows, whose columns are attributes where a judge knows them, else parts."""
    attributes = list(table.loc[table["specific"].notna(), "measure"].unique())
    if not attributes:
        return {str(name): rows.assign(column=rows["part"]) for name, rows in table.groupby("measure", sort=False)}
    shown = [*attributes, *(["readable"] if "readable" in set(table["measure"]) else [])]
    some = table[table["measure"].isin(shown)]
    some = some.assign(column=some["measure"]).sort_values("column", key=lambda names: names.map(shown.index))
    parts = list(table["part"].unique())
    return {str(part): some[some["part"] == part] for part in parts}


def _is_share(rows: pd.DataFrame) -> bool:
    """Whether all damage is a share of images."""
    return bool(rows["specific"].notna().any())


def _draw_panel(figure: go.Figure, rows: pd.DataFrame, column: int, *, shared: bool) -> None:
    """One panel, and the marks of what is needed.

    figure: gets them.
    rows: of the summary, with the column of each.
    column: number of the panel.
    shared: whether all panels have one scale, from 0 to 1.
    """
    names, blocks = list(dict.fromkeys(rows["column"])), sorted(rows["block"].unique())

    def lay_out(name: str) -> np.ndarray:
        if name not in rows:
            return np.full((len(blocks), len(names)), np.nan)
        return rows.pivot(index="block", columns="column", values=name).loc[blocks, names].to_numpy(float)

    figure.add_heatmap(
        z=lay_out("damage"),
        x=names,
        y=blocks,
        customdata=np.stack([lay_out(name) for name in FACTS], -1),
        colorscale=SCALE,
        xgap=1,
        ygap=1,
        zmin=0,
        zmax=1 if shared else None,
        showscale=not shared or column == 1,
        colorbar=_place_bar(figure, column, shared=shared),
        hovertemplate="block %{y}, %{x}<br>damage %{z:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f}), "
        "n = %{customdata[0]:.0f}<br>under noise as large %{customdata[3]:.3f}"
        "<br>beyond noise %{customdata[4]:.3f}, n = %{customdata[7]:.0f}"
        "<br>beyond other blocks %{customdata[5]:.3f}, n = %{customdata[8]:.0f}"
        "<br>beyond other attributes %{customdata[6]:.3f}, n = %{customdata[9]:.0f}<extra></extra>",
        row=1,
        col=column,
    )
    needed = rows[rows["needed"] == "yes"]
    own = needed["specific"] == "yes"
    marked = {"needed": needed[~own], "specific": needed[own]} if rows["specific"].notna().any() else {"needed": needed}
    for name, some in marked.items():
        symbol, size, text = MARKS[name]
        figure.add_scatter(
            x=some["column"] if len(some) else [None],
            y=some["block"] if len(some) else [None],
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": "#FFFFFF", "line": {"color": "#222222", "width": 1}},
            name=text,
            legendgroup=name,
            showlegend=column == 1,
            hoverinfo="skip",
            row=1,
            col=column,
        )


def _place_bar(figure: go.Figure, column: int, *, shared: bool) -> dict[str, Any]:
    """The colour bar: one below all panels, or one below each."""
    low, high = (0.0, 1.0) if shared else figure.layout["xaxis" if column == 1 else f"xaxis{column}"].domain
    return bar_below((low + high) / 2, (high - low) * (0.5 if shared else 1))
