"""The figures of claim 3: nearer to the source, farther from the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.overlays import sheet
from dit_lens.plots.tables import check_summary, column_values, describe_n, error_bars
from dit_lens.plots.theme import CI, INK, MASSIVE, Look, looks, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from PIL.Image import Image


class TransferResult(Protocol):
    """What :func:`transfer_strips` uses of a ``Result``: its settings, and its images by what was done."""

    settings: dict[str, Any]

    def image(self, item: int, seed: int, **which: Any) -> Image: ...


@carries_code
@checked
def transfer_figure(summary: pd.DataFrame, k: int | None = None) -> go.Figure:
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
    [('top (massive)', 'x'), ('top (massive)', 'x3'), ('top (massive)', 'x2')]

    Left: both distances against strength, with those of all that can be moved (ceiling), of the mean picture and of mid
    grey as lines; below, how much nearer a picture is to its own source than to others, if the summary says so.
    Right: one distance against the other, a curve per arm; low and left is near both. Rows with strength 0 are the
    untouched target: every curve then starts there, and a dotted line shows what blending the two images would give.
    Blends of latents and prompts, and top without the last blocks or read out alone, are on the right only.

    summary: of ``studies.transfer``; columns arm, masked (bool), strength (0 to 1), n, to_source, to_target (RMSE, 0 to
      255), each with _low and _high; also specificity (RMSE) with its bounds, if it is there; fidelity_source and
      fidelity_target (shares) are shown on hovering.
    k: which number of channels, if the summary has several; None then draws both distances against k, at the largest
      strength.
    """
    table = _check_transfer(summary)
    curves = table[(table["strength"] > 0) & ~table["arm"].isin(LEVELS)].sort_values("strength")
    if curves.empty:
        raise OpError("The summary has no transfer to draw: it needs rows with a strength above 0.")
    ks = _list_ks(curves)
    if k is None and len(ks) > 1:
        return _draw_over_k(curves, ks)
    if k is not None and k not in ks:
        raise OpError(f"The summary has no k={k}. It has: {', '.join(map(str, ks))}.")
    return _draw_over_strength(table, _select_k(curves, k if k is not None else (ks or [0])[0], ks))


@carries_code
@checked
def transfer_image_figure(summary: pd.DataFrame, k: int | None = None) -> go.Figure:
    """What moving channels out of an image does: see :func:`transfer_figure`."""
    figure = transfer_figure(summary, k)
    return figure.update_layout(title={"text": figure.layout.title.text.replace("a source", "an image")})


@carries_code
@checked
def transfer_strips(
    result: TransferResult,
    *,
    pair: int = 0,
    seed: int | None = None,
    k: int | None = None,
    masked: bool = False,
    arms: Sequence[str] = ("top", "random", "all", "prompt-blend", "latent-blend", "pixel-blend"),
) -> go.Figure:
    """The way from target to source in images: a row of strengths for every arm.

    >>> from PIL import Image
    >>> from dit_lens.studies import Result
    >>> dot = Image.new("RGB", (8, 8))
    >>> keys = ["0/0/target", "0/0/4/top/whole/0.5", "0/0/4/top/whole/1", "0/0/source"]
    >>> settings = {"k": [4], "seeds": [0], "strengths": [0.5, 1.0], "width": 128}
    >>> strips = transfer_strips(Result("transfer", None, None, settings, dict.fromkeys(keys, dot)))
    >>> len(strips.data), [label.text for label in strips.layout.annotations]
    (4, ['target', 'strength 0.5', 'strength 1', 'source', 'top (massive)'])

    Arms of which the result has no images, as it has none of blended prompts inside a mask, are left out.

    result: of ``studies.transfer`` or ``studies.transfer_image``.
    pair: number of the pair.
    seed: seed of the noise; the first of the result by default.
    k: number of channels; the first of the result by default.
    masked: whether to show images that were touched inside the mask only.
    arms: arms to show.
    """
    seed = result.settings["seeds"][0] if seed is None else seed
    k = result.settings["k"][0] if k is None else k
    strengths = sorted(map(float, result.settings["strengths"]))
    try:
        target, source = (result.image(pair, seed, arm=end) for end in ("target", "source"))
    except OpError as problem:
        raise OpError(f"The result has no images of pair {pair} under seed {seed}.") from problem
    part = "masked" if masked else "whole"
    rows = {}
    for arm in arms:
        with suppress(OpError):  # it has no images of this arm
            about = {"k": _find_size(result.settings, arm, k), "arm": arm, "part": part}
            moved = [result.image(pair, seed, **about, strength=strength) for strength in strengths]
            rows[arm] = [target, *moved, source]
    if not rows:
        raise OpError(f"The result has no images of {', '.join(arms)} with k={k}, {part}.")
    columns = ["target", *(f"strength {strength:g}" for strength in strengths), "source"]
    small = f"k = {k}; channels moved at {_WHERE[masked]}"
    names = [_find_look(arm).name for arm in rows]
    return sheet(list(rows.values()), names, columns, title="From the target to the source", subtitle=small)


_DASH = "5px,3px"

_WHERE = {True: "subject's tokens only", False: "all tokens"}

TRANSFER_ARMS = {
    "top-early": Look("top-early (not in the last quarter)", MASSIVE, "circle-open"),
    "top-readout": Look("top-readout (only where it is read out)", MASSIVE, "circle-x-open"),
    "latent-blend": Look("latent-blend", "#56B4E9", "cross"),
    "prompt-blend": Look("prompt-blend", "#7570B3", "hexagram"),
    "pixel-blend": Look("pixel-blend", INK, "x-thin-open"),
}

LEVELS = {"ceiling": "all that can be moved", "mean-picture": "mean picture", "grey": "mid grey"}


def _find_look(arm: str) -> Look:
    return TRANSFER_ARMS.get(arm) or looks([arm])[arm]


def _check_transfer(summary: pd.DataFrame) -> pd.DataFrame:
    needed = [f"to_{side}{bound}" for side in ("source", "target") for bound in ("", "_low", "_high")]
    table = check_summary(summary, ("arm", "masked", "strength", "n", *needed))
    table["masked"] = table["masked"].astype(bool)
    return table


def _list_ks(curves: pd.DataFrame) -> list[int]:
    """The numbers of top channels in a summary; empty if it does not say."""
    return sorted({int(k) for k in curves.loc[curves["arm"] == "top", "k"]}) if "k" in curves else []


def _select_k(curves: pd.DataFrame, k: int, ks: Sequence[int]) -> pd.DataFrame:
    """The rows of one k, with those of arms that have no k of their own.

    curves: rows of the summary.
    k: number of channels.
    ks: all numbers of channels in the summary.
    """
    if not ks:
        return curves
    sized = curves["arm"].isin(set(curves.loc[curves["k"].isin(ks), "arm"]) - {"all"})
    return curves[~sized | (curves["k"] == k)]


def _find_size(settings: Mapping[str, Any], arm: str, k: int) -> int:
    """Under which k the images of an arm are kept.

    settings: settings of the result.
    arm: name of the arm.
    k: number of channels of an arm that has one.
    """
    if arm == "all":
        return settings["width"]
    return 0 if arm.endswith("-blend") else k


def _draw_over_strength(table: pd.DataFrame, curves: pd.DataFrame) -> go.Figure:
    """Both distances against strength, and one against the other."""
    kinds = sorted(set(curves["masked"]), reverse=True)
    apart = [float(one) for one in table.loc[table["strength"] == 0, "to_source"].tolist()[:1]]
    measures = _list_measures(curves)
    figure = make_subplots(
        len(measures),
        2,
        specs=[[{}, {"rowspan": len(measures)}], *[[{}, None]] * (len(measures) - 1)],
        column_widths=[0.46, 0.54],
        horizontal_spacing=0.14,
        vertical_spacing=0.06,
    )
    drawn = looks(arm for arm in curves["arm"] if arm not in TRANSFER_ARMS)
    for i, (arm, look) in enumerate(drawn.items()):
        for masked in kinds:
            rows = curves[(curves["arm"] == arm) & (curves["masked"] == masked)]
            if len(rows):
                style = _make_style(arm, look, "solid" if masked or len(kinds) == 1 else _DASH, _WHERE[masked])
                _draw_distances(
                    figure, rows, look, style, nudge=0.008 * (i - (len(drawn) - 1) / 2), key=masked == kinds[0]
                )
                _draw_trajectory(figure, rows, apart, style, named=i == 0)
    for arm in [arm for arm in TRANSFER_ARMS if arm != "pixel-blend" and arm in set(curves["arm"])]:
        rows = curves[(curves["arm"] == arm) & (curves["masked"] == kinds[-1])]
        if len(rows):  # prompts are not blended inside a mask
            style = _make_style(arm, TRANSFER_ARMS[arm], "solid" if len(kinds) == 1 else _DASH, _WHERE[kinds[-1]])
            _draw_trajectory(figure, rows, apart, style, named=False, key=True)
    levels = table[table["arm"].isin(LEVELS)].groupby("arm", sort=False)["to_source"].mean()
    _draw_levels(figure, levels)
    level = {"mode": "lines", "hoverinfo": "skip", "row": 1, "col": 2}
    for one in apart:
        dots = {"color": INK, "width": 1.5, "dash": "dot"}
        figure.add_scatter(x=[0, one], y=[one, 0], name=TRANSFER_ARMS["pixel-blend"].name, line=dots, **level)
    for masked in kinds if len(kinds) == 2 else ():
        line = {"color": INK, "width": 1.8, "dash": "solid" if masked else _DASH}
        figure.add_scatter(x=[None], y=[None], name=_WHERE[masked], line=line, **level)
    arms = table[~table["arm"].isin(LEVELS)]
    far, high = (
        float(np.nanmax(arms[[f"to_{side}{bound}" for side in ("source", "target") for bound in bounds]])) or 1.0
        for bounds in (("",), ("", "_high"))
    )
    _set_axes(figure, measures, far, max(high, *levels) if len(levels) else high)
    where = "" if len(kinds) == 2 else f"; {_WHERE[kinds[0]]}"
    size = f"; k = {int(curves.loc[curves['arm'] == 'top', 'k'].iloc[0])}" if _list_ks(curves) else ""
    small = f"{describe_n(curves)}{size}; {CI}{where}; numbers beside points: strength"
    return set_title(figure, "Moving channels from a source into a target", small, height=270 * len(measures))


def _draw_over_k(curves: pd.DataFrame, ks: Sequence[int]) -> go.Figure:
    """Both distances against the number of channels moved, up to all of them, at the largest strength."""
    full = curves[
        (curves["strength"] == curves["strength"].max()) & (curves["k"] > 0) & ~curves["arm"].isin(TRANSFER_ARMS)
    ]
    kinds = sorted(set(full["masked"]), reverse=True)
    figure = make_subplots(1, 2, horizontal_spacing=0.14)
    for arm, look in looks(full["arm"]).items():
        for masked in kinds:
            rows = full[(full["arm"] == arm) & (full["masked"] == masked)].sort_values("k")
            dash = "solid" if masked or len(kinds) == 1 else _DASH
            style = {**_make_style(arm, look, dash, _WHERE[masked]), "mode": "lines+markers"}
            for column, side in enumerate(("source", "target"), start=1):
                figure.add_scatter(
                    x=rows["k"],
                    y=rows[f"to_{side}"],
                    error_y=error_bars(rows, f"to_{side}", look),
                    customdata=_hover_data(rows),
                    showlegend=column == 1 and masked == kinds[0],
                    row=1,
                    col=column,
                    **style,
                )
    for column, side in enumerate(("source", "target"), start=1):
        ticks = sorted({*ks, int(full["k"].max())})
        figure.update_xaxes(type="log", title="k: channels moved", tickvals=ticks, ticktext=ticks, row=1, col=column)
        figure.update_yaxes(title=f"RMSE to the {side} (0 to 255)", rangemode="tozero", row=1, col=column)
    where = "solid: subject's tokens only, dashed: all tokens" if len(kinds) == 2 else _WHERE[kinds[0]]
    small = f"{describe_n(full)}; {CI}; strength {full['strength'].max():g}; {where}"
    return set_title(figure, "Moving k channels from a source into a target", small, height=400)


def _make_style(arm: str, look: Look, dash: str, where: str) -> dict[str, Any]:
    return {
        "name": look.name,
        "legendgroup": arm,
        "line": {"color": look.colour, "width": 1.8, "dash": dash},
        "marker": {"symbol": look.symbol, "size": 7, "color": look.colour},
        "hovertemplate": f"{look.name}, {where}<br>strength %{{customdata[0]:g}}, n = %{{customdata[1]:.0f}}"
        "<br>RMSE to the source %{customdata[2]:.1f}, to the target %{customdata[3]:.1f}"
        "<br>right by the source's prompt %{customdata[4]:.0%}, by the target's %{customdata[5]:.0%}<extra></extra>",
    }


def _hover_data(rows: pd.DataFrame) -> np.ndarray:
    columns = ("strength", "n", "to_source", "to_target", "fidelity_source", "fidelity_target")
    return np.stack([column_values(rows, name) for name in columns], axis=1)


def _draw_distances(
    figure: go.Figure, rows: pd.DataFrame, look: Look, style: dict[str, Any], *, nudge: float, key: bool
) -> None:
    """Left: an arm's distance to the source, to the target, and between its own source and others.

    figure: gets the lines.
    rows: rows of the arm.
    look: look of the arm.
    style: keywords of its traces.
    nudge: shift along the axis, so that arms do not hide each other.
    key: whether the arm is in the legend.
    """
    for row, measure in enumerate(_list_measures(rows), start=1):
        figure.add_scatter(
            x=rows["strength"].to_numpy() + nudge,
            y=rows[measure].to_numpy(),
            error_y=error_bars(rows, measure, look),
            mode="lines+markers",
            customdata=_hover_data(rows),
            showlegend=key and row == 1,
            row=row,
            col=1,
            **style,
        )


def _draw_trajectory(
    figure: go.Figure, rows: pd.DataFrame, apart: list[float], style: dict[str, Any], *, named: bool, key: bool = False
) -> None:
    """Right: an arm's way from the target.

    figure: gets the line.
    rows: rows of the arm.
    apart: distance of the untouched target from the source; empty if it is not known.
    style: keywords of its trace.
    named: whether the strengths are written beside the points.
    key: whether the arm is in the legend.
    """
    figure.add_scatter(
        x=[*[0.0] * len(apart), *rows["to_target"]],
        y=[*apart, *rows["to_source"]],
        customdata=[*[[0.0, np.nan, one, 0.0, np.nan, np.nan] for one in apart], *_hover_data(rows).tolist()],
        mode="lines+markers+text" if named else "lines+markers",
        text=[*[""] * len(apart), *(f"{strength:g}" for strength in rows["strength"])] if named else None,
        textposition="middle right",
        textfont={"size": 10},
        showlegend=key,
        row=1,
        col=2,
        **style,
    )


def _list_measures(rows: pd.DataFrame) -> list[str]:
    """What is drawn against strength."""
    known = "specificity" in rows and rows["specificity"].notna().any()
    return ["to_source", "to_target", *(["specificity"] if known else [])]


def _draw_levels(figure: go.Figure, levels: pd.Series) -> None:
    """Left, above: how near to the source is what no channels could better, and what shows nothing of it.

    figure: gets the lines.
    levels: arm -> RMSE to the source.
    """
    collapses = levels.drop("ceiling", errors="ignore")
    lower = collapses.idxmin() if len(collapses) else ""  # its name is below its line
    for arm, level in levels.items():
        figure.add_hline(
            y=float(level),
            line={"color": INK, "width": 1, "dash": "dot"},
            annotation={"text": LEVELS[str(arm)], "font": {"size": 10}},
            annotation_position="bottom left" if arm == lower else "top left",
            row=1,
            col=1,
        )


def _set_axes(figure: go.Figure, measures: Sequence[str], span: float, high: float) -> None:
    """Titles and ranges of the axes.

    figure: gets them.
    measures: what is drawn on the left, from above.
    span: the largest distance.
    high: the largest end of an interval, which only the left shows.
    """
    strength = {"range": [0, 1.08], "dtick": 0.25}
    last = len(measures)
    for row in range(1, last):
        figure.update_xaxes(**strength, matches=f"x{last + 1}", showticklabels=False, row=row, col=1)
    figure.update_xaxes(**strength, title="strength", row=last, col=1)
    figure.update_xaxes(
        title="RMSE to the target (0 to 255)", range=[-0.04 * span, span * 1.12], showgrid=True, row=1, col=2
    )
    for row, side in enumerate(("source", "target"), start=1):
        figure.update_yaxes(title=f"RMSE to the {side}<br>(0 to 255)", range=[0, high * 1.06], row=row, col=1)
    if "specificity" in measures:
        figure.update_yaxes(title="RMSE nearer to its own<br>source than to others", row=last, col=1)
        figure.add_hline(y=0, line={"color": INK, "width": 1}, row=last, col=1)
    figure.update_yaxes(title="RMSE to the source (0 to 255)", range=[0, span * 1.12], row=1, col=2)
    corner = {"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    figure.add_annotation(text="↙ near both", xref="x2 domain", yref="y2 domain", font={"size": 11}, **corner)
