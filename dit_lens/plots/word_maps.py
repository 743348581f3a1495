"""Maps of words beside the image they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dit_lens.analysis.arrays import to_numpy
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.overlays import strip

if TYPE_CHECKING:
    import plotly.graph_objects as go

DIMMED = 0.35  # of the image, in grey, under a map


@carries_code
@checked
def word_map_figure(image: Image.Image, maps: Mapping[str, Any], *, title: str = "", subtitle: str = "") -> go.Figure:
    """An image, and the map of every word over it: from dark, its lowest value, to bright, its highest.

    >>> figure = word_map_figure(Image.new("RGB", (8, 8)), {"sky": np.eye(2), "tree": 1 - np.eye(2)})
    >>> [label.text for label in figure.layout.annotations]
    ['image', 'sky<br>0 to 1', 'tree<br>0 to 1']

    image: PIL image.
    maps: word -> [h, w], shown with its own range, which its label states.
    title: title of the figure.
    subtitle: the small print below it.
    """
    if not maps:
        raise OpError("There are no maps to show. Give at least one: {word: [h, w]}.")
    found = {word: to_numpy(one) for word, one in maps.items()}
    if odd := [word for word, one in found.items() if one.ndim != 2 or not np.isfinite(one).all()]:
        raise OpError(f"the map of {odd[0]!r} must be [h, w], finite, and has shape {list(found[odd[0]].shape)}.")
    labels = [f"{word}<br>{one.min():.2g} to {one.max():.2g}" for word, one in found.items()]
    painted = [blend(image, one) for one in found.values()]
    return strip([image, *painted], ["image", *labels], title=title, subtitle=subtitle)


def paint(heat: np.ndarray, size: tuple[int, int], *, least: float | None = None) -> Image.Image:
    """A map of tokens from dark to bright, as large as an image.

    heat: [h, w].
    size: of the image.
    least: the value that is dark; the map's lowest by default.
    """
    from plotly.colors import sample_colorscale

    low = float(heat.min()) if least is None else least
    spread = float(heat.max()) - low
    scaled = (heat - low) / (spread if spread > 0 else 1)
    steps = np.array(sample_colorscale("Inferno", np.linspace(0, 1, 256).tolist(), colortype="tuple"))
    pixels = (255 * steps[(255 * scaled).round().astype(int)]).round().astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def blend(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """A map of tokens over its image, in dim grey. heat: [h, w]."""
    return Image.blend(paint(heat, image.size), image.convert("L").convert("RGB"), DIMMED)
