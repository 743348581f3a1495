"""Figures with images in them: masks laid over an image, and rows of images with labels.

Letters: h w token grid, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit_lens.analysis.arrays import to_numpy
from dit_lens.analysis.clusters import iou, upsample
from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import check_number
from dit_lens.core.runs.html import data_url
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.theme import INK, WIDTH, set_title, shorten_site

if TYPE_CHECKING:
    from PIL.Image import Image

# Magenta, because images seldom have it; the truth is white on black, which is visible on anything.
MASK = "#FF00C8"

# Images a row, and the pixels beyond which an image is made smaller before it is put into a figure.
_ROW, _PIXELS = 8, 512


@carries_code
@checked
def cluster_overlay(
    image: Image, mask: Any, *, truth: Any = None, title: str = "Clusters", opacity: float = 0.45
) -> go.Figure:
    """A mask of the token grid in magenta over its image, and the true subject as an outline.

    >>> from PIL import Image
    >>> mask = np.array([[True, False], [False, False]])
    >>> figure = cluster_overlay(Image.new("RGB", (8, 8)), mask, truth=upsample(mask, (8, 8)))
    >>> figure.layout.title.subtitle.text
    'magenta: mask, 1 of 2 x 2 tokens; dashed: true subject; IoU 1.00'

    Clicking on the legend hides and shows mask and outline.

    image: PIL image, H x W pixels.
    mask: bool [h, w], enlarged by nearest neighbour.
    truth: mask of the subject, bool [H, W], or None.
    title: title of the figure.
    opacity: opacity of the mask, 0 to 1.
    """
    check_number("opacity", opacity, 0, 1)
    found, true = _check_mask(mask, "mask"), None if truth is None else _check_mask(truth, "truth")
    facts = [f"magenta: mask, {int(found.sum())} of {found.shape[0]} x {found.shape[1]} tokens"]
    facts += [] if true is None else ["dashed: true subject", f"IoU {_measure_iou(image, found, true):.2f}"]
    figure = go.Figure([_draw_image(image), *_draw_layers(image.size, found, true, opacity)])
    # Keys of their own, in colours that show on any page; a click hides the layer.
    keys = {"mask": {"color": MASK, "width": 2}, "true subject": {"color": INK, "width": 2, "dash": "3px,3px"}}
    for name, line in list(keys.items())[: 1 if true is None else 2]:
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, legendgroup=name, line=line, showlegend=True)
    _hide_axes(figure, image.size)
    return set_title(figure, title, "; ".join(facts), height=460)


@carries_code
@checked
def overlay_grid(
    image: Image, masks: Mapping[str, Any], *, truth: Any = None, title: str = "Clusters", opacity: float = 0.45
) -> go.Figure:
    """One image under several masks, such as one per block.

    >>> from PIL import Image
    >>> mask = np.array([[True, False], [False, False]])
    >>> figure = overlay_grid(Image.new("RGB", (8, 8)), {"blocks.0.img": mask, "blocks.1.img": ~mask})
    >>> [label.text for label in figure.layout.annotations]
    ['block 0', 'block 1']

    Labels say the IoU if the truth is known.

    image: PIL image, H x W pixels.
    masks: name -> bool [h, w].
    truth: mask of the subject, bool [H, W], or None.
    title: title of the figure.
    opacity: opacity of the masks, 0 to 1.
    """
    check_number("opacity", opacity, 0, 1)
    if not masks:
        raise OpError("There are no masks to lay over the image. Give at least one: {name: bool [h, w]}.")
    found = {name: _check_mask(mask, f"the mask of {name}") for name, mask in masks.items()}
    true = None if truth is None else _check_mask(truth, "truth")
    labels = [f"block {shorten_site(name)}" if shorten_site(name).isdecimal() else name for name in found]
    if true is not None:
        labels = [
            f"{label}<br>IoU {_measure_iou(image, m, true):.2f}"
            for label, m in zip(labels, found.values(), strict=True)
        ]
    figure, cells = _make_cells([image.size] * len(found), labels)
    small = _draw_image(image)
    for mask, (row, column) in zip(found.values(), cells, strict=True):
        for trace in (small, *_draw_layers(image.size, mask, true, opacity)):
            figure.add_trace(trace, row=row, col=column)
    subtitle = "magenta: mask" + ("" if true is None else "; dashed: true subject")
    return set_title(figure, title, subtitle, height=figure.layout.height)


@carries_code
@checked
def strip(images: Sequence[Image], labels: Sequence[str], *, title: str = "", subtitle: str = "") -> go.Figure:
    """Images in a row with labels underneath, eight to a row; pixels stay sharp squares.

    >>> from PIL import Image
    >>> figure = strip([Image.new("RGB", (8, 8))] * 3, ["target", "strength 0.5", "source"])
    >>> len(figure.data), [label.text for label in figure.layout.annotations]
    (3, ['target', 'strength 0.5', 'source'])

    images: PIL images, of any sizes.
    labels: one per image; may hold <br>.
    title: title of the figure.
    subtitle: the small print below it.
    """
    if not images or len(images) != len(labels):
        raise OpError(f"A strip takes one label per image, and got {len(images)} images and {len(labels)} labels.")
    figure, cells = _make_cells([image.size for image in images], labels)
    for image, (row, column) in zip(images, cells, strict=True):
        figure.add_trace(_draw_image(image), row=row, col=column)
    headed = bool(title or subtitle)
    figure.update_layout(margin={"t": 60 if headed else 8})
    return set_title(figure, title, subtitle, height=figure.layout.height - (0 if headed else 52))


@carries_code
@checked
def sheet(
    images: Sequence[Sequence[Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    subtitle: str = "",
) -> go.Figure:
    """Images in a table, such as steps by blocks.

    >>> from PIL import Image
    >>> figure = sheet([[Image.new("RGB", (8, 8))] * 2], ["step 0"], ["block 0", "block 1"])
    >>> [label.text for label in figure.layout.annotations]
    ['block 0', 'block 1', 'step 0']

    images: [row][column], PIL images.
    rows: labels of the rows.
    columns: labels of the columns.
    title: title of the figure.
    subtitle: the small print below it.
    """
    if not images or any(len(line) != len(columns) for line in images) or len(images) != len(rows):
        raise OpError(
            f"A sheet takes one label per row and column, and got {len(rows)} and {len(columns)} labels for "
            f"{len(images)} rows of {', '.join(str(len(line)) for line in images)} images."
        )
    labels = [column for _ in rows for column in columns]
    flat = [image for line in images for image in line]
    figure, cells = _make_cells([image.size for image in flat], labels, len(columns))
    for image, (row, column) in zip(flat, cells, strict=True):
        figure.add_trace(_draw_image(image), row=row, col=column)
    for number, label in enumerate(rows, start=1):
        domain = figure.get_subplot(number, 1).yaxis.domain
        figure.add_annotation(
            text=label,
            textangle=-90,
            x=0,
            y=sum(domain) / 2,
            xref="paper",
            yref="paper",
            xanchor="right",
            yanchor="middle",
            xshift=-4,
            showarrow=False,
            font={"size": 11},
        )
    figure.update_layout(margin={"l": 42})
    return set_title(figure, title, subtitle, height=figure.layout.height)


@checked
def trace_outline(mask: np.ndarray) -> tuple[list[float | None], list[float | None]]:
    """The border of a mask as line segments x, y with None between them; pixel (0, 0) spans 0 to 1.

    >>> trace_outline(np.array([[True]]))
    ([0, 1, None, 0, 1, None, 0, 0, None, 1, 1, None], [0, 0, None, 1, 1, None, 0, 1, None, 0, 1, None])

    mask: bool [H, W]. Neighbouring edges on one line are joined.
    """
    x: list[float | None] = []
    y: list[float | None] = []
    # An edge lies wherever two neighbours differ; outside of the image is outside of the mask.
    across = np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0)  # [H + 1, W]
    down = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # [H, W + 1]
    for lines, along, beside in ((across, x, y), (down.T, y, x)):
        for i, line in enumerate(lines):
            # A run is one stretch of edges of one sign: at a saddle the mask changes sides, and so the run ends.
            jumps = np.flatnonzero(np.diff(np.concatenate([[0], line, [0]])))
            for start, stop in zip(jumps[:-1].tolist(), jumps[1:].tolist(), strict=True):
                if line[start]:
                    along += [start, stop, None]
                    beside += [i, i, None]
    return x, y


def _draw_image(image: Image) -> go.Image:
    """The image as a trace whose coordinates are the pixels of the original."""
    small = image.convert("RGB")
    scale = max(1.0, max(image.size) / _PIXELS)
    if scale > 1:
        small = small.resize((round(image.width / scale), round(image.height / scale)))
    dx, dy = image.width / small.width, image.height / small.height
    return go.Image(source=data_url(small), x0=dx / 2, y0=dy / 2, dx=dx, dy=dy, zsmooth=False, hoverinfo="skip")


def _draw_layers(
    size: tuple[int, int], mask: np.ndarray, truth: np.ndarray | None, opacity: float
) -> list[go.Heatmap | go.Scatter]:
    """The mask, its border and the border of the truth, in pixels of the image.

    size: of the image, (W, H).
    mask: bool [h, w].
    truth: bool [H, W], or None.
    opacity: opacity of the mask, 0 to 1.
    """
    dx, dy = size[0] / mask.shape[1], size[1] / mask.shape[0]
    tokens = go.Heatmap(
        z=np.where(mask, 1.0, np.nan),
        x0=dx / 2,
        y0=dy / 2,
        dx=dx,
        dy=dy,
        legendgroup="mask",
        colorscale=[[0, MASK], [1, MASK]],
        opacity=opacity,
        showscale=False,
        hoverongaps=False,
        customdata=np.moveaxis(np.indices(mask.shape), 0, -1),
        hovertemplate="token row %{customdata[0]}, column %{customdata[1]}<extra></extra>",
    )
    layers = [tokens, _draw_border(size, mask, "mask", {"color": MASK, "width": 2})]
    if truth is not None:
        layers += [
            _draw_border(size, truth, "true subject", {"color": "black", "width": 2.5}),
            _draw_border(size, truth, "true subject", {"color": "white", "width": 1.5, "dash": "3px,3px"}),
        ]
    return layers


def _draw_border(size: tuple[int, int], mask: np.ndarray, name: str, line: dict[str, Any]) -> go.Scatter:
    """The border of a mask, in pixels of the image.

    size: of the image, (W, H).
    mask: bool, of any shape.
    name: name in the legend.
    line: style of the line, as plotly takes it.
    """
    x, y = trace_outline(mask)
    dx, dy = size[0] / mask.shape[1], size[1] / mask.shape[0]
    return go.Scatter(
        x=[None if value is None else value * dx for value in x],
        y=[None if value is None else value * dy for value in y],
        name=name,
        legendgroup=name,
        mode="lines",
        line=line,
        hoverinfo="skip",
        showlegend=False,
    )


def _make_cells(
    sizes: Sequence[tuple[int, int]], labels: Sequence[str], columns: int | None = None
) -> tuple[go.Figure, list[tuple[int, int]]]:
    """Empty cells for images (W, H), wrapped into even rows, labels below; and the (row, column) of each."""
    rows = -(-len(sizes) // (columns or _ROW))
    columns = columns or -(-len(sizes) // rows)
    wide = (WIDTH - 16) / max(columns, 3)
    lines = 1 + max(label.count("<br>") for label in labels)
    tall = min(320.0, wide * max(height / width for width, height in sizes))
    below = 8 + 15 * lines
    height = rows * tall + (rows - 1) * below
    figure = make_subplots(
        rows, columns, horizontal_spacing=0.06 / columns, vertical_spacing=below / height if rows > 1 else 0
    )
    cells = [(1 + i // columns, 1 + i % columns) for i in range(len(sizes))]
    for i in range(rows * columns):
        row, column = 1 + i // columns, 1 + i % columns
        if i < len(sizes):
            _hide_axes(figure, sizes[i], row=row, col=column)
            axes = figure.get_subplot(row, column)
            figure.add_annotation(
                text=labels[i],
                x=sum(axes.xaxis.domain) / 2,
                y=axes.yaxis.domain[0],
                xref="paper",
                yref="paper",
                xanchor="center",
                yanchor="top",
                yshift=-2,
                showarrow=False,
                font={"size": 11},
            )
        else:
            figure.update_xaxes(visible=False, row=row, col=column)
            figure.update_yaxes(visible=False, row=row, col=column)
    figure.update_layout(height=int(height + 60 + below), margin={"l": 8, "r": 8, "t": 60, "b": below})
    return figure, cells


def _hide_axes(figure: go.Figure, size: tuple[int, int], **cell: int) -> None:
    """No axes, square pixels, row 0 on top."""
    x = figure.get_subplot(**cell).yaxis.anchor if cell else "x"
    figure.update_xaxes(visible=False, range=[0, size[0]], constrain="domain", **cell)
    figure.update_yaxes(
        visible=False, range=[size[1], 0], scaleanchor=x, constrain="domain", constraintoward="bottom", **cell
    )
    if not cell:
        figure.update_layout(margin={"l": 8, "r": 8, "b": 34})


def _measure_iou(image: Image, mask: np.ndarray, truth: np.ndarray) -> float:
    if truth.shape != (image.height, image.width):
        raise OpError(
            f"The truth has shape {truth.shape} and the image {image.height} x {image.width} pixels. "
            "Give the truth in the image's pixels."
        )
    return iou(upsample(mask, truth.shape), truth)


def _check_mask(mask: Any, what: str) -> np.ndarray:
    array = to_numpy(mask)
    if array.ndim != 2 or array.dtype != bool or not array.size:
        raise OpError(f"{what} must be bool and two-dimensional, and is {array.dtype} {list(array.shape)}.")
    return array
