"""What decides a pipeline's answers: whatever changes an image changes the state, and a run alone does not."""

import contextlib
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_lens import DiTLens
from dit_lens.core.runs.state import capture_state, describe_state
from dit_lens.errors import OpError, StoreError
from dit_lens.studies.shared.fingerprints import fingerprint_values
from dit_lens.studies.shared.folders import claim_folder
from tests import pipelines

CALL = {"seed": 3, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


@pytest.fixture(scope="module")
def base(lens):
    return lens.run("red", record=True, **CALL)


def halve(module, inputs, output):
    return tuple(one / 2 for one in output) if isinstance(output, tuple) else output


def halve_text(module, inputs, output):
    output["last_hidden_state"] = output["last_hidden_state"] / 2
    return output


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


STEP, ENCODE = FlowMatchEulerDiscreteScheduler.step, pipelines.FluxPipeline.encode_prompt


def small_step(self, output, *args, **kwargs):
    return STEP(self, output / 2, *args, **kwargs)


def small_text(pipe, *args, **kwargs):
    texts, *others = ENCODE(pipe, *args, **kwargs)
    return texts / 2, *others


def activation(pipe):
    return pipe.transformer.transformer_blocks[0].ff.net[0]


def last_norm(pipe):
    return pipe.text_encoder_2.encoder.final_layer_norm


CHANGES = {
    "eps": lambda pipe: mock.patch.object(pipe.transformer.transformer_blocks[1].norm1.norm, "eps", 0.5),
    "theta": lambda pipe: mock.patch.object(pipe.transformer.pos_embed, "theta", 10),
    "approximate": lambda pipe: mock.patch.object(activation(pipe), "approximate", "none"),
    "hook on a block": lambda pipe: hooked(pipe.transformer.transformer_blocks[1], halve),
    "hook on an encoder": lambda pipe: hooked(pipe.text_encoder_2, halve_text),
    "padding_side": lambda pipe: mock.patch.object(pipe.tokenizer_2, "padding_side", "left"),
    "step of the class": lambda pipe: mock.patch.object(type(pipe.scheduler), "step", small_step),
    "step of one": lambda pipe: mock.patch.object(pipe.scheduler, "step", small_step.__get__(pipe.scheduler)),
    "encode_prompt of one": lambda pipe: mock.patch.object(pipe, "encode_prompt", small_text.__get__(pipe)),
    "forward of one": lambda pipe: mock.patch.object(last_norm(pipe), "forward", lambda x: x),
    "autocast": lambda pipe: torch.autocast("cpu", torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_latents_is_refused(lens, base, change, tmp_path):
    claim_folder(tmp_path, "disruption", {}, lens)
    with CHANGES[change](lens.pipe):
        assert not torch.equal(lens.run("red", **CALL).latents, base.latents)
        with pytest.raises(OpError, match=r"changed since the run of prefix= was recorded\. Record it again"):
            lens.run("red", prefix=base, **CALL)
        with pytest.raises(StoreError, match=r"with another model; .*state\.(settings|functions)"):
            claim_folder(tmp_path, "disruption", {}, lens)
    assert torch.equal(lens.run("red", prefix=base, **CALL).latents, base.latents)
    claim_folder(tmp_path, "disruption", {}, lens)


def test_a_changed_attribute_is_named(lens, base, tmp_path):
    claim_folder(tmp_path, "disruption", {}, lens)
    with CHANGES["theta"](lens.pipe):
        with pytest.raises(OpError, match=r"the transformer\.FluxPosEmbed\.theta \(settings\) changed since"):
            lens.run("red", prefix=base, **CALL)
        with pytest.raises(StoreError, match=r'FluxPosEmbed\.theta: "10000" there, "10" now'):
            claim_folder(tmp_path, "disruption", {}, lens)


def test_a_backend_of_attention_is_a_setting():
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))
    base, state = lens.run("red", record=True, **CALL), describe_state(lens.pipe)
    processor = lens.pipe.transformer.transformer_blocks[0].attn.processor
    processor._attention_backend = "_native_math"  # noqa: SLF001 what set_attention_backend sets
    with pytest.raises(OpError, match=r"FluxAttention\.processor \(settings\) changed since"):
        lens.run("red", prefix=base, **CALL)
    assert describe_state(lens.pipe) != state


@pytest.mark.parametrize("through", [lambda tensor: tensor, lambda tensor: tensor.data], ids=["itself", "data"])
def test_answers_that_were_changed_are_refused(lens, through):
    base = lens.run("red", record=True, **CALL)
    with torch.no_grad():
        through(base.recording.answers[1][0])[0, 0, 0] += 1
    with pytest.raises(OpError, match="the answers that the run of prefix= recorded were changed since"):
        lens.run("red", prefix=base, **CALL)


def test_a_run_alone_changes_nothing(lens):
    before = capture_state(lens.pipe), describe_state(lens.pipe)
    lens.run("a dog", seed=8, height=64)
    assert (capture_state(lens.pipe), describe_state(lens.pipe)) == before
    other = DiTLens(pipelines.flux())
    other.run("a dog", height=32, width=32, num_inference_steps=1, max_sequence_length=24)
    assert describe_state(other.pipe) == before[1]


# Functions that are given to studies


def found(judge):
    return fingerprint_values({"judge": judge})


@pytest.fixture
def helpers(monkeypatch):
    module = ModuleType("helpers_of_a_user")
    exec("LIMIT = 1\nUNUSED = 1\ndef score(image):\n return LIMIT", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_an_attribute_of_a_function_counts():
    def judge(image, prompt):
        return {"it": judge.scale}

    judge.scale = 2
    before = found(judge)
    judge.scale = 3
    assert found(judge) != before
    assert before[0]["judge"][".scale"] == "2"


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_user_s_own_module_holds_counts(helpers, inside):
    space = {} if inside else {"helpers_of_a_user": helpers}
    imported = " import helpers_of_a_user\n" if inside else ""
    exec(f"def judge(image, prompt):\n{imported} return {{'it': helpers_of_a_user.score(image)}}", space)
    before, unknown = found(space["judge"])
    assert not unknown
    helpers.UNUSED = 2
    assert found(space["judge"])[0] == before
    helpers.LIMIT = 2
    assert found(space["judge"])[0] != before
    helpers.LIMIT = 1
    assert found(space["judge"])[0] == before
    exec("def score(image):\n return 2 * LIMIT", vars(helpers))
    assert found(space["judge"])[0] != before


def test_a_user_s_own_module_of_torch_counts_by_attributes_and_hooks():
    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = torch.nn.Linear(2, 2), 1.0

    score = Score()
    before = found(score)[0]
    assert found(score)[0] == before
    score.scale = 2.0
    assert found(score)[0] != before
    score.scale = 1.0
    assert found(score)[0] == before
    with hooked(score.layer, halve):
        hook = found(score)[0]
    assert hook != before
    with hooked(score.layer, lambda *_: None):
        assert found(score)[0] not in (hook, before)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("open('limit').read()", "files, by open"),
        ("__import__('os').environ['LIMIT']", "variables of the process, by environ"),
        ("globals()['LIMIT']", "names that are made as it runs, by globals"),
        ("(lambda: eval('LIMIT'))()", "names that are made as it runs, by eval"),
    ],
)
def test_what_code_looks_up_as_it_runs_is_told(lens, body, said, tmp_path):
    exec(f"def judge(image, prompt):\n return {body}", space := {})
    assert f"judge ({said})" in found(space["judge"])[1]
    with pytest.warns(UserWarning, match=rf"cannot be known.*{said}"):
        claim_folder(tmp_path, "disruption", {"judge": space["judge"]}, lens)


def test_a_method_of_a_package_that_a_user_wrote_is_read(monkeypatch):
    import functools

    @functools.wraps(STEP)
    def step(self, *args, **kwargs):
        return STEP(self, *args, **kwargs)

    def state():
        return describe_state(pipe)["functions"]

    pipe = pipelines.flux()
    assert not state()
    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    assert [name.rsplit(".", 1)[-1] for name in state()] == ["step"]
