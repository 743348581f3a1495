"""What an explorer shows, as arrays: images, maps of channels, clusters of tokens. Knows runs, but no widget.

Letters: l block (any site of image tokens), e image with values, s step, g group of channels, k channel of a group,
h w token grid, d channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from dit_lens.analysis.clusters import cluster
from dit_lens.core.request.ops import Read
from dit_lens.errors import OpError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Reading, Run

THUMB = 8  # tokens of the longer side of a thumbnail
NONE = 255  # the label of a token without a cluster

Groups = dict[str, dict[str, tuple[int, ...]]]


def explorer_reads(massive: ChannelSet, *, seed: int = 0) -> list[Read]:
    """The reads that the explorer shows of a large model: a few channels of every site, and their controls.

    >>> import dit_lens as dl
    >>> lens, prompt = dl.DiTLens.toy(), "a big red circle left on a plain blue background"
    >>> massive = lens.massive_channels(prompt, k=4, seed=0, num_inference_steps=2)
    >>> run = lens.run(prompt, dl.explorer_reads(massive), seed=0, num_inference_steps=2)
    >>> run.keys(), run["top"]["blocks.3.img"].shape
    (['top', 'bottom', 'random'], torch.Size([2, 1, 256, 4]))

    Of FLUX.1 at 1024 pixels, 28 steps and k = 8 they keep 0.6 GB in bfloat16, whole hidden states 40 GB.
    seed: of the random channels.
    """
    return [Read(list(massive), channels=chosen, name=name) for name, chosen in arms_of(massive, seed).items()]


def _nothing(_: int) -> np.ndarray:
    return np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Pane:
    """An image with its name; ``values``: its place among the images that have maps or clusters, if it has."""

    name: str
    image: Image | None = None
    values: int | None = None


@dataclass(frozen=True)
class Views:
    """All that is shown.

    panes: images to choose from. groups: names of the groups of channels. blocks: names of sites, in their order.
    steps: (index, sigma where it is known). grid: (h, w). channels: int32 [l, g, k], -1 where a group has fewer.
    ranges: float32 [l, e, s, g, k, 2], the smallest and the largest value of a map, NaN where there is none. means:
    [l, e, s, g, k]. thumbs: uint8 [l, e, s, g, k, th, tw]. scores: [l, d], of every channel, or [0, 0]. maps: l ->
    uint8 [e * s * g * k, h, w], from the smallest value to the largest. labels: l -> uint8 [e, s, g, h, w], 0 the
    coldest cluster. code: what makes this explorer, with a place for its state. masks: whether labels are masks that a
    study made, not clusters. right: the image that is first seen next to the first. note: a sentence under all.
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
    maps: Callable[[int], np.ndarray] = _nothing
    labels: Callable[[int], np.ndarray] = _nothing
    code: str = ""
    masks: bool = False
    right: int = -1
    note: str = ""

    @property
    def map_bytes(self) -> int:
        """How large all maps are."""
        return self.means.size * prod(self.grid)


def of_runs(
    runs: Sequence[Run], *, channels: ChannelSet | None, k: int, clusters: int, code: str, side: int | None = None
) -> Views:
    """The views of some runs that read the same sites; those of later runs that did not have their image only.

    channels: chosen of whole reads; of other reads only its scores are shown. side: the largest grid; finer ones are
    averaged down to it.
    """
    shown = _Shown(tuple(runs), channels, k, clusters, side)
    blocks = range(len(shown.blocks))
    stats = [_statistics(shown.values(block), shown.grid) for block in blocks]
    return Views(
        panes=shown.panes,
        groups=tuple(shown.groups),
        blocks=shown.blocks,
        steps=tuple((step, runs[0].sigmas[step]) for step in shown.steps),
        grid=shown.grid,
        channels=shown.channel_table(),
        ranges=np.stack([ranges for ranges, *_ in stats]),
        means=np.stack([means for _, means, _ in stats]),
        thumbs=np.stack([thumbs for *_, thumbs in stats]),
        scores=shown.scores(),
        maps=lambda block: _quantised(shown.values(block)).reshape(-1, *shown.grid),
        labels=shown.labels,
        code=code,
        right=next((i for i, (run, _) in enumerate(shown.rows) if run is not runs[0]), -1),
    )


@dataclass(frozen=True)
class _Shown:
    """The part of some runs that is shown; everything is worked out from the first."""

    runs: tuple[Run, ...]
    given: ChannelSet | None
    k: int
    clusters: int
    side: int | None

    @cached_property
    def readings(self) -> list[Reading]:
        """What the first run read of image tokens on a grid, every token kept."""
        found = _gridded(self.runs[0])
        if not found:
            kept = ", ".join(self.runs[0].keys()) or "nothing"
            raise OpError(
                f"an explorer shows maps of image tokens, and this run kept {kept}. Read whole tokens of the image: "
                "lens.run(prompt, [dl.Read('blocks.*.img')], seed=0), or of a large model "
                "lens.run(prompt, dl.explorer_reads(massive), seed=0)."
            )
        return found

    @cached_property
    def grid(self) -> tuple[int, int]:
        """The grid that is shown."""
        h, w = self.fine
        shrink = min(1.0, (self.side or max(h, w)) / max(h, w))
        return max(1, round(h * shrink)), max(1, round(w * shrink))

    @cached_property
    def fine(self) -> tuple[int, int]:
        """The grid of the reads."""
        grid = self.readings[0].shape_of_grid
        if grid is None or len(grid) != 2:
            raise OpError(f"an explorer shows images, and this run's grid is {grid}: a video's frames, h and w.")
        return grid[0], grid[1]

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that all readings share."""
        shared = set.intersection(*(set(reading.steps) for reading in self.readings))
        if not shared:
            raise OpError("the reads of this run share no step. Read all groups of channels at the same steps.")
        return tuple(sorted(shared))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site for reading in self.readings for site in reading.tensors))

    @cached_property
    def groups(self) -> Groups:
        """Names of groups -> site -> channels: the reads that chose channels, else top, bottom and random ones."""
        chosen: Groups = {}
        for reading in self.readings:
            for site, kept in reading.channels.items():
                if kept is not None:
                    chosen.setdefault(reading.name or "channels", {})[site] = kept
        if chosen:
            return chosen
        return arms_of(self._top() if self.given is None else self.given)

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """Site -> [s, b, n, d] of the reads that kept every channel."""
        return {
            site: _conditional(reading, site)
            for reading in self.readings
            for site, kept in reading.channels.items()
            if kept is None
        }

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        """Site -> [d], |mean over tokens| averaged over steps and images."""
        return {site: values.float().mean(2).abs().mean((0, 1)) for site, values in self._whole.items()}

    def _top(self) -> ChannelSet:
        from dit_lens.analysis.channels import top_channels

        narrow = min(map(len, self._means.values()))
        if not 1 <= self.k <= narrow:
            raise OpError(f"k={self.k} channels were asked for, and a site has {narrow}. Choose k from 1 to {narrow}.")
        energy = {site: values.float().square().mean((0, 1, 2)) for site, values in self._whole.items()}
        return top_channels(self._means, energy, self.k, "|mean|")

    @cached_property
    def held(self) -> list[Run]:
        """The runs that kept all that is shown of the first."""
        wanted = [(site, chosen) for group in self.groups.values() for site, chosen in group.items()]
        return [run for run in self.runs if all(_holder(run, self, site, chosen) for site, chosen in wanted)]

    @cached_property
    def rows(self) -> list[tuple[Run, int]]:
        """Every image, as (run, row)."""
        return [(run, row) for run in self.runs for row in range(len(run.images) or len(_gridded(run)[0].rows))]

    @cached_property
    def panes(self) -> tuple[Pane, ...]:
        places = [(id(run), row) for run in self.held for row in _gridded(run)[0].rows]
        return tuple(
            Pane(
                _name(run, row),
                run.images[row] if run.images else None,
                places.index((id(run), row)) if (id(run), row) in places else None,
            )
            for run, row in self.rows
        )

    @cached_property
    def size(self) -> int:
        """How many channels the largest group has."""
        return max(len(chosen) for group in self.groups.values() for chosen in group.values())

    def values(self, block: int) -> np.ndarray:
        """float32 [e, s, g, k, n] of one site; NaN where a group has no channel."""
        site = self.blocks[block]
        images = sum(len(_gridded(run)[0].rows) for run in self.held)
        found = np.full((images, len(self.steps), len(self.groups), self.size, prod(self.grid)), np.nan, np.float32)
        for g, group in enumerate(self.groups.values()):
            chosen = group.get(site, ())
            if chosen:
                readings = [_holder(run, self, site, chosen) for run in self.held]
                parts = [_chosen(reading, site, chosen, self.steps) for reading in readings if reading is not None]
                found[:, :, g, : len(chosen)] = _averaged(torch.cat(parts), self.fine, self.grid)
        return found

    def labels(self, block: int) -> np.ndarray:
        """uint8 [e, s, g, h, w]: the clusters of every step and group of one site, as ``dit_lens.clusters`` makes."""
        values = self.values(block)
        found = np.full((*values.shape[:3], values.shape[-1]), NONE, np.uint8)
        for place in np.ndindex(*found.shape[:3]):
            tokens = values[place]
            tokens = tokens[~np.isnan(tokens[:, 0])].T  # [n, k]
            if tokens.size:
                found[place] = cluster(tokens, self.clusters)
        return found.reshape(*found.shape[:3], *self.grid)

    def channel_table(self) -> np.ndarray:
        table = np.full((len(self.blocks), len(self.groups), self.size), -1, np.int32)
        for g, group in enumerate(self.groups.values()):
            for site, chosen in group.items():
                table[self.blocks.index(site), g, : len(chosen)] = chosen
        return table

    def scores(self) -> np.ndarray:
        """[l, d]: |mean over tokens| of every channel, averaged over steps and images, where all channels are known.

        Empty where sites differ in width or a site's other channels were neither read nor scored.
        """
        known = self._means if self.given is None else self.given.scores
        rows = [known.get(site) for site in self.blocks]
        if any(row is None for row in rows) or len({len(row) for row in rows if row is not None}) > 1:
            return np.zeros((0, 0), np.float32)
        return np.stack([row.float().numpy() for row in rows if row is not None])


def _gridded(run: Run) -> list[Reading]:
    """The reads of whole tokens on a grid, without their sites of text; of the rows that the first of them has."""
    found = [_narrowed(reading, reading.on_grid) for reading in run.readings if reading.on_grid]
    return [reading for reading in found if reading.rows == found[0].rows]


def _narrowed(reading: Reading, sites: Sequence[str]) -> Reading:
    """Some sites of a read."""
    tensors, channels = reading.tensors, reading.channels
    return replace(reading, tensors={site: tensors[site] for site in sites}, channels={s: channels[s] for s in sites})


def arms_of(massive: ChannelSet, seed: int = 0) -> Groups:
    """A set of channels and its controls, as groups."""
    arms = {"top": massive, "bottom": massive.bottom(), "random": massive.random(seed)}
    return {name: dict(chosen) for name, chosen in arms.items()}


def _conditional(reading: Reading, site: str) -> Tensor:
    """[s, b, n, d] of one branch: the conditional one where both were read."""
    return next(iter(reading.by_branch(site).values()))


def _holder(run: Run, shown: _Shown, site: str, channels: Sequence[int]) -> Reading | None:
    """The first read of a run that kept these channels of a site, at the steps and on the grid that are shown."""
    for reading in _gridded(run):
        kept = reading.channels.get(site, ())
        whole = kept is None or set(channels) <= set(kept)
        if site in reading.tensors and whole and set(shown.steps) <= set(reading.steps):
            return reading if reading.shape_of_grid == shown.fine else None
    return None


def _chosen(reading: Reading, site: str, channels: Sequence[int], steps: Sequence[int]) -> Tensor:
    """float32 [b, s, k, n] of some channels and steps."""
    kept = reading.channels[site]
    places = list(channels) if kept is None else [kept.index(channel) for channel in channels]
    at = [reading.steps.index(step) for step in steps]
    return _conditional(reading, site)[at][..., places].float().permute(1, 0, 3, 2)


def _averaged(values: Tensor, fine: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[..., n] of a fine grid on a coarser one."""
    if fine == grid:
        return values
    maps = values.reshape(-1, 1, *fine)
    return torch.nn.functional.adaptive_avg_pool2d(maps, grid).reshape(*values.shape[:-1], prod(grid))


def _statistics(values: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranges, means and thumbnails of [e, s, g, k, n]."""
    ranges = np.stack([values.min(-1), values.max(-1)], -1)
    height, width = (min(side, max(1, round(side * THUMB / max(grid)))) for side in grid)
    maps = torch.from_numpy(_quantised(values)).reshape(-1, 1, *grid).float()
    thumbs = torch.nn.functional.adaptive_avg_pool2d(maps, (height, width)).round().to(torch.uint8)
    return ranges, values.mean(-1), thumbs.reshape(*values.shape[:-1], height, width).numpy()


def _quantised(values: np.ndarray) -> np.ndarray:
    """uint8, 0 the smallest and 255 the largest value of every map; constant and missing maps are 0."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scaled = np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)
    return np.rint(255 * scaled).astype(np.uint8)


def _name(run: Run, row: int) -> str:
    """An image's prompt and seed, and the edits that touched it."""
    prompts, seeds = run.spec.get("prompt") or [], run.spec.get("seed") or []
    each = max(1, len(run.images) // max(1, len(prompts)))
    text = prompts[row // each] if row // each < len(prompts) else f"image {row}"
    seed = f", seed {seeds[row]}" if row < len(seeds) else ""
    edits = dict.fromkeys(entry.kind for entry in run.receipt.entries if entry.rows is None or row in entry.rows)
    done = f" [{', '.join(edits)}]" if edits else ""
    return text + seed + done
