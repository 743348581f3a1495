"""The sections of the demo's page: one sentence with its numbers, figures, and the code that gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from dit_lens import plots
from dit_lens.analysis.channels import top_median_ratio
from dit_lens.analysis.clusters import iou, upsample
from dit_lens.commands.page import Section
from dit_lens.commands.sentences import describe_readable, format_interval
from dit_lens.studies.shared.judges import scene_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.tables import format_summary
from dit_lens.toys.scenes import Scene, recognise_scene

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from PIL.Image import Image

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Run
    from dit_lens.studies import Result

CONTROLS = ("bottom", "random", "energy-matched")
CONFOUNDS = ("attenuated", "norm-frozen")
FAR = 5  # times the median, where a response is told to be far from the others

CALL: dict[str, Any] = {"num_inference_steps": 4}  # the toy's scenes are read back as well as after its own twelve
OPTIONS: dict[str, dict[str, Any]] = {
    "disruption": {"draws": 1, "confounds": list(CONFOUNDS)},
    "organisation": {"draws": 1},
    "transfer": {"draws": 1, "strengths": [1.0], "mask_from": None},
}


@dataclass(frozen=True)
class Asked:
    """What a demo is of, and the code that says so.

    prompts: the scenes, a target and its source in turn.
    seed: of the noise.
    k: how many channels count as massive.
    """

    prompts: tuple[str, ...]
    seed: int
    k: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(source, target)."""
        return list(zip(self.prompts[1::2], self.prompts[::2], strict=False))

    def options(self, study: str) -> dict[str, Any]:
        """The arguments of a study, besides lens and prompts."""
        return {"k": self.k, "seeds": [self.seed], **OPTIONS[study], **CALL}

    def write_code(self, *lines: str, imports: str = "") -> str:
        """Lines of code after those that make the lens and the prompts: all that a fresh interpreter needs."""
        listed = "".join(f"    {write(prompt)},\n" for prompt in self.prompts)
        head = f"import dit_lens as dl\n{imports}\nlens = dl.DiTLens.toy()\nprompts = [\n{listed}]\n\n"
        return head + "\n".join(lines)

    def write_study(self, study: str, subjects: str, shown: str, figure: str = "result.figure()") -> str:
        """The code of a study. subjects: what is studied. shown, figure: what is printed of its result, and drawn."""
        call = write_call(f"dl.studies.{study}", f"lens, {subjects}", self.options(study))
        return self.write_code(f"result = {call}", f"print({shown})", figure)


def write(value: Any) -> str:
    """A value as code has it: texts in double quotes.

    >>> write(["a", 1.0]), write("a")
    ('["a", 1.0]', '"a"')
    """
    if isinstance(value, list):
        return f"[{', '.join(map(write, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def write_call(what: str, given: str, options: Mapping[str, Any]) -> str:
    """A call as code: on one line, or where that is long, on several.

    >>> write_call("lens.run", "prompts", {"seed": 0})
    'lens.run(prompts, seed=0)'
    """
    named = ", ".join(f"{name}={write(value)}" for name, value in options.items())
    line = f"{what}({given}, {named})"
    return line if len(line) < 80 else f"{what}(\n    {given},\n    {named},\n)"


def show_images(run: Run, asked: Asked) -> Section:
    """The untouched images, read back from their pixels."""
    read = [recognise_scene(image) for image in run.images]
    exact = sum(found.scene == Scene.parse(prompt) for found, prompt in zip(read, asked.prompts, strict=True))
    sentence = f"Read back from their pixels, {exact} of {len(read)} images are exactly the scene that was asked for."
    table = pd.DataFrame({"asked": asked.prompts, "read back (share of variance explained)": list(map(str, read))})
    scenes = [Scene.parse(prompt) for prompt in asked.prompts]
    figure = plots.strip(run.images, [f"{s.size} {s.colour} {s.shape}<br>{s.position}" for s in scenes])
    worst = min(found.confidence for found in read)
    caption = f"The scene that is read explains {worst:.0%} or more of each image; below 60 % an image is unreadable."
    call = write_call("lens.run", "prompts", {"seed": asked.seed, **CALL})
    code = asked.write_code(
        f"run = {call}",
        "print([str(recognise_scene(image)) for image in run.images])",
        "run",
        imports="from dit_lens.toys.scenes import recognise_scene\n",
    )
    return Section("The images", sentence, (figure,), table, code, (caption,))


def show_massive(massive: ChannelSet, asked: Asked) -> Section:
    """The channels that respond far more strongly than the rest."""
    k, width, share = asked.k, massive.width, massive.energy_share().values()
    ratios = {site: top_median_ratio(scores) for site, scores in massive.scores.items()}
    site = max(ratios, key=lambda name: ratios[name])
    scores = massive.scores[site]
    sentence = (
        f"The strongest channel responds {ratios[site]:.0f} times as strongly as the median one, at {site}. The {k} "
        f"strongest of {width} channels ({k / len(scores):.0%}) hold {min(share):.0%} to {max(share):.0%} of a block's "
        "squared energy."
    )
    often = Counter(channel for chosen in massive.values() for channel in chosen)
    usual = sum(2 * count >= len(massive) for count in often.values())
    far = int((scores >= FAR * scores.median()).sum())
    captions = (
        f"All {width} channels of {site}, by size: channel {massive[site][0]} is the strongest.",
        f"The same as a histogram: {far} channels respond {FAR} times as strongly as the median one, or more.",
        f"All blocks: {usual} channels are among the {k} strongest in half of the blocks or more.",
    )
    figures = (
        plots.channel_spectrum(scores, massive[site], site=site),
        plots.channel_histogram(scores, massive[site], site=site),
        plots.block_channel_map(massive.scores, massive),
    )
    call = write_call("lens.massive_channels", "prompts", {"k": k, "seed": asked.seed, **CALL})
    code = asked.write_code(
        f"massive = {call}", "print(massive.energy_share())", "dl.plots.block_channel_map(massive.scores, massive)"
    )
    return Section("Massive channels", sentence, figures, None, code, captions)


def show_disruption(result: Result, asked: Asked) -> Section:
    """What zeroing them does to images."""
    rows, k = result.summary.set_index("arm"), asked.k
    changed = {arm: format_interval(rows.loc[arm], "rmse", ".0f") for arm in rows.index}
    held = rows["energy_share"]
    sentence = (
        f"Zeroing the top {k} channels in every block changes the images by {changed['top']} of 255 (RMSE, 95 % "
        f"interval), and {describe_readable(result.table, 'top')}. With {k} random channels it is {changed['random']}, "
        f"and {describe_readable(result.table, 'random')}."
    )
    one = result.table[result.table["prompt"] == asked.prompts[0]].set_index("arm")
    shown = {"untouched": result.image(0, asked.seed, k=0, arm="untouched")}
    shown |= {arm: result.image(0, asked.seed, k=k, arm=arm) for arm in ("top", *CONTROLS, *CONFOUNDS)}
    far = {arm: f"RMSE {one.loc[arm, 'rmse']:.0f}" for arm in shown if arm != "untouched"}
    labels = [f"{arm}<br>{far.get(arm, '')}<br>{_say_read(image, asked.prompts[0])}" for arm, image in shown.items()]
    captions = (
        (
            f"“{asked.prompts[0]}” alone, one of {len(asked.prompts)} images. Under each: how far it is from the "
            f"untouched one ({far['top']} with the top channels zeroed), and what of the prompt can be read back."
        ),
        (
            f"Means of {len(asked.prompts)} images. The top hold {held['top']:.0%} of the energy, the energy-matched "
            f"{held['energy-matched']:.0%}. Turned down until tokens move as far as with those, the top change images "
            f"by {changed['attenuated']} (attenuated); zeroed while norms use the statistics of before, by "
            f"{changed['norm-frozen']} (norm-frozen)."
        ),
    )
    figures = (plots.strip(list(shown.values()), labels, title="One image, other channels changed"), result.figure())
    measures = ["rmse", "rmse_top_minus", "fidelity", "energy_share"]
    columns = ["arm", "n", *(name for measure in measures for name in (measure, f"{measure}_low", f"{measure}_high"))]
    code = asked.write_study(
        "disruption", "prompts", 'result.table.groupby("arm")[["rmse", "readable", "fidelity"]].mean()'
    )
    return Section("1. Are they critical?", sentence, figures, format_summary(result.summary[columns]), code, captions)


def show_organisation(result: Result, depth: int, asked: Asked) -> Section:
    """How well they find the subject. depth: how many blocks there are."""
    summary = result.summary
    top = summary[summary["arm"] == "top"].set_index("block")
    best, step = int(top["iou"].idxmax()), int(top["step"].iloc[0])
    table = summary[summary["block"] == best].set_index("arm")
    at, means, n = table["iou"], summary.groupby("arm")["iou"].mean(), int(table.loc["top", "n"])
    sentence = (
        f"Tokens that lie apart from the border, by the top channels alone, fit the subject best at block {best}: mean "
        f"IoU {at['top']:.2f} over {n} images. Random channels fit by {at['random']:.2f}, all by {at['all']:.2f}, "
        f"their first principal component by {at['component']:.2f}, a disc in the centre by {at['centre']:.2f}. The "
        f"best of {depth} blocks flatters: over all blocks it is {means['top']:.2f}, {means['energy-matched']:.2f} by "
        f"energy-matched and {means['random']:.2f} by random channels."
    )
    keys = [key for text in result.masks if (key := ImageKey.parse(text))]
    first = next(key for key in keys if key.arm == "truth")  # some image that could be read back
    item, seed, truth = first.item, first.seed, result.masks[str(first)]
    blocks = {f"block {block}": result.mask(item, seed, step=step, block=block, arm="top") for block in range(depth)}
    arms = {arm: result.mask(item, seed, step=step, block=best, arm=arm) for arm in table.index}
    fits = {arm: float(iou(upsample(mask, truth.shape), truth)) for arm, mask in arms.items()}
    highest = sorted(fits, key=lambda arm: -fits[arm])[:3]
    image = result.image(item, seed)
    overlays = (
        plots.overlay_grid(image, blocks, truth=truth, title="One image: masks of the top channels"),
        plots.overlay_grid(image, arms, truth=truth, title=f"The same image at block {best}: others, and nulls"),
    )
    captions = (
        (
            f"“{asked.prompts[item]}” alone: at block {best} its IoU is {fits['top']:.2f}. The {at['top']:.2f} above "
            f"is the mean of {n} images."
        ),
        f"The same image alone. Here {', '.join(f'{arm} ({fits[arm]:.2f})' for arm in highest)} fit best.",
        (
            f"Means of {n} images. At block {best}, the top channels' masks fit the other prompts' subjects by "
            f"{table.loc['top', 'iou_other_prompts']:.2f}, and random masks as large fit by "
            f"{table.loc['top', 'chance']:.2f}."
        ),
    )
    columns = ["arm", "n", "iou", "low", "high", "chance", "iou_other_prompts", "p", "size", "degenerate"]
    code = asked.write_study(
        "organisation",
        "prompts",
        'result.summary.pivot(index="block", columns="arm", values="iou")[["top", "random", "all"]]',
    )
    shown, figures = table.reset_index()[columns], (*overlays, result.figure())
    return Section("2. Are they organised in space?", sentence, figures, shown, code, captions)


def show_transfer(result: Result, asked: Asked) -> Section:
    """What moving them from a source into a target does."""
    at, count = result.summary.set_index("arm"), len(asked.pairs)
    moved = {arm: f"{at.loc[arm, 'to_source']:.0f}" for arm in ("untouched", "top", "random", "energy-matched")}
    nearer = at["specificity"]
    sentence = (
        f"The target lies {moved['untouched']} from the source (RMSE of 255, mean of {count} pairs). With the source's "
        f"top channels it lies {moved['top']} away, with random ones {moved['random']}, with energy-matched ones "
        f"{moved['energy-matched']}. A collapse to the mean picture would lie "
        f"{at.loc['mean-picture', 'to_source']:.0f} away, but no nearer to this source than to the other; with the top "
        f"channels it is {nearer['top']:.0f} nearer, with random ones {nearer['random']:.0f}, with energy-matched ones "
        f"{nearer['energy-matched']:.0f}. So few pairs decide nothing."
    )
    strips, captions = zip(*(_show_pair(result, asked, number) for number in range(count)), strict=True)
    columns = ["arm", "n", "to_source", "to_target", "specificity", "fidelity_source", "fidelity_target"]
    pairs = "list(zip(prompts[1::2], prompts[::2]))"  # source, target
    code = asked.write_study(
        "transfer", pairs, f"result.summary[{write(columns[:5])}]", "dl.plots.transfer_strips(result)"
    )
    return Section("3. Can they be moved?", sentence, strips, result.summary[columns], code, captions)


def _show_pair(result: Result, asked: Asked, number: int) -> tuple[go.Figure, str]:
    """A pair's target with channels of its source, and what that did."""
    source, target = asked.pairs[number]
    one = result.table[result.table["prompt"] == f"{source} -> {target}"].set_index("arm")
    moves = {"k": asked.k, "part": "whole", "strength": 1.0}
    shown = {"target": result.image(number, asked.seed, arm="target")}
    shown |= {arm: result.image(number, asked.seed, arm=arm, **moves) for arm in ("top", "random", "energy-matched")}
    shown["source"] = result.image(number, asked.seed, arm="source")
    far = {"target": one.loc["untouched", "to_source"], **one["to_source"], "source": 0}
    read = {arm: _say_read(image, source) for arm, image in shown.items()}
    labels = [f"{arm}<br>{far[arm]:.0f} away<br>{read[arm]}" for arm in shown]
    figure = plots.strip(
        list(shown.values()), labels, title=f"Pair {number + 1}: the target with channels of its source"
    )
    caption = (
        f"“{target}” and its source, “{source}”. Under each: RMSE to the source, and what of the source's prompt is "
        f"read back; with the top channels {far['top']:.0f}, {read['top']}."
    )
    return figure, caption


def _say_read(image: Image, prompt: str) -> str:
    """What of a prompt can be read back from one image."""
    found = scene_judge(image, prompt)
    return f"{found['fidelity']:.0%} right" if found["readable"] else "unreadable"
