"""The main job: a page that finds the massive activations of the trained toy and tests the three claims about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL.Image import Image

from dit_lens import plots, studies
from dit_lens.analysis.channels import top_median_ratio
from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import as_seed
from dit_lens.commands.page import Section, write_figures, write_page
from dit_lens.core.runs.files import check_folder, whole_folder
from dit_lens.core.runs.run import FILES as RUN_FILES
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.studies.shared.arguments import check_k
from dit_lens.studies.shared.arms import average_scores, make_score_reads, select_top_channels
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.result import FILES as RESULT_FILES
from dit_lens.studies.shared.tables import format_summary
from dit_lens.toys.scenes import Scene, recognise_scene, sample_scenes

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Run
    from dit_lens.studies import Result

PROMPT = "a big red circle left on a checkered blue background"
SOURCE = "a big yellow triangle right on a plain green background"
K = 8
MARK = ".dit-lens-demo"
FILES = (  # what the folder of a demo has
    rf"{re.escape(MARK)}|index\.html|(image|figure)-\d+\.png|run/({RUN_FILES})|"
    rf"(disruption|organisation|transfer)/({RESULT_FILES})"
)
ROOM = 32 * 2**20  # bytes that a demo takes, about
OTHERS = 2  # further scenes, so that the studies speak of more than one image
STRENGTHS = (0.5, 1.0)
CONTROLS = ("bottom", "random", "energy-matched")

TITLE = "dit_lens: massive activations in a toy FLUX"
LEAD = (
    "A few channels of a Diffusion Transformer respond far more strongly than the rest. This page looks for them in a "
    "small FLUX that was trained on drawn scenes, and asks three things of them: does the image depend on them, do "
    "they know where the subject is, can they be moved from one image into another? One model, a few prompts and one "
    "seed: an illustration of the tool, not evidence about large models."
)


@dataclass(frozen=True)
class Outcome:
    """What :func:`demo` leaves.

    page: path of index.html.
    headline: the numbers of the three claims.
    """

    page: Path
    headline: pd.DataFrame


@checked
def demo(
    out: str | Path, *, prompt: str | None = None, source: str | None = None, seed: int = 0, k: int | None = None
) -> Outcome:
    """Draws, finds the massive channels, runs the three studies, and writes ``out/index.html``, PNGs and raw results.

    Raises PromptError, before anything is drawn, for a prompt that is not a scene, and StoreError if ``out`` holds
    something that this command did not write.

    out: folder of the page.
    prompt: a scene of the toy's grammar, to draw and to edit.
    source: another, whose channels are moved into it.
    seed: seed of the noise.
    k: number of channels that count as massive.
    """
    out, seed = Path(out), as_seed(seed)
    prompt, source = PROMPT if prompt is None else prompt, SOURCE if source is None else source
    k = K if k is None else k
    for scene in (prompt, source):
        Scene.parse(scene)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "index.html").exists())):
        raise StoreError(f"{out} exists and holds no earlier demo. Choose another folder with --out.")
    check_folder(out, MARK, room=ROOM)
    lens = DiTLens.toy()
    check_k(lens, "blocks.*.img", [k])
    prompts = [prompt, source, *(scene.caption for scene in sample_scenes(OTHERS, seed=seed + 100, distinct=True))]
    with lens.quiet():
        run = lens.run(prompts, make_score_reads("blocks.*.img", "|mean|"), seed=seed)
    massive = select_top_channels(average_scores(run), k, "|mean|")[0]
    disruption = studies.disruption(lens, prompts, k=k, seeds=[seed], draws=1)
    organisation = studies.organisation(lens, prompts, k=k, seeds=[seed], draws=2)
    transfer = studies.transfer(lens, [(source, prompt)], k=k, strengths=STRENGTHS, seeds=[seed], draws=2)
    sections = [
        _show_images(run),
        _show_massive(massive, k),
        _show_disruption(disruption, k, seed),
        _show_organisation(organisation, lens.anatomy.depth),
        _show_transfer(transfer),
    ]
    with whole_folder(out, mark=MARK, own=FILES) as folder:
        write_page(folder / "index.html", title=TITLE, lead=LEAD, sections=sections)
        run.save(folder / "run")
        for result in (disruption, organisation, transfer):
            result.save(folder / result.study)
        for i, image in enumerate(run.images):
            image.save(folder / f"image-{i}.png")
        write_figures(_name_figures(sections, folder))
    return Outcome(out / "index.html", _make_headline(massive, disruption, organisation, transfer))


def _show_images(run: Run) -> Section:
    prompts = run.spec["prompt"]
    read = [recognise_scene(image) for image in run.images]
    exact = sum(found.scene == Scene.parse(prompt) for found, prompt in zip(read, prompts, strict=True))
    sentence = f"Read back from their pixels, {exact} of {len(read)} images are exactly the scene that was asked for."
    table = pd.DataFrame({"asked": prompts, "read back (share of variance explained)": list(map(str, read))})
    scenes = [Scene.parse(prompt) for prompt in prompts]
    figure = plots.strip(run.images, [f"{s.size} {s.colour} {s.shape} {s.position}" for s in scenes])
    return Section("The images", sentence, (figure,), table, "run = lens.run(prompts, seed=0)\nrun.images")


def _show_massive(massive: ChannelSet, k: int) -> Section:
    ratios = {site: top_median_ratio(scores) for site, scores in massive.scores.items()}
    site = max(ratios, key=lambda name: ratios[name])
    share = massive.energy_share().values()
    sentence = (
        f"The strongest channel responds {ratios[site]:.0f} times as strongly as the median one in {site}; the {k} "
        f"strongest of {massive.width} channels ({k / len(massive.scores[site]):.0%}) hold {min(share):.0%} to "
        f"{max(share):.0%} of the squared energy, depending on the block."
    )
    figures = (
        plots.channel_spectrum(massive.scores[site], massive[site], site=site),
        plots.channel_histogram(massive.scores[site], massive[site], site=site),
        plots.block_channel_map(massive.scores, massive),
    )
    code = f"massive = lens.massive_channels(prompt, k={k}, seed=0)\nplots.block_channel_map(massive.scores, massive)"
    return Section("Massive channels", sentence, figures, None, code)


def _show_disruption(result: Result, k: int, seed: int) -> Section:
    rows = result.summary.set_index("arm")
    changed = {arm: _format_interval(rows.loc[arm], "rmse") for arm in rows.index}
    against = ", ".join(f"{changed[arm]} for {arm}" for arm in CONTROLS)
    held = rows["energy_share"]
    sentence = (
        f"Zeroing the top {k} channels in every block changes the images by {changed['top']} of 255 (RMSE, 95 % CI), "
        f"against {against}; {rows.loc['top', 'fidelity']:.0%} of the prompts' attributes are right afterwards, "
        f"against {rows.loc['random', 'fidelity']:.0%} with random channels zeroed. The top hold {held['top']:.0%} of "
        f"the energy, the energy-matched {held['energy-matched']:.0%}: turned down only until tokens move as far as "
        f"with those, the top change the images by {changed['attenuated']}. Overwritten so that the next norm sees "
        f"the mean and variance of before, they change them by {changed['norm-kept']}; zeroed while norms use the "
        f"statistics of before, by {changed['norm-frozen']}; left in place while norms raise the others as zeroing "
        f"would, by {changed['rescaled']}."
    )
    arms = ["untouched", "top", *CONTROLS, "attenuated", "norm-kept", "norm-frozen", "rescaled"]
    shown = [result.image(0, seed, k=0 if arm == "untouched" else k, arm=arm) for arm in arms]
    figures = (plots.strip(shown, arms, title="One image, different channels changed"), result.figure())
    code = f"result = studies.disruption(lens, prompts, k={k})\nresult.figure()"
    measures = ["rmse", "rmse_top_minus", "fidelity", "energy_share"]
    columns = ["arm", "n", *(name for measure in measures for name in (measure, f"{measure}_low", f"{measure}_high"))]
    return Section("1. Are they critical?", sentence, figures, format_summary(result.summary[columns]), code)


def _show_organisation(result: Result, depth: int) -> Section:
    summary = result.summary
    top = summary[summary["arm"] == "top"].set_index("block")
    best, step = int(top["iou"].idxmax()), int(top["step"].iloc[0])
    table = summary[summary["block"] == best].set_index("arm")
    others, means = table["iou"], summary.groupby("arm")["iou"].mean()
    sentence = (
        f"The tokens that lie apart from the border, by the top channels alone, overlap with the subject best in block "
        f"{best}: IoU {others['top']:.2f}, against {others['random']:.2f} for random channels, "
        f"{others['bottom']:.2f} for bottom channels and {others['all']:.2f} for all; {others['component']:.2f} for "
        f"the first principal component "
        f"of all, {others['centre']:.2f} for a disc in the centre, {table.loc['top', 'iou_other_prompts']:.2f} for the "
        f"same masks on the other prompts' images and {table.loc['top', 'chance']:.2f} for equally large random masks. "
        "The block is the best of several, so its IoU flatters; averaged over blocks it is "
        f"{', '.join(f'{means[arm]:.2f} for {arm}' for arm in ('top', *CONTROLS))}."
    )
    keys = [key for text in result.masks if (key := ImageKey.parse(text))]
    first = next(key for key in keys if key.arm == "truth")  # some image that could be read back
    item, seed, truth = first.item, first.seed, result.masks[str(first)]
    blocks = {f"block {block}": result.mask(item, seed, step=step, block=block, arm="top") for block in range(depth)}
    arms = {arm: result.mask(item, seed, step=step, block=best, arm=arm) for arm in table.index}
    image = result.image(item, seed)
    overlays = (
        plots.overlay_grid(image, blocks, truth=truth, title="Masks of the top channels"),
        plots.overlay_grid(image, arms, truth=truth, title=f"Block {best}: other channels, baselines and nulls"),
    )
    code = "result = studies.organisation(lens, prompts)\nresult.figure()"
    columns = ["arm", "n", "iou", "low", "high", "chance", "iou_other_prompts", "p", "size", "degenerate"]
    shown = table.reset_index()[columns]
    return Section("2. Are they organised in space?", sentence, (*overlays, result.figure()), shown, code)


def _show_transfer(result: Result) -> Section:
    full = result.summary[(result.summary["strength"] == 1.0) & ~result.summary["masked"]].set_index("arm")
    moved = {arm: f"{full.loc[arm, 'to_source']:.0f} and {full.loc[arm, 'to_target']:.0f}" for arm in full.index}
    sentence = (
        f"Moving the source's top channels into the target at full strength leaves an image at RMSE {moved['top']} of "
        f"255 from source and target; with random channels it is {moved['random']}, with all channels {moved['all']}. "
        f"{full.loc['top', 'direct_share']:.0%} of the change in what the model predicts is read out directly, by the "
        f"final norm and projection alone, against {full.loc['random', 'direct_share']:.0%} with random channels."
    )
    arms = ("top", "random", "prompt-blend")
    strips = [plots.transfer_strips(result, masked=masked, arms=arms) for masked in (False, True)]
    code = "result = studies.transfer(lens, [(source, prompt)])\nresult.figure()\nplots.transfer_strips(result)"
    columns = ["arm", "masked", "strength", "to_source", "to_target", "inside", "outside"]
    columns += ["fidelity_source", "fidelity_target"]
    return Section("3. Can they be moved?", sentence, (*strips, result.figure()), result.summary[columns], code)


def _make_headline(massive: ChannelSet, disruption: Result, organisation: Result, transfer: Result) -> pd.DataFrame:
    damage = disruption.summary.set_index("arm")
    overlap = organisation.summary.groupby("arm")["iou"].mean()  # its best block would favour an arm of luck
    moved = transfer.summary[(transfer.summary["strength"] == 1.0) & ~transfer.summary["masked"]].set_index("arm")
    arms = ["top", *CONTROLS]
    return pd.DataFrame(
        {
            f"channels (k = {massive.k} of {massive.width})": arms,
            "energy share": [damage.loc[arm, "energy_share"] for arm in arms],
            "zeroed: rmse to untouched": [damage.loc[arm, "rmse"] for arm in arms],
            "IoU with subject, mean over blocks": [overlap[arm] for arm in arms],
            "moved: rmse to source": [moved.loc[arm, "to_source"] for arm in arms],
        }
    )


def _format_interval(row: pd.Series, measure: str) -> str:
    low, high = row[f"{measure}_low"], row[f"{measure}_high"]
    return f"{row[measure]:.0f}" + ("" if np.isnan(low) else f" ({low:.0f} to {high:.0f})")


def _name_figures(sections: list[Section], folder: Path) -> dict[Path, go.Figure]:
    """Every plotly figure of the page, under a file name of its own."""
    figures = [figure for section in sections for figure in section.figures if not isinstance(figure, Image)]
    return {folder / f"figure-{i}.png": figure for i, figure in enumerate(figures)}
