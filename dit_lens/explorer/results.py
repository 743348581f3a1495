"""What an explorer shows of a study's result: its images, and its masks over blocks and steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.analysis.clusters import to_grid
from dit_lens.errors import OpError
from dit_lens.explorer.views import NONE, Pane, Views

if TYPE_CHECKING:
    from dit_lens.studies import Result

# prompt / seed / step / block / arm, as organisation keeps its masks
_MASK = re.compile(r"(?P<image>\d+/\d+)/(?P<step>\d+)/(?P<block>\d+)/(?P<arm>.+)")

SIZED = ("disruption", "transfer", "transfer_image")  # studies that key an image by k, 0 where it has none
FIRST = "top"  # the arm that is looked at first


def of_result(result: Result) -> Views:
    """The views of a result. Those of organisation have masks for every block, step and arm; others have images."""
    if not result.images:
        raise OpError(
            f"this result of {result.study} keeps no images, so there is nothing to explore. See result.figure()."
        )
    code = (
        "import dit_lens as dl\n\nresult = dl.studies.Result.load(folder)  # what result.save(folder) wrote\n"
        "dl.explore(result{state})"
    )
    found = {key: match for key in result.masks if (match := _MASK.fullmatch(key))}
    if not found:
        panes = tuple(Pane(_name(key, result), image) for key, image in result.images.items())
        return Views(panes=panes, code=code, right=1 if len(panes) > 1 else -1)
    return _of_masks(result, list(found.values()), code)


def _of_masks(result: Result, found: Sequence[re.Match[str]], code: str) -> Views:
    images = list(dict.fromkeys(match["image"] for match in found))
    steps, blocks = (sorted({int(match[name]) for match in found}) for name in ("step", "block"))
    arms = sorted({match["arm"] for match in found}, key=lambda arm: (arm != FIRST, arm))
    grid = result.masks[found[0].group()].shape
    truths = {key: result.masks.get(f"{key}/truth") for key in images}
    groups = [*arms, *(["truth"] if any(truth is not None for truth in truths.values()) else [])]
    fit = {key: None if truth is None else _on_grid(truth, grid) for key, truth in truths.items()}

    def labels(block: int) -> np.ndarray:
        made = np.full((len(images), len(steps), len(groups), *grid), NONE, np.uint8)
        for e, s, g in np.ndindex(*made.shape[:3]):
            key = f"{images[e]}/{steps[s]}/{blocks[block]}/{groups[g]}"
            mask = fit[images[e]] if groups[g] == "truth" else result.masks.get(key)
            if mask is not None:
                made[e, s, g] = mask
        return made

    return Views(
        panes=tuple(Pane(_name(key, result), result.images.get(key), i) for i, key in enumerate(images)),
        groups=tuple(groups),
        blocks=tuple(f"blocks.{block}.img" for block in blocks),
        steps=tuple((step, None) for step in steps),
        grid=(grid[0], grid[1]),
        labels=labels,
        code=code,
        masks=True,
    )


def _on_grid(truth: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    return truth if truth.shape == tuple(grid) else to_grid(truth, (grid[0], grid[1]))


def _name(key: str, result: Result) -> str:
    """A key in words: the prompt it numbers, then its other parts."""
    number, *rest = key.split("/")
    listed = result.settings.get("prompts") or result.settings.get("pairs") or []
    if isinstance(listed, Mapping) or not number.isdigit() or int(number) >= len(listed):
        return key
    prompt = listed[int(number)]
    words = " -> ".join(map(str, prompt)) if isinstance(prompt, list | tuple) else str(prompt)
    if not rest:
        return words
    seed, *more = rest
    if more and result.study in SIZED:
        size, *more = more
        more = ([f"k {size}"] if size != "0" else []) + more
    return ", ".join([words, f"seed {seed}", *more])
