"""What an explorer sends to the browser: views as bytes and JSON, which static/explorer_data.js reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.explorer.colours import CLUSTER_COLOURS, PALETTES, parse_colour, read_palette
from dit_lens.explorer.view_arrays import ChannelMaps, Views
from dit_lens.explorer.widget import encode_webp

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LARGEST = 768  # pixels of the longer side of an image in the browser
FRAME = 512  # and of one that is predicted at a step

Span = tuple[int, int]  # where an image starts and ends in the bytes of all images


@dataclass(frozen=True)
class PaneSpans:
    """Where the images of a pane are. image: its own; None if it has none. frames: those of all steps; None without."""

    image: Span | None
    frames: tuple[Span | None, ...] | None


def make_info(views: Views, spans: Sequence[PaneSpans], initial: dict[str, Any]) -> dict[str, Any]:
    """Returns what the browser needs besides the arrays.

    views: the views.
    spans: where the images of each pane are.
    initial: state of a new explorer.
    """
    panes = [
        {"name": pane.name, "mapIndex": pane.map_index, "bytes": span.image, "frames": span.frames}
        for pane, span in zip(views.panes, spans, strict=True)
    ]
    return {
        "panes": panes,
        "groups": views.groups,
        "labelled": {name: list(labels) for name, labels in views.labelled.items()},
        "width": views.width,
        "blocks": views.blocks,
        "steps": views.steps,
        "grid": views.grid,
        "groupSize": views.channels.shape[-1],
        "mappedImages": len({pane.map_index for pane in views.panes} - {None}),
        "thumb": views.thumbs.shape[-2:],
        "palettes": {name: read_palette(name) for name in PALETTES},
        "clusterColours": [parse_colour(colour) for colour in CLUSTER_COLOURS],
        "masks": views.masks,
        "code": views.code,
        "note": views.note,
        "initial": initial,
    }


def join_images(views: Views) -> tuple[bytes, list[PaneSpans]]:
    """Returns all images as WebP, one after the other, and where those of each pane are; one that is shared, once."""
    files: list[bytes] = []
    known: dict[int, Span] = {}

    def add(image: Image | None, largest: int) -> Span | None:
        if image is None:
            return None
        if id(image) not in known:
            start = sum(map(len, files))
            files.append(encode_webp(image, largest))
            known[id(image)] = (start, start + len(files[-1]))
        return known[id(image)]

    spans = [
        PaneSpans(
            add(pane.image, LARGEST),
            tuple(add(pane.frames.get(step), FRAME) for step, _ in views.steps) if pane.frames else None,
        )
        for pane in views.panes
    ]
    return b"".join(files), spans


def join_blocks(views: Views, compute: Callable[[int], np.ndarray]) -> bytes:
    """Returns the arrays of all blocks, one after the other."""
    return b"".join(compute(block).tobytes() for block in range(len(views.blocks)))


def join_arrays(maps: ChannelMaps) -> bytes:
    """Returns all arrays of a channel, one after the other."""
    return b"".join(array.tobytes() for array in (maps.ranges, maps.means, maps.thumbs, maps.maps))
