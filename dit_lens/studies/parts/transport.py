"""What is moved from sources into targets, and how: the choices that the studies of transport share.

Every source and its target are neighbouring rows of one batch (2i and 2i + 1), under the same noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dit_lens.analysis.channels import ChannelSet
from dit_lens.analysis.clusters import to_grid
from dit_lens.core.request.ops import Branch, Op, Swap
from dit_lens.errors import OpError, check_choice
from dit_lens.studies.shared.arguments import as_ks, as_strengths, check_draws, check_k
from dit_lens.studies.shared.arms import Arm, add_controls, check_arm_score, count_arms, select_top_channels
from dit_lens.studies.shared.judges import Judge

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

ChannelsFrom = Literal["source", "target", "union"]
MaskFrom = Literal["source", "target", "both"]
FINAL = "final.img"
MODULATION = "final.img.mod"


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs that run together, from one seed.

    key: the batch in the keys of its cells.
    seed: seed of the noise.
    numbers: numbers of the pairs in the study.
    prompts: sources and targets in turn.
    labels: names of the pairs in the table.
    captions: what a judge is asked about each source; "" for nothing.
    ops: ops that make the source rows, before any swap.
    call: other arguments of the pipeline.
    """

    key: str
    seed: int
    numbers: range
    prompts: tuple[str, ...]
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)

    def run(self, lens: DiTLens, ops: Sequence[Op] = (), **more: Any) -> Run:
        """Runs the batch.

        lens: lens on the model.
        ops: ops besides those of the batch.
        more: arguments of the pipeline that replace those of the batch; embeddings replace the prompts.
        """
        prompts = () if "prompt_embeds" in more else (list(self.prompts),)
        return lens.run(*prompts, ops=[*self.ops, *ops], seed=self.seed, **{**self.call, **more})


@dataclass(frozen=True, kw_only=True)
class Transport:
    """What is moved, and how: the same for all batches of a study.

    lens: lens on the model.
    ks: numbers of channels, in ascending order.
    strengths: strengths of the transport, in (0, 1].
    draws: number of random controls.
    score: reduction by which channels are ranked.
    site: sites whose channels are moved.
    steps: denoising steps at which they are moved; None for all.
    branch: "cond" or "both".
    channels_from: whose top channels are moved.
    mask_from: whose subject is the mask, a drawing, or None for no masked arms.
    mask_block: block whose tokens are clustered for the mask; None for two thirds down.
    judge: what says how far an image shows a prompt, if anything does.
    prompt_blend: whether blends of prompts are drawn.
    """

    lens: DiTLens
    ks: tuple[int, ...]
    strengths: tuple[float, ...]
    draws: int
    score: str
    site: Pattern
    steps: Steps
    branch: Branch
    channels_from: ChannelsFrom
    mask_from: Any
    mask_block: int | None
    judge: Judge | None
    prompt_blend: bool = False

    def settings(self) -> dict[str, Any]:
        """The choices as plain data."""
        return {
            "k": self.ks,
            "strengths": self.strengths,
            "draws": self.draws,
            "score": self.score,
            "site": self.site,
            "steps": str(self.steps),
            "branch": self.branch,
            "channels_from": self.channels_from,
            "mask_from": self.mask_from,
            "mask_site": self.mask_site,
            "judge": self.judge,
            "width": self.width,
            "no_modulation": self.no_modulation,
        }

    def check(self, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        """Raises what would go wrong, before anything runs.

        prompts: all sources and targets of the study, in turn.
        call: other arguments of the pipeline.
        """
        check_draws(self.draws)
        check_k(self.lens, self.sites, [self.sets_moved * k for k in self.ks[:1]])
        if max(self.ks) > self.width:
            raise OpError(f"k={max(self.ks)} channels were asked for, but there are {self.width}.")
        check_choice(self.channels_from, ("source", "target", "union"), "value of channels_from")
        if not self.strengths or not all(0 < strength <= 1 for strength in self.strengths):
            raise OpError(
                f"strengths={list(self.strengths)} must be numbers above 0, up to 1; 0 is the untouched target."
            )
        scored = list(dict.fromkeys([*self.sites, self.mask_site]))
        check_arm_score(self.lens, self.score, prompts, scored, call)
        self._check_mask(prompts, call)
        self.lens.cost(list(prompts), self.make_swaps(self.ceiling, len(prompts) // 2, None, 1.0), seed=0, **call)

    def _check_mask(self, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        if self.mask_from is None:
            return
        if isinstance(self.mask_from, str):
            check_choice(self.mask_from, ("source", "target", "both"), "value of mask_from")
        if odd := [site for site in self.sites if site.split(".")[2:3] != ["img"]]:
            raise OpError(f"mask_from= chooses image tokens, which {odd[0]} does not hold. Pass mask_from=None.")
        if not isinstance(self.mask_from, str):
            grid = self.lens.outline(list(prompts), seed=0, **call).grid
            if not to_grid(self.mask_from, grid or np.shape(self.mask_from)).any():
                raise OpError("mask_from= is a drawing that covers half of no token. Draw a larger region.")

    @cached_property
    def sites(self) -> list[str]:
        """The sites whose channels are moved."""
        return self.lens.sites(self.site)

    @cached_property
    def ceiling(self) -> Arm:
        """All there is to move: every channel of the sites, and what modulates the final norm, where it has a name."""
        return Arm("ceiling", 0)

    @cached_property
    def no_modulation(self) -> str:
        """Why the ceiling does not move what modulates the final norm; "" if it does."""
        return self.lens.anatomy.why_not(None, "img", "mod.final") or ""

    @cached_property
    def mask_site(self) -> str:
        """The site whose tokens are clustered for the mask."""
        return self.lens.mask_site(self.mask_block)

    @cached_property
    def width(self) -> int:
        """The number of channels of a site."""
        return self.lens.anatomy.channels(self.lens.anatomy.site(self.sites[0]))

    @property
    def sets_moved(self) -> int:
        """How many sets of k channels are moved: those of the source and of the target, or of one of them."""
        return 2 if self.channels_from == "union" else 1

    @property
    def controlled(self) -> list[int]:
        """The k that leave room for controls of the same size."""
        return [k for k in self.ks if 2 * self.sets_moved * k <= self.width]

    @cached_property
    def early(self) -> list[str]:
        """The sites before the last quarter of the blocks; none if sites are not all image streams between blocks."""
        parts = [site.split(".") for site in self.sites]
        if not all(len(part) == 3 and part[2] == "img" for part in parts):
            return []
        limit = math.ceil(0.75 * self.lens.anatomy.depth)
        return [site for site, part in zip(self.sites, parts, strict=True) if int(part[1]) < limit]

    @property
    def conditions(self) -> list[tuple[bool, float]]:
        """Masked or not, at every strength."""
        return list(itertools.product((False,) if self.mask_from is None else (False, True), self.strengths))

    @property
    def cells_per_batch(self) -> int:
        """The number of cells of a batch."""
        arms = 1 + sum(
            count_arms(self.draws) + (2 if self.early else 0) if k in self.controlled else 1 for k in self.ks
        )
        direct = len(self.controlled) if self.early else 0
        return 4 + arms * len(self.conditions) + direct + (len(self.strengths) if self.prompt_blend else 0)

    @property
    def images_per_pair(self) -> int:
        """How many images are drawn for a pair and a seed, sources beside their targets included."""
        arms = self.cells_per_batch - 3 - (len(self.controlled) if self.early else 0)  # one of these is the ceiling
        runs = 2 + arms + len(self.controlled) * (1 + 2 * (1 + bool(self.draws))) * bool(self.early)
        return 2 * runs

    def select_channels(self, scores: Mapping[str, np.ndarray], k: int) -> list[ChannelSet]:
        """For every pair the channels that are moved, at the study's sites and where masks are found.

        scores: what ``average_scores`` returned for sources and targets in turn.
        k: number of channels.
        """
        rows = select_top_channels(scores, k, self.score)
        return [choose_channels(*pair, self.channels_from) for pair in zip(rows[0::2], rows[1::2], strict=True)]

    def list_arms(
        self, scores: Mapping[str, np.ndarray], seed: int, labels: Sequence[str]
    ) -> Iterator[tuple[int, Arm]]:
        """Every k with its arms, and all channels, which bracket them.

        scores: as in :meth:`select_channels`.
        seed: seed of the images.
        labels: names of the pairs.
        """
        for k in self.ks:
            top = [one.restrict(self.sites) for one in self.select_channels(scores, k)]
            arms = self._add_controls(top, seed, labels, k) if k in self.controlled else [Arm("top", 0, tuple(top))]
            yield from ((k, arm) for arm in arms)
        yield self.width, Arm("all", 0)

    def _add_controls(self, top: Sequence[ChannelSet], seed: int, labels: Sequence[str], k: int) -> list[Arm]:
        arms = add_controls(top, self.draws, seed, labels, k)
        if self.early:
            arms.append(Arm("top-early", 0, tuple(one.restrict(self.early) for one in top)))
            arms.append(Arm("top-readout", 0, tuple(map(keep_readout, top))))
        return arms

    def make_swaps(self, arm: Arm, pairs: int, masks: Sequence[np.ndarray] | None, strength: float) -> list[Swap]:
        """The transport of an arm, for every pair of a batch.

        arm: the arm; without sets, all channels are moved.
        pairs: number of pairs in the batch.
        masks: mask of every pair, bool [h, w], or None for everywhere.
        strength: strength of the swaps.
        """
        more = [MODULATION] if arm == self.ceiling and not self.no_modulation else []
        return [
            Swap(
                list(arm.sets[i]) if arm.sets else [*dict.fromkeys([*self.sites, *more])],
                source=f"row:{2 * i}",
                rows=2 * i + 1,
                channels=arm.sets[i] if arm.sets else None,
                mask=None if masks is None else masks[i],
                strength=strength,
                steps=self.steps,
                branch=self.branch,
            )
            for i in range(pairs)
        ]


def plan_transport(
    prompts: Sequence[str],
    call: Mapping[str, Any],
    *,
    k: int | Sequence[int],
    strengths: float | Sequence[float],
    **choices: Any,
) -> Transport:
    """A transport that was checked against the prompts of its study.

    prompts: all sources and targets of the study, in turn.
    call: other arguments of the pipeline.
    k: one or several numbers of channels.
    strengths: one or several strengths.
    choices: the other fields of :class:`Transport`.
    """
    transport = Transport(ks=tuple(as_ks(k)), strengths=as_strengths(strengths), **choices)
    transport.check(prompts, call)
    return transport


def choose_channels(source: ChannelSet, target: ChannelSet, channels_from: ChannelsFrom) -> ChannelSet:
    """The channels of the source, of the target, or of both; then with the mean of their scores and energies.

    source: top channels of the source.
    target: top channels of the target.
    channels_from: "source", "target" or "union".
    """
    if channels_from != "union":
        return source if channels_from == "source" else target
    return replace(
        source,
        channels={site: tuple(dict.fromkeys((*source[site], *target[site]))) for site in source},
        scores={site: (source.scores[site] + target.scores[site]) / 2 for site in source},
        energy={site: (source.energy[site] + target.energy[site]) / 2 for site in source},
    )


def keep_readout(top: ChannelSet) -> ChannelSet:
    """The channels of the last site, where the final norm and projection read them."""
    last = list(top)[-1]
    return replace(top, channels={FINAL: top[last]}, scores={FINAL: top.scores[last]}, energy={FINAL: top.energy[last]})
