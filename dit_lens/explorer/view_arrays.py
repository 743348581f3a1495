"""What an explorer shows, as arrays: images, maps of channels, clusters of tokens. Independent of runs and widgets.

Letters: l block (any site with image tokens), e image with maps, s step, g group of channels, k channel of a group, h w
token grid, d channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.old_names import OldName

if TYPE_CHECKING:
    from PIL.Image import Image

NONE = 255  # the label of a token that is in no cluster


def _no_maps(_: int) -> np.ndarray:
    return np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Pane:
    """An image to choose from.

    name: what the list of images shows, such as prompt and seed.
    image: the image; None if the run kept none.
    map_index: index e among the images that have maps or clusters; None if it has none.
    frames: step -> the image predicted there.
    """

    name: str
    image: Image | None = None
    map_index: int | None = None
    frames: Mapping[int, Image] = field(default_factory=dict)

    values = OldName("map_index")


@dataclass(frozen=True)
class ChannelMaps:
    """The maps of one channel at all blocks.

    ranges: float32 [l, e, s, 2], as in :class:`Views`.
    means: float32 [l, e, s].
    thumbs: uint8 [l, e, s, h', w'].
    maps: uint8 [l, e, s, h, w].
    """

    ranges: np.ndarray
    means: np.ndarray
    thumbs: np.ndarray
    maps: np.ndarray


def _no_channel(number: int) -> ChannelMaps:
    raise KeyError(number)


@dataclass(frozen=True)
class Views:
    """All data that an explorer shows.

    panes: images to choose from.
    groups: names of the groups of channels.
    blocks: names of the sites, in the order of the model.
    steps: (index, sigma) of each step; sigma is None if it is not known.
    grid: (h, w) of the maps.
    channels: int32 [l, g, k], channel numbers; -1 if a group has fewer.
    ranges: float32 [l, e, s, g, k, 2], smallest and largest value of each map; NaN if there is none.
    means: float32 [l, e, s, g, k], mean value of each map.
    thumbs: uint8 [l, e, s, g, k, h', w'], thumbnails of the maps.
    scores: float32 [l, d], score of every channel; [0, 0] if not known.
    maps: l -> uint8 [e * s * g * k, h, w], each map scaled from its smallest value (0) to its largest (255).
    labels: l -> uint8 [e, s, g, h, w], cluster of each token, numbered from the lowest mean heat.
    labelled: group -> what its "channels" are called if they are no channels but numbered from 0, such as words.
    width: number of channels that ``other`` knows; 0 if only those of the groups are known.
    other: number of any channel -> its maps.
    code: code that makes this explorer, with a placeholder for its state.
    masks: whether the labels are masks of a study instead of clusters.
    right: index of the image that is first shown on the right; -1 for none.
    note: text below the views.
    """

    panes: tuple[Pane, ...]
    groups: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    steps: tuple[tuple[int, float | None], ...] = ()
    grid: tuple[int, int] = (1, 1)
    channels: np.ndarray = field(default_factory=lambda: np.zeros((0,) * 3, np.int32))
    ranges: np.ndarray = field(default_factory=lambda: np.zeros((0,) * 6, np.float32))
    means: np.ndarray = field(default_factory=lambda: np.zeros((0,) * 5, np.float32))
    thumbs: np.ndarray = field(default_factory=lambda: np.zeros((0,) * 7, np.uint8))
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0,) * 2, np.float32))
    maps: Callable[[int], np.ndarray] = _no_maps
    labels: Callable[[int], np.ndarray] = _no_maps
    labelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    width: int = 0
    other: Callable[[int], ChannelMaps] = _no_channel
    code: str = ""
    masks: bool = False
    right: int = -1
    note: str = ""

    @property
    def map_bytes(self) -> int:
        """Size of all maps, in bytes."""
        return self.means.size * prod(self.grid)
