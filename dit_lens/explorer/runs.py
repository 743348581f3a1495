"""The views of runs: the maps of chosen channels that the runs have read, and their clusters.

Letters as in ``views``, and b row of a run, n image token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from dit_lens.analysis.channels import top_channels
from dit_lens.analysis.clusters import cluster
from dit_lens.arguments.checks import checked
from dit_lens.core.request.ops import Read
from dit_lens.errors import OpError
from dit_lens.explorer.companions import check_same_run, frames_of, values_of_words
from dit_lens.explorer.maps import average_maps, quantise, summarise_maps
from dit_lens.explorer.view_arrays import NONE, ChannelMaps, Pane, Views
from dit_lens.families.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.reading import Reading
    from dit_lens.core.runs.run import Run
    from dit_lens.instruments.word_maps import WordMap
    from dit_lens.instruments.x0_lens import X0

WORDS = "words"  # the group of the maps of words

Groups = dict[str, dict[str, tuple[int, ...]]]  # name of a group -> site -> channels


@checked
def explorer_reads(massive: ChannelSet, *, seed: int = 0) -> list[Read]:
    """Returns reads for the explorer that fit into memory for a large model: only a set of channels and its controls.

    >>> import dit_lens as dl
    >>> lens, prompt = dl.DiTLens.toy(), "a big red circle left on a plain blue background"
    >>> massive = lens.massive_channels(prompt, k=4, seed=0, num_inference_steps=2)
    >>> run = lens.run(prompt, dl.explorer_reads(massive), seed=0, num_inference_steps=2)
    >>> list(run), run["top"]["blocks.3.img"].shape
    (['top', 'bottom', 'random'], torch.Size([2, 1, 256, 4]))

    For FLUX.1 with 1024 pixels, 28 steps and k = 8 they take 0.6 GB in bfloat16; whole hidden states would take 40 GB.

    massive: the channels to read. seed: seed of the random channels.
    """
    return [Read(list(massive), channels=chosen, name=name) for name, chosen in make_groups(massive, seed).items()]


def make_groups(massive: ChannelSet, seed: int = 0) -> Groups:
    """Returns a set of channels and its controls as groups. seed: seed of the random channels."""
    arms = {"top": massive, "bottom": massive.bottom(), "random": massive.random(seed)}
    return {name: dict(chosen) for name, chosen in arms.items()}


def view_runs(
    runs: Sequence[Run],
    *,
    channels: ChannelSet | None,
    k: int,
    clusters: int,
    code: str,
    side: int | None = None,
    x0: X0 | None = None,
    words: WordMap | None = None,
) -> Views:
    """Makes the views of runs. A later run without the reads of the first is shown by its images only.

    runs: the runs, the first of which decides what is shown.
    channels: channels to show of whole reads; of other reads only its scores are used. None: the top k.
    k: number of channels per site, if they are not given.
    clusters: number of clusters.
    code: code that makes the explorer, with a placeholder for its state.
    side: longest side of the maps in tokens; larger maps are reduced by averaging.
    x0: the first run's images predicted at its steps.
    words: maps of words of the first run.
    """
    data = _RunData(tuple(runs), channels, k, clusters, side, x0, words)
    data.check_companions()
    if not 2 <= clusters <= min(prod(data.grid), NONE):
        raise OpError(
            f"clusters={clusters} was asked for, but the maps have {prod(data.grid)} tokens. Choose 2 to "
            f"{min(prod(data.grid), NONE)}."
        )
    summaries = [summarise_maps(data.values(block), data.grid) for block in range(len(data.blocks))]
    edited = next((i for i, (run, _) in enumerate(data.rows) if run is not runs[0]), -1)
    return Views(
        panes=data.panes,
        groups=data.group_names,
        blocks=data.blocks,
        steps=tuple((step, runs[0].sigmas[step]) for step in data.steps),
        grid=data.grid,
        channels=data.channel_table(),
        ranges=np.stack([ranges for ranges, *_ in summaries]),
        means=np.stack([means for _, means, _ in summaries]),
        thumbs=np.stack([thumbs for *_, thumbs in summaries]),
        scores=data.scores(),
        maps=lambda block: quantise(data.values(block)).reshape(-1, *data.grid),
        labels=data.labels,
        labelled={} if words is None else {WORDS: words.words},
        width=data.width,
        other=data.other,
        code=code,
        right=len(data.rows) if edited < 0 and x0 is not None else edited,
    )


@dataclass(frozen=True)
class _RunData:
    """What is shown of runs, computed from their reads when needed; the parameters of :func:`view_runs`.

    runs: the runs, the first of which decides what is shown.
    given: channels to show of whole reads, or None.
    k: number of channels per site, if they are not given.
    clusters: number of clusters.
    side: longest side of the maps in tokens, or None for that of the reads.
    x0: the first run's images predicted at its steps, or None.
    words: maps of words of the first run, or None.
    """

    runs: tuple[Run, ...]
    given: ChannelSet | None
    k: int
    clusters: int
    side: int | None
    x0: X0 | None = None
    words: WordMap | None = None

    def check_companions(self) -> None:
        """Raises OpError if x0 or words are of another run, or lack steps that are shown."""
        for name, one in (("x0", self.x0), ("words", self.words)):
            if one is not None:
                check_same_run(self.runs[0], one.run, name)
        if self.words is None:
            return
        if missing := sorted(set(self.steps) - set(self.words.steps)):
            raise OpError(
                f"words= has no maps at step {missing[0]}, which the run read. Leave steps= out of lens.word_map, or "
                "read the same steps."
            )
        if WORDS in self.groups:
            raise OpError(f"a read of this run is called {WORDS!r}, as the maps of words are. Give it another name.")

    @cached_property
    def readings(self) -> list[Reading]:
        """The first run's reads that have all image tokens of a grid."""
        found = _grid_readings(self.runs[0])
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
        """(h, w) of the maps."""
        h, w = self.read_grid
        shrink = 1.0 if self.side is None else min(1.0, self.side / max(h, w))
        return max(1, round(h * shrink)), max(1, round(w * shrink))

    @cached_property
    def read_grid(self) -> tuple[int, int]:
        """(h, w) of the reads."""
        grid = self.readings[0].shape_of_grid
        if grid is None or len(grid) != 2:
            raise OpError(f"an explorer shows images, and this run's grid is {grid}: a video's frames, h and w.")
        return grid[0], grid[1]

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that all readings have."""
        shared = set.intersection(*(set(reading.steps) for reading in self.readings))
        if not shared:
            raise OpError("the reads of this run share no step. Read all groups of channels at the same steps.")
        return tuple(sorted(shared))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site for reading in self.readings for site in reading.tensors))

    @cached_property
    def groups(self) -> Groups:
        """The reads of chosen channels, each a group; without any, the given or top channels and their controls."""
        chosen: Groups = {}
        for reading in self.readings:
            for site, kept in reading.channels.items():
                if kept is not None:
                    chosen.setdefault(reading.name or "channels", {})[site] = kept
        return chosen or make_groups(self._choose_top() if self.given is None else self.given)

    @property
    def group_names(self) -> tuple[str, ...]:
        return (*self.groups, *(() if self.words is None else (WORDS,)))

    @cached_property
    def _whole_reads(self) -> dict[str, Tensor]:
        """Site -> [s, b, n, d] of the reads that kept every channel."""
        return {
            site: _cond_branch(reading, site)
            for reading in self.readings
            for site, kept in reading.channels.items()
            if kept is None
        }

    @cached_property
    def _mean_scores(self) -> dict[str, Tensor]:
        """Site -> [d], |mean over tokens| averaged over steps and images."""
        return {site: values.float().mean(2).abs().mean((0, 1)) for site, values in self._whole_reads.items()}

    def _choose_top(self) -> ChannelSet:
        narrow = min(map(len, self._mean_scores.values()))
        if not 1 <= self.k <= narrow:
            raise OpError(f"k={self.k} channels were asked for, and a site has {narrow}. Choose k from 1 to {narrow}.")
        energy = {site: values.float().square().mean((0, 1, 2)) for site, values in self._whole_reads.items()}
        return top_channels(self._mean_scores, energy, self.k, "|mean|")

    @cached_property
    def mapped_runs(self) -> list[Run]:
        """The runs that read everything that is shown of the first."""
        wanted = [(site, chosen) for group in self.groups.values() for site, chosen in group.items()]
        return [run for run in self.runs if all(_find_reading(run, self, site, chosen) for site, chosen in wanted)]

    @cached_property
    def rows(self) -> list[tuple[Run, int]]:
        """Every image, as (run, row)."""
        return [(run, row) for run in self.runs for row in range(len(run.images) or len(_grid_readings(run)[0].rows))]

    @cached_property
    def panes(self) -> tuple[Pane, ...]:
        mapped = [(id(run), row) for run in self.mapped_runs for row in _grid_readings(run)[0].rows]
        panes = [
            Pane(
                _label(run, row),
                run.images[row] if run.images else None,
                mapped.index((id(run), row)) if (id(run), row) in mapped else None,
                frames_of(self.x0, row) if run is self.runs[0] else {},
            )
            for run, row in self.rows
        ]
        predicted = [pane for pane in panes if pane.frames]
        return (*panes, *(replace(pane, name=f"{pane.name}: x0 at the step", map_index=None) for pane in predicted))

    @cached_property
    def size(self) -> int:
        """Number of channels of the largest group."""
        words = 0 if self.words is None else len(self.words.words)
        return max(words, *(len(chosen) for group in self.groups.values() for chosen in group.values()))

    def values(self, block: int) -> np.ndarray:
        """Returns float32 [e, s, g, k, n] of one site; NaN if a group has fewer channels."""
        site = self.blocks[block]
        images = sum(len(_grid_readings(run)[0].rows) for run in self.mapped_runs)
        shape = (images, len(self.steps), len(self.group_names), self.size, prod(self.grid))
        found = np.full(shape, np.nan, np.float32)
        for g, group in enumerate(self.groups.values()):
            chosen = group.get(site, ())
            if chosen:
                readings = [_find_reading(run, self, site, chosen) for run in self.mapped_runs]
                parts = [
                    _select_values(reading, site, chosen, self.steps) for reading in readings if reading is not None
                ]
                found[:, :, g, : len(chosen)] = average_maps(torch.cat(parts), self.read_grid, self.grid)
        rows = _grid_readings(self.runs[0])[0].rows
        maps = None if self.words is None else values_of_words(self.words, site, self.steps, rows)
        if maps is not None:
            kept = average_maps(torch.from_numpy(maps), self.read_grid, self.grid)
            found[: len(rows), :, -1, : maps.shape[2]] = kept
        return found

    @cached_property
    def width(self) -> int:
        """Number of channels, if every run that is shown kept all of them at every site; else 0."""
        whole = all(
            _keeps_all(_find_reading(run, self, site, (0,)), site) for run in self.mapped_runs for site in self.blocks
        )
        widths = {len(scores) for scores in self._mean_scores.values()}
        return widths.pop() if whole and len(widths) == 1 else 0

    def other(self, channel: int) -> ChannelMaps:
        """Returns the maps of any channel that the runs kept."""
        parts = []
        for site in self.blocks:
            readings = [_find_reading(run, self, site, (channel,)) for run in self.mapped_runs]
            values = [_select_values(one, site, (channel,), self.steps) for one in readings if one is not None]
            maps = np.asarray(average_maps(torch.cat(values), self.read_grid, self.grid))[:, :, 0]
            parts.append((*summarise_maps(maps, self.grid), quantise(maps).reshape(*maps.shape[:-1], *self.grid)))
        return ChannelMaps(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))

    def labels(self, block: int) -> np.ndarray:
        """Returns uint8 [e, s, g, h, w], the clusters of :func:`dit_lens.clusters.cluster` for every step and group."""
        values = self.values(block)
        found = np.full((*values.shape[:3], values.shape[-1]), NONE, np.uint8)
        for index in np.ndindex(*found.shape[:3]):
            tokens = values[index]
            tokens = tokens[~np.isnan(tokens[:, 0])].T  # [n, k]
            if tokens.size:
                found[index] = cluster(tokens, self.clusters)
        return found.reshape(*found.shape[:3], *self.grid)

    def channel_table(self) -> np.ndarray:
        """Returns int32 [l, g, k], channel numbers; -1 if a group has fewer."""
        table = np.full((len(self.blocks), len(self.group_names), self.size), -1, np.int32)
        for g, group in enumerate(self.groups.values()):
            for site, chosen in group.items():
                table[self.blocks.index(site), g, : len(chosen)] = chosen
        if self.words is not None:
            for block, site in enumerate(self.blocks):
                if Site.parse(site).block in self.words.blocks:
                    table[block, -1, : len(self.words.words)] = range(len(self.words.words))
        return table

    def scores(self) -> np.ndarray:
        """Returns [l, d], |mean over tokens| of every channel, averaged over steps and images.

        Empty if sites differ in width, or if the other channels of a site were neither read nor scored.
        """
        known = self._mean_scores if self.given is None else self.given.scores
        rows = [known.get(site) for site in self.blocks]
        if any(row is None for row in rows) or len({len(row) for row in rows if row is not None}) > 1:
            return np.zeros((0, 0), np.float32)
        return np.stack([row.float().numpy() for row in rows if row is not None])


def _grid_readings(run: Run) -> list[Reading]:
    """Returns the reads of whole tokens on a grid, without text sites, that have the same rows as the first of them."""
    found = [_restrict(reading, reading.on_grid) for reading in run.readings if reading.on_grid]
    return [reading for reading in found if reading.rows == found[0].rows]


def _keeps_all(reading: Reading | None, site: str) -> bool:
    """Whether a read has every channel of a site."""
    return reading is not None and reading.channels[site] is None


def _restrict(reading: Reading, sites: Sequence[str]) -> Reading:
    """Returns a read at some of its sites."""
    tensors, channels = reading.tensors, reading.channels
    return replace(reading, tensors={site: tensors[site] for site in sites}, channels={s: channels[s] for s in sites})


def _cond_branch(reading: Reading, site: str) -> Tensor:
    """Returns [s, b, n, d] of one guidance branch: the conditional one, if both were read."""
    return next(iter(reading.by_branch(site).values()))


def _find_reading(run: Run, data: _RunData, site: str, channels: Sequence[int]) -> Reading | None:
    """Finds the first read of a run that has some channels of a site.

    Returns None if there is none, or if it is on another grid.
    run: the run to search.
    data: the steps and the grid that the read must have.
    site: name of the site.
    channels: channels that the read must have.
    """
    for reading in _grid_readings(run):
        kept = reading.channels.get(site, ())
        complete = kept is None or set(channels) <= set(kept)
        if site in reading.tensors and complete and set(data.steps) <= set(reading.steps):
            return reading if reading.shape_of_grid == data.read_grid else None
    return None


def _select_values(reading: Reading, site: str, channels: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Returns float32 [b, s, k, n] of a read.

    reading: a read of the site.
    site: name of the site.
    channels: channel numbers, k of them.
    steps: step indices, s of them.
    """
    kept, values = reading.channels[site], _cond_branch(reading, site)
    indices = list(channels) if kept is None else [kept.index(channel) for channel in channels]
    at = [reading.steps.index(step) for step in steps]
    if at != list(range(len(values))):
        values = values[at]
    if indices != list(range(values.shape[-1])):
        values = values[..., indices]
    return values.float().permute(1, 0, 3, 2)


def _label(run: Run, row: int) -> str:
    """Returns an image's prompt and seed, and the kinds of edits that changed it."""
    prompts, seeds = run.spec.get("prompt") or [], run.spec.get("seed") or []
    per_prompt = max(1, (len(seeds) or len(run.images)) // max(1, len(prompts)))  # of latents there are no images
    text = prompts[row // per_prompt] if row // per_prompt < len(prompts) else f"image {row}"
    seed = f", seed {seeds[row]}" if row < len(seeds) else ""
    edits = dict.fromkeys(entry.kind for entry in run.receipt.entries if entry.rows is None or row in entry.rows)
    return text + seed + (f" [{', '.join(edits)}]" if edits else "")
