"""What is shown with a run though it was made in a run of its own: maps of words, and images predicted at steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.errors import OpError, show
from dit_lens.families.sites import Site

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.runs.run import Run
    from dit_lens.instruments.word_maps import WordMap
    from dit_lens.instruments.x0_lens import X0

TOLERANCE = 1.0  # mean difference of pixels (0 to 255) that rounding on a device may leave between equal runs


def check_kinds(x0: Any, words: Any) -> None:
    """Raises OpError if x0 or words are nothing that they can be."""
    from dit_lens.instruments.word_maps import WordMap
    from dit_lens.instruments.x0_lens import X0

    if not isinstance(x0, X0 | None):
        raise OpError(f"x0={show(x0)} is not what lens.read_x0(prompt, 'x0', steps=...) returns. Give that, or None.")
    if not isinstance(words, WordMap | None):
        raise OpError(f"words={show(words)} is not what lens.word_map(prompt, words) returns. Give that, or None.")


def check_same_run(run: Run, other: Run, name: str) -> None:
    """Raises OpError if two runs do not draw the same images. name: the argument that the other run came with."""
    for asked in ("prompt", "seed"):
        one, two = run.spec.get(asked), other.spec.get(asked)
        if one != two:
            raise OpError(f"{name}= is of another run: its {asked} is {two!r}, that of the run shown is {one!r}.")
    for row, (one, two) in enumerate(zip(run.images, other.images, strict=False)):
        far = one.size != two.size or np.abs(np.asarray(one, float) - np.asarray(two, float)).mean() > TOLERANCE
        if far:
            raise OpError(
                f"{name}= is of another run: its image {row} differs from that of the run shown. Give both the same "
                "arguments of the pipeline, such as num_inference_steps, and the same edits."
            )


def frames_of(x0: X0 | None, row: int) -> dict[int, Image]:
    """Returns step -> the image predicted there, of one row."""
    if x0 is None:
        return {}
    return {step: images[row] for step, images in zip(x0.steps, x0.images["x0"], strict=True)}


def values_of_words(words: WordMap, site: str, steps: Sequence[int], rows: Sequence[int]) -> np.ndarray | None:
    """Returns float32 [e, s, w, n], the maps of words at a site; None if its block was not kept.

    words: the maps.
    site: name of the site.
    steps: steps to show.
    rows: rows of the run, e of them.
    """
    block = Site.parse(site).block
    if block not in words.blocks:
        return None
    at = [words.steps.index(step) for step in steps]
    chosen = [
        values[words.blocks.index(block)][at][:, list(rows)].flatten(2).transpose(0, 1)
        for values in words.tensors.values()
    ]
    return np.stack([value.float().numpy() for value in chosen], 2)
