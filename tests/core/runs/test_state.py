"""What decides a pipeline's answers: whatever changes an image changes the state, and a run alone does not."""

import contextlib
import functools
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_flux
from diffusers.pipelines.flux import pipeline_flux
from torch.overrides import TorchFunctionMode

from dit_lens import DiTLens, Zero
from dit_lens.core.runs.state import capture_state, describe_state
from dit_lens.errors import ExecutionError, OpError, StoreError
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


def changed(module, name, change):
    """A function of a module, replaced by one that changes what it returns."""
    before = getattr(module, name)
    return mock.patch.object(module, name, lambda *args, **kwargs: change(before(*args, **kwargs)))


@contextlib.contextmanager
def another_backend():
    backends = attention_dispatch._AttentionBackendRegistry._backends  # noqa: SLF001 where kernels are registered
    chosen = attention_dispatch.AttentionBackendName.NATIVE
    before = backends[chosen]
    with mock.patch.dict(backends, {chosen: lambda *args, **kwargs: before(*args, **kwargs) / 2}):
        yield


class Halved(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        return found / 2 if func is torch.nn.functional.scaled_dot_product_attention else found


def half(value):
    return value / 2


CHANGES = {
    "attention of torch": lambda pipe: changed(torch.nn.functional, "scaled_dot_product_attention", half),
    "attention of a file": lambda pipe: changed(transformer_flux, "dispatch_attention_fn", half),
    "attention of a registry": lambda pipe: another_backend(),
    "positions": lambda pipe: changed(transformer_flux, "apply_rotary_emb", half),
    "noise": lambda pipe: changed(pipeline_flux, "randn_tensor", half),
    "times": lambda pipe: changed(pipeline_flux, "retrieve_timesteps", lambda found: (found[0] / 2, found[1])),
    "mode": lambda pipe: Halved(),
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


class Gain(torch.nn.Module):
    """A user's own text encoder."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self._gain, self.cache, self._calls = inner, inner.config, 1.0, {"_scale": 1.0}, 0

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, *args, **kwargs):
        self._calls += 1
        found = self.inner(*args, **kwargs)
        found["last_hidden_state"] = found["last_hidden_state"] * self._gain * self.cache["_scale"]
        return found


def test_what_a_user_s_own_module_keeps_to_itself_counts():
    pipe = pipelines.flux()
    own = pipe.text_encoder_2 = Gain(pipe.text_encoder_2)
    lens = DiTLens(pipe, defaults=dict(pipelines.CALL))
    base, state = lens.run("red", record=True, **CALL), describe_state(pipe)["settings"]
    for change in (lambda value: setattr(own, "_gain", value), lambda value: own.cache.update(_scale=value)):
        change(3.0)
        with pytest.raises(OpError, match=r"Gain\.(_gain|cache) \(settings\) changed since"):
            lens.run("red", prefix=base, **CALL)
        assert describe_state(pipe)["settings"] != state
        change(1.0)
        lens.run("blue", **CALL)  # what it counts is no change
        assert torch.equal(lens.run("red", prefix=base, **CALL).latents, base.latents)


def test_what_the_transformer_is_given_is_compared(lens):
    """What no look at the pipeline shows: a list in a hook's closure, and numbers that nobody seeds."""
    gains, encoder = [1.0], lens.pipe.text_encoder_2

    def hook(module, inputs, output):
        output["last_hidden_state"] = output["last_hidden_state"] * gains[0]

    with hooked(encoder, hook):
        base = lens.run("red", record=True, **CALL)
        assert torch.equal(lens.run("red", prefix=base, **CALL).latents, base.latents)
        gains[0] = 1 + 2**-20
        with pytest.raises(
            ExecutionError, match=r"given other encoder_hidden_states in step 0 \(cond\) when the run of"
        ):
            lens.run("red", prefix=base, **CALL)


def test_what_the_first_computed_step_is_given_is_compared(lens):
    """A scheduler that goes another way from the recorded answers on."""
    shifts = [0.0]

    def step(self, output, *args, **kwargs):
        return STEP(self, output + shifts[0], *args, **kwargs)

    with mock.patch.object(FlowMatchEulerDiscreteScheduler, "step", step):
        base = lens.run("red", record=True, **CALL)
        shifts[0] = 0.5
        with pytest.raises(ExecutionError, match=r"given other hidden_states in step 1 \(cond\) when the run of"):
            lens.run("red", Zero("blocks.1.img", channels=[3], steps=-1), prefix=base, **CALL)


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
    @functools.wraps(STEP)
    def step(self, *args, **kwargs):
        return STEP(self, *args, **kwargs)

    def state():
        return describe_state(pipe)["functions"]

    pipe = pipelines.flux()
    assert not state()
    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    assert [name.rsplit(".", 1)[-1] for name in state()] == ["step"]


# What a judge writes itself is no other judge


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, value):
        self.calls += 1
        return value


def lazily(limit):
    global MODEL  # noqa: PLW0603 as judges load what they need
    if MODEL is None:
        MODEL = Net()
    return MODEL(limit)


MODEL, SCORES = None, {}


def keeps_in_closure(limit):
    memo, count = {}, 0

    def judge(image, prompt):
        nonlocal count
        count += 1
        memo[prompt] = limit
        return {"it": memo[prompt]}

    return judge


def keeps_in_module(limit):
    def judge(image, prompt):
        SCORES.setdefault(prompt, []).append(limit)
        return {"it": lazily(limit)}

    return judge


def keeps_in_default(limit):
    def judge(image, prompt, memo=[], *, more={}):  # noqa: B006 as judges are written
        memo.append(prompt)
        more[prompt] = limit
        judge.calls = len(memo)
        return {"it": limit}

    return judge


def keeps_in_cache(limit):
    @functools.cache
    def judge(image, prompt):
        return {"it": limit}

    return judge


class Judge:
    def __init__(self, limit):
        self.limit, self.model, self.memo = limit, None, {}

    def __call__(self, image, prompt):
        self.model = self.model or Net()
        self.memo[prompt] = self.limit
        return {"it": self.model(self.memo[prompt])}


class Scorer:
    def __init__(self, limit):
        self.limit, self._calls = limit, 0

    def set_limit(self, limit):
        self.limit = limit

    @functools.cached_property
    def net(self):
        return Net()

    @property
    def calls(self):
        self._calls += 1
        return self._calls

    def score(self, image, prompt):
        return {"it": self.net(self.limit * self.calls // self._calls)}


class JudgeOfTorch(Net):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    set_limit = Scorer.set_limit

    def forward(self, image, prompt):
        return {"it": super().forward(self.limit)}


def keeps_in_method(limit):
    return Scorer(limit).score


def keeps_in_scorer(limit):
    scorer = Scorer(limit)
    return lambda image, prompt: dict(scorer.score(image, prompt))


KEEPING = [
    keeps_in_method,
    keeps_in_scorer,
    keeps_in_closure,
    keeps_in_module,
    keeps_in_default,
    keeps_in_cache,
    Judge,
    JudgeOfTorch,
]


@pytest.mark.parametrize("make", KEEPING, ids=lambda make: make.__name__)
def test_a_judge_that_keeps_what_it_found_is_the_same_judge(lens, make, tmp_path):
    judge = make(2)
    before = found(judge)
    claim_folder(tmp_path, "disruption", {"judge": judge}, lens)
    for prompt in ("red", "blue"):
        assert judge(None, prompt) == {"it": 2}
    assert found(judge) == before
    claim_folder(tmp_path, "disruption", {"judge": judge}, lens)
    with pytest.raises(StoreError, match="with another function or array"):
        claim_folder(tmp_path, "disruption", {"judge": make(3)}, lens)


def test_what_a_setter_sets_is_a_choice():
    scorer, net = Scorer(2), JudgeOfTorch(2)
    for one, judge in ((scorer, scorer.score), (net, net)):
        before = found(judge)
        one.set_limit(3)
        assert found(judge) != before
        one.set_limit(2)
        assert found(judge) == before
