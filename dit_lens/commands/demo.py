"""The main job: a page that finds the massive activations of the trained toy and tests the three claims about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from PIL.Image import Image

from dit_lens import studies
from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import as_seed
from dit_lens.commands.demo_sections import (
    CALL,
    CONTROLS,
    Asked,
    show_disruption,
    show_images,
    show_massive,
    show_organisation,
    show_transfer,
)
from dit_lens.commands.page import Section, write_figures, write_page
from dit_lens.core.runs.files import check_folder, whole_folder
from dit_lens.core.runs.run import FILES as RUN_FILES
from dit_lens.errors import PromptError, StoreError
from dit_lens.lens import DiTLens
from dit_lens.studies.shared.arguments import check_k
from dit_lens.studies.shared.result import FILES as RESULT_FILES
from dit_lens.toys.scenes import Scene, sample_scenes

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from dit_lens.analysis.channels import ChannelSet
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
OTHERS = 2  # further scenes, so that the studies speak of more than one image, and of more than one pair

TITLE = "dit_lens: massive activations in a toy FLUX"
LEAD = (
    "A few channels of a Diffusion Transformer respond far more strongly than the rest. Does the image depend on them? "
    "Do they know where the subject is? Can they be moved into another image? A small FLUX answers that was trained to "
    "draw scenes."
)
SCOPE = (
    "One model, {prompts} prompts and one seed, {steps} denoising steps: this shows the tool, and proves nothing about "
    "large models. Every box of code runs as it stands, and gives the numbers above it."
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
    if prompt == source:
        raise PromptError(f"the prompt and the source are both {prompt!r}. Choose another --source.")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "index.html").exists())):
        raise StoreError(f"{out} exists and holds no earlier demo. Choose another folder with --out.")
    check_folder(out, MARK, room=ROOM)
    lens = DiTLens.toy()
    check_k(lens, "blocks.*.img", [k])
    others = [scene.caption for scene in sample_scenes(OTHERS + 2, seed=seed + 100, distinct=True)]
    prompts = [prompt, source, *[other for other in others if other not in (prompt, source)][:OTHERS]]
    asked = Asked(tuple(prompts), seed, k)
    with lens.quiet():
        run = lens.run(prompts, seed=seed, **CALL)
        massive = lens.massive_channels(prompts, k, seed=seed, **CALL)
    disruption = studies.disruption(lens, prompts, **asked.options("disruption"))
    organisation = studies.organisation(lens, prompts, **asked.options("organisation"))
    transfer = studies.transfer(lens, asked.pairs, **asked.options("transfer"))
    sections = [
        show_images(run, asked),
        show_massive(massive, asked),
        show_disruption(disruption, asked),
        show_organisation(organisation, lens.anatomy.depth, asked),
        show_transfer(transfer, asked),
    ]
    lead = f"{LEAD} {SCOPE.format(prompts=len(prompts), steps=len(run.sigmas))}"
    with whole_folder(out, mark=MARK, own=FILES) as folder:
        write_page(folder / "index.html", title=TITLE, lead=lead, sections=sections)
        run.save(folder / "run")
        for result in (disruption, organisation, transfer):
            result.save(folder / result.study)
        for i, image in enumerate(run.images):
            image.save(folder / f"image-{i}.png")
        write_figures(_name_figures(sections, folder))
    return Outcome(out / "index.html", _make_headline(massive, disruption, organisation, transfer))


def _make_headline(massive: ChannelSet, disruption: Result, organisation: Result, transfer: Result) -> pd.DataFrame:
    damage = disruption.summary.set_index("arm")
    overlap = organisation.summary.groupby("arm")["iou"].mean()  # its best block would favour an arm of luck
    readable = disruption.table.groupby("arm")["readable"].mean()
    moved = transfer.summary.set_index("arm")
    arms = ["top", *CONTROLS]
    return pd.DataFrame(
        {
            f"channels (k = {massive.k} of {massive.width})": arms,
            "energy share": [damage.loc[arm, "energy_share"] for arm in arms],
            "zeroed: rmse to untouched": [damage.loc[arm, "rmse"] for arm in arms],
            "zeroed: share of images readable": [readable[arm] for arm in arms],
            "IoU with subject, mean over blocks": [overlap[arm] for arm in arms],
            "moved: rmse to source": [moved.loc[arm, "to_source"] for arm in arms],
        }
    )


def _name_figures(sections: list[Section], folder: Path) -> dict[Path, go.Figure]:
    """Every plotly figure of the page, under a file name of its own."""
    figures = [figure for section in sections for figure in section.figures if not isinstance(figure, Image)]
    return {folder / f"figure-{i}.png": figure for i, figure in enumerate(figures)}
