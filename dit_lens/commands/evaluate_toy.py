"""Measures how well a toy follows prompts that it never saw, and writes its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from dit_lens.core.runs.files import read_json, write_json, write_text
from dit_lens.core.session import DEFAULTS_FILE
from dit_lens.lens import DiTLens
from dit_lens.toys.kinds import Kind, kind
from dit_lens.toys.quality import measure_shares
from dit_lens.toys.scenes import Scene, draw, sample_scenes
from dit_lens.toys.stages import draw_batch

PROMPTS = 200
BATCH = 8
# The least share of held-out prompts in which an attribute must be right; size has no such bar.
BAR = {"colour": 0.95, "background": 0.95, "position": 0.95, "texture": 0.90, "shape": 0.85}
CARD = "README.md"


def evaluate(folder: Path, *, prompts: int = PROMPTS, seed: int = 0) -> dict[str, Any]:
    """Shares of attributes right over held-out prompts, and how well images can be read back at all.

    Image i is drawn from noise seed ``seed + i`` with the toy's own default arguments.

    folder: folder of the toy's pipeline.
    prompts: number of held-out prompts.
    seed: seed of the first image.
    """
    lens = DiTLens.from_pretrained(folder)
    toy = kind(_name_toy(read_json(folder / DEFAULTS_FILE, "the defaults of a toy")))
    scenes = sample_scenes(prompts, seed=seed + 1, held_out=True)
    images: list[Image.Image] = []
    with lens.quiet():
        for start in tqdm(range(0, prompts, BATCH), desc="held-out prompts"):
            part = scenes[start : start + BATCH]
            seeds = list(range(seed + start, seed + start + len(part)))
            images += lens.run([scene.caption for scene in part], seed=seeds).images
    drawn = [draw(scene, seed + i).image for i, scene in enumerate(scenes)]
    return {
        "prompts": prompts,
        "steps": lens.defaults["num_inference_steps"],
        "generated": measure_shares(scenes, images),
        "drawn": measure_shares(scenes, drawn),
        "round trip": measure_shares(scenes, _encode_and_decode(toy, lens, scenes, seed)),
        "bar": BAR,
    }


def report(quality: dict[str, Any]) -> str:
    """The evaluation as a table in plain text; it says by how much a bar was missed."""
    lines = [
        f"{quality['prompts']} held-out prompts, {quality['steps']} steps",
        f"{'attribute':<12}{'right':>7}{'95 % CI':>16}{'bar':>7}",
    ]
    for name, (share, low, high) in quality["generated"].items():
        bar = quality["bar"].get(name)
        verdict = (
            "" if bar is None else f"{bar:>7.2f}  " + ("reached" if share >= bar else f"missed by {bar - share:.3f}")
        )
        lines.append(f"{name:<12}{share:>7.3f}{f'{low:.3f} to {high:.3f}':>16}{verdict}")
    for source in ("drawn", "round trip"):
        worst = min(share for share, *_ in quality[source].values())
        lines.append(f"reading back {source} images: every attribute right in at least {worst:.3f}")
    return "\n".join(lines)


def write_card(folder: Path, quality: dict[str, Any]) -> None:
    """Adds the measured quality to the toy's JSON file, and writes the model card beside it."""
    stored = read_json(folder / DEFAULTS_FILE, "the defaults of a toy")
    stored["quality"] = quality
    write_json(folder / DEFAULTS_FILE, stored)
    training, name = stored["training"], _name_toy(stored)
    toy = kind(name)
    stages = "\n".join(
        f"| {name} | {s['iterations']} | {s['seconds']} | {s['loss']} |" for name, s in training["stages"].items()
    )
    rows = "\n".join(
        f"| {name} | {share:.3f} | {low:.3f} to {high:.3f} | {_compare_to_bar(name, share)} |"
        for name, (share, low, high) in quality["generated"].items()
    )
    write_text(
        folder / CARD,
        CARD_TEXT.format(
            **(training | {"stages": stages}),
            name=name,
            title=toy.TITLE,
            pipeline=read_json(folder / "model_index.json", "a pipeline")["_class_name"],
            notes=f"\n{toy.NOTES}\n" if toy.NOTES else "",
            rows=rows,
            n=quality["prompts"],
            steps=quality["steps"],
        ),
    )


CARD_TEXT = """# A {title} toy

A `{pipeline}` of diffusers, trained from nothing on images drawn by `dit_lens.toys.scenes`: 64 x 64 pixels, 16 x 16
image tokens, sentences such as "a big red circle left on a checkered blue background". About 9 % of the combinations of
colour, shape, texture and position were held out of training. It is for teaching and testing; it can draw nothing else.
{notes}
Trained with `dit-lens train-toy {name}` (seed {seed}, batch {batch}, rate {rate}) on {hardware}.

| stage | iterations | seconds | final loss |
| --- | --- | --- | --- |
{stages}

Text encoders learn the grammar's attributes; the autoencoder minimises L1 with a small KL term; the transformer is
trained by rectified flow with 10 % caption dropout, and its weights are averaged (EMA) and stored in half precision.

Measured over {n} held-out prompts at {steps} steps, images read back by `recognise_scene`:

| attribute | share right | 95 % interval | bar |
| --- | --- | --- | --- |
{rows}
"""


def _name_toy(stored: dict[str, Any]) -> str:
    """The kind of a toy; the first one was written before there were others."""
    return stored.get("toy", "flux")


def _compare_to_bar(name: str, share: float) -> str:
    if name not in BAR:
        return "none"
    return f"{BAR[name]:.2f}, {'reached' if share >= BAR[name] else f'missed by {BAR[name] - share:.3f}'}"


@torch.no_grad()
def _encode_and_decode(toy: Kind, lens: DiTLens, scenes: Sequence[Scene], seed: int) -> list[Image.Image]:
    """Drawn images, encoded and decoded again by the toy's autoencoder."""
    images = []
    for start in range(0, len(scenes), BATCH):
        drawn = draw_batch(list(scenes[start : start + BATCH]), seed + start, lens.pipe.vae.device)
        decoded = toy.decode(lens.pipe, toy.posterior(lens.pipe, drawn).mode())
        arrays = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        images += [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
    return images
