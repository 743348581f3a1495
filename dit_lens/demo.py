"""The main job: from a prompt to a page that shows massive activations in the trained toy, found and tested on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dit_lens import plots, studies
from dit_lens.channels import top_median_ratio
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.ops import Read
from dit_lens.page import Section, write_page, write_png
from dit_lens.store import whole_folder
from dit_lens.studies.common import score_ops, sets_of
from dit_lens.toys.scenes import Scene, describe, sample_scenes

if TYPE_CHECKING:
    from dit_lens.channels import ChannelSet
    from dit_lens.run import Run
    from dit_lens.studies import Result

PROMPT = "a big red circle left on a checkered blue background"
SOURCE = "a big yellow triangle right on a plain green background"
K = 8
OTHERS = 2  # further scenes, so that the studies speak of more than one picture
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Outcome:
    """page: the index.html. headline: the numbers of the three claims."""

    page: Path
    headline: pd.DataFrame


def demo(
    out: Path, *, prompt: str | None = None, source: str | None = None, seed: int = 0, k: int | None = None
) -> Outcome:
    """Draws, finds the massive channels, runs the three studies, and writes ``out/index.html``, PNGs and raw results.

    prompt, source: scenes of the toy's grammar. Raises PromptError, before anything is drawn, for another sentence, and
    StoreError when ``out`` holds something this command did not write.
    """
    prompt, source, k = prompt or PROMPT, source or SOURCE, k or K
    for scene in (prompt, source):
        Scene.parse(scene)
    if out.exists() and any(out.iterdir()) and not (out / "index.html").exists():
        raise StoreError(f"{out} is not empty and holds no earlier demo. Choose another folder with --out.")
    lens = DiTLens.toy()
    prompts = [prompt, source, *(scene.caption for scene in sample_scenes(OTHERS, seed=seed + 100))]
    with lens.quiet():
        run = lens.run(
            prompts,
            [*score_ops("blocks.*.img", "|mean|", None), Read("blocks.*.img", steps=-1, name="last")],
            seed=seed,
        )
    massive = sets_of(run, k, "|mean|")[0]
    disruption = studies.disruption(lens, prompts, k=k, seeds=[seed], draws=2)
    organisation = studies.organisation(lens, prompts, k=k, seeds=[seed], draws=2)
    transfer = studies.transfer(lens, [(source, prompt)], k=k, strengths=STRENGTHS, seeds=[seed])
    sections = [
        _drawn(run),
        _massive(massive, k),
        _disruption(disruption, k, seed),
        _organisation(organisation, lens.anatomy.depth, seed),
        _transfer(transfer, seed),
    ]
    lead = (
        "A few channels of a Diffusion Transformer respond far more strongly than the rest. This page looks for them in a small FLUX that was "
        "trained on drawn scenes, and asks three things of them: does the picture depend on them, do they know where the subject is, can they "
        "be moved from one picture into another? One model, a few prompts and one seed: an illustration of the tool, not evidence about DiTs."
    )
    with whole_folder(out) as folder:
        write_page(
            folder / "index.html", title="dit_lens: massive activations in a toy FLUX", lead=lead, sections=sections
        )
        run.save(folder / "run")
        for result in (disruption, organisation, transfer):
            result.save(folder / result.study)
        for section in sections:
            _pictures(section, folder)
    return Outcome(out / "index.html", _headline(massive, disruption, organisation, transfer))


def _drawn(run: Run) -> Section:
    read = [str(describe(image)) for image in run.images]
    right = sum(text.startswith(prompt) for text, prompt in zip(read, run.spec["prompt"], strict=True))
    sentence = (
        f"Read back from their pixels, {right} of {len(read)} pictures are exactly the scene they were asked for."
    )
    figure = plots.strip(run.images, [Scene.parse(prompt).caption for prompt in run.spec["prompt"]])
    table = pd.DataFrame({"asked": run.spec["prompt"], "read back (share of variance explained)": read})
    return Section("The pictures", sentence, (figure,), table, "run = lens.run(prompts, seed=0)\nrun.images")


def _massive(massive: ChannelSet, k: int) -> Section:
    ratios = {site: top_median_ratio(scores) for site, scores in massive.scores.items()}
    site = max(ratios, key=lambda name: ratios[name])
    share = massive.energy_share()
    sentence = (
        f"The strongest channel responds {ratios[site]:.0f} times as strongly as the median one in {site}; the {k} strongest of {massive.width} "
        f"channels hold {min(share.values()):.0%} to {max(share.values()):.0%} of the squared energy, depending on the block."
    )
    figures = (
        plots.channel_spectrum(massive.scores[site], massive[site], site=site),
        plots.channel_histogram(massive.scores[site], massive[site]),
        plots.block_channel_map(massive.scores, massive),
    )
    return Section(
        "Massive channels",
        sentence,
        figures,
        None,
        f"massive = lens.massive_channels(prompt, k={k}, seed=0)\nmassive.table",
    )


def _disruption(result: Result, k: int, seed: int) -> Section:
    rows = result.summary.set_index("arm")
    controls = ["bottom", "random", "energy-matched"]
    sentence = (
        f"Zeroing the top {k} channels in every block changes the pictures by {_interval(rows.loc['top'], 'rmse')} of 255 (RMSE), against "
        + ", ".join(f"{_interval(rows.loc[arm], 'rmse')} for {arm}" for arm in controls)
        + f"; the share of attributes that are still right falls to {rows.loc['top', 'fidelity']:.2f}, against {rows.loc['random', 'fidelity']:.2f} for random channels."
    )
    arms = ["untouched", "top", *controls]
    shown = [result.pictures[f"0/{seed}/{0 if arm == 'untouched' else k}/{arm}"] for arm in arms]
    figures = (plots.strip(shown, arms, title="One picture, different channels zeroed"), result.figure())
    return Section(
        "1. Are they critical?", sentence, figures, result.summary, f"studies.disruption(lens, prompts, k={k})"
    )


def _organisation(result: Result, depth: int, seed: int) -> Section:
    top = result.summary[result.summary["arm"] == "top"].set_index("block")
    best = int(top["iou"].idxmax())
    others = result.summary[result.summary["block"] == best].set_index("arm")["iou"]
    sentence = (
        f"Two clusters of the tokens, made from the top channels alone, overlap with the subject best in block {best}: IoU {top.loc[best, 'iou']:.2f}, "
        f"against {others['random']:.2f} for random channels, {others['bottom']:.2f} for bottom channels and {top.loc[best, 'chance']:.2f} for equally large random masks."
    )
    first = next(key.removesuffix("/truth") for key in result.masks if key.endswith("/truth"))
    masks = {f"block {block}": result.masks[f"{first}/{block}/top"] for block in range(depth)}
    figures = (plots.overlay_grid(result.pictures[first], masks, truth=result.masks[f"{first}/truth"]), result.figure())
    return Section("2. Are they organised in space?", sentence, figures, None, "studies.organisation(lens, prompts)")


def _transfer(result: Result, seed: int) -> Section:
    full = result.summary[(result.summary["strength"] == 1.0) & ~result.summary["masked"]].set_index("arm")
    sentence = (
        f"Moving the top channels of the source at full strength brings the picture to a distance of {full.loc['top', 'to_source']:.0f} of 255 from the source "
        f"and {full.loc['top', 'to_target']:.0f} from the target (RMSE); random channels give {full.loc['random', 'to_source']:.0f} and "
        f"{full.loc['random', 'to_target']:.0f}, all channels {full.loc['all', 'to_source']:.0f} and {full.loc['all', 'to_target']:.0f}."
    )
    strips = []
    for where in ("whole", "masked"):
        keys = [
            f"0/{seed}/target",
            *(f"0/{seed}/top/{where}/{strength:g}" for strength in STRENGTHS),
            f"0/{seed}/source",
        ]
        labels = ["target", *(f"strength {strength:g}" for strength in STRENGTHS), "source"]
        title = (
            "Top channels moved, every token"
            if where == "whole"
            else "Top channels moved, inside the source's cluster mask"
        )
        strips.append(plots.strip([result.pictures[key] for key in keys], labels, title=title))
    return Section(
        "3. Can they be moved?",
        sentence,
        (*strips, result.figure()),
        None,
        "studies.transfer(lens, [(source, prompt)])",
    )


def _headline(massive: ChannelSet, disruption: Result, organisation: Result, transfer: Result) -> pd.DataFrame:
    damage = disruption.summary.set_index("arm")["rmse"]
    best = organisation.summary.groupby("arm")["iou"].max()
    moved = transfer.summary[(transfer.summary["strength"] == 1.0) & ~transfer.summary["masked"]].set_index("arm")[
        "to_source"
    ]
    arms = ["top", "bottom", "random", "energy-matched"]
    share = {"top": np.mean(list(massive.energy_share().values()))} | disruption.summary.set_index("arm")[
        "energy_share"
    ].to_dict()
    return pd.DataFrame(
        {
            "channels": arms,
            "energy share": [share[arm] for arm in arms],
            "zeroed: rmse to untouched": [damage[arm] for arm in arms],
            "best block IoU": [best[arm] for arm in arms],
            "moved: rmse to source": [moved[arm] for arm in arms],
        }
    )


def _interval(row: pd.Series, measure: str) -> str:
    low, high = row[f"{measure}_low"], row[f"{measure}_high"]
    return f"{row[measure]:.0f}" + ("" if np.isnan(low) else f" ({low:.0f} to {high:.0f})")


def _pictures(section: Section, folder: Path) -> None:
    """Every figure of a section as a PNG, where a browser can draw it."""
    from PIL.Image import Image

    name = "".join(letter if letter.isalnum() else "-" for letter in section.heading.lower()).strip("-")
    for i, figure in enumerate(section.figures):
        path = folder / f"{name}-{i}.png"
        if isinstance(figure, Image):
            figure.save(path)
        else:
            write_png(figure, path)
