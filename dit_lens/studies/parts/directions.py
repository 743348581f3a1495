"""Directions in the space of channels: those a basis offers at a site, the energy along each, and their removal.

Pure but for the ops at the end. Letters: s step, n token, d channel, m direction. Shares of energy are of all tokens'
squared norm over the steps that count, in an untouched run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.core.request.ops import Apply, MeanAblate, Op, Zero
from dit_lens.core.request.reduce import reduce_tokens

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Steps


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions of one site, in the order in which they are removed.

    order: [m], which channels they are, or which columns of ``vectors``.
    held: [m], the share of the energy along each.
    vectors: [d, ...], or [s, d, ...] where every step has its own; None for channels.
    """

    order: Tensor
    held: Tensor
    vectors: Tensor | None = None

    def take(self, count: int) -> Basis:
        """The first directions."""
        return replace(self, order=self.order[:count], held=self.held[:count])

    def coefficients(self, x: Tensor) -> Tensor:
        """What tokens hold along every direction: [s, n, d] -> [s, n, m]."""
        return x[..., self.order] if self.vectors is None else x @ self.vectors[..., self.order]


def count_directions(held: Tensor, level: float) -> int:
    """How many of the first directions a level means: an int of them, or those that come nearest to a share of energy.

    >>> held = torch.tensor([0.4, 0.2, 0.1, 0.1])
    >>> count_directions(held, 0.55), count_directions(held, 0.05), count_directions(held, 3)
    (2, 1, 3)

    held: [m], the share of the energy along each.
    level: an int, the number of directions; a float, a share of the energy.
    """
    if isinstance(level, int):
        return min(level, len(held))
    return int((held.double().cumsum(0) - level).abs().argmin()) + 1


def share_removed(basis: Basis, own: Tensor, put: Tensor | None, energy: float, steps: Sequence[int]) -> float:
    """The share of the energy that goes when a basis' coefficients are replaced by those of a mean, or by zero.

    >>> basis = Basis(torch.tensor([0]), torch.tensor([0.5]))
    >>> own, put = torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 0.0]])  # every token is [2, 2]
    >>> share_removed(basis, own, None, 8.0, [0]), share_removed(basis, own, put, 8.0, [0])
    (0.5, 0.125)

    basis: the directions that are removed.
    own: [s, d], the mean of the image's own tokens.
    put: [s, d], the mean whose coefficients take their place; None: zero does.
    energy: sum over the steps of the tokens' mean squared norm.
    steps: those that count, as indices of s.
    """
    removed = float(basis.held.double().sum())
    if put is not None:
        # Of |(x - put) v|^2 the square is held; the rest needs only the tokens' mean.
        of_own, of_put = (basis.coefficients(x[:, None].float()).double()[list(steps)] for x in (own, put))
        removed -= float((2 * of_own * of_put - of_put.square()).sum()) / energy
    return removed


def find_basis(
    name: str, x: Tensor, steps: Sequence[int], *, score: str, seed: int, relevance: Tensor | None = None
) -> Basis:
    """All directions of a basis at one site, the first to be removed first.

    >>> x = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    >>> found = find_basis("mean-direction", x, [0], score="|mean|", seed=0)
    >>> found.vectors.flatten(), found.held
    (tensor([0.6000, 0.8000]), tensor([1.]))

    - top: channels by their score;
    - random: channels in random order;
    - rotation: directions of a random rotation, by the score of their coefficients;
    - components: the directions that hold the most energy, each the most of what is left (principal components of the
      tokens as they are, not centred);
    - mean-direction: one direction for every step, that of the tokens' mean;
    - relevant: channels by their relevance.

    name: one of these.
    x: [s, n, d], float.
    steps: those whose energy and scores count, as indices of s.
    score: reduction that gives one number per channel.
    seed: of the random order and the rotation.
    relevance: [d], for "relevant".
    """
    counted = x[list(steps)]
    total = counted.square().mean(1).sum()
    if name == "mean-direction":
        vectors = torch.nn.functional.normalize(x.mean(1), dim=-1)[..., None]  # [s, d, 1]
        held = (x @ vectors)[list(steps)].square().mean(1).sum() / total
        return Basis(torch.zeros(1, dtype=torch.long), held[None], vectors)
    if name == "components":
        moment = sum((one.T @ one / len(one) for one in counted), torch.zeros(x.shape[-1], x.shape[-1]))
        energy, vectors = torch.linalg.eigh(moment)
        return Basis(torch.arange(len(energy)), energy.flip(0).clamp_min(0) / total, vectors.flip(1))
    vectors = make_rotation(x.shape[-1], seed) if name == "rotation" else None
    seen = counted if vectors is None else counted @ vectors
    held = seen.square().mean(1).sum(0) / total
    if name == "random":
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(held)))
    else:
        scores = relevance if name == "relevant" and relevance is not None else reduce_tokens(seen, score).mean(0)
        order = torch.sort(scores, descending=True, stable=True).indices
    return Basis(order, held[order], vectors)


def make_rotation(width: int, seed: int) -> Tensor:
    """A random orthonormal basis, [d, d], every one as likely as any other.

    >>> basis = make_rotation(3, 0)
    >>> torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)
    True

    width: number of channels.
    seed: of the draw.
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return torch.from_numpy(q * np.sign(np.diag(r))).float()


def remove(x: Tensor, vectors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Takes directions out of tokens, or puts the coefficients of a mean in their place.

    >>> x, up = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[0.0], [1.0]])
    >>> remove(x, up), remove(x, up, torch.tensor([9.0, 1.0]))
    (tensor([[[3., 0.]]]), tensor([[[3., 1.]]]))

    x: [row, token, channel].
    vectors: [d, m], orthonormal.
    mean: [d].
    """
    vectors, old = vectors.to(x.device), x.float()
    gone = old if mean is None else old - mean.to(x.device)
    return (old - gone @ vectors @ vectors.T).to(x.dtype)


def make_removal_ops(bases: Mapping[str, Basis], row: int, steps: Steps, means: Mapping[str, Tensor]) -> list[Op]:
    """The ops that remove directions from an image.

    bases: site -> the directions.
    row: row of the batch that is edited.
    steps: denoising steps.
    means: site -> [s, d], whose coefficients are put in place; empty: zero is.
    """
    ops: list[Op] = []
    for site, basis in bases.items():
        if basis.vectors is not None:
            fn = _make_removal(basis.vectors[..., basis.order], means.get(site))
            ops.append(Apply(site, rows=row, steps=steps, fn=fn))
        elif means:
            mean = {site: means[site]}
            ops.append(MeanAblate(site, channels=basis.order.tolist(), rows=row, steps=steps, mean=mean))
        else:
            ops.append(Zero(site, channels=basis.order.tolist(), rows=row, steps=steps))
    return ops


def _make_removal(vectors: Tensor, mean: Tensor | None) -> Any:
    """A function for ``Apply``: :func:`remove`, with what belongs to the step."""

    def fn(x: Tensor, hook: Any) -> Tensor:
        of_step = vectors if vectors.ndim == 2 else vectors[hook.step]
        return remove(x, of_step, None if mean is None else mean[hook.step])

    return fn
