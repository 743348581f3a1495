"""Claim 2: are massive channels spatially organised? Part the tokens by them, and compare with the subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.analysis.channels import ChannelSet, top_channels
from dit_lens.analysis.clusters import upsample
from dit_lens.arguments.lists import as_prompts, as_seeds
from dit_lens.core.request.ops import Read
from dit_lens.errors import ExecutionError, FamilyError, OpError, PromptError, SiteError
from dit_lens.plots import organisation_figure
from dit_lens.studies.parts.clustering import ClusteringOptions, TokenMask
from dit_lens.studies.parts.saliency import (
    centred_disc,
    choose_words,
    count_heads,
    enters_by_cross_attention,
    first_component,
    noisy_latent,
    read_word_attention,
    read_word_maps,
    token_norm,
)
from dit_lens.studies.parts.subject_masks import as_mask, check_masks, digest_mask
from dit_lens.studies.parts.subject_overlap import assemble, name_mask
from dit_lens.studies.shared.arguments import check_draws, check_k, find_meant
from dit_lens.studies.shared.arms import DRAWS, Arm, add_controls, check_arm_score, find_relevance, make_score_reads
from dit_lens.studies.shared.batches import PromptBatch, divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.toys import scenes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens
    from dit_lens.studies.parts.subject_masks import Masks


@study(
    question="Claim 2: are they organised in space?",
    assemble=assemble,
    figure=organisation_figure,
)
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
    polarity: str = "distance",
    masks: Masks | None = None,
    words: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """The image tokens in two parts by k channels, per block and step, against the subject in the generated image.

    >>> import numpy as np
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
    maps from the same run: attention to the subject's word (its share of the attention to text, joint or cross, mean
    over heads), the norm of every token, the first principal component of all channels. Nulls know nothing of the
    block: a centred disc, and masks from the noisy latent and from the predicted clean one (x0), which stand beside
    every block. Maps and the disc become masks of as many tokens as the top channels' mask, so that they differ from it
    in place alone.

    The table has one row per prompt, seed, step, block and arm: iou; chance, of an equally large random mask;
    iou_other_prompts, the same mask's IoU with the subjects of all other prompts, which a smooth mask in the centre has
    as well; iou_gap, how far the IoU lies below that of top on the same image; size, the share of tokens in front;
    clusters, the tokens of each, from cold to hot, or near and far; degenerate, a part under 1 %; energy_share, of the
    channels that were looked at; half, whether the prompt "chooses" or "judges". The summary adds p: the share of
    orders of the prompts in which masks and subjects fit as well (of one arm, block and step, not corrected for their
    number). Intervals are 95 %.

    The best of several blocks is partly the luckiest, so a block is chosen on half of the prompts, by the mean IoU of
    top, and judged on the other half: a note says by how much top exceeds the other channels there, the first
    component, the disc, and its own masks on the subjects of other prompts. With less than four readable prompts no
    block can be chosen and judged; name it beforehand, as ``site="blocks.5.img"``, and all prompts judge.

    Memory: all channels of every token are read, tokens x channels per block, step and image of a batch.

    lens: lens on the model.
    prompts: one prompt or several.
    k: number of channels of an arm.
    seeds: seeds of the noise; every prompt is run with each.
    steps: denoising steps whose tokens are clustered; channels are chosen at the same step.
    draws: number of random controls.
    score: reduction by which channels are ranked, or "relevance": how much the prediction depends on them.
    site: one site of image tokens per block.
    n_clusters: number of clusters of K-means, at least 2.
    method: how channels are scaled: "minmax" (as reproduced) or "robust" (quantile clip).
    polarity: what is in front: the tokens at a "distance" from those on the border of the image (see
      :func:`~dit_lens.analysis.subjects.distance_from_border`); or a cluster of K-means: all but the one at the
      "border"; the one with the most "heat", as in the reproduction, which inverts where massive channels are negative
      on the subject; or, as "oracle", that at the border or its complement, whichever fits the truth better, and chance
      is that of the same choice between a random mask and its complement.
    masks: where the subject truly is: one bool [H, W] or PIL image (white is subject) per prompt, or a function
      (image, prompt) that returns one; toys read the image back (unreadable ones are left out and counted).
    words: word of the subject, one for all prompts or one each, for the attention baseline; toys take the shape's; []
      leaves it out.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Source: arXiv 2605.13974; the procedure is the public reproduction's.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    check_draws(draws)
    blocks = _find_blocks(lens, site)
    divided = divide_call(lens, call, len(prompts))
    options = ClusteringOptions(n_clusters=n_clusters, method=method, polarity=polarity)
    masks = check_masks(masks, lens, prompts)
    words = choose_words(lens, prompts, words)
    extra, left_out = _choose_extra_reads(lens, prompts, words, list(blocks.values()), call)
    outline = lens.outline(prompts, **call)
    if len(outline.grid or (0, 0)) != 2:
        raise OpError("the tokens of a video have no grid (h, w) to cluster; organisation is of images.")
    batches = make_batches(prompts, seeds, batch_size, divided)
    check_arm_score(lens, score, batches[0].prompts, site, batches[0].call)
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
        "masks": [digest_mask(mask) for mask in masks] if isinstance(masks, list) else masks,
        "words": words,
        "left_out": left_out,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
    }
    reads = [Read(site, steps=steps, name="x"), *make_score_reads(site, score, steps)]
    reads += [Read(name, steps=steps, name=name) for name in ("x0", "velocity") if name in extra]
    crosses = all(enters_by_cross_attention(lens, block) for block in blocks.values())
    heads = count_heads(lens, list(blocks.values())) if "attention" in extra and not crosses else {}
    cluster = ClusterStudy(
        lens=lens,
        blocks=blocks,
        reads=reads,
        options=options,
        masks=masks,
        words=words if "attention" in extra else [],
        heads=heads,
        k=k,
        score=score,
        site=site,
        draws=draws,
        kind=outline.kind,
    )
    meant = find_meant(lens, batches[0].prompts, batches[0].call, site, steps)
    total, images = len(batches), len(prompts) * len(seeds) * (2 if "attention" in extra else 1)
    with StudyCheckpoints(
        "organisation", settings, lens=lens, total=total, out=out, meant=meant, images=images
    ) as cells:
        for batch in batches:
            cells.get(batch.key, partial(cluster.run_batch, batch))
    result = cells.result()
    if result.table.empty:
        raise OpError(
            "no image could be read back, so there is no subject to compare with. "
            "Use other prompts or seeds, or pass masks=."
        )
    return result


def _find_blocks(lens: DiTLens, site: Pattern) -> dict[str, int]:
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


def _choose_extra_reads(
    lens: DiTLens, prompts: Sequence[str], words: Sequence[str], blocks: list[int], call: Mapping[str, Any]
) -> tuple[set[str], dict[str, str]]:
    """Which of attention, x0 and velocity this model offers; and baseline -> why it is left out.

    lens: lens on the model.
    prompts: all prompts of the study.
    words: word of every prompt's subject.
    blocks: blocks that are clustered.
    call: other arguments of the pipeline.
    """
    extra, left_out = {"attention", "x0", "velocity"}, {}
    if not words:
        extra.discard("attention")
        left_out["attention"] = "no word for the subject was given"
    try:
        if words and all(enters_by_cross_attention(lens, block) for block in blocks):
            lens.engine.check_weights("maps of words need")
            text = lens.outline(prompts, **call).text()
            missing = [(row, word) for row, word in enumerate(words) if not text.find("cond", row, word)]
            if missing:
                raise OpError(
                    f"the word {missing[0][1]!r} is not in {prompts[missing[0][0]]!r}. Name one of its words."
                )
        elif words:
            count_heads(lens, blocks)
            lens.cost(prompts, _make_word_reads(words), **call)
    except (ExecutionError, FamilyError, SiteError, PromptError) as problem:
        extra.discard("attention")
        left_out["attention"] = str(problem)
    try:
        lens.cost(prompts, Read("x0"), **call)
    except (OpError, SiteError, FamilyError) as problem:
        extra -= {"x0", "velocity"}
        left_out["noisy latent, x0"] = str(problem)
    return extra, left_out


def _make_word_reads(words: Sequence[str]) -> list[Read]:
    """One number per token of each row's word: a read tells which tokens these are."""
    return [
        Read("blocks.0.txt", tokens=word, rows=row, channels=[0], steps=0, name=f"word/{row}")
        for row, word in enumerate(words)
    ]


@dataclass(frozen=True, kw_only=True)
class ClusterStudy:
    """What every batch of one study shares.

    lens: lens on the model.
    blocks: site -> block.
    reads: what every run reads.
    options: how tokens become a mask.
    masks: where the subject truly is: one per prompt, a function, or None if a toy reads its images back.
    words: word of every prompt's subject; empty without the attention baseline.
    heads: number of heads of every block whose attention patterns are read; empty where text enters by cross-attention,
      of which maps of words are read.
    k: number of channels of an arm.
    score: what channels are ranked by.
    site: sites of the channels.
    draws: number of random controls.
    kind: what the model predicts, such as "flow"; None if that is not known.
    """

    lens: DiTLens
    blocks: Mapping[str, int]
    reads: Sequence[Read]
    options: ClusteringOptions
    masks: list[np.ndarray] | Callable | None
    words: Sequence[str]
    heads: dict[int, int]
    k: int
    score: str
    site: Pattern
    draws: int
    kind: str | None

    def run_batch(self, batch: PromptBatch) -> Cell:
        """Draws a batch, and clusters its tokens at every step and block."""
        words = self.words[batch.rows.start : batch.rows.stop]
        reads = [*self.reads, *(_make_word_reads(words) if self.heads else [])]
        run = self.lens.run(batch.prompts, reads, seed=batch.seed, **batch.call)
        steps = run["x"].steps
        relevance = find_relevance(
            self.lens, self.score, batch.prompts, self.site, seed=batch.seed, call=batch.call, steps=list(steps)
        )
        scores = run["score"] if relevance is None else relevance
        maps: dict[int, np.ndarray] = {}
        if words and not self.heads:
            maps = read_word_maps(self.lens, batch, words, list(self.blocks.values()), steps)
        elif words:
            tokens = [run[f"word/{row}"].tokens or () for row in range(len(words))]
            maps = read_word_attention(
                self.lens, batch.prompts, tokens, self.heads, steps, run.grid, seed=batch.seed, **batch.call
            )
        cell = Cell()
        truths = {i: self._find_truth(run.images[i], prompt, batch.rows[i]) for i, prompt in enumerate(batch.prompts)}
        for i, truth in truths.items():
            cell.images[str(ImageKey(batch.rows[i], batch.seed))] = run.images[i]
            if truth is not None:
                cell.masks[str(ImageKey(batch.rows[i], batch.seed, arm="truth"))] = truth
        for s, step in enumerate(steps):
            arms = add_controls(
                _select_channels(scores, run["rms"], s, self.k, self.score), self.draws, batch.seed, batch.prompts, step
            )
            for i, truth in truths.items():
                if truth is not None:
                    self._cluster_image(cell, batch, run, (s, step, i), arms, maps, truth)
        return cell

    def _cluster_image(
        self,
        cell: Cell,
        batch: PromptBatch,
        run: Run,
        where: tuple[int, int, int],
        arms: Sequence[Arm],
        maps: Mapping[int, np.ndarray],
        truth: np.ndarray,
    ) -> None:
        """All blocks of one image at one step, into the cell.

        cell: gets rows of the table and masks.
        batch: the batch of the image.
        run: the run of the batch.
        where: index of the step among those read, number of the step, row of the image.
        arms: arms of channels at this step.
        maps: block -> attention to the subject's word, [step, row, n].
        truth: mask of the subject, bool [H, W].
        """
        s, step, i = where
        latents = self._cluster_latents(run, s, step, i)
        for site, block in self.blocks.items():
            x = run["x"][site][s, i].float().numpy()
            found = {(arm.name, arm.draw): self.options.cluster(x[:, arm.sets[i][site]], run.grid) for arm in arms}
            found["all", 0] = self.options.cluster(x, run.grid)
            size = int(found["top", 0].mask.sum())
            saliency = {"attention": maps[block][s, i]} if maps else {}
            saliency |= {"norm": token_norm(x), "component": first_component(x)}
            found |= {(name, 0): self.options.threshold(values, size, run.grid) for name, values in saliency.items()}
            found["centre", 0] = TokenMask(centred_disc(size, run.grid), (len(x) - size, size))
            found |= latents
            named = {"prompt": batch.prompts[i], "seed": batch.seed, "step": step, "block": block}
            whole = dict.fromkeys((("all", 0), ("norm", 0), ("component", 0)), 1.0)
            energy = whole | {(arm.name, arm.draw): arm.sets[i].energy_share()[site] for arm in arms}
            for line in self.options.measure(found, truth):
                share = energy.get((line["arm"], line["draw"]), 0.0)
                cell.lines.append({"row": batch.rows[i], **named, **line, "energy_share": share})
            for (arm, draw), one in found.items():
                cell.masks[name_mask(batch.rows[i], batch.seed, step, block, arm, draw)] = one.mask

    def _cluster_latents(self, run: Run, s: int, step: int, i: int) -> dict[tuple[str, int], TokenMask]:
        """K-means of what enters the model and of the clean latents it predicts, if these are known."""
        if "x0" not in run:
            return {}
        clean = run["x0"].tensor[s, i].float()
        predicted = run["velocity"].tensor[s, i].float()[:, : clean.shape[-1]] * self.lens.family.prediction.sign
        noisy = noisy_latent(clean, predicted, run.sigmas[step], self.kind or "flow")
        return {(name, 0): self.options.cluster(x, run.grid) for name, x in (("noisy latent", noisy), ("x0", clean))}

    def _find_truth(self, image: Image, prompt: str, row: int) -> np.ndarray | None:
        """The subject's mask in an image, in its pixels; None if a toy's image is unreadable."""
        if self.masks is None:
            found = scenes.recognise_scene(image)
            return None if found.scene is None else found.mask
        if isinstance(self.masks, list):
            mask = self.masks[row]
        else:
            mask = as_mask(self.masks(image, prompt), "what masks= returned")
        return upsample(mask, (image.height, image.width))


def _select_channels(
    scored: Mapping[str, Tensor], sized: Mapping[str, Tensor], s: int, k: int, score: str
) -> list[ChannelSet]:
    """Every image's own top-k channels at one of the steps, by their scores and sizes (rms) there."""
    scores, rms = ({site: value[s].float() for site, value in some.items()} for some in (scored, sized))
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
