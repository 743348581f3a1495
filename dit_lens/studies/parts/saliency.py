"""What else in a run tells where the subject is: the baselines and nulls of claim 2.

Maps over the image tokens, and the masks they make. Letters: n image token, d channel, h w token grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse.linalg import svds

from dit_lens.analysis.arrays import border_of
from dit_lens.errors import OpError, check_choice
from dit_lens.studies.shared.batches import share_call
from dit_lens.studies.shared.judges import choose_judge
from dit_lens.toys.scenes import Scene

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.batches import SeededPrompts

POLARITIES = ("heat", "border", "distance")
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
    # Any fixed start but a constant one, which centred tokens map to zero.
    start = np.random.default_rng(0).normal(size=min(centred.shape))
    _, _, weights = svds(centred, k=1, v0=start, solver="arpack")
    return centred @ weights[0] * (1.0 if weights[0].sum() >= 0 else -1.0)


def select_largest(values: np.ndarray, size: int, grid: tuple[int, ...], polarity: str = "heat") -> np.ndarray:
    """The mask of the ``size`` tokens that stand out most: bool [h, w].

    >>> select_largest(np.array([0.1, 0.9, 0.7, 0.2]), 1, (2, 2)).tolist()
    [[False, True], [False, False]]

    Of equal values the first tokens are taken.

    values: [n].
    size: number of tokens.
    grid: token grid, (h, w).
    polarity: "heat": the largest values stand out; "border": the largest or the smallest, whichever end the border of
      the grid is farther from on average; "distance": those farthest from the mean of the border.
    """
    check_choice(polarity, POLARITIES, "polarity")
    border = values[border_of(grid).ravel()].mean()
    if polarity == "distance":
        values = np.abs(values - border)
    elif polarity == "border" and border > values.mean():
        values = -values
    mask = np.zeros(values.size, dtype=bool)
    mask[np.argsort(-values, kind="stable")[:size]] = True
    return mask.reshape(grid)


def centred_disc(size: int, grid: tuple[int, ...]) -> np.ndarray:
    """The mask of the ``size`` tokens nearest to the centre, which needs no look at the image: bool [h, w].

    >>> centred_disc(4, (4, 4)).astype(int).tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in grid)
    return select_largest(-np.hypot(rows[:, None], columns).ravel(), size, grid)


def noisy_latent(clean: Any, predicted: Any, sigma: float, kind: str) -> Any:
    """The latents that a transformer was given, from what it predicts and the clean latents that follow from it.

    >>> noisy_latent(np.array([1.0]), np.array([2.0]), 0.5, "flow").tolist()
    [2.0]

    clean: predicted clean latents, read at "x0".
    predicted: prediction of the transformer, read at "velocity".
    sigma: noise level of the step.
    kind: "flow", "v_prediction" or "epsilon".
    """
    if kind == "flow":
        return clean + sigma * predicted  # x0 = x - sigma v
    # x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, and v = alpha eps - sigma x0 (arXiv 2202.00512, appendix D).
    kept = (1 - sigma**2) ** 0.5
    return (clean + sigma * predicted) / kept if kind == "v_prediction" else kept * clean + sigma * predicted


def count_heads(lens: DiTLens, blocks: Sequence[int]) -> dict[int, int]:
    """Counts the heads of every block; SiteError if one forms no pattern or its heads cannot be counted.

    Raises ExecutionError if patterns cannot be read because the model is on a server that makes runs only.
    """
    lens.engine.check_weights("patterns of attention need")
    for block in blocks:
        lens.anatomy.find_attention(block)
    return {block: len(lens.heads(f"blocks.{block}.img.attn.q")) for block in blocks}


def read_word_attention(
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
    outweigh which word it attends to. One run reads as many blocks as ``PATTERN_BYTES`` hold; of each pattern only the
    word's columns are kept.

    lens: lens on the model.
    prompts: prompts of the batch.
    words: text tokens of each row's word.
    heads: block -> number of heads, for every block that is read.
    steps: denoising steps that are read.
    grid: token grid, (h, w).
    call: arguments of the run that the maps belong to, its seed included.
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


def enters_by_cross_attention(lens: DiTLens, block: int) -> bool:
    """Whether the image tokens of a block read the text by an attention of its own."""
    return lens.anatomy.why_not(block, "img", "cross_out") is None


def read_word_maps(
    lens: DiTLens, batch: SeededPrompts, words: Sequence[str], blocks: Sequence[int], steps: Sequence[int]
) -> dict[int, np.ndarray]:
    """As :func:`read_word_attention`, where text enters by cross-attention, which is to text alone.

    Prompts of one word run together, so that every prompt is drawn once.

    lens: lens on the model.
    batch: the prompts and their seed.
    words: each row's word.
    blocks: those that are read.
    steps: denoising steps that are read.
    """
    rows = {word: [i for i, other in enumerate(words) if other == word] for word in words}
    maps: dict[int, list[Any]] = {block: [None] * len(words) for block in blocks}
    for word, some in rows.items():
        found = lens.word_map(
            [batch.prompts[i] for i in some],
            word,
            blocks=list(blocks),
            steps=list(steps),
            seed=batch.seed,
            **share_call(lens, batch, some),
        )
        for block, kept in zip(found.blocks, found.tensors[word], strict=True):
            for place, i in enumerate(some):
                maps[block][i] = kept[:, place].flatten(1).numpy()
    return {block: np.stack(found, 1) for block, found in maps.items()}


def choose_words(lens: DiTLens, prompts: Sequence[str], words: str | Sequence[str] | None) -> list[str]:
    """The word for the subject of every prompt: as given; of a toy's scene its shape; else an empty list.

    lens: lens of the study.
    prompts: all prompts of the study.
    words: what the user gave.
    """
    if words is None:
        if choose_judge(lens, prompts, None) is None:
            return []
        return [Scene.parse(prompt).shape for prompt in prompts]
    given = [words] * len(prompts) if isinstance(words, str) else list(words)
    if given and len(given) != len(prompts):
        raise OpError(f"words= takes one word for every prompt, and got {len(given)} for {len(prompts)} prompts.")
    return given
