"""Draws docs/images/explorer.webp: the explorer of the page "Explore a run", as a browser shows it."""

import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import dit_lens as dl
from dit_lens.commands.page import find_browser

HERE = Path(__file__).parent
SOURCE, TARGET = (
    "a big yellow triangle right on a plain green background",
    "a big red circle left on a checkered blue background",
)


def explorer() -> dl.explorer.Explorer:
    """An image beside the same with channels of another."""
    lens = dl.DiTLens.toy()
    massive = lens.massive_channels(SOURCE, k=8, seed=0)
    reads = dl.explorer_reads(massive)
    swap = dl.Swap("blocks.*.img", source="row:0", rows=1, channels=massive, branch="cond")
    runs = [lens.run([SOURCE, TARGET], ops, seed=0) for ops in (reads, [swap, *reads])]
    return dl.explore(*runs, channels=massive, left=1, right=3, site="blocks.3.img", step=6)


if __name__ == "__main__":
    page = explorer().to_html(Path(tempfile.mkdtemp()) / "explorer.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1060, "height": 900}, device_scale_factor=1.5)
        view.goto(page.as_uri())
        view.locator("canvas[data-side=right]").click(position={"x": 150, "y": 150})
        view.mouse.move(1, 1)
        shot = view.locator(".dit-lens").screenshot()
        Image.open(BytesIO(shot)).convert("RGB").save(HERE / "images" / "explorer.webp", lossless=True, method=6)
        browser.close()
