"""Writes docs/scaling.md from what was measured, and shows the arithmetic: ``python docs/scaling.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_lens.studies.parts.ablations import CONFOUNDS
from dit_lens.studies.shared.arms import DRAWS, count_arms

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = Path(__file__).with_name("scaling.md")

PROMPTS, BLOCKS, BATCH, STEPS = 1600, 57, 8, 28
GPUS = (1, 8, 64)
# A forward pass of FLUX.1 at 1024 x 1024: 2 operations for each of 12 billion weights and each of 4,096 + 512 tokens,
# and 4 for each pair of tokens and each of 3,072 channels in 57 blocks.
TOKENS, WEIGHTS, WIDTH = 4096 + 512, 12e9, 3072
OPERATIONS = 2 * WEIGHTS * TOKENS + 4 * TOKENS**2 * WIDTH * BLOCKS
PEAK, USED = 989e12, 0.4  # an H100 in bfloat16, and the share of it that such a model reaches
SECONDS = STEPS * OPERATIONS / (PEAK * USED)
KEPT_ARMS = 6  # untouched, no-op, top, bottom, energy-matched, and the first random one
PIXELS = 1024 * 1024 * 3

HEAD = """# Scaling

What a study of many prompts takes, with the arithmetic. Written by `python docs/scaling.py` from
`benchmarks/results/scaling.json`, which `python -m benchmarks.scaling` measures. How to divide a study is in
[](how-to/long-studies.md).
"""


def page() -> str:
    """The whole page."""
    found = json.loads(RESULTS.read_text("utf-8"))
    parts = [_measured(found), _study(found["cells"]), _breaks(found), _simulated(found)]
    return "\n".join([HEAD, *(line for part in parts for line in [*part, ""])]).rstrip() + "\n"


def _measured(found: dict[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    yield "## A cell"
    yield ""
    yield (
        f"A cell of `disruption` on FLUX.1-dev, {BATCH} prompts at 1024 x 1024. Sizes are those of "
        "cells of this form, with images as hard to compress as photographs; seconds are those of "
        f"{machine['device']}, one thread, beside other programs (load {machine['load before']:.1f} on "
        f"{machine['cores']} cores), so at most these."
    )
    yield ""
    yield "| cell | on disk, and on the network | packed by its worker | kept by the process that deals | read again |"
    yield "| --- | --- | --- | --- | --- |"
    for kind, one in found["cells"].items():
        yield (
            f"| {kind} | {one['bytes'] / 1e6:.1f} MB | {one['pack']:.1f} s | {1000 * one['keep']:.0f} ms | "
            f"{one['read']:.2f} s |"
        )
    yield ""
    image = found["cells"]["arm"]["image_bytes"]
    yield (
        f"An image is {image / 1e6:.1f} MB as PNG, which is most of what a worker packs. An untouched cell has the "
        f"scores, norms and energies of the {WIDTH:,} channels of each block and prompt besides."
    )


def _study(cells: dict[str, Any]) -> Iterator[str]:
    arms = count_arms(DRAWS)
    each = 2 + arms  # images of a prompt at one block
    images = PROMPTS * BLOCKS * each
    batches = PROMPTS // BATCH * BLOCKS
    count = batches * each
    disk = batches * (cells["untouched, blocks: 1"]["bytes"] + (each - 1) * cells["arm"]["bytes"] * _kept(each))
    yield f"## {PROMPTS:,} prompts x {BLOCKS} blocks x arms"
    yield ""
    yield (
        f'One block at a time, `sweep("disruption", ..., over={{"site": ["blocks.0.img", ...]}}, confounds=False)`: at '
        f"each block a prompt has {each} images, which are 2 (untouched, no-op) and {arms} arms (top, bottom, "
        f"{DRAWS} random and {arms - 2 - DRAWS} energy-matched)."
    )
    yield ""
    yield f"- images: {PROMPTS:,} x {BLOCKS} x {each} = {images:,}"
    yield f"- cells: {PROMPTS:,} / {BATCH} x {BLOCKS} x {each} = {count:,}"
    yield (
        f"- a forward pass: 2 x {WEIGHTS:.3g} weights x {TOKENS:,} tokens + 4 x {TOKENS:,}^2 x {WIDTH:,} x {BLOCKS} = "
        f"{OPERATIONS:.3g} operations"
    )
    yield (
        f"- an image: {STEPS} steps x {OPERATIONS:.3g} / ({USED:.0%} of {PEAK:.3g} a second, an H100) = "
        f"{SECONDS:.1f} s. This is the assumption on which all else rests; `dit-lens study PIPELINE --plan` times your "
        "own model on your own GPU."
    )
    yield f"- all images: {images * SECONDS / 3600:,.0f} hours of one GPU"
    yield (
        f"- on disk: {disk / 1e12:.1f} TB. Images of the first draw are kept alone, so of {each} cells {KEPT_ARMS} "
        "have them"
    )
    yield ""
    yield "| GPUs | days | cells a second | to the process that deals | its time for keeping |"
    yield "| --- | --- | --- | --- | --- |"
    for gpus in GPUS:
        duration = images * SECONDS / gpus + count * cells["arm"]["pack"] * _kept(each) / gpus
        yield (
            f"| {gpus} | {duration / 86400:.1f} | {count / duration:.2f} | {disk / duration / 1e6:.1f} MB/s | "
            f"{count / duration * cells['arm']['keep']:.2%} |"
        )
    yield ""
    yield (
        f"All blocks at once, as `disruption` does by default, with its {len(CONFOUNDS)} other arms: {PROMPTS:,} x "
        f"{each + len(CONFOUNDS)} = {PROMPTS * (each + len(CONFOUNDS)):,} images, "
        f"{PROMPTS * (each + len(CONFOUNDS)) * SECONDS / 3600:,.0f} hours of one GPU."
    )


def _kept(each: int) -> float:
    """The share of cells that keep their images."""
    return KEPT_ARMS / each


def _breaks(found: dict[str, Any]) -> Iterator[str]:
    images = PROMPTS * KEPT_ARMS
    sizes = [found["cells"][f"untouched, blocks: {blocks}"]["bytes"] / 1e6 for blocks in (1, BLOCKS)]
    engine = found["threads"]
    rate = engine["cells"] / engine["seconds"]
    yield "## What breaks first"
    yield ""
    yield (
        f"1. **Memory where the result is put together.** A result holds its images as pixels: {images:,} of a block "
        f"are {images * PIXELS / 1e9:.0f} GB, and a sweep holds those of all blocks, "
        f"{images * BLOCKS * PIXELS / 1e12:.1f} TB. Run one study for each block, with `out=` of its own, and put "
        "their tables together; or give the pipeline a smaller `height=` and `width=`."
    )
    yield (
        "2. **The disk**, of which the table above tells. Cells are files in one folder, a folder for each: on file "
        "systems that are slow with many of them, take a larger `batch_size=`."
    )
    yield (
        f"3. **What a worker fetches.** For an arm it needs the untouched cell of the batch, {sizes[0]:.0f} MB of one "
        f"block and {sizes[1]:.0f} MB of all, at most as often as it makes cells. Workers of `transfer` and "
        "`carrier_or_detail` fetch those of all batches, as they compare or average them."
    )
    yield (
        f"4. **The process that deals**: it dealt and kept {rate:.0f} small cells a second below, which is far more "
        "than the table asks of it."
    )
    yield (
        "5. **Cells that cannot be divided.** The sets of `stability` are of all prompts before, so of one seed one "
        "worker makes all; a study without `batch_size=` has one batch a seed."
    )


def _simulated(found: dict[str, Any]) -> Iterator[str]:
    yield "## Simulated"
    yield ""
    yield (
        "Cells that sleep, dealt by the engine that deals real ones, written to a folder. A tenth of them come first, "
        "and the study looks into each before it asks for the others."
    )
    yield ""
    yield "| workers | cells | killed in a cell | kept | kept twice | seconds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, where in (("threads", "threads"), ("ray", "actors of Ray")):
        if name in found:
            one = found[name]
            yield (
                f"| {one['workers']} {where} | {one['cells']:,} | {one['deaths']} | {one['kept']:,} | "
                f"{one['kept_twice']} | {one['seconds']:.0f} |"
            )
    if "actors" in found:
        one, two = (found["actors"]["cells_per_second"][size] for size in ("1", "2"))
        yield ""
        yield (
            f"`disruption` on the toy, two actors of Ray beside one, on {found['machine']['cores']} cores (load "
            f"{found['actors']['load'][0]:.1f}): {two:.2f} cells a second and {one:.2f}, {two / one:.2f} times as "
            "many. The tables are those of one process."
        )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
