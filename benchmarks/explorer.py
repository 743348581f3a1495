"""How long the explorer takes from a slider to the drawn image, at the size of FLUX.1 with 28 steps and 1024 pixels.

    python benchmarks/explorer.py

57 blocks x 28 steps x 8 channels x 64 x 64 tokens: 50 MB of maps, all in the browser. Prints milliseconds from the
input event to the end of drawing, over 200 moves of the block's and the step's slider, in the browser of this machine.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from dit_lens.commands.page import find_browser
from dit_lens.explorer import Explorer, Views
from dit_lens.explorer.views import Pane

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


def main():
    began = time.perf_counter()
    explorer = Explorer(views())
    made = time.perf_counter() - began
    path = explorer.to_html(Path(tempfile.mkdtemp()) / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        began = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]", state="attached")
        opened = time.perf_counter() - began
        median, slow = np.percentile(page.evaluate(MOVES), [50, 95])
        print(f"{browser.version}: slider to drawn, median {median:.2f} ms, 95 % within {slow:.2f} ms")
        print(f"made in {made:.2f} s; its page has {path.stat().st_size / 2**20:.0f} MB and opens in {opened:.1f} s")
        browser.close()


if __name__ == "__main__":
    main()
