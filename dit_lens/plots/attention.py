"""Figures of attention: the patterns of heads, one number for every head, and what heads make of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.arrays import to_numpy
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.overlays import sheet, strip
from dit_lens.plots.theme import MASSIVE, bar_below, fade, set_title
from dit_lens.plots.word_maps import blend, paint

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL import Image

SIDE = 256  # pixels of a pattern's longer side; larger ones are averaged down to it
ROW = 20  # pixels of a block


@carries_code
@checked
def pattern_figure(patterns: Mapping[str, Any], *, title: str = "", subtitle: str = "") -> go.Figure:
    """The pattern of every head: queries downwards, keys across, from dark (nothing) to bright (the head's largest).

    >>> figure = pattern_figure({"head 0": np.eye(4), "head 1": np.full((4, 4), 0.25)})
    >>> [label.text for label in figure.layout.annotations]
    ['head 0<br>up to 1', 'head 1<br>up to 0.25']

    Brightness is the square root of the attention, so that little of it is seen as well.

    patterns: name of the head -> [query, key], of which rows sum to 1. Of many tokens, neighbours are averaged.
    title: title of the figure.
    subtitle: the small print below it.
    """
    if not patterns:
        raise OpError("There are no patterns to show. Give at least one: {name: [query, key]}.")
    images, labels = [], []
    for name, given in patterns.items():
        pattern = _check_map(name, given)
        least = min(SIDE / max(pattern.shape), 1.0)
        small = average_neighbours(pattern, *(max(1, round(n * least)) for n in pattern.shape))
        images.append(paint(np.sqrt(small), (small.shape[1], small.shape[0]), least=0.0))
        labels.append(f"{name}<br>up to {pattern.max():.2g}")
    return strip(images, labels, title=title, subtitle=subtitle)


@carries_code
@checked
def head_figure(values: Mapping[Any, Sequence[float]], *, title: str = "", subtitle: str = "") -> go.Figure:
    """One number for every head: blocks downwards, heads across.

    >>> head_figure({0: [0.1, 0.9], 5: [0.3, 0.2]}).data[0].z.tolist()
    [[0.1, 0.9], [0.3, 0.2]]

    values: block -> the number of each of its heads, from 0 up; blocks may differ in their heads.
    title: title of the figure.
    subtitle: the small print below it.
    """
    import plotly.graph_objects as go

    if not values or not all(len(row) for row in values.values()):
        raise OpError("There are no heads to show. Give at least one number for each block: {block: [numbers]}.")
    grid = np.full((len(values), max(map(len, values.values()))), np.nan)
    for i, row in enumerate(values.values()):
        grid[i, : len(row)] = np.asarray(row, dtype=float)
    scale = [[0, fade(MASSIVE, 0)], [1, fade(MASSIVE, 1)]]
    heat = go.Heatmap(
        z=grid,
        x=list(range(grid.shape[1])),
        y=[str(block) for block in values],
        zmin=0,
        colorscale=scale,
        xgap=1,
        ygap=1,
        colorbar=bar_below(),
        hovertemplate="block %{y}, head %{x}: %{z:.3f}<extra></extra>",
    )
    height = int(np.clip(ROW * len(values), 80, 900)) + 190
    figure = set_title(go.Figure(heat), title, subtitle, height=height)
    figure.update_xaxes(title="head", dtick=max(1, grid.shape[1] // 16), showgrid=False, showline=False)
    ticks = [str(block) for block in values][:: max(1, len(values) // 20)]
    figure.update_yaxes(title="block", type="category", autorange="reversed", tickvals=ticks, showgrid=False)
    return figure.update_layout(margin={"b": 110})


@carries_code
@checked
def head_word_figure(
    image: Image.Image, maps: Mapping[str, Mapping[str, Any]], *, title: str = "", subtitle: str = ""
) -> go.Figure:
    """Where each head finds each word: heads downwards, words across, over the image.

    >>> from PIL import Image
    >>> figure = head_word_figure(Image.new("RGB", (8, 8)), {"head 0": {"sky": np.eye(2), "tree": 1 - np.eye(2)}})
    >>> [label.text for label in figure.layout.annotations]
    ['sky', 'tree', 'head 0']

    Every panel goes from its own lowest value, dark, to its highest, bright.

    image: PIL image.
    maps: name of the head -> word -> [h, w].
    title: title of the figure.
    subtitle: the small print below it.
    """
    words = list(next(iter(maps.values()), {}))
    if not words or any(list(row) != words for row in maps.values()):
        raise OpError("Every head takes the maps of the same words, at least one: {head: {word: [h, w]}}.")
    panels = [[blend(image, _check_map(word, one)) for word, one in row.items()] for row in maps.values()]
    return sheet(panels, list(maps), words, title=title, subtitle=subtitle)


def _check_map(name: str, given: Any) -> np.ndarray:
    found = to_numpy(given)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise OpError(f"{name!r} must be two-dimensional and finite, and has shape {list(found.shape)}.")
    return found.astype(float)


def average_neighbours(pattern: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The means of neighbouring entries: [rows, columns]."""
    for axis, count in enumerate((rows, columns)):
        edges = np.linspace(0, pattern.shape[axis], count + 1).round().astype(int)
        sizes = np.diff(edges).reshape([-1, 1] if axis == 0 else [1, -1])
        pattern = np.add.reduceat(pattern, edges[:-1], axis=axis) / sizes
    return pattern
