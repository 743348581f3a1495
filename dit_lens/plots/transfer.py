"""The figure of claim 3: nearer to the source, farther from the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.overlays import sheet
from dit_lens.plots.tables import checked, errors, floats, n_of
from dit_lens.plots.theme import CI, INK, MASSIVE, Look, looks, titled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from dit_lens.studies.shared.result import Result


@carries_code
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

    summary: columns arm, masked (bool), strength (0 to 1), n, to_source, to_target (RMSE, 0 to 255), each with _low and
    _high; says_source and says_target (shares) go into the hover text. Left: both distances against strength. Right:
    one against the other, a curve per arm; low and left is near both. Rows with strength 0 are the untouched target:
    every curve then starts there, and a dotted line shows what blending the two images would give. Blends of latents
    and prompts, and top without the last blocks or read out alone, are on the right only.
    k: which size, where the summary has several; None then draws both distances against k, at the largest strength.
    """
    table = _checked(summary)
    curves = table[table["strength"] > 0].sort_values("strength")
    if curves.empty:
        raise OpError("The summary has no transfer to draw: it needs rows with a strength above 0.")
    ks = _ks(curves)
    if k is None and len(ks) > 1:
        return _over_k(curves, ks)
    if k is not None and k not in ks:
        raise OpError(f"The summary has no k={k}. It has: {', '.join(map(str, ks))}.")
    return _over_strength(table, _of_k(curves, k if k is not None else (ks or [0])[0], ks))


@carries_code
def transfer_image_figure(summary: pd.DataFrame, k: int | None = None) -> go.Figure:
    """What moving channels out of an image does: see :func:`transfer_figure`."""
    figure = transfer_figure(summary, k)
    return figure.update_layout(title={"text": figure.layout.title.text.replace("a source", "an image")})


@carries_code
def transfer_strips(
    result: Result,
    *,
    pair: int = 0,
    seed: int | None = None,
    k: int | None = None,
    masked: bool = False,
    arms: Sequence[str] = ("top", "random", "all", "prompt-blend", "latent-blend", "pixel-blend"),
) -> go.Figure:
    """The way from target to source in images: a line of strengths for every arm.

    >>> from PIL import Image
    >>> from dit_lens.studies import Result
    >>> dot = Image.new("RGB", (8, 8))
    >>> keys = ["0/0/target", "0/0/4/top/whole/0.5", "0/0/4/top/whole/1", "0/0/source"]
    >>> settings = {"k": [4], "seeds": [0], "strengths": [0.5, 1.0], "width": 128}
    >>> strips = transfer_strips(Result("transfer", None, None, settings, dict.fromkeys(keys, dot)))
    >>> len(strips.data), [label.text for label in strips.layout.annotations]
    (4, ['target', 'strength 0.5', 'strength 1', 'source', 'top (massive)'])

    result: of ``studies.transfer`` or ``studies.transfer_image``. pair: its number. seed, k: the first by default. Arms
    that the result has no images of, as it has none of blended prompts inside a mask, are left out.
    """
    seed = result.settings["seeds"][0] if seed is None else seed
    k = result.settings["k"][0] if k is None else k
    strengths, name = sorted(result.settings["strengths"]), f"{pair}/{seed}"
    if f"{name}/target" not in result.images:
        raise OpError(f"The result has no images of pair {pair} under seed {seed}.")
    ends = result.images[f"{name}/target"], result.images[f"{name}/source"]
    where = "masked" if masked else "whole"
    lines = {}
    for arm in arms:
        size = _size(result, arm, k)
        keys = [f"{name}/{size}/{arm}/{where}/{strength:g}" for strength in strengths]
        if all(key in result.images for key in keys):
            lines[arm] = [ends[0], *(result.images[key] for key in keys), ends[1]]
    if not lines:
        raise OpError(f"The result has no images of {', '.join(arms)} with k={k}, {where}.")
    columns = ["target", *(f"strength {strength:g}" for strength in strengths), "source"]
    title, words = "From the target to the source", f"k = {k}; channels moved at {_WHERE[masked]}"
    return sheet(list(lines.values()), [_look(arm).name for arm in lines], columns, title=title, subtitle=words)


_DASH = "5px,3px"

_WHERE = {True: "subject's tokens only", False: "all tokens"}

_OWN = {
    "top-early": Look("top-early (not in the last quarter)", MASSIVE, "circle-open"),
    "top-readout": Look("top-readout (only where it is read out)", MASSIVE, "circle-x-open"),
    "latent-blend": Look("latent-blend", "#56B4E9", "cross"),
    "prompt-blend": Look("prompt-blend", "#7570B3", "hexagram"),
    "pixel-blend": Look("pixel-blend", INK, "x-thin-open"),
}


def _look(arm: str) -> Look:
    return _OWN.get(arm) or looks([arm])[arm]


def _checked(summary: pd.DataFrame) -> pd.DataFrame:
    needed = [f"to_{side}{bound}" for side in ("source", "target") for bound in ("", "_low", "_high")]
    table = checked(summary, ("arm", "masked", "strength", "n", *needed))
    table["masked"] = table["masked"].astype(bool)
    return table


def _ks(curves: pd.DataFrame) -> list[int]:
    """The sizes of the top set that a summary has; none where it does not say."""
    return sorted({int(k) for k in curves.loc[curves["arm"] == "top", "k"]}) if "k" in curves else []


def _of_k(curves: pd.DataFrame, k: int, ks: Sequence[int]) -> pd.DataFrame:
    """One size's rows, with those of arms that have no size."""
    if not ks:
        return curves
    sized = curves["arm"].isin(set(curves.loc[curves["k"].isin(ks), "arm"]) - {"all"})
    return curves[~sized | (curves["k"] == k)]


def _size(result: Result, arm: str, k: int) -> int:
    """Under which size the images of an arm are kept."""
    if arm == "all":
        return result.settings["width"]
    return 0 if arm.endswith("-blend") else k


def _over_strength(table: pd.DataFrame, curves: pd.DataFrame) -> go.Figure:
    """Both distances against strength, and one against the other."""
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
    drawn = looks(arm for arm in curves["arm"] if arm not in _OWN)
    for i, (arm, look) in enumerate(drawn.items()):
        for masked in kinds:
            rows = curves[(curves["arm"] == arm) & (curves["masked"] == masked)]
            if len(rows):
                style = _transfer_style(arm, look, "solid" if masked or len(kinds) == 1 else _DASH, _WHERE[masked])
                _distances(figure, rows, look, style, nudge=0.008 * (i - (len(drawn) - 1) / 2), key=masked == kinds[0])
                _trajectory(figure, rows, apart, style, named=i == 0)
    for arm in [arm for arm in _OWN if arm != "pixel-blend" and arm in set(curves["arm"])]:
        rows = curves[(curves["arm"] == arm) & (curves["masked"] == kinds[-1])]
        if len(rows):  # prompts are not blended inside a mask
            style = _transfer_style(arm, _OWN[arm], "solid" if len(kinds) == 1 else _DASH, _WHERE[kinds[-1]])
            _trajectory(figure, rows, apart, style, named=False, key=True)
    level = {"mode": "lines", "hoverinfo": "skip", "row": 1, "col": 2}
    for one in apart:
        dots = {"color": INK, "width": 1.5, "dash": "dot"}
        figure.add_scatter(x=[0, one], y=[one, 0], name=_OWN["pixel-blend"].name, line=dots, **level)
    for masked in kinds if len(kinds) == 2 else ():
        line = {"color": INK, "width": 1.8, "dash": "solid" if masked else _DASH}
        figure.add_scatter(x=[None], y=[None], name=_WHERE[masked], line=line, **level)
    far, high = (
        float(np.nanmax(table[[f"to_{side}{bound}" for side in ("source", "target") for bound in bounds]])) or 1.0
        for bounds in (("",), ("", "_high"))
    )
    _transfer_axes(figure, far, high)
    where = "" if len(kinds) == 2 else f"; {_WHERE[kinds[0]]}"
    size = f"; k = {int(curves.loc[curves['arm'] == 'top', 'k'].iloc[0])}" if _ks(curves) else ""
    small = f"{n_of(curves)}{size}; {CI}{where}; numbers beside points: strength"
    return titled(figure, "Moving channels from a source into a target", small, height=540)


def _over_k(curves: pd.DataFrame, ks: Sequence[int]) -> go.Figure:
    """Both distances against the number of channels moved, up to all of them, at the largest strength."""
    full = curves[(curves["strength"] == curves["strength"].max()) & (curves["k"] > 0) & ~curves["arm"].isin(_OWN)]
    kinds = sorted(set(full["masked"]), reverse=True)
    figure = make_subplots(1, 2, horizontal_spacing=0.14)
    for arm, look in looks(full["arm"]).items():
        for masked in kinds:
            rows = full[(full["arm"] == arm) & (full["masked"] == masked)].sort_values("k")
            dash = "solid" if masked or len(kinds) == 1 else _DASH
            style = {**_transfer_style(arm, look, dash, _WHERE[masked]), "mode": "lines+markers"}
            for column, side in enumerate(("source", "target"), start=1):
                figure.add_scatter(
                    x=rows["k"],
                    y=rows[f"to_{side}"],
                    error_y=errors(rows, f"to_{side}", look),
                    customdata=_transfer_facts(rows),
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
    small = f"{n_of(full)}; {CI}; strength {full['strength'].max():g}; {where}"
    return titled(figure, "Moving k channels from a source into a target", small, height=400)


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
    figure: go.Figure, rows: pd.DataFrame, apart: list[float], style: dict[str, Any], *, named: bool, key: bool = False
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
        showlegend=key,
        row=1,
        col=2,
        **style,
    )


def _transfer_axes(figure: go.Figure, span: float, high: float) -> None:
    """span: the largest distance. high: the largest end of an interval, which only the left shows."""
    strength = {"range": [0, 1.08], "dtick": 0.25}
    figure.update_xaxes(**strength, matches="x3", showticklabels=False, row=1, col=1)
    figure.update_xaxes(**strength, title="strength", row=2, col=1)
    figure.update_xaxes(
        title="RMSE to the target (0 to 255)", range=[-0.04 * span, span * 1.12], showgrid=True, row=1, col=2
    )
    for row, side in enumerate(("source", "target"), start=1):
        figure.update_yaxes(title=f"RMSE to the {side}<br>(0 to 255)", range=[0, high * 1.06], row=row, col=1)
    figure.update_yaxes(title="RMSE to the source (0 to 255)", range=[0, span * 1.12], row=1, col=2)
    corner = {"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    figure.add_annotation(text="↙ near both", xref="x2 domain", yref="y2 domain", font={"size": 11}, **corner)
