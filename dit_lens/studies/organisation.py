"""Claim 2: are massive channels spatially organised? Cluster the tokens by them, and compare with the subject."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
from PIL import Image

from dit_lens.analysis import clusters
from dit_lens.analysis.channels import ChannelSet, top_channels
from dit_lens.analysis.clusters import DEGENERATE_SHARE, chance_iou, ious, permutation_p, segment, upsample
from dit_lens.core.request.ops import Read
from dit_lens.errors import ExecutionError, FamilyError, OpError, PromptError, SiteError, nearest
from dit_lens.studies.parts.saliency import (
    centred_disc,
    first_component,
    heads_of,
    largest,
    noisy_latent,
    subject_words,
    token_norm,
    word_attention,
)
from dit_lens.studies.shared.arguments import as_prompts, as_seeds, check_k, share_of_width
from dit_lens.studies.shared.arms import DRAWS, Arm, control_arms, score_ops
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import Batch, batches
from dit_lens.studies.shared.judges import judge_for
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.result import Result, summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

Mask = np.ndarray | Image.Image
Masks = Sequence[Mask] | Callable[[Image.Image, str], Mask]

ARMS = ("top", "bottom", "random", "energy-matched", "all")
BASELINES = ("attention", "norm", "component")
NULLS = ("centre", "noisy latent", "x0")
POLARITIES = (*clusters.POLARITIES, "oracle")
SUMMARY = ("step", "block", "arm", "n", "iou", "low", "high", "chance", "others", "p", "behind")
SUMMARY += ("behind_low", "behind_high", "size", "degenerate", "energy_share")


@with_protocols
def organisation(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int = 12,
    seeds: int | Sequence[int] = (0,),
    steps: Steps = -1,
    draws: int = DRAWS,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    n_clusters: int = 2,
    method: str = "minmax",
    polarity: str = "heat",
    masks: Masks | None = None,
    words: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """K-means of the image tokens on k channels, per block and step, against the subject in the generated image.

    >>> from dit_lens import DiTLens
    >>> whole = lambda image, prompt: np.ones((64, 64), bool)
    >>> result = organisation(
    ...     DiTLens.toy(),
    ...     "a big red circle left on a plain blue background",
    ...     k=4,
    ...     draws=1,
    ...     masks=whole,
    ...     num_inference_steps=2,
    ... )
    >>> list(result.summary["arm"].unique())[:5]
    ['top', 'bottom', 'random', 'energy-matched', 'all']

    Arms are sets of channels: top, bottom, random (``draws`` of them), energy-matched, and all channels. Baselines are
    maps from the same run: attention to the subject's word (its share of the attention to text, mean over heads), the
    norm of every token, the first principal component of all channels. Nulls know nothing of the block: a centred disc,
    K-means of the noisy latent and of the predicted clean one (x0); the last two stand beside every block. Maps and the
    disc become masks of as many tokens as the top channels' mask, so that they differ from it in place alone.

    steps: which denoising steps are clustered; channels are chosen at the same step. n_clusters: at least 2.
    method: "minmax" (as reproduced) or "robust" (quantile clip). polarity: what is in front: the "heat"-iest cluster,
    all but the one at the "border", or, as "oracle", the heat mask or its complement, whichever fits the truth better;
    then chance is that of the better of a random mask and its complement.
    masks: where the subject truly is: one bool [H, W] or PIL image (white is subject) per prompt, or
    ``fn(image, prompt)`` that returns one; toys read the image back (unreadable ones are left out and counted).
    words: of the subject, one for all prompts or one each, for the attention baseline; toys take the shape's; [] leaves
    it out. batch_size: prompts that run together. out: a folder for finished cells, from which the same call goes on.
    Memory: all channels of every token are read, tokens x channels per block, step and image of a batch.

    The table has one line per prompt, seed, step, block and arm: iou; chance, of an equally large random mask; others,
    the same mask's IoU with the subjects of all other prompts, which a smooth mask in the centre has as well; behind,
    how far the IoU lies below that of top on the same image; size, the share of tokens in front; clusters, the tokens
    of each, from cold to hot; degenerate, a cluster under 1 %; energy_share, of the channels that were looked at.
    The summary adds p: the share of orders of the prompts in which masks and subjects fit as well (of one arm, block
    and step, not corrected for their number). Intervals are 95 %.
    Source: arXiv 2605.13974; the procedure is the public reproduction's.

    A segmenter for real images, as ``masks=birefnet``; its weights come with code of their own, so look at it first::

        net = transformers.AutoModelForImageSegmentation.from_pretrained("ZhengPeng7/BiRefNet", trust_remote_code=True)


        def birefnet(image, prompt):
            x = torchvision.transforms.functional.to_tensor(image.resize((1024, 1024)))
            x = torchvision.transforms.functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            with torch.no_grad():
                return (net(x[None])[-1].sigmoid()[0, 0] > 0.5).numpy()
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    blocks = _blocks(lens, site)
    way = Way(n_clusters, method, polarity)
    masks = _checked(masks, lens, prompts)
    words = subject_words(lens, prompts, words)
    extra, left_out = _extra_reads(lens, prompts, words, list(blocks.values()), call)
    when, plan = lens.planned(prompts, **call)
    if len(plan.program["expected"] or (0, 0)) != 2:
        raise OpError("the tokens of a video have no grid (h, w) to cluster; organisation is of images.")
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "steps": str(steps),
        "draws": draws,
        "score": score,
        "site": site,
        "n_clusters": n_clusters,
        "method": method,
        "polarity": polarity,
        "masks": [_digest(mask) for mask in masks] if isinstance(masks, list) else masks,
        "words": words,
        "left_out": left_out,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
    }
    reads = [Read(site, steps=steps, name="x"), *score_ops(site, score, steps)]
    reads += [Read(name, steps=steps, name=name) for name in ("x0", "velocity") if name in extra]
    heads = heads_of(lens, list(blocks.values())) if "attention" in extra else {}
    study = _Study(lens, blocks, reads, way, masks, words if heads else [], heads, k, score, draws, when.kind, call)
    parts = batches(prompts, seeds, batch_size)
    with Cells("organisation", settings, lens=lens, total=len(parts), out=out) as cells:
        for part in parts:
            cells.get(part.key, partial(study.cell, part))
    result = cells.result()
    if result.table.empty:
        raise OpError(
            "no image could be read back, so there is no subject to compare with. "
            "Use other prompts or seeds, or pass masks=."
        )
    return result


# What can be wrong, before anything runs


def _blocks(lens: DiTLens, site: Pattern) -> dict[str, int]:
    """Site -> block; every site holds image tokens of a block of its own."""
    blocks: dict[str, int] = {}
    for name in lens.sites(site):
        found = lens.anatomy.site(name)
        if found.block is None or found.stream != "img" or ".mod." in name:
            raise OpError(f"{name} is clustered by image tokens of a block, which it does not hold. Use blocks.*.img.")
        if found.block in blocks.values():
            raise OpError(f"{name} is a second site of block {found.block}. Run the study once for each point.")
        blocks[name] = found.block
    return blocks


def _checked(masks: Masks | None, lens: DiTLens, prompts: Sequence[str]) -> list[np.ndarray] | Callable | None:
    """Masks as bool arrays, one per prompt; a function as it is; None where a toy reads its images back."""
    if masks is None:
        if judge_for(lens, prompts, None) is None:
            raise OpError(
                "where the subject is must be told: pass masks=, a list of bool arrays or a function of image and "
                "prompt."
            )
        return None
    if callable(masks):
        return masks
    if len(masks) != len(prompts):
        raise OpError(f"masks= takes one mask for every prompt, and got {len(masks)} for {len(prompts)} prompts.")
    return [_plain_mask(mask, f"masks[{i}]") for i, mask in enumerate(masks)]


def _plain_mask(mask: Any, name: str) -> np.ndarray:
    if isinstance(mask, Image.Image):
        return np.asarray(mask.convert("L")) > 127
    array = np.asarray(mask)
    if array.dtype != bool or array.ndim != 2:
        raise OpError(
            f"{name} must be a bool array [H, W] or a PIL image, and is {array.dtype} {list(array.shape)}. "
            "Compare it first: mask > 0."
        )
    return array


def _digest(mask: np.ndarray) -> str:
    return f"{mask.shape} {hashlib.sha256(mask.tobytes()).hexdigest()[:16]}"


def _extra_reads(
    lens: DiTLens, prompts: Sequence[str], words: Sequence[str], blocks: list[int], call: Mapping[str, Any]
) -> tuple[set[str], dict[str, str]]:
    """Which of attention, x0 and velocity this model offers; and baseline -> why it is left out."""
    extra, left_out = {"attention", "x0", "velocity"}, {}
    if not words:
        extra.discard("attention")
        left_out["attention"] = "no word for the subject was given"
    try:
        if words:
            heads_of(lens, blocks)
            lens.cost(prompts, _word_reads(words), **call)
    except (ExecutionError, FamilyError, SiteError, PromptError) as problem:
        extra.discard("attention")
        left_out["attention"] = str(problem)
    try:
        lens.cost(prompts, Read("x0"), **call)
    except (OpError, SiteError, FamilyError) as problem:
        extra -= {"x0", "velocity"}
        left_out["noisy latent, x0"] = str(problem)
    return extra, left_out


def _word_reads(words: Sequence[str]) -> list[Read]:
    """One number per token of each row's word: a read tells which tokens these are."""
    return [
        Read("blocks.0.txt", tokens=word, rows=row, channels=[0], steps=0, name=f"word/{row}")
        for row, word in enumerate(words)
    ]


# From tokens to masks


class Found(NamedTuple):
    """A mask, bool [h, w], and the tokens of each cluster it was made from, from cold to hot."""

    mask: np.ndarray
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """How tokens become a mask: the study's n_clusters, method and polarity."""

    n_clusters: int
    method: str
    polarity: str

    def __post_init__(self) -> None:
        choices = (("method", self.method, clusters.METHODS), ("polarity", self.polarity, POLARITIES))
        for name, asked, known in choices:
            if asked not in known:
                raise OpError(f"There is no {name} {asked!r}.{nearest(str(asked), known)}")
        if self.n_clusters < 2:
            raise OpError(f"n_clusters={self.n_clusters} separates nothing. Choose 2 or more.")

    @property
    def side(self) -> str:
        """The rule that finds the front without the truth."""
        return "heat" if self.polarity == "oracle" else self.polarity

    def clustered(self, x: Any, grid: tuple[int, ...]) -> Found:
        """K-means of tokens [n, k]."""
        found = segment(x, grid, n_clusters=self.n_clusters, method=self.method, polarity=self.side)
        return Found(found.mask, found.sizes)

    def thresholded(self, values: np.ndarray, size: int, grid: tuple[int, ...]) -> Found:
        """As many tokens of a map [n] as another mask has."""
        return Found(largest(values, size, grid, self.side), (values.size - size, size))

    def lines(self, found: Mapping[tuple[str, int], Found], truth: np.ndarray) -> list[dict[str, Any]]:
        """What the table says of every mask."""
        masks = np.stack([one.mask for one in found.values()])
        score = scored(masks, truth[None], self.polarity)[:, 0]
        front = [int(upsample(mask, truth.shape).sum()) for mask in masks]
        return [
            {
                "arm": arm,
                "draw": draw,
                "iou": float(score[i]),
                "chance": chance_iou(truth, front[i], oracle=self.polarity == "oracle"),
                "size": float(masks[i].mean()),
                "clusters": list(one.sizes),
                "degenerate": float(min(one.sizes) < DEGENERATE_SHARE * masks[i].size),
            }
            for i, ((arm, draw), one) in enumerate(found.items())
        ]


def scored(masks: np.ndarray, truths: np.ndarray, polarity: str) -> np.ndarray:
    """IoU [m, t]; of an oracle, that of the mask or of its complement, whichever is larger."""
    score = ious(masks, truths)
    return np.maximum(score, ious(~masks, truths)) if polarity == "oracle" else score


# One batch


@dataclass(frozen=True)
class _Study:
    """What every batch of one study shares. heads: of the blocks whose patterns are read; words: of the rows."""

    lens: DiTLens
    blocks: Mapping[str, int]
    reads: Sequence[Read]
    way: Way
    masks: list[np.ndarray] | Callable | None
    words: Sequence[str]
    heads: dict[int, int]
    k: int
    score: str
    draws: int
    kind: str | None
    call: Mapping[str, Any]

    def cell(self, part: Batch) -> Cell:
        words = self.words[part.rows.start : part.rows.stop]
        run = self.lens.run(part.prompts, [*self.reads, *_word_reads(words)], seed=part.seed, **self.call)
        steps = run["x"].steps
        maps: dict[int, np.ndarray] = {}
        if words:
            tokens = [run[f"word/{row}"].tokens or () for row in range(len(words))]
            maps = word_attention(
                self.lens, part.prompts, tokens, self.heads, steps, run.grid, seed=part.seed, **self.call
            )
        cell = Cell()
        truths = {i: self._truth(run.images[i], prompt, part.rows[i]) for i, prompt in enumerate(part.prompts)}
        for i, truth in truths.items():
            key = f"{part.rows[i]}/{part.seed}"
            cell.images[key] = run.images[i]
            if truth is not None:
                cell.masks[f"{key}/truth"] = truth
        for s, step in enumerate(steps):
            arms = control_arms(_sets(run, s, self.k, self.score), self.draws, part.seed)
            for i, truth in truths.items():
                if truth is not None:
                    self._image(cell, part, run, (s, step, i), arms, maps, truth)
        return cell

    def _image(
        self,
        cell: Cell,
        part: Batch,
        run: Run,
        where: tuple[int, int, int],
        arms: Sequence[Arm],
        maps: Mapping[int, np.ndarray],
        truth: np.ndarray,
    ) -> None:
        """All blocks of one image at one step, into the cell."""
        s, step, i = where
        latents = self._latents(run, s, step, i)
        for site, block in self.blocks.items():
            x = run["x"][site][s, i].float().numpy()
            found = {(arm.name, arm.draw): self.way.clustered(x[:, arm.sets[i][site]], run.grid) for arm in arms}
            found["all", 0] = self.way.clustered(x, run.grid)
            size = int(found["top", 0].mask.sum())
            saliency = {"attention": maps[block][s, i]} if maps else {}
            saliency |= {"norm": token_norm(x), "component": first_component(x)}
            found |= {(name, 0): self.way.thresholded(values, size, run.grid) for name, values in saliency.items()}
            found["centre", 0] = Found(centred_disc(size, run.grid), (len(x) - size, size))
            found |= latents
            named = {"prompt": part.prompts[i], "seed": part.seed, "step": step, "block": block}
            whole = dict.fromkeys((("all", 0), ("norm", 0), ("component", 0)), 1.0)
            energy = whole | {(arm.name, arm.draw): arm.sets[i].energy_share()[site] for arm in arms}
            for line in self.way.lines(found, truth):
                share = energy.get((line["arm"], line["draw"]), 0.0)
                cell.lines.append({"row": part.rows[i], **named, **line, "energy_share": share})
            key = f"{part.rows[i]}/{part.seed}/{step}/{block}"
            cell.masks |= {f"{key}/{_called(*name)}": one.mask for name, one in found.items()}

    def _latents(self, run: Run, s: int, step: int, i: int) -> dict[tuple[str, int], Found]:
        """K-means of what enters the model and of the clean latents it predicts, where these are known."""
        if "x0" not in run.keys():  # noqa: SIM118 a Run is no mapping
            return {}
        clean = run["x0"].tensor[s, i].float()
        predicted = run["velocity"].tensor[s, i].float()[:, : clean.shape[-1]] * self.lens.family.sign
        noisy = noisy_latent(clean, predicted, run.sigmas[step], self.kind or "flow")
        return {(name, 0): self.way.clustered(x, run.grid) for name, x in (("noisy latent", noisy), ("x0", clean))}

    def _truth(self, image: Image.Image, prompt: str, row: int) -> np.ndarray | None:
        """The subject's mask in an image, in its pixels; None when a toy's image is unreadable."""
        if self.masks is None:
            from dit_lens.toys.scenes import describe

            found = describe(image)
            return None if found.scene is None else found.mask
        if isinstance(self.masks, list):
            mask = self.masks[row]
        else:
            mask = _plain_mask(self.masks(image, prompt), "what masks= returned")
        return upsample(mask, (image.height, image.width))


def _sets(run: Run, s: int, k: int, score: str) -> list[ChannelSet]:
    """Every image's own top-k channels at one of the steps that were read."""
    scores, rms = ({site: value[s].float() for site, value in run[name].items()} for name in ("score", "rms"))
    rows = len(next(iter(scores.values())))
    return [
        top_channels(
            {site: value[row] for site, value in scores.items()},
            {site: value[row].square() for site, value in rms.items()},
            k,
            score,
        )
        for row in range(rows)
    ]


# The result


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    images = {name: image for cell in cells for name, image in cell.images.items()}
    masks = {name: mask for cell in cells for name, mask in cell.masks.items()}
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    if table.empty:
        return Result("organisation", table, pd.DataFrame(columns=list(SUMMARY)), dict(settings), images, masks)
    others, p = _other_prompts(table, masks, settings["polarity"])
    pair = ["row", "seed", "step", "block"]
    top = table.loc[table["arm"] == "top", [*pair, "iou"]].rename(columns={"iou": "behind"})
    table = table.assign(others=others).merge(top, on=pair)
    table["behind"] -= table["iou"]
    notes = _notes(table, settings, len(images) - sum(name.endswith("/truth") for name in masks))
    table = table.drop(columns="row")
    return Result("organisation", table, _summary(table, p), dict(settings), images, masks, notes)


def _called(arm: str, draw: int) -> str:
    """An arm in the key of a mask."""
    return f"{arm}/{draw}" if draw else arm


def _other_prompts(
    table: pd.DataFrame, masks: Mapping[str, np.ndarray], polarity: str
) -> tuple[pd.Series, dict[tuple[int, int, str], float]]:
    """Line by line the mean IoU with the other prompts' subjects; and (step, block, arm) -> p. NaN for one prompt."""
    others = pd.Series(np.nan, table.index)
    p: dict[tuple[int, int, str], float] = {}
    for where, group in table.groupby(["step", "block"], sort=False):
        step, block = cast("tuple[int, int]", where)
        fits = []
        for seed, own in group.groupby("seed", sort=False):
            rows = own["row"].unique()
            called = zip(own["row"], own["arm"], own["draw"], strict=True)
            found = [masks[f"{row}/{seed}/{step}/{block}/{_called(arm, draw)}"] for row, arm, draw in called]
            truths = [masks[f"{row}/{seed}/truth"] for row in rows]
            fit = pd.DataFrame(scored(np.stack(found), np.stack(truths), polarity), own.index, rows)
            fits.append(fit)
            if len(rows) > 1:
                others[own.index] = (fit.sum(axis=1) - own["iou"]) / (len(rows) - 1)
        mean = pd.concat(fits).groupby([group["arm"], group["row"]]).mean()  # over seeds and draws
        for arm in group["arm"].unique():
            square = mean.loc[arm]
            square = square[square.index].to_numpy()
            p[step, block, arm] = permutation_p(square) if len(square) > 1 and np.isfinite(square).all() else np.nan
    return others, p


def _summary(table: pd.DataFrame, p: Mapping[tuple[int, int, str], float]) -> pd.DataFrame:
    by = ["step", "block", "arm"]
    summary = summarise(table, by, ("iou", "behind")).rename(columns={"iou_low": "low", "iou_high": "high"})
    plain = table.groupby([*by, "prompt"])[["chance", "others", "size", "degenerate", "energy_share"]].mean()
    summary = summary.merge(plain.groupby(level=by).mean().reset_index(), on=by)
    summary["p"] = [p[key] for key in summary[by].itertuples(index=False, name=None)]
    place = {arm: i for i, arm in enumerate((*ARMS, *BASELINES, *NULLS))}
    summary = summary.sort_values(by, key=lambda column: column.map(place) if column.name == "arm" else column)
    return summary[list(SUMMARY)].reset_index(drop=True)


def _notes(table: pd.DataFrame, settings: Mapping[str, Any], unreadable: int) -> list[str]:
    notes = [share_of_width(settings["k"], settings["width"])]
    if settings["polarity"] == "oracle":
        notes.append(
            "polarity oracle: every mask is the better of itself and its complement, chosen with the truth in hand; "
            "chance is that of the same choice between a random mask and its complement"
        )
    held = table.groupby("arm")["energy_share"].mean()
    notes.append(
        f"the top channels hold {held['top']:.1%} of the energy, the energy-matched ones {held['energy-matched']:.1%}"
    )
    notes.append("attention, norm, component and centre are masks of as many tokens as the top channels' mask")
    notes += [f"left out: {name}: {why}" for name, why in settings["left_out"].items()]
    if unreadable:
        notes.append(f"{unreadable} images were unreadable and are left out")
    return notes
