"""How well a toy follows its prompts: its images are read back, attribute by attribute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dit_lens.analysis.metrics import wilson
from dit_lens.toys.scenes import ATTRIBUTES, Scene, recognise_scene

if TYPE_CHECKING:
    from PIL.Image import Image

Share = tuple[float, float, float]


def measure_shares(scenes: Sequence[Scene], images: Sequence[Image]) -> dict[str, Share]:
    """For every attribute, and for readability: the share of images that are right, and its 95 % Wilson interval.

    >>> from dit_lens.toys.scenes import draw, sample_scenes
    >>> scenes = sample_scenes(4, seed=0)
    >>> measure_shares(scenes, [draw(scene, 0).image for scene in scenes])["colour"][0]
    1.0

    scenes: that the images should show.
    images: one for each scene.
    """
    found = [recognise_scene(image).scene for image in images]
    right = [scene.agreement(read) for scene, read in zip(scenes, found, strict=True)]
    counts = {name: sum(one[name] for one in right) for name in ATTRIBUTES} | {
        "readable": sum(read is not None for read in found)
    }
    return {name: _measure_share(count, len(images)) for name, count in counts.items()}


def _measure_share(count: int, n: int) -> Share:
    share, low, high = wilson(count, n)
    return float(share), float(low), float(high)
