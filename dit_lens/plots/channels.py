"""Figures of scores over channels: one block's spectrum and histogram, and all blocks on one map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from dit_lens.analysis.arrays import to_numpy
from dit_lens.analysis.channels import top_median_ratio
from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import check_number
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.theme import INK, LINE, MASSIVE, WIDTH, fade, label_width, place_labels, set_title, shorten_site

# More labels than this are unreadable; the hover text names the rest.
_LABELS = 24

# The plot area of a figure in a notebook, in pixels, for which labels are laid out.
_PLOT = (WIDTH - 80, 230)


@carries_code
@checked
def channel_spectrum(
    scores: Any, massive: Sequence[int] = (), *, site: str = "", score: str = "|mean|", by_rank: bool = False
) -> go.Figure:
    """The score of every channel of one site, with the massive ones marked by number.

    >>> figure = channel_spectrum([0.1, 9.0, 0.2, 0.1], massive=[1], site="blocks.3.img")
    >>> [trace.name for trace in figure.data], figure.layout.title.subtitle.text
    (['4 channels', '1 massive'], 'highest score 60 times the median')

    scores: [d], an array or tensor.
    massive: channels to mark.
    site: name of the site, for the title.
    score: name of the score, for the axis.
    by_rank: False shows channels in their order, on linear axes; True by falling score, on logarithmic axes.
    """
    values = _as_vector(scores, massive)
    order = np.argsort(-values, kind="stable")
    rank = np.empty(len(values), int)
    rank[order] = np.arange(1, len(values) + 1)
    x = rank if by_rank else np.arange(len(values))
    details = np.stack([np.arange(len(values)), rank], axis=1)
    hover = f"channel %{{customdata[0]}}<br>{score} %{{y:.4g}}<br>rank %{{customdata[1]}}<extra></extra>"
    along = order if by_rank else np.arange(len(values))
    figure = go.Figure(
        go.Scatter(
            x=x[along],
            y=values[along],
            customdata=details[along],
            name=f"{len(values)} channels",
            mode="lines",
            # One filled staircase is a bar chart that stays legible, and fast, with thousands of bars.
            line={"shape": "hvh", "width": 1, "color": INK},
            fill="tozeroy",
            fillcolor=fade(INK, 0.35),
            hovertemplate=hover,
        )
    )
    marked = sorted({int(c) for c in massive if values[int(c)] > 0 or not by_rank}, key=lambda c: -values[c])
    if marked:
        figure.add_scatter(
            x=x[marked],
            y=values[marked],
            customdata=details[marked],
            name=f"{len(marked)} massive",
            mode="markers",
            marker={"color": MASSIVE, "size": 7},
            # Stems: at 3,000 channels a bar of its own would be a fifth of a pixel wide.
            error_y=None
            if by_rank
            else {
                "type": "data",
                "symmetric": False,
                "array": np.zeros(len(marked)),
                "arrayminus": values[marked],
                "thickness": 2,
                "width": 0,
                "color": MASSIVE,
            },
            hovertemplate=hover,
        )
    _set_ranges(figure, values, by_rank=by_rank)
    position = (np.log10(x[marked]), np.log10(values[marked])) if by_rank else (x[marked], values[marked])
    _add_labels(figure, *position, marked, stems=not by_rank)
    figure.update_xaxes(title="rank of the channel" if by_rank else "channel")
    figure.update_yaxes(title=f"{score} over image tokens")
    return set_title(figure, _make_title("Score of every channel", site), _describe_ratio(values), height=340)


@carries_code
@checked
def channel_histogram(
    scores: Any, massive: Sequence[int] = (), *, site: str = "", score: str = "|mean|", bins: int = 48
) -> go.Figure:
    """How many channels have which score, both on logarithmic scales; massive channels stand as labelled ticks.

    >>> figure = channel_histogram([0.1, 9.0, 0.2, 0.1], massive=[1], bins=8)
    >>> int(figure.data[0].y.sum()), figure.data[1].marker.color
    (4, '#D55E00')

    scores: [d], an array or tensor, not negative; zeros are not on the scale, and are counted in the subtitle.
    massive: channels to mark.
    site: name of the site, for the title.
    score: name of the score, for the axis.
    bins: number of bins, of equal width in log10(score).
    """
    check_number("bins", bins, 1, 10_000)
    values = _as_vector(scores, massive)
    positive = values > 0
    logs = np.log10(values[positive]) if positive.any() else np.zeros(0)
    counts, edges = np.histogram(logs, bins=bins)
    kept = counts > 0
    figure = go.Figure(
        go.Bar(
            x=((edges[:-1] + edges[1:]) / 2)[kept],
            y=counts[kept],
            width=np.diff(edges)[kept],
            customdata=10 ** np.stack([edges[:-1], edges[1:]], axis=1)[kept],
            name=f"{len(values)} channels",
            marker={"color": fade(INK, 0.6), "line": {"width": 0}},
            hovertemplate=f"%{{y}} channels<br>{score} %{{customdata[0]:.3g}} to %{{customdata[1]:.3g}}<extra></extra>",
        )
    )
    marked = sorted((int(c) for c in set(massive) if values[int(c)] > 0), key=lambda c: -values[c])
    top = max(2.0, float(counts.max(initial=1)))
    if marked:
        # The rug stands just over bins of one channel, where its ticks hide nothing.
        figure.add_scatter(
            x=np.log10(values[marked]),
            y=np.full(len(marked), 1.35),
            customdata=np.stack([marked, values[marked]], axis=1),
            name=f"{len(marked)} massive",
            mode="markers",
            marker={"color": MASSIVE, "symbol": "line-ns", "size": 14, "line": {"width": 2, "color": MASSIVE}},
            hovertemplate=f"channel %{{customdata[0]}}<br>{score} %{{customdata[1]:.4g}}<extra></extra>",
        )
    figure.update_yaxes(type="log", range=[np.log10(0.7), np.log10(top * 2)], dtick=1, title="channels (log scale)")
    low, high = (float(edges[0]), float(edges[-1])) if len(logs) else (-1.0, 0.0)
    margin = 0.03 * (high - low)
    ticks = _choose_ticks(low, high)
    figure.update_xaxes(
        title=f"{score} over image tokens (log scale)",
        range=[low - margin, high + margin],
        tickvals=np.log10(ticks),
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    _add_labels(figure, np.log10(values[marked]), np.full(len(marked), np.log10(1.5)), marked)
    below = "" if values.min() >= 0 else " or below"
    zeros = f"; {int((~positive).sum())} channels at 0{below} are not drawn" if not positive.all() else ""
    return set_title(figure, _make_title("Distribution of scores", site), _describe_ratio(values) + zeros, height=340)


@carries_code
@checked
def block_channel_map(
    scores: Mapping[str, Any], massive: Mapping[str, Sequence[int]] | None = None, *, score: str = "|mean|"
) -> go.Figure:
    """The score of every channel at every site, colour on a logarithmic scale; massive channels are dotted.

    >>> figure = block_channel_map(
    ...     {"blocks.0.img": [1.0, 10.0], "blocks.1.img": [1.0, 100.0]}, massive={"blocks.1.img": [1]}
    ... )
    >>> figure.data[0].z.tolist(), figure.data[1].y
    ([[0.0, 1.0], [0.0, 2.0]], ('blocks.1.img',))

    Channels that are massive at half of the sites or more are named above the map. Sites run downwards, as depth does.

    scores: site -> [d], an array or tensor; sites may differ in d.
    massive: site -> channels to mark, such as a ChannelSet.
    score: name of the score, for the colour bar.
    """
    if not scores:
        raise OpError("A map needs the scores of at least one site: {site: [d]}.")
    chosen = {site: [int(c) for c in massive[site]] if massive and site in massive else [] for site in scores}
    rows = {site: _as_vector(values, chosen[site]) for site, values in scores.items()}
    width = max(map(len, rows.values()))
    table = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows.values()):
        table[i, : len(row)] = row
    positive = table[table > 0]
    floor = float(positive.min()) if positive.size else 1.0
    # Zeros, which have no logarithm, take the darkest colour.
    logs = np.log10(np.where(table < floor, floor, table))
    low, high = (float(np.nanmin(logs)), float(np.nanmax(logs)))
    ticks = _choose_ticks(low, high)
    figure = go.Figure(
        go.Heatmap(
            z=logs,
            y=list(rows),
            customdata=table,
            colorscale="Cividis",
            hoverongaps=False,
            colorbar={
                "title": {"text": f"{score}<br>(log scale)"},
                "tickvals": np.log10(ticks),
                "ticktext": [f"{tick:g}" for tick in ticks],
                "outlinewidth": 0,
                "thickness": 14,
            },
            hovertemplate=f"%{{y}}<br>channel %{{x}}<br>{score} %{{customdata:.4g}}<extra></extra>",
        )
    )
    marks = [(site, c, rows[site][c]) for site in rows for c in chosen[site]]
    if marks:
        figure.add_scatter(
            x=np.array([c for _, c, _ in marks]),
            y=[site for site, _, _ in marks],
            customdata=[value for _, _, value in marks],
            name="massive",
            mode="markers",
            marker={"color": MASSIVE, "size": 5, "line": {"width": 1, "color": "white"}},
            hovertemplate=f"%{{y}}<br>channel %{{x}}, massive<br>{score} %{{customdata:.4g}}<extra></extra>",
        )
    height = int(np.clip(20 * len(rows), 160, 560)) + 150
    figure.update_xaxes(title="channel", range=[-0.5, width - 0.5], showline=False)
    figure.update_yaxes(
        title="block", range=[len(rows) - 0.5, -0.5], showgrid=False, showline=False, **_make_block_ticks(list(rows))
    )
    recurring = _find_runs([c for c, n in Counter(c for _, c, _ in marks).items() if 2 * n >= len(rows)])
    middle = np.array([(first + last) / 2 for first, last in recurring])
    names = [f"{first}" if first == last else f"{first}–{last}" for first, last in recurring]
    _add_labels(figure, middle, np.full(len(names), -0.5), names, leaders=False, levels=3)
    ratios = [top_median_ratio(torch.from_numpy(row)) for row in rows.values()]
    subtitle = (
        f"highest score {_format_ratio(min(ratios))} to {_format_ratio(max(ratios))} times the median of its block"
    )
    if marks:
        subtitle += "; dots: massive channels"
    if recurring:
        subtitle += ", named where they recur"
    set_title(figure, f"Score of every channel at {len(rows)} sites", subtitle, height=height)
    return figure.update_layout(margin={"t": 104 if recurring else 60})


def _as_vector(scores: Any, massive: Sequence[int]) -> np.ndarray:
    """float64 [d] on the CPU, after checking that the massive channels are among them."""
    values = to_numpy(scores).astype(np.float64)
    if values.ndim != 1 or not values.size:
        raise OpError(
            f"Scores are one number per channel, [d], and got {list(values.shape)}. Average over steps and rows."
        )
    if not np.isfinite(values).all():
        raise OpError("Scores must be finite: there are NaN or infinite values among them.")
    if odd := [int(c) for c in massive if not 0 <= c < len(values)]:
        raise OpError(f"The massive channels {odd} are not among the {len(values)} channels, 0 to {len(values) - 1}.")
    return values


def _make_title(what: str, site: str) -> str:
    return f"{what}, {site}" if site else what


def _describe_ratio(values: np.ndarray) -> str:
    return f"highest score {_format_ratio(top_median_ratio(torch.from_numpy(values)))} times the median"


def _format_ratio(ratio: float) -> str:
    return "infinitely many" if np.isinf(ratio) else f"{ratio:.3g}"


def _choose_ticks(low: float, high: float) -> np.ndarray:
    """Round numbers between 10**low and 10**high: powers of ten, with 2 and 5 between where there are few."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    found = [m * 10.0**e for e in range(int(np.floor(low)), int(np.ceil(high)) + 1) for m in steps]
    inside = [tick for tick in found if low - 0.02 <= np.log10(tick) <= high + 0.02]
    return np.array(inside or [10.0 ** ((low + high) / 2)])


def _set_ranges(figure: go.Figure, values: np.ndarray, *, by_rank: bool) -> None:
    """Axis ranges with headroom for labels; fixed, because labels are laid out for them."""
    top = float(values.max()) or 1.0
    top = 1.0 if by_rank and top < 0 else top
    if not by_rank:
        figure.update_xaxes(range=[-0.5 - len(values) / 60, len(values) - 0.5 + len(values) / 60])
        figure.update_yaxes(range=[min(0.0, float(values.min())) * 1.1, top * 1.3])
        return
    floor = float(values[values > 0].min()) if (values > 0).any() else top / 10
    room = 0.2 * max(np.log10(top / floor), 0.5)
    figure.update_xaxes(type="log", range=[-0.06, np.log10(len(values)) + 0.06], dtick=1)
    figure.update_yaxes(type="log", range=[np.log10(floor) - room / 4, np.log10(top) + room], dtick=1)


def _add_labels(
    figure: go.Figure, x: np.ndarray, y: np.ndarray, names: Sequence[Any], *, leaders: bool = True, **how: Any
) -> None:
    """Writes names over points, the first first; those for which there is no room are left out.

    figure: a figure whose axis ranges are set.
    x: positions in the units of the range, which on a logarithmic axis are powers of ten.
    y: the same, upwards.
    names: one per point.
    leaders: whether names that had to rise get lines to their points.
    how: see ``place_labels``.
    """
    spans = (figure.layout.xaxis.range, figure.layout.yaxis.range)
    across, up = (
        (np.asarray(along, float) - span[0]) / (span[1] - span[0]) * pixels
        for along, span, pixels in zip((x, y), spans, _PLOT, strict=True)
    )
    points = list(zip(across.tolist(), up.tolist(), strict=True))[:_LABELS]
    texts = [str(name) for name in names[:_LABELS]]
    for i, offset in enumerate(place_labels(points, [label_width(text) for text in texts], **how)):
        if offset is None:
            continue
        label = {"x": float(x[i]), "y": float(y[i]), "text": texts[i], "font": {"size": 11}}
        if leaders and offset[1] > LINE:
            leader = {"arrowhead": 0, "arrowwidth": 1, "arrowcolor": INK, "standoff": 4}
            figure.add_annotation(**label, **leader, ax=0, ay=-offset[1])
        else:
            figure.add_annotation(**label, showarrow=False, xshift=offset[0], yshift=offset[1])


def _find_runs(channels: Sequence[int]) -> list[tuple[int, int]]:
    """Channels as first and last of every run of neighbours."""
    ordered = np.sort(np.asarray(channels, int))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1) if len(ordered) else []
    return [(int(run[0]), int(run[-1])) for run in runs]


def _make_block_ticks(sites: Sequence[str]) -> dict[str, Any]:
    names = [shorten_site(site) for site in sites]
    every = max(1, -(-len(sites) // 30))
    return {"type": "category", "tickvals": list(sites)[::every], "ticktext": names[::every]}
