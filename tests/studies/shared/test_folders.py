"""A study continues with the same model and the same functions, by value; whatever else it is called with is named."""

import functools
import json
import threading
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image, ImageDraw

from dit_lens import DiTLens, studies
from dit_lens.errors import StoreError
from dit_lens.studies import disruption
from dit_lens.studies.shared.fingerprints import fingerprint_values
from dit_lens.studies.shared.folders import claim_folder
from dit_lens.studies.shared.judges import ask_judge
from tests import pipelines

LIMIT = 0.5


@pytest.fixture
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


def fingerprint(value):
    found, unknown = fingerprint_values({"judge": value})
    assert not unknown
    return found


def above(limit):
    return lambda image, prompt: {"bright": float(np.mean(image) > limit)}


def uses_a_global(image, prompt):
    return {"bright": float(np.mean(image) > LIMIT)}


class Counter:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, image, prompt):
        return {"bright": self.limit}


def test_another_function_of_the_same_name_is_another_setting(lens, tmp_path):
    settings = {"k": 4, "judge": above(0.5)}
    claim_folder(tmp_path, "disruption", settings, lens)
    claim_folder(tmp_path, "disruption", {"k": 4, "judge": above(0.5)}, lens)
    with pytest.raises(StoreError, match=r'another function or array; judge\.limit: "0\.5" there, "0\.7" now\. Call'):
        claim_folder(tmp_path, "disruption", {"k": 4, "judge": above(0.7)}, lens)
    another = {}
    exec(
        "def above(limit):\n return lambda image, prompt: {'bright': float(np.max(image) > limit)}", globals(), another
    )
    other = another["above"](0.5)
    other.__qualname__ = settings["judge"].__qualname__
    with pytest.raises(StoreError, match=r'another function or array; judge\.code: "python3\.\d+ \w+" there'):
        claim_folder(tmp_path, "disruption", {"k": 4, "judge": other}, lens)


def test_a_study_is_not_answered_with_what_another_judge_said(lens, tmp_path):
    call = {"k": 4, "draws": 1, "confounds": False, "num_inference_steps": 1, "out": tmp_path}
    one = disruption(lens, "red", judge=lambda image, prompt: {"it": 1.0}, **call)
    assert set(one.table["it"]) == {1.0}
    with pytest.raises(StoreError, match=r"another function or array; judge\.code: "):
        disruption(lens, "red", judge=lambda image, prompt: {"it": 2.0}, **call)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: 1, lambda: 2),
        (lambda x: x + LIMIT, lambda x: x - LIMIT),
        (above(1), above(1.0)),
        (functools.partial(above, 1), functools.partial(above, 2)),
        (functools.partial(above, limit=1), functools.partial(above, 1)),
        (Counter(1), Counter(2)),
        (Counter(1).__call__, Counter(2).__call__),
        (above(np.zeros((2, 3))), above(np.zeros((3, 2)))),
        (above(torch.zeros(2)), above(torch.zeros(2, dtype=torch.float64))),
        (above({"a": [1, (2, {3})]}), above({"a": [1, (2, {4})]})),
        (above(above(1)), above(above(2))),
        (above(Image.new("L", (2, 4))), above(Image.new("L", (4, 2)))),
        (np.mean, np.max),
        (sum, max),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
    ],
)
def test_values_are_told_apart(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)
    json.dumps(fingerprint(one))


def test_a_global_counts_and_another_place_in_the_file_does_not(monkeypatch):
    before = fingerprint(uses_a_global)
    monkeypatch.setitem(globals(), "LIMIT", 0.7)
    after = fingerprint(uses_a_global)
    assert [name for name in before["judge"] if before["judge"][name] != after["judge"][name]] == ["LIMIT"]
    made = []
    for blank in ("", "\n\n# a comment\n"):
        exec(f"{blank}def f(image, prompt):\n return {{'it': 1}}", space := {})
        made.append(fingerprint(space["f"]))
    assert made[0] == made[1]


def test_a_value_that_holds_itself(lens):
    loop = [1]
    loop.append(loop)
    assert fingerprint(above(loop)) == fingerprint(above(loop))
    assert fingerprint(above(lens)) == fingerprint(above(lens))
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert fingerprint_values({"judge": above(deep)})[1] == ["judge (nested too deep, or too large)"]


def test_what_has_no_value_is_told(lens, tmp_path):
    with pytest.warns(UserWarning, match=r"cannot be known, .*: judge \(_thread\.lock\)\. Continue it with the same"):
        claim_folder(tmp_path, "disruption", {"judge": above(threading.Lock())}, lens)


def add_lora(lens, scale):
    torch.manual_seed(1)
    lens.pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    lens.pipe.transformer.set_adapters(["one"], [scale])


def nudge(module):
    weight = next(module.parameters())
    weight.data.view(-1)[-1] = weight.data.view(-1)[-1].nextafter(torch.tensor(9.0))


@torch.no_grad()
def exchange_rows(lens):
    weight = lens.pipe.text_encoder_2.shared.weight
    weight[[3, 5]] = weight[[5, 3]].clone()


CHANGES = {
    "a weight": (lambda lens: nudge(lens.pipe.transformer), r"state\.weights\.transformer: "),
    "a weight of an encoder": (lambda lens: nudge(lens.pipe.text_encoder), r"state\.weights\.text_encoder: "),
    "a weight of the autoencoder": (lambda lens: nudge(lens.pipe.vae), r"state\.weights\.vae: "),
    "the order of weights": (exchange_rows, r"state\.weights\.text_encoder_2: "),
    "shift": (lambda lens: lens.pipe.scheduler.set_shift(2.0), r"state\.scheduler\.shift now: 1\.0 there, 2\.0 now"),
    "defaults": (lambda lens: lens.defaults.update(height=64), r"defaults\.height: 32 there, 64 now"),
    "an adapter": (lambda lens: add_lora(lens, 1.0), r"lora: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_another(lens, tmp_path, change):
    claim_folder(tmp_path, "disruption", {}, lens)
    do, said = CHANGES[change]
    do(lens)
    with pytest.raises(StoreError, match=f"with another model; .*{said}"):
        claim_folder(tmp_path, "disruption", {}, lens)


def test_the_strength_of_an_adapter(lens, tmp_path):
    add_lora(lens, 1.0)
    claim_folder(tmp_path, "disruption", {}, lens)
    lens.pipe.transformer.set_adapters(["one"], [0.5])
    with pytest.raises(
        StoreError, match=r"state\.adapters\.transformer\..*to_q\.scaling: .*4\.0.* there, .*2\.0.* now"
    ):
        claim_folder(tmp_path, "disruption", {}, lens)


def test_an_older_folder_continues_and_says_what_is_not_compared(lens, tmp_path):
    judge = above(0.5)
    claim_folder(tmp_path, "disruption", {"judge": judge}, lens)
    file = tmp_path / "study.json"
    data = json.loads(file.read_text())
    del data["values"]
    data["model"] = {
        name: value for name, value in data["model"].items() if name not in ("server", "state", "defaults")
    }
    file.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=r"earlier release.*Not compared.*every weight.*functions and arrays.*judge"):
        claim_folder(tmp_path, "disruption", {"judge": above(0.7)}, lens)
    with pytest.raises(StoreError, match="another model; weights: "):
        claim_folder(tmp_path, "disruption", {"judge": judge}, DiTLens(pipelines.flux(seed=1)))
    assert json.loads(file.read_text()) == data
    other = tmp_path / "new"
    claim_folder(other, "disruption", {"judge": judge}, lens)
    with warnings.catch_warnings(action="error"):
        claim_folder(other, "disruption", {"judge": judge}, lens)


def test_a_judge_may_draw_on_its_image():
    image = Image.new("RGB", (4, 4))

    def judge(image, prompt):
        ImageDraw.Draw(image).point((0, 0), "white")
        return {"it": 1}

    assert ask_judge(judge, image, "red") == {"it": 1}
    assert image.getbbox() is None


SAME = {
    "a number of torch": ({"guidance_scale": 3.5}, {"guidance_scale": torch.tensor(3.5)}),
    "a number of numpy": ({"guidance_scale": np.float64(3.5)}, {"guidance_scale": np.array(3.5)}),
    "steps as a slice": ({"steps": [0]}, {"steps": slice(0, 1)}),
    "steps from the end": ({"steps": 1}, {"steps": -1}),
    "all steps": ({"steps": None}, {"steps": (0.0, 1.0)}),
    "steps of numpy": ({"steps": np.array([0, 1])}, {"steps": range(2)}),
    "sites": ({"site": "blocks[1:3].img"}, {"site": ["blocks.1.img", "blocks.2.img"]}),
    "sites by a function": (
        {"site": "blocks.*.img"},
        {"site": lambda name: name.endswith(".img") and "final" not in name},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_study_goes_on_however_its_arguments_are_written(tmp_path, monkeypatch, name):
    """And an argument that means another thing is told, with what it means."""
    lens = DiTLens(pipelines.flux(), defaults={**pipelines.CALL, "num_inference_steps": 2})
    one, other = SAME[name]
    first = studies.stability(lens, ["red"], k=2, out=tmp_path / "study", **one)
    monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it was drawn"))
    again = studies.stability(lens, ["red"], k=2, out=tmp_path / "study", **other)
    assert again.table.equals(first.table)
    for odd, said in (({"steps": [1, 0]}, r"steps: .* there, \[1, 0\] now"), ({"site": "blocks.0.img"}, "site")):
        with pytest.raises(StoreError, match=said):
            studies.stability(lens, ["red"], k=2, out=tmp_path / "study", **{**one, **odd})
