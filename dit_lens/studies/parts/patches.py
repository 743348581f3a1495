"""The cells of a map of patches: which of a source's activations go into the target. Plain data; knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.core.request.ops import Branch, Swap
from dit_lens.studies.shared.streams import make_stream

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet


@dataclass(frozen=True)
class Patch:
    """What one cell of a map swaps.

    row: row of the map.
    column: column of the map.
    sites: sites that are swapped together.
    steps: denoising steps at which they are swapped.
    channels: channels that are swapped; None for all.
    tokens: image tokens that are swapped; None for all.
    draw: number of the draw of a random column.
    """

    row: str | int
    column: str | int
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    channels: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    draw: int = 0

    def make_op(self, row: int, branch: Branch) -> Swap:
        """The swap into a row of a batch whose first row is the source."""
        return Swap(
            self.sites,
            source="row:0",
            rows=row,
            channels=self.channels,
            tokens=self.tokens,
            steps=list(self.steps),
            branch=branch,
        )

    def sum_attribution(self, shares: Mapping[str, np.ndarray], steps: Sequence[int]) -> float:
        """The attribution of all that it swaps.

        shares: "channels/site" -> [s, d] and "tokens/site" -> [s, n].
        steps: denoising steps of the first axis of the shares.
        """
        axis, chosen = ("channels", self.channels) if self.tokens is None else ("tokens", self.tokens)
        which = slice(None) if chosen is None else list(chosen)
        at = [list(steps).index(step) for step in self.steps]
        return float(sum(shares[f"{axis}/{site}"][at][:, which].sum() for site in self.sites))


def patch_steps(sites: Sequence[str], steps: Sequence[int]) -> list[Patch]:
    """One site at one step, with every channel and token; patches of a step stand together."""
    return [Patch(site, step, (site,), (step,)) for step in steps for site in sites]


def patch_groups(
    top: ChannelSet | None, sites: Sequence[str], steps: Sequence[int], draws: int, seed: int
) -> list[Patch]:
    """One group of channels of one site, at all steps.

    Groups: top, bottom, random (``draws`` of them, each one map for all sites), and rest: all that are not top. Without
    a set the patches are there, with no channels.

    top: the massive channels of every site, or None.
    sites: rows of the map.
    steps: denoising steps of every patch.
    draws: number of random groups.
    seed: seed of the random groups, of this pair alone.
    """
    columns = [("top", 0), ("bottom", 0), *(("random", draw) for draw in range(draws)), ("rest", 0)]

    def channels(name: str, draw: int) -> Mapping[str, Sequence[int]]:
        if top is None:
            return dict.fromkeys(sites, ())
        if name == "rest":
            return {site: np.setdiff1d(np.arange(len(top.scores[site])), top[site]).tolist() for site in sites}
        return {"top": top, "bottom": top.bottom()}.get(name) or top.random(make_stream(seed, "random", draw))

    return [
        Patch(site, name, (site,), tuple(steps), channels=tuple(group[site]), draw=draw)
        for name, draw in columns
        for group in [channels(name, draw)]
        for site in sites
    ]


def patch_heads(heads: Mapping[str, Sequence[range]], steps: Sequence[int]) -> list[Patch]:
    """One head of one site, at all steps."""
    return [
        Patch(site, number, (site,), tuple(steps), channels=tuple(head))
        for site, some in heads.items()
        for number, head in enumerate(some)
    ]


def patch_regions(sites: Sequence[str], steps: Sequence[int], subject: np.ndarray, tiles: int) -> list[Patch]:
    """Tokens of one tile of the grid, or inside or outside of the subject, at all sites and steps.

    sites: sites that are swapped together.
    steps: denoising steps of every patch.
    subject: mask of the subject, bool [h, w].
    tiles: number of tiles along each side.
    """
    numbers = np.arange(subject.size).reshape(subject.shape)
    regions: list[tuple[str | int, str | int, np.ndarray]] = [
        (i, j, tile)
        for i, band in enumerate(np.array_split(numbers, tiles, axis=0))
        for j, tile in enumerate(np.array_split(band, tiles, axis=1))
    ]
    regions += [("subject", "inside", numbers[subject]), ("subject", "outside", numbers[~subject])]
    return [
        Patch(row, column, tuple(sites), tuple(steps), tokens=tuple(map(int, tokens.ravel())))
        for row, column, tokens in regions
    ]


def chunk_patches(patches: Sequence[Patch], size: int) -> Iterator[list[Patch]]:
    """Patches that run together: neighbours at the same steps, ``size`` at most.

    >>> [len(some) for some in chunk_patches(patch_steps(["a", "b", "c"], [0, 1]), 2)]
    [2, 1, 2, 1]
    """
    for _, same in groupby(patches, key=lambda patch: patch.steps):
        some = list(same)
        yield from (some[start : start + size] for start in range(0, len(some), size))
