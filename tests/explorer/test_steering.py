"""The panel draws the same image as its code, and as lens.run with the same op."""

from __future__ import annotations

import runpy

import numpy as np
import pytest

import dit_lens as dl
from dit_lens.errors import CallError, OpError, PromptError
from dit_lens.explorer import Setting
from tests import browser, pipelines

CIRCLE = "a big red circle left on a checkered blue background"
CROSS = "a small white cross right on a plain green background"
CALL = {"seed": 3, "num_inference_steps": 3, "true_cfg_scale": 1.0}  # guidance: in the test of texts, below


@pytest.fixture
def panel(toy):
    return dl.steer(toy, CIRCLE, CROSS, k=4, **CALL)


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_a_drawing_is_a_swap_from_the_source(toy, panel):
    drawn = panel.draw(strength=0.5, blocks=(2, 6), steps=(1, 3))
    massive = toy.massive_channels(CIRCLE, 4, **CALL)
    swap = dl.Swap(
        "blocks[2:6].img", source="row:0", rows=1, channels=massive, strength=0.5, steps=[1, 2], branch="cond"
    )
    assert same(drawn, toy.run([CIRCLE, CROSS], [swap], **CALL).images[1])
    assert not same(drawn, panel.base.images[1])


def test_controls_are_those_of_the_channels(panel):
    top = panel.massive.take(4)
    expected = {"top": top, "bottom": top.bottom(), "random": top.random(0), "energy-matched": top.energy_matched(0)}
    for arm, channels in expected.items():
        assert panel.swap(Setting(arm=arm, k=4, blocks=(0, 8), steps=(0, 3))).channels == channels
    assert panel.swap(Setting(arm="all", k=4, blocks=(0, 8), steps=(0, 3))).channels is None


@pytest.mark.parametrize("changes", [{"arm": "random", "k": 6}, {"where": "subject"}, {"arm": "all", "steps": (2, 3)}])
def test_the_code_draws_the_same_image(panel, tmp_path, changes):
    drawn = panel.draw(**changes)
    (tmp_path / "again.py").write_text(panel.code.replace("run.images[1]", "image = run.images[1]"))
    assert same(runpy.run_path(str(tmp_path / "again.py"))["image"], drawn)


def test_the_strip_keeps_every_result(panel):
    for strength in (0.25, 0.75):
        panel.draw(strength=strength)
    assert [setting.strength for setting in panel.settings] == [0.25, 0.75]
    assert panel.strength == 0.75, "the controls show the setting of the last image"
    state = panel.whole_state()
    assert [result["strength"] for result in state["data_results"]] == [0.25, 0.75]
    assert len(state["data_images"]) == sum(result["length"] for result in state["data_results"])


def test_what_cannot_be_drawn_raises_and_leaves_no_result(toy, panel):
    with pytest.raises(OpError, match=r"no control 'strenght'. Nearest: 'strength'"):
        panel.draw(strenght=1)
    with pytest.raises(OpError, match=r"'botom' is not a valid arm. Nearest: 'bottom'"):
        panel.draw(arm="botom")
    with pytest.raises(OpError, match=r"k=100 of 128 channels leaves too few for the controls. Choose k from 1 to 64"):
        dl.steer(toy, CIRCLE, CROSS, k=100, **CALL)
    sent = []
    panel.send = lambda message, buffers=(): sent.append(message)
    browser.send_to_widget(panel, {"kind": "draw", "setting": {"arm": "botom"}})
    assert sent[0]["kind"] == "error"
    assert "Nearest: 'bottom'" in sent[0]["text"]
    assert not panel.images


@pytest.mark.browser
def test_the_page_shows_the_strip_and_its_code(panel, tmp_path):
    panel.draw(strength=0.25)
    panel.draw(strength=0.75, arm="bottom")
    with browser.page() as page:
        page.goto(panel.to_html(tmp_path / "panel.html").as_uri())
        root = page.locator(".dit-lens[data-open]")
        root.wait_for()
        page.get_by_text("The code that made this").click()
        assert "massive.bottom()" in page.locator("code").inner_text()
        page.get_by_role("button", name="top 4, 0.25").click()
        assert root.get_attribute("data-current") == "0"
        assert "strength=0.25" in page.locator("code").inner_text()
        assert page.get_by_role("slider", name="strength").input_value() == "0.25"
        sizes = page.evaluate("[...document.querySelectorAll('figure img')].map(image => image.naturalWidth)")
        assert sizes == [64, 64, 64]


def test_texts_of_source_and_target_each_keep_their_own():
    lens = dl.DiTLens(pipelines.flux())
    call = {**pipelines.CALL, "num_inference_steps": 2, "true_cfg_scale": 4.0}
    panel = dl.steer(lens, "red", "a blue dog", k=2, negative_prompt=["a", "b"], **call)
    image = panel.draw(where="subject")
    first = {"seed": 0, "negative_prompt": "a", **call}
    massive = lens.massive_channels("red", 2, **first)
    assert panel.massive.take(2) == massive
    swap = dl.Swap(
        "blocks.*.img",
        source="row:0",
        rows=1,
        channels=massive,
        branch="cond",
        mask=lens.subject_mask("red", massive, **first),
    )
    run = lens.run(["red", "a blue dog"], [swap], seed=0, negative_prompt=["a", "b"], **call)
    assert same(image, run.images[1])
    assert "negative_prompt=['a'], " in panel.code
    assert "negative_prompt=['a', 'b']" in panel.code


@pytest.mark.parametrize(
    ("error", "told", "how"),
    [
        (PromptError, "source and target are one row each", {"num_images_per_prompt": 2}),
        (PromptError, "the panel shows images", {"output_type": "latent"}),
        (CallError, "no argument 'ops': it sets this itself", {"ops": []}),
        (CallError, "no argument 'batch_size'", {"batch_size": 1}),
        (PromptError, "takes no argument 'steps'", {"steps": 1}),
    ],
)
def test_what_a_panel_cannot_use_is_told_before_it_draws(toy, monkeypatch, error, told, how):
    monkeypatch.setattr(toy.engine, "generate", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises(error, match=told):
        dl.steer(toy, CIRCLE, CROSS, k=4, **how)
