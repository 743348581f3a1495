"""The panel draws the same image as its code, and as lens.run with the same op."""

from __future__ import annotations

import contextlib
import runpy

import numpy as np
import pytest

import dit_lens as dl
from dit_lens.errors import CallError, OpError, PromptError
from dit_lens.explorer import Setting
from dit_lens.explorer.widget import STATIC, join_modules
from dit_lens.studies.shared.judges import scene_judge
from tests import browser, pipelines

CIRCLE = "a big red circle left on a checkered blue background"
CROSS = "a small white cross right on a plain green background"
SQUARE = "a big yellow square right on a plain green background"
CALL = {"seed": 3, "num_inference_steps": 3, "true_cfg_scale": 1.0}  # guidance: in the test of texts, below


@pytest.fixture
def panel(toy):
    return dl.steer(toy, CIRCLE, CROSS, k=4, **CALL)


@pytest.fixture(scope="module")
def brushed(toy):
    """A panel with one image, whose mask was brushed."""
    panel = dl.steer(toy, CIRCLE, CROSS, k=4, **CALL)
    panel.draw(where="brush", mask=(3, 100, 101))
    return panel


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


@pytest.mark.parametrize(
    "changes", [{"arm": "random", "k": 6}, {"where": "subject"}, {"arm": "all", "where": "brush", "mask": (7, 40)}]
)
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
    lengths = [result["length"] for result in state["data_results"]]
    assert len(state["data_images"]) == sum(lengths) + sum(state["data_starts"][0]["lengths"])


def test_brushed_tokens_are_the_mask_of_the_swap(toy, brushed):
    panel = brushed
    mask = np.zeros((16, 16), bool)
    mask[0, 3] = mask[6, 4] = mask[6, 5] = True
    swap = dl.Swap("blocks.*.img", source="row:0", rows=1, channels=panel.massive.take(4), mask=mask, branch="cond")
    assert same(panel.images[0], toy.run([CIRCLE, CROSS], [swap], **CALL).images[1])
    with pytest.raises(OpError, match=r"mask= has token 256, and the image has 256\. Choose 0 to 255"):
        panel.draw(mask=(256,))
    with pytest.raises(OpError, match=r"where='brush' swaps at the tokens of mask=, and there are none"):
        panel.draw(where="brush", mask=())


def test_other_prompts_are_drawn_anew_and_results_keep_their_own(toy, panel):
    first, base = panel.draw(), panel.base
    other = panel.draw(source=SQUARE)
    assert panel.prompts == [SQUARE, CROSS] == [panel.source, panel.target]
    massive = toy.massive_channels(SQUARE, 4, **CALL)
    swap = dl.Swap("blocks.*.img", source="row:0", rows=1, channels=massive, branch="cond")
    assert same(other, toy.run([SQUARE, CROSS], [swap], **CALL).images[1])
    assert SQUARE in panel.code
    state = panel.whole_state()
    assert [(one["start"], one["source"]) for one in state["data_results"]] == [(0, CIRCLE), (1, SQUARE)]
    assert CIRCLE in state["data_results"][0]["code"]
    result, images = state["data_results"][0], [first, *base.images]
    drawn, *ends = (np.asarray(image, float) for image in images)
    assert result["distances"] == pytest.approx([np.sqrt(np.mean((drawn - end) ** 2)) for end in ends])
    told = [scene_judge(first, prompt)["fidelity"] for prompt in (CIRCLE, CROSS)]
    assert result["fidelity"]["shares"] == told
    before = len(panel.images)
    with pytest.raises(PromptError):
        panel.draw(target="an unknown word")
    assert (len(panel.images), panel.prompts) == (before, [SQUARE, CROSS])


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
    assert [message["kind"] for message in sent] == ["started", "error"]
    assert "Nearest: 'bottom'" in sent[1]["text"]


@pytest.mark.parametrize("problem", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_whatever_goes_wrong_ends_the_waiting_of_the_browser(brushed, monkeypatch, problem):
    panel, sent = brushed, []
    monkeypatch.setattr(panel, "send", lambda message, buffers=(): sent.append(message))
    monkeypatch.setattr(panel.lens, "run", lambda *_, **__: (_ for _ in ()).throw(problem))
    with contextlib.suppress(KeyboardInterrupt):
        browser.send_to_widget(panel, {"kind": "draw", "setting": {"arm": "bottom"}})
    assert sent[-1]["kind"] == "error"
    assert type(problem).__name__ in sent[-1]["text"]
    assert len(panel.images) == 1


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
        assert "has no kernel" in page.get_by_role("note").inner_text()
        assert page.get_by_role("slider", name="strength").is_disabled()
        assert page.get_by_role("button", name="Draw").is_disabled()
        assert "RMSE to the target" in page.locator(".said").inner_text()


FAKE_KERNEL = """async ([esm, css, state]) => {
  state.data_images = new Uint8Array(state.data_images);
  document.head.append(Object.assign(document.createElement('style'), { textContent: css }));
  const listeners = {}, model = {
    get: name => state[name], save_changes() {}, send: message => sent.push(message),
    set(name, value) { state[name] = value; for (const f of listeners[`change:${name}`] ?? []) f(); },
    on(event, f) { (listeners[event] ??= []).push(f); },
  };
  window.sent = [];
  window.answer = (message, buffers) => { for (const f of listeners['msg:custom']) f(message, buffers); };
  const module = await import(URL.createObjectURL(new Blob([esm], { type: 'text/javascript' })));
  module.default.render({ model, el: document.body });
}"""


@pytest.mark.browser
def test_the_browser_asks_for_what_is_brushed_and_written_and_shows_errors(brushed):
    state = brushed.whole_state()
    state |= {"data_images": list(state["data_images"]), "where": "everywhere", "mask": []}
    with browser.page() as page:
        page.goto("about:blank")
        css = (STATIC / "widget.css").read_text("utf-8")
        page.evaluate(FAKE_KERNEL, [join_modules("steering_brush", "steering"), css, state])
        asked = "[...sent].filter(message => message.kind === 'draw').map(message => message.setting)"
        # A stroke over three tokens of the target, with a brush of one token.
        page.get_by_role("button", name="brush").click()
        page.get_by_role("slider", name="brush").press("Home")
        canvas = page.get_by_role("application").nth(1)
        box = canvas.bounding_box()
        at = [(box["x"] + box["width"] * (x + 0.5) / 16, box["y"] + box["height"] * 5.5 / 16) for x in (3, 4, 5)]
        page.mouse.move(*at[0])
        page.mouse.down()
        for place in at[1:]:
            page.mouse.move(*place)
        assert page.evaluate(asked) == [], "a brush without tokens asks for nothing"
        page.mouse.up()
        canvas.press("ArrowRight")
        canvas.press(" ")
        page.wait_for_function("sent.some(message => message.kind === 'draw')")
        (setting,) = page.evaluate(asked)
        assert (setting["where"], setting["mask"]) == ("brush", [83, 84, 85, 86])
        assert "4 of 256 tokens" in canvas.get_attribute("aria-label")
        # What goes wrong is shown, and the panel draws again.
        page.evaluate("answer({ kind: 'error', text: 'RuntimeError: out of memory' }, [])")
        page.get_by_text("out of memory").wait_for()
        assert page.locator("[data-busy]").count() == 0
        prompt = page.get_by_role("textbox", name="prompt of the source")
        prompt.fill(SQUARE)
        prompt.press("Enter")
        page.wait_for_function("sent.filter(message => message.kind === 'draw').length === 2")
        assert page.evaluate(asked)[1]["source"] == SQUARE
        # The target, for as long as the button is held.
        images = "[...document.querySelectorAll('figure img')].map(image => image.src)"
        source, target, result = page.evaluate(images)
        page.get_by_role("button", name="Hold to compare").hover()
        page.mouse.down()
        assert page.evaluate(images) == [source, target, target]
        page.mouse.up()
        assert page.evaluate(images) == [source, target, result]


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
