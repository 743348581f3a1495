"""What an explorer shows of a study's result: its images, and its masks over blocks and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.analysis.clusters import to_grid
from dit_lens.errors import OpError
from dit_lens.explorer.view_arrays import NONE, Pane, Views
from dit_lens.studies.shared.keys import ImageKey

if TYPE_CHECKING:
    from dit_lens.studies.shared.result import Result

FIRST = "top"  # the arm that is shown first


def view_result(result: Result) -> Views:
    """The views of a result: of masks for every block, step and arm, if the study keeps such; else of its images."""
    if not result.images:
        raise OpError(
            f"this result of {result.study} keeps no images, so there is nothing to explore. See result.figure()."
        )
    code = (
        "import dit_lens as dl\n\nresult = dl.studies.Result.load(folder)  # what result.save(folder) wrote\n"
        "dl.explore(result{state})"
    )
    keys = [key for text in result.masks if (key := ImageKey.parse(text)) and key.block is not None]
    if keys:
        return _view_masks(result, keys, code)
    panes = tuple(Pane(_name_image(text, result), image) for text, image in result.images.items())
    return Views(panes=panes, code=code, right=1 if len(panes) > 1 else -1)


def _view_masks(result: Result, keys: Sequence[ImageKey], code: str) -> Views:
    images = list(dict.fromkeys(ImageKey(key.item, key.seed) for key in keys))
    steps, blocks = (sorted({getattr(key, name) for key in keys}) for name in ("step", "block"))
    arms = sorted({_name_arm(key) for key in keys}, key=lambda arm: (arm != FIRST, arm))
    grid = result.masks[str(keys[0])].shape
    masks = {(replace(key, arm=None, draw=None), _name_arm(key)): result.masks[str(key)] for key in keys}
    truths = {key: result.masks.get(str(replace(key, arm="truth"))) for key in images}
    groups = [*arms, *(["truth"] if any(truth is not None for truth in truths.values()) else [])]
    fit = {key: None if truth is None else _fit_to_grid(truth, grid) for key, truth in truths.items()}

    def labels(block: int) -> np.ndarray:
        made = np.full((len(images), len(steps), len(groups), *grid), NONE, np.uint8)
        for e, s, g in np.ndindex(*made.shape[:3]):
            at = replace(images[e], step=steps[s], block=blocks[block])
            mask = fit[images[e]] if groups[g] == "truth" else masks.get((at, groups[g]))
            if mask is not None:
                made[e, s, g] = mask
        return made

    return Views(
        panes=tuple(
            Pane(_name_image(str(key), result), result.images.get(str(key)), i) for i, key in enumerate(images)
        ),
        groups=tuple(groups),
        blocks=tuple(f"blocks.{block}.img" for block in blocks),
        steps=tuple((step, None) for step in steps),
        grid=(grid[0], grid[1]),
        labels=labels,
        code=code,
        masks=True,
    )


def _name_arm(key: ImageKey) -> str:
    """An arm with its draw, which the first does not have."""
    return f"{key.arm}" if key.draw is None else f"{key.arm}/{key.draw}"


def _fit_to_grid(truth: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    return truth if truth.shape == tuple(grid) else to_grid(truth, (grid[0], grid[1]))


def _name_image(text: str, result: Result) -> str:
    """The key of an image for people: the prompt that it numbers, then its other parts."""
    key, prompts = ImageKey.parse(text), result.settings.get("prompts") or result.settings.get("pairs") or []
    if key is None or isinstance(prompts, Mapping) or key.item >= len(prompts):
        return text
    prompt = prompts[key.item]
    words = " -> ".join(map(str, prompt)) if isinstance(prompt, list | tuple) else str(prompt)
    k = [f"k {key.k}"] if key.k else []
    return ", ".join([words, f"seed {key.seed}", *k, *replace(key, k=None).parts[2:]])
