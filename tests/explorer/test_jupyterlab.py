"""The widgets in a real JupyterLab and browser: moves sliders, clicks channels, and compares the state in Python."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from tests import browser

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("jupyterlab")]

SET_UP = """
import dit_lens as dl
from dit_lens.explorer import explorer as module
circle = "a big red circle left on a checkered blue background"
cross = "a small white cross right on a plain green background"
lens = dl.DiTLens.toy()
run = lens.run(circle, [dl.Read("blocks[3:6].img")], seed=0, num_inference_steps=3)
"""
CELLS = {
    "explorer": [SET_UP, "x = dl.explore(run, k=4)\nx"],
    "lazy": [SET_UP, "module.BUDGET = 0\nx = dl.explore(run, k=4)\nx"],
    "panel": [SET_UP, "x = dl.steer(lens, circle, cross, k=4, num_inference_steps=2)\nx"],
}


LESSON = Path(__file__).parents[2] / "notebooks" / "solutions" / "lesson_1_names.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    browser.browser_or_skip()
    folder = tmp_path_factory.mktemp("notebooks")
    for name, cells in CELLS.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "solutions").mkdir()
    shutil.copy(LESSON, folder / "solutions")
    shutil.copy(LESSON.parent.parent / "colab.svg", folder)  # an image in the lesson
    with browser.jupyterlab(folder) as address:
        yield address


@pytest.fixture
def page():
    with browser.page(width=1400, height=1000) as page:
        yield page


def open_and_run(page, lab, name):
    browser.open_notebook(page, lab, f"{name}.ipynb")
    assert browser.run_all(page) == []
    view = page.locator(".dit-lens")
    view.wait_for()
    view.scroll_into_view_if_needed()
    return view


def pixels(locator):
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def wait_for_view(page, start):
    page.wait_for_function("start => document.querySelector('.dit-lens').dataset.view.startsWith(start)", arg=start)


def wait_for_python(page, expression, value):
    """Waits until an expression in the kernel has a value; the browser sends changes with a small delay."""
    for _ in range(50):
        if browser.ask_kernel(page, expression) == value:
            return
        page.wait_for_timeout(100)
    assert browser.ask_kernel(page, expression) == value


def test_sliders_and_channels_change_the_state_in_python_and_python_the_view(page, lab):
    view = open_and_run(page, lab, "explorer")
    canvas = view.locator("canvas[data-side=left]")
    before = pixels(canvas)
    view.get_by_role("slider", name="step").press("Home")
    wait_for_view(page, "0/blocks.5.img/")
    moved = pixels(canvas)
    assert np.abs(moved - before).max() > 30
    wait_for_python(page, "x.step", "0")
    bar = view.locator(".bar").nth(2)
    channel = bar.locator("span").first.inner_text().removeprefix("channel ")
    bar.click()
    wait_for_view(page, f"0/blocks.5.img/{channel}")
    page.mouse.move(5, 5)
    assert np.abs(pixels(canvas) - moved).max() > 30
    wait_for_python(page, "x.channel", channel)
    browser.ask_kernel(page, "[setattr(x, 'step', 1), setattr(x, 'site', 'blocks.3.img')]")
    wait_for_view(page, "1/blocks.3.img/")


def test_the_first_lesson_runs_and_its_explorer_reacts(page, lab):
    view = open_and_run(page, lab, f"solutions/{LESSON.stem}")
    canvas = view.locator("canvas[data-side=left]")
    before = pixels(canvas)
    view.get_by_role("slider", name="block").press("Home")
    page.wait_for_function("() => document.querySelector('.dit-lens').dataset.view.includes('/blocks.0.img/')")
    bar = view.locator(".bar").nth(1)
    bar.click()
    page.mouse.move(5, 5)
    assert bar.get_attribute("aria-pressed") == "true"
    assert np.abs(pixels(canvas) - before).max() > 30
    figures = page.locator(".js-plotly-plot .main-svg")
    figures.first.wait_for()
    assert figures.count() >= 2


def test_blocks_beyond_the_budget_and_clusters_are_requested(page, lab):
    view = open_and_run(page, lab, "lazy")
    canvas = view.locator("canvas[data-side=left]")
    for overlay in ("channel", "clusters"):
        view.get_by_role("button", name=overlay, exact=True).click()
        view.get_by_role("slider", name="block").press("Home")
        wait_for_view(page, "2/blocks.3.img/")
        view.get_by_role("button", name="image", exact=True).click()
        bare = pixels(canvas)
        view.get_by_role("button", name=overlay, exact=True).click()
        page.wait_for_function("() => !document.querySelector('.legend').textContent.includes('…')")
        page.wait_for_timeout(300)
        assert np.abs(pixels(canvas) - bare).max() > 30


def test_the_panel_draws_when_a_control_stops_moving(page, lab):
    view = open_and_run(page, lab, "panel")
    shown = view.locator("figure img").last
    before = pixels(shown)
    view.get_by_role("slider", name="first block").press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.dit-lens').dataset.results === '1'", timeout=60_000)
    assert np.abs(pixels(shown) - before).max() > 10
    assert browser.ask_kernel(page, "x.settings[0].blocks") == "(1, 8)"
    view.get_by_role("button", name="bottom", exact=True).click()
    page.wait_for_function("() => document.querySelector('.dit-lens').dataset.results === '2'", timeout=60_000)
    assert browser.ask_kernel(page, "x.settings[1].arm") == "bottom"
