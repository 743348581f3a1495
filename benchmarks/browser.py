"""How long the explorer takes from a slider to the drawn image, at the size of FLUX.1 with 28 steps and 1024 pixels.

57 blocks x 28 steps x 8 channels x 64 x 64 tokens: 50 MB of maps, all in the browser. Milliseconds from the input event
to the end of drawing, over 200 moves of the block's and the step's slider, in the browser of this machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.measure import Row, quartiles
from dit_lens.commands.page import find_browser
from dit_lens.explorer import Explorer, Views
from dit_lens.explorer.view_arrays import Pane

BLOCKS, STEPS, CHANNELS, SIDE = 57, 28, 8, 64
MOVES = """async () => {
  const times = [], sliders = [...document.querySelectorAll('.side input[type=range]')].slice(0, 2);
  for (let i = 0; i < 200; i++) {
    const slider = sliders[i % 2];
    slider.value = (+slider.value + 7) % (+slider.max + 1);
    const began = performance.now();
    slider.dispatchEvent(new Event('input'));
    times.push(performance.now() - began);
    await new Promise(requestAnimationFrame);
  }
  return times;
}"""


def views():
    """Random maps of that size."""
    rng = np.random.default_rng(0)
    shape = (BLOCKS, 1, STEPS, 1, CHANNELS)
    maps = rng.integers(0, 256, (*shape[1:], SIDE, SIDE), dtype=np.uint8)
    return Views(
        panes=(Pane("noise", Image.effect_noise((512, 512), 64).convert("RGB"), 0),),
        groups=("top",),
        blocks=tuple(f"blocks.{block}.img" for block in range(BLOCKS)),
        steps=tuple((step, 1 - step / STEPS) for step in range(STEPS)),
        grid=(SIDE, SIDE),
        channels=np.tile(np.arange(CHANNELS, dtype=np.int32), (BLOCKS, 1, 1)),
        ranges=np.tile(np.float32([0, 1]), (*shape, 1)),
        means=rng.random(shape, np.float32),
        thumbs=rng.integers(0, 256, (*shape, 8, 8), dtype=np.uint8),
        scores=rng.lognormal(size=(BLOCKS, 3072)).astype(np.float32),
        maps=lambda block: np.roll(maps, block, -1),
        labels=lambda _: np.zeros((1, STEPS, 1, SIDE, SIDE), np.uint8),
        code="",
    )


def measure_explorer() -> Iterator[Row]:
    """The page of the explorer, opened and moved through."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Explorer(views()).to_html(Path(folder) / "page.html")
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(path.as_uri(), wait_until="commit")
        page.wait_for_selector("[data-complete]", state="attached")
        opened, complete = (
            float(page.locator(f"[data-{name}]").get_attribute(f"data-{name}")) / 1000 for name in ("ready", "complete")
        )
        times, note = page.evaluate(MOVES), f"{browser.version}, a page of {path.stat().st_size / 2**20:.0f} MB"
        browser.close()
    yield Row(
        "explorer",
        "slider to drawn, 57 x 28 x 8 maps of 64 x 64",
        "ms",
        **quartiles(times),
        target=2,
        rounds=len(times),
        note=note,
    )
    yield Row("explorer", "opening that page until its first map is shown", "s", opened, opened, opened, target=1)
    yield Row("explorer", "opening that page until it has all maps", "s", complete, complete, complete)
