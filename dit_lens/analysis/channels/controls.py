"""Maps of channels, from which controls are made: random ones, and ones that keep the energy.

One injective map for all sites keeps every overlap between sites, so a control touches as many distinct channels as the
set it stands for. Pure: numpy in, maps out. Letters: s site, d channel, u channel of the union over sites, r start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

# Starts that the search for an energy match compares, and how often each goes over all channels at most.
STARTS, SWEEPS = 16, 12

# Maps whose mean relative error is this near to the best count as equally good.
NEAR = 0.01


def random_map(family: Sequence[tuple[int, ...]], width: int, rng: np.random.Generator) -> dict[int, int]:
    """A random injective map of every channel of a family into channels 0 to width - 1.

    >>> found = random_map([(0, 1), (1, 2)], 6, np.random.default_rng(0))
    >>> sorted(found), sorted(found.values())
    ([0, 1, 2], [3, 4, 5])

    Out of the union where that is possible, else with the fewest hits: images, counted per site, that are in the very
    set they stand for.
    """
    union = union_of(family)
    outside = np.setdiff1d(np.arange(width), union)
    if len(union) <= len(outside):
        return dict(zip(union, rng.permutation(outside)[: len(union)].tolist(), strict=True))
    # A map's hits are a sum over pairs (channel, image) of how many sites hold both: an assignment problem, solved
    # exactly. Between maps with equally few hits those that leave the union win, and then chance does.
    member = _members(family, width)
    hits = member[:, union].T @ member  # [u, d]
    inside = member.any(0).astype(float)
    chance = rng.random(hits.shape) / (2 * len(union))
    images = linear_sum_assignment(hits * (len(union) + 1) + inside + chance)[1]
    return dict(zip(union, images.tolist(), strict=True))


def matched_map(
    family: Sequence[tuple[int, ...]], energy: np.ndarray, rng: np.random.Generator, starts: int = STARTS
) -> dict[int, int]:
    """An injective map under which the images of every set hold as nearly as can be the energy of the set.

    >>> energy = np.array([[8.0, 3.0, 1.0, 7.5, 3.5, 0.5], [1.0, 4.0, 9.0, 0.5, 4.5, 8.5]])
    >>> found = matched_map([(0, 1), (1, 2)], energy, np.random.default_rng(0))
    >>> [found[c] for c in (0, 1, 2)]
    [3, 4, 5]

    It leads out of the union, or has the fewest hits, as :func:`random_map` does. Among such maps the sum over sites of
    |energy found / energy of the set - 1| is made small by exchanging one image after the other, from several starts;
    chance picks among those within 1 % of the best found. A heuristic: among all maps of small pools, tried one by one,
    there was mostly none better, and on average one better by under 0.02 a site where the sets hardly go together.

    family: the set of each site. energy: [s, d], mean square per channel. starts: of the search.
    """
    union = union_of(family)
    if not union:
        return {}
    search = _Search.of(family, energy, union)
    found = np.concatenate([search.strongest(), search.spread(starts - 1, rng)])  # [r, u]
    search.exchange(found)
    error = search.errors(found)
    best = np.flatnonzero(error <= error.min() + NEAR * len(family))
    return dict(zip(union, search.pool[found[rng.choice(best)]].tolist(), strict=True))


def hits_of(family: Sequence[tuple[int, ...]], images: Mapping[int, int]) -> int:
    """Images, counted per site, that are in the very set they stand for."""
    return sum(len({images[c] for c in chosen} & set(chosen)) for chosen in family)


def union_of(family: Sequence[tuple[int, ...]]) -> list[int]:
    """Every channel of a family, ascending."""
    return sorted(set().union(*family))


def _members(family: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    member = np.zeros((len(family), width))
    for row, chosen in zip(member, family, strict=True):
        row[list(chosen)] = 1
    return member


@dataclass(frozen=True)
class _Search:
    """Maps as arrays [r, u]: for every channel of the union the place of its image in the pool.

    pool: [p] channels that may be images. member: [s, u] bool. energy: [s, p], in units of what the site's set holds.
    wanted: [s], 1, or 0 for a set without energy. penalty: [u, p], what a hit costs: more than any error of energy.
    order: channels of the union, those of most sites first, whose images decide most.
    """

    pool: np.ndarray
    member: np.ndarray
    energy: np.ndarray
    wanted: np.ndarray
    penalty: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, family: Sequence[tuple[int, ...]], energy: np.ndarray, union: list[int]) -> _Search:
        width = energy.shape[1]
        member = _members(family, width)
        pool = np.setdiff1d(np.arange(width), union)
        if len(pool) < len(union):
            pool = np.arange(width)
        held, every = (energy * member).sum(1), energy.sum(1)
        unit = np.where(held > 0, held, np.where(every > 0, every, 1.0))
        relative = energy[:, pool] / unit[:, None]
        hits = member[:, union].T @ member[:, pool]
        return cls(
            pool=pool,
            member=member[:, union].astype(bool),
            energy=relative,
            wanted=held / unit,
            penalty=hits * (1 + len(family) + relative.sum()),
            order=np.argsort(-member[:, union].sum(0), kind="stable"),
        )

    def strongest(self) -> np.ndarray:
        """The map with the most energy, [1, u]: the answer where the pool has too little."""
        gain = self.member.T.astype(float) @ self.energy
        return linear_sum_assignment(self.penalty - gain)[1][None]

    def spread(self, starts: int, rng: np.random.Generator) -> np.ndarray:
        """Maps [r, u] that split the wanted energy in ways of their own, from nearly all in one image to nearly even.

        A single dominant channel may be what is needed. Every channel takes the free image nearest to its part, and
        what is missing is carried over to the next.
        """
        evenness = np.logspace(-2, 1, starts)[:, None]
        parts = rng.gamma(evenness, size=(starts, len(self.order))) + 1e-9  # so that no rest of them sums to 0
        later = np.cumsum((parts[:, None, :] * self.member)[..., self.order[::-1]], -1)[..., ::-1]  # [r, s, u] in order
        images = np.zeros((starts, len(self.order)), int)
        free = np.ones((starts, len(self.pool)), bool)
        missing = np.repeat(self.wanted[None], starts, 0)
        for i, c in enumerate(self.order):
            sites = self.member[:, c]
            aim = missing[:, sites] * parts[:, c, None] / later[:, sites, i]
            self._take(images, free, missing, c, aim)
        return images

    def exchange(self, images: np.ndarray) -> None:
        """Gives every channel in turn the free image that leaves the smallest error, until none changes."""
        rows = np.arange(len(images))
        free = np.ones((len(images), len(self.pool)), bool)
        free[rows[:, None], images] = False
        missing = self.wanted - self._found(images)
        for _ in range(SWEEPS):
            before = images.copy()
            for c in self.order:
                sites = self.member[:, c]
                free[rows, images[:, c]] = True
                missing[:, sites] += self.energy[sites][:, images[:, c]].T
                self._take(images, free, missing, c, missing[:, sites])
            if (images == before).all():
                return

    def errors(self, images: np.ndarray) -> np.ndarray:
        """Relative errors summed over sites, [r], and the penalty of hits."""
        hits = self.penalty[np.arange(len(self.order)), images].sum(1)
        return np.abs(self.wanted - self._found(images)).sum(1) + hits

    def _take(self, images: np.ndarray, free: np.ndarray, missing: np.ndarray, c: int, aim: np.ndarray) -> None:
        """The free image nearest to the aim, [r, sites of c], for one channel in every map."""
        sites, rows = self.member[:, c], np.arange(len(images))
        cost = np.abs(self.energy[sites] - aim[:, :, None]).sum(1) + self.penalty[c]
        images[:, c] = np.where(free, cost, np.inf).argmin(1)
        free[rows, images[:, c]] = False
        missing[:, sites] -= self.energy[sites][:, images[:, c]].T

    def _found(self, images: np.ndarray) -> np.ndarray:
        """The energy that the images of every set hold, [r, s]."""
        return np.stack([(self.energy[:, image] * self.member).sum(1) for image in images])
