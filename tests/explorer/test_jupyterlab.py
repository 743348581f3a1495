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
VIEWS = {
    "explorer": "x = dl.explore(run, k=4)\nx",
    "lazy": "module.BUDGET = 0\ny = dl.explore(run, k=4)\ny",
    "row": """
import ipywidgets
u, v = dl.explore(run, k=2), dl.explore(run, k=2)
ipywidgets.link((u, "step"), (v, "step"))
ipywidgets.HBox([u, v])
""",
    "panel": "z = dl.steer(lens, circle, cross, k=4, num_inference_steps=2)\nz",
}
PLACES = {"explorer": 0, "lazy": 1, "row": 2, "panel": 4}  # from the top: a row has two views
LESSON = Path(__file__).parents[2] / "notebooks" / "solutions" / "lesson_1_names.ipynb"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A notebook with views, whose cells all ran; it and the lesson share a kernel, as each imports torch anew."""
    browser.browser_or_skip()
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_code_cell(text) for text in (SET_UP, *VIEWS.values())]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "views.ipynb")
    (folder / "solutions").mkdir()
    shutil.copy(LESSON, folder / "solutions")
    shutil.copy(LESSON.parent.parent / "colab.svg", folder)  # an image in the lesson
    with browser.jupyterlab(folder) as address, browser.page(width=1400, height=1000) as page:
        browser.open_notebook(page, address, "views.ipynb")
        assert browser.run_all(page) == []
        yield page


def shown(page, place=0):
    """A view in the notebook that is shown. place: which one, from the top."""
    view = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .dit-lens").nth(place)
    view.wait_for()
    view.scroll_into_view_if_needed()
    return view


@pytest.fixture
def view(page, request):
    """The view that the test names, in a notebook where all cells ran."""
    browser.show_notebook(page, "views.ipynb")
    return shown(page, PLACES[request.param])


def of(name):
    return pytest.mark.parametrize("view", [name], indirect=True)


def pixels(locator):
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def wait_until(view, condition, timeout=None):
    """Waits for a condition on the element of a view, which is called ``view`` there."""
    view.page.wait_for_function(f"view => {condition}", arg=view.element_handle(), timeout=timeout)


def wait_for_view(view, start):
    wait_until(view, f"view.dataset.view.startsWith('{start}')")


def wait_for_python(page, expression, value):
    """Waits until an expression in the kernel has a value; the browser sends changes with a small delay."""
    for _ in range(50):
        if browser.ask_kernel(page, expression) == value:
            return
        page.wait_for_timeout(100)
    assert browser.ask_kernel(page, expression) == value


@of("explorer")
def test_sliders_and_channels_change_the_state_in_python_and_python_the_view(page, view):
    canvas = view.locator("canvas[data-side=left]")
    before = pixels(canvas)
    view.get_by_role("slider", name="step").press("Home")
    wait_for_view(view, "0/blocks.5.img/")
    moved = pixels(canvas)
    assert np.abs(moved - before).max() > 30
    wait_for_python(page, "x.step", "0")
    bar = view.locator(".bar").nth(2)
    channel = bar.locator("span").first.inner_text().removeprefix("channel ")
    bar.click()
    wait_for_view(view, f"0/blocks.5.img/{channel}")
    page.mouse.move(5, 5)
    assert np.abs(pixels(canvas) - moved).max() > 30
    wait_for_python(page, "x.channel", channel)
    browser.ask_kernel(page, "[setattr(x, 'step', 1), setattr(x, 'site', 'blocks.3.img')]")
    wait_for_view(view, "1/blocks.3.img/")


def test_the_first_lesson_runs_and_its_explorer_reacts(page):
    browser.show_notebook(page, f"solutions/{LESSON.name}")
    assert browser.run_all(page) == []
    view = shown(page)
    canvas = view.locator("canvas[data-side=left]")
    before = pixels(canvas)
    view.get_by_role("slider", name="block").press("Home")
    wait_until(view, "view.dataset.view.includes('/blocks.0.img/')")
    bar = view.locator(".bar").nth(1)
    bar.click()
    page.mouse.move(5, 5)
    assert bar.get_attribute("aria-pressed") == "true"
    assert np.abs(pixels(canvas) - before).max() > 30
    figures = page.locator(".js-plotly-plot .main-svg")
    figures.first.wait_for()
    assert figures.count() >= 2


@of("lazy")
def test_blocks_beyond_the_budget_and_clusters_are_requested(page, view):
    canvas = view.locator("canvas[data-side=left]")
    for overlay in ("channel", "clusters"):
        view.get_by_role("button", name=overlay, exact=True).click()
        view.get_by_role("slider", name="block").press("Home")
        wait_for_view(view, "2/blocks.3.img/")
        view.get_by_role("button", name="image", exact=True).click()
        bare = pixels(canvas)
        view.get_by_role("button", name=overlay, exact=True).click()
        wait_until(view, "!view.querySelector('.legend').textContent.includes('…')")
        page.wait_for_timeout(300)
        assert np.abs(pixels(canvas) - bare).max() > 30


@of("row")
def test_explorers_stand_beside_each_other_and_are_linked(page, view):
    other = shown(page, PLACES["row"] + 1)
    boxes = [one.bounding_box() for one in (view, other)]
    assert all(box["width"] > 300 for box in boxes), "neither is squeezed"
    assert abs(boxes[0]["y"] - boxes[1]["y"]) < 2
    view.get_by_role("slider", name="step").press("Home")
    wait_for_view(other, "0/blocks.5.img/")


@of("panel")
def test_the_panel_draws_when_a_control_stops_moving(page, view):
    picture = view.locator("figure img").last
    before = pixels(picture)
    view.get_by_role("slider", name="first block").press("ArrowRight")
    wait_until(view, "view.dataset.results === '1'", timeout=60_000)
    assert np.abs(pixels(picture) - before).max() > 10
    assert browser.ask_kernel(page, "z.settings[0].blocks") == "(1, 8)"
    view.get_by_role("button", name="bottom", exact=True).click()
    wait_until(view, "view.dataset.results === '2'", timeout=60_000)
    assert browser.ask_kernel(page, "z.settings[1].arm") == "bottom"
