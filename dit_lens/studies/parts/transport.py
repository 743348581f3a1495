"""Channels moved from sources into targets in lockstep: what the studies of transport share.

Every source and its target are neighbouring rows of one batch (2i and 2i + 1), under the same noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dit_lens.analysis.channels import ChannelSet
from dit_lens.analysis.clusters import segment, to_grid
from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Branch, Op, Read, Swap
from dit_lens.errors import OpError, nearest
from dit_lens.instruments.latents import tokens_of
from dit_lens.studies.parts.blends import blend_images, blend_latents, blend_texts
from dit_lens.studies.parts.nearness import change_within, explained
from dit_lens.studies.shared.arguments import check_k
from dit_lens.studies.shared.arms import Arm, control_arms, kept_scores, score_ops, sets_of
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import Drawing, begins_late
from dit_lens.studies.shared.judges import Judge, judged

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

ChannelsFrom = Literal["source", "target", "union"]
MaskFrom = Literal["source", "target", "both"]
FINAL = "final.img"
LATENTS = "all/latents/final"  # beside the scores, whose keys are row/name/site


@dataclass(frozen=True)
class Lockstep:
    """A batch of pairs.

    key: of its cells. numbers: of its pairs in the study. prompts: sources and targets in turn. labels: of the pairs.
    captions: what a judge is asked of each source ("" for nothing). ops: what makes the source rows, before any swap.
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
        prompts = () if "prompt_embeds" in more else (list(self.prompts),)
        return lens.run(*prompts, ops=[*self.ops, *ops], seed=self.seed, **{**self.call, **more})


@dataclass(frozen=True)
class Transport:
    """What is moved, and how: the choices that all batches of a study share."""

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
        }

    def check(self, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        """Refuses what cannot be carried out, before anything runs."""
        twice = 2 if self.channels_from == "union" else 1
        check_k(self.lens, self.sites, [twice * k for k in self.ks[:1]])
        if max(self.ks) > self.width:
            raise OpError(f"k={max(self.ks)} channels were asked for, but there are {self.width}.")
        _choice(self.channels_from, ("source", "target", "union"), "channels_from")
        if not self.strengths or not all(0 < strength <= 1 for strength in self.strengths):
            raise OpError(
                f"strengths={list(self.strengths)} must be numbers above 0, up to 1; 0 is the untouched target."
            )
        self._check_mask(prompts, call)
        self.lens.cost(list(prompts), self.swaps(Arm("all", 0), len(prompts) // 2, None, 1.0), seed=0, **call)

    def _check_mask(self, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        if self.mask_from is None:
            return
        if isinstance(self.mask_from, str):
            _choice(self.mask_from, ("source", "target", "both"), "mask_from")
        if odd := [site for site in self.sites if site.split(".")[2:3] != ["img"]]:
            raise OpError(f"mask_from= chooses image tokens, which {odd[0]} does not hold. Pass mask_from=None.")
        if not isinstance(self.mask_from, str):
            _, plan = self.lens.planned(list(prompts), seed=0, **call)
            if not to_grid(self.mask_from, plan.program["expected"] or np.shape(self.mask_from)).any():
                raise OpError("mask_from= is a drawing that covers half of no token. Draw a larger region.")

    @cached_property
    def sites(self) -> list[str]:
        return self.lens.sites(self.site)

    @cached_property
    def mask_site(self) -> str:
        return self.lens.mask_site(self.mask_block)

    @cached_property
    def width(self) -> int:
        return self.lens.anatomy.channels(self.lens.anatomy.site(self.sites[0]))

    @property
    def controlled(self) -> list[int]:
        """The k that leave room for controls of the same size."""
        twice = 2 if self.channels_from == "union" else 1
        return [k for k in self.ks if 2 * twice * k <= self.width]

    @cached_property
    def early(self) -> list[str]:
        """The sites before the last quarter of the blocks; none where sites are no image stream between blocks."""
        places = [site.split(".") for site in self.sites]
        if not all(len(place) == 3 and place[2] == "img" for place in places):
            return []
        limit = math.ceil(0.75 * self.lens.anatomy.depth)
        return [site for site, place in zip(self.sites, places, strict=True) if int(place[1]) < limit]

    @property
    def conditions(self) -> list[tuple[bool, float]]:
        """Masked or not, at every strength."""
        return list(itertools.product((False,) if self.mask_from is None else (False, True), self.strengths))

    @property
    def count(self) -> int:
        """Cells of a batch."""
        arms = 1 + sum(3 + self.draws + (2 if self.early else 0) if k in self.controlled else 1 for k in self.ks)
        direct = len(self.controlled) if self.early else 0
        return 2 + arms * len(self.conditions) + direct + (len(self.strengths) if self.prompt_blend else 0)

    def sets(self, kept: Mapping[str, np.ndarray], k: int) -> list[ChannelSet]:
        """For every pair the channels that are moved, at the study's sites and where masks are found."""
        rows = sets_of(kept, k, self.score)
        return [chosen(*pair, self.channels_from) for pair in zip(rows[0::2], rows[1::2], strict=True)]

    def arms(self, kept: Mapping[str, np.ndarray], seed: int) -> Iterator[tuple[int, Arm]]:
        """Every k with its arms, and all channels, which bracket them."""
        for k in self.ks:
            top = [one.restrict(self.sites) for one in self.sets(kept, k)]
            yield from (
                (k, arm) for arm in (self._arms(top, seed) if k in self.controlled else [Arm("top", 0, tuple(top))])
            )
        yield self.width, Arm("all", 0)

    def _arms(self, top: Sequence[ChannelSet], seed: int) -> list[Arm]:
        arms = control_arms(top, self.draws, seed)
        if self.early:
            arms.append(Arm("top-early", 0, tuple(one.restrict(self.early) for one in top)))
            arms.append(Arm("top-readout", 0, tuple(map(read_out, top))))
        return arms

    def swaps(self, arm: Arm, pairs: int, masks: Sequence[np.ndarray] | None, strength: float) -> list[Swap]:
        """The transport of an arm, for every pair of a batch."""
        return [
            Swap(
                list(arm.sets[i]) if arm.sets else self.sites,
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


def carry_out(cells: Cells, transport: Transport, batch: Lockstep) -> None:
    """All cells of a batch."""
    clean = cells.get(f"{batch.key}/clean", partial(_clean, transport, batch))
    masks = _masks(batch, clean)
    measure = partial(_measured, transport, batch, clean)
    # Source rows that are made by ops of their own leave no step alone.
    late = not batch.ops and begins_late(transport.lens, batch.prompts[0], transport.steps, batch.call)
    draw = Drawing(transport.lens, batch.call, late=late)
    arms = list(transport.arms(clean.arrays, batch.seed))
    for k, arm in arms:
        for masked, strength in transport.conditions:
            swaps = transport.swaps(arm, len(batch.numbers), masks if masked else None, strength)
            make = partial(_moved, draw, batch, swaps, partial(measure, k, arm, masked, strength))
            cells.get(f"{batch.key}/{k}/{arm.name}/{arm.draw}/{masked}/{strength:g}", make)
    cells.get(f"{batch.key}/blends", partial(_blends, transport, batch, clean, measure))
    for strength in transport.strengths if transport.prompt_blend else ():
        make = partial(_prompt_blend, transport.lens, batch, strength, measure)
        cells.get(f"{batch.key}/prompt-blend/{strength:g}", make)
    for k in transport.controlled if transport.early else ():
        make = partial(_direct, transport, batch, [arm for size, arm in arms if size == k], k)
        cells.get(f"{batch.key}/{k}/direct", make)


def chosen(source: ChannelSet, target: ChannelSet, channels_from: ChannelsFrom) -> ChannelSet:
    """The channels of the source, of the target, or of both; then with the mean of their scores and energies."""
    if channels_from != "union":
        return source if channels_from == "source" else target
    return replace(
        source,
        channels={site: tuple(dict.fromkeys((*source[site], *target[site]))) for site in source},
        scores={site: (source.scores[site] + target.scores[site]) / 2 for site in source},
        energy={site: (source.energy[site] + target.energy[site]) / 2 for site in source},
    )


def read_out(top: ChannelSet) -> ChannelSet:
    """The channels of the last site, where the final norm and projection read them."""
    last = list(top)[-1]
    return replace(top, channels={FINAL: top[last]}, scores={FINAL: top.scores[last]}, energy={FINAL: top.energy[last]})


def _choice(asked: Any, known: Sequence[str], name: str) -> None:
    if asked not in known:
        raise OpError(f"{name}={asked!r} does not exist.{nearest(str(asked), known)}")


def _clean(transport: Transport, batch: Lockstep) -> Cell:
    """Sources and targets without any transport: scores, masks, images and final latents."""
    lens, site = transport.lens, transport.mask_site
    scored = list(dict.fromkeys([*transport.sites, site]))
    run = batch.run(lens, [*score_ops(scored, transport.score), Read(site, steps=-1, name="mask")])
    cell = Cell(arrays=kept_scores(run))
    tokens = run["mask"][site][-1].float().numpy()  # [b, n, d]
    sets = transport.sets(cell.arrays, transport.ks[0])
    found = [segment(row[:, list(sets[i // 2][site])], run.grid).mask for i, row in enumerate(tokens)]
    final = batch.run(lens, output_type="latent")
    cell.arrays[LATENTS] = tokens_of(lens, final.latents, run.grid).numpy()
    for i, number in enumerate(batch.numbers):
        name = f"{number}/{batch.seed}"
        cell.images |= {f"{name}/source": run.images[2 * i], f"{name}/target": run.images[2 * i + 1]}
        cell.masks[name] = _mask(transport.mask_from, found[2 * i], found[2 * i + 1])
    measured = _measured(transport, batch, cell, 0, Arm("untouched", 0), False, 0.0, run.images[1::2])
    redrawn = blend_latents(lens, torch.from_numpy(cell.arrays[LATENTS]), run.grid, 0.0)
    errors = [float(rmse(*pair)) for pair in zip(redrawn, run.images[1::2], strict=True)]
    cell.lines = [{**line, "redrawn": error} for line, error in zip(measured.lines, errors, strict=True)]
    return cell


def _mask(mask_from: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The tokens of a pair that a masked transport touches, bool [h, w]; the source's where none is asked for."""
    if mask_from is None or isinstance(mask_from, str):
        return {"target": target, "both": source | target}.get(mask_from, source)
    return to_grid(mask_from, source.shape)


def _masks(batch: Lockstep, clean: Cell) -> list[np.ndarray]:
    return [clean.masks[f"{number}/{batch.seed}"] for number in batch.numbers]


def _measured(
    transport: Transport,
    batch: Lockstep,
    clean: Cell,
    k: int,
    arm: Arm,
    masked: bool,
    strength: float,
    images: Sequence[Image],
) -> Cell:
    """One line per pair: how far the target's image has come, and what it shows now."""
    cell, judge, masks = Cell(), transport.judge, _masks(batch, clean)
    for i, number in enumerate(batch.numbers):
        name, result = f"{number}/{batch.seed}", images[i]
        source, target = clean.images[f"{name}/source"], clean.images[f"{name}/target"]
        inside, outside = change_within(result, target, masks[i])
        caption = batch.captions[i]
        line = {
            **_key(batch, i, k, arm, masked, strength),
            "to_source": float(rmse(result, source)),
            "to_target": float(rmse(result, target)),
            "inside": inside,
            "outside": outside,
            "says_source": judged(judge, result, caption).get("fidelity", np.nan) if caption else np.nan,
            "says_target": judged(judge, result, batch.prompts[2 * i + 1]).get("fidelity", np.nan),
        }
        if arm.sets:
            line["energy_share"] = float(np.mean(list(arm.sets[i].energy_share().values())))
            line["distinct"] = len(set().union(*arm.sets[i].values()))
            line["matched"] = arm.sets[i].matched
        elif arm.name == "all":
            line |= {"energy_share": 1.0, "distinct": transport.width}
        cell.lines.append(line)
        if arm.draw == 0 and strength:
            cell.images[f"{name}/{k}/{arm.name}/{'masked' if masked else 'whole'}/{strength:g}"] = result
    return cell


def _key(batch: Lockstep, i: int, k: int, arm: Arm, masked: bool, strength: float) -> dict[str, Any]:
    return {
        "prompt": batch.labels[i],
        "seed": batch.seed,
        "k": k,
        "arm": arm.name,
        "draw": arm.draw,
        "masked": masked,
        "strength": strength,
    }


def _moved(draw: Drawing, batch: Lockstep, swaps: Sequence[Swap], measure: Any) -> Cell:
    return measure(draw.edited(batch, [*batch.ops, *swaps]).images[1::2])


def _blends(transport: Transport, batch: Lockstep, clean: Cell, measure: Any) -> Cell:
    """The two images blended in pixels, and in latents."""
    masks = _masks(batch, clean)
    cell, latents = Cell(), torch.from_numpy(clean.arrays[LATENTS])
    kept = list(clean.images.values())
    for masked, strength in transport.conditions:
        where = masks if masked else None
        pixels = [
            blend_images(source, target, strength, None if where is None else where[i])
            for i, (source, target) in enumerate(zip(kept[0::2], kept[1::2], strict=True))
        ]
        drawn = blend_latents(transport.lens, latents, masks[0].shape, strength, where)
        for name, images in (("pixel-blend", pixels), ("latent-blend", drawn)):
            found = measure(0, Arm(name, 0), masked, strength, images)
            cell.lines += found.lines
            cell.images |= found.images
    return cell


def _prompt_blend(lens: DiTLens, batch: Lockstep, strength: float, measure: Any) -> Cell:
    """Targets drawn from embeddings between the two prompts'."""
    texts = blend_texts(lens.encode(list(batch.prompts), **batch.call), strength)
    run = batch.run(lens, **texts)
    return measure(0, Arm("prompt-blend", 0), False, strength, run.images[1::2])


def _direct(transport: Transport, batch: Lockstep, arms: Sequence[Arm], k: int) -> Cell:
    """How much of what a transport changes in the prediction needs only the final norm and projection.

    Along the untouched target's own trajectory, at every step: the velocity with the channels swapped at all sites,
    against the velocity with the same channels swapped only where the final norm reads.
    """
    guided = len(transport.lens.planned(list(batch.prompts), seed=batch.seed, **batch.call)[0].branches) > 1
    clean = batch.run(transport.lens, [Read("velocity", branch="both" if guided else "cond", name="clean")])
    still = clean["clean"].by_branch("velocity")["cond"][:, 1::2].float().numpy()

    def change(arm: Arm) -> np.ndarray:
        swaps = transport.swaps(arm, len(batch.numbers), None, max(transport.strengths))
        held = [Read("velocity", name="moved"), Swap("velocity", source=clean)]
        return batch.run(transport.lens, [*swaps, *held])["moved"]["velocity"][:, 1::2].float().numpy() - still

    cell = Cell()
    for arm in arms:
        if arm.name not in ("top", "random") or arm.draw:
            continue
        whole, part = change(arm), change(replace(arm, sets=tuple(map(read_out, arm.sets))))  # [s, pair, n, d]
        for i in range(len(batch.numbers)):
            key = _key(batch, i, k, arm, False, max(transport.strengths))
            cell.lines.append({**key, "direct_share": explained(whole[:, i], part[:, i])})
    return cell
