"""What else in a run tells where the subject is: the baselines and nulls of claim 2.

Maps over the image tokens, and the masks they make. Letters: n image token, d channel, h w token grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse.linalg import svds

from dit_lens.core.request.call import needs_weights
from dit_lens.errors import OpError, nearest

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens

POLARITIES = ("heat", "border")
PATTERN_BYTES = 2e9  # of the patterns of attention that are held at once


def token_norm(x: np.ndarray) -> np.ndarray:
    """How long every token is, over all of its channels: [n].

    >>> token_norm(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 0.0]
    """
    return np.linalg.norm(x, axis=1)


def first_component(x: np.ndarray) -> np.ndarray:
    """The tokens along the first principal component of all channels: float64 [n], of mean 0.

    >>> first_component(np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])).round(6).tolist()
    [-1.0, 0.0, 1.0]

    x: [n, d], as they are: channels that vary most weigh most. A component has no sign of its own; here the channels'
    weights sum to a positive number.
    """
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    if min(centred.shape) == 1 or not centred.any():
        return centred.sum(1)
    _, _, weights = svds(centred, k=1, v0=np.ones(min(centred.shape)), solver="arpack")
    return centred @ weights[0] * (1.0 if weights[0].sum() >= 0 else -1.0)


def largest(values: np.ndarray, size: int, grid: tuple[int, ...], polarity: str = "heat") -> np.ndarray:
    """The mask of the ``size`` tokens that stand out most: bool [h, w].

    >>> largest(np.array([0.1, 0.9, 0.7, 0.2]), 1, (2, 2)).tolist()
    [[False, True], [False, False]]

    values: [n]. polarity: "heat": the largest values stand out. "border": the largest or the smallest, whichever end
    the border of the grid is farther from on average. Of equal values the first tokens are taken.
    """
    if polarity not in POLARITIES:
        raise OpError(f"There is no polarity {polarity!r}.{nearest(polarity, POLARITIES)}")
    edge = np.ones(grid, dtype=bool)
    edge[1:-1, 1:-1] = False
    turned = polarity == "border" and values[edge.ravel()].mean() > values.mean()
    mask = np.zeros(values.size, dtype=bool)
    mask[np.argsort(values if turned else -values, kind="stable")[:size]] = True
    return mask.reshape(grid)


def centred_disc(size: int, grid: tuple[int, ...]) -> np.ndarray:
    """The mask of the ``size`` tokens nearest to the centre of the image: what needs no look at it. bool [h, w].

    >>> centred_disc(4, (4, 4)).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in grid)
    return largest(-np.hypot(rows[:, None], columns).ravel(), size, grid)


def noisy_latent(clean: Any, predicted: Any, sigma: float, kind: str) -> Any:
    """The latents a transformer was given, from what it predicts ("velocity") and the clean latents that means ("x0").

    >>> noisy_latent(np.array([1.0]), np.array([2.0]), 0.5, "flow").tolist()
    [2.0]

    kind: "flow" (x0 = x - sigma v), "v_prediction" or "epsilon".
    """
    if kind == "flow":
        return clean + sigma * predicted
    kept = (1 - sigma**2) ** 0.5
    return (clean + sigma * predicted) / kept if kind == "v_prediction" else kept * clean + sigma * predicted


def heads_of(lens: DiTLens, blocks: Sequence[int]) -> dict[int, int]:
    """How many heads attend in every block; SiteError where one forms no pattern or does not count its heads.

    ExecutionError where patterns cannot be read here, the model being on a server.
    """
    needs_weights(lens.pipe, "patterns of attention need")
    for block in blocks:
        lens.anatomy.attention(block)
    return {block: len(lens.heads(f"blocks.{block}.img.attn.q")) for block in blocks}


def word_attention(
    lens: DiTLens,
    prompts: Sequence[str],
    words: Sequence[Sequence[int]],
    heads: dict[int, int],
    steps: Sequence[int],
    grid: tuple[int, ...],
    **call: Any,
) -> dict[int, np.ndarray]:
    """How much of its attention to text every image token gives to a word: block -> [step, row, n].

    The mean over heads and the word's tokens. A share, because how much a token attends to text at all would otherwise
    outweigh which word it attends to.
    words: the text tokens of each row's word. heads: of every block that is read, as ``heads_of`` counts them.
    call: as of the run that the maps are to go with, its seed included. Only as many blocks are read in one run as
    ``PATTERN_BYTES`` hold; of each pattern nothing but the word's columns is kept.
    """
    size = 4 * len(steps) * len(prompts) * (np.prod(grid) + 512) ** 2  # of one head; 512: room for text tokens
    maps: dict[int, np.ndarray] = {}
    for count, alike in itertools.groupby(heads, heads.__getitem__):
        blocks = list(alike)
        at_once = max(1, int(PATTERN_BYTES // (size * count)))
        for start in range(0, len(blocks), at_once):
            found = lens.read_pattern(
                prompts, blocks[start : start + at_once], heads=range(count), steps=list(steps), **call
            )
            for block in found.tensors:
                to_text = found.between(block, "img", "txt")  # [step, row, head, n, text token]
                share = (to_text / to_text.sum(-1, keepdim=True)).mean(2)
                columns = [share[:, row, :, list(tokens)].mean(-1) for row, tokens in enumerate(words)]
                maps[block] = np.stack([column.numpy() for column in columns], 1)
    return maps


def subject_words(lens: DiTLens, prompts: Sequence[str], words: str | Sequence[str] | None) -> list[str]:
    """The word for the subject of every prompt: given; of a toy's scene its shape; none where nobody says."""
    from dit_lens.studies.shared.judges import judge_for

    if words is None:
        if judge_for(lens, prompts, None) is None:
            return []
        from dit_lens.toys.scenes import Scene

        return [Scene.parse(prompt).shape for prompt in prompts]
    given = [words] * len(prompts) if isinstance(words, str) else list(words)
    if given and len(given) != len(prompts):
        raise OpError(f"words= takes one word for every prompt, and got {len(given)} for {len(prompts)} prompts.")
    return given
