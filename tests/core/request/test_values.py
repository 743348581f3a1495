"""Arguments of a call: what can be meant works, the rest is told before anything is drawn, and nothing is changed."""

from __future__ import annotations

import copy
import itertools
import time

import numpy as np
import pytest
import torch

from dit_lens import Apply, DiTLens, Read
from dit_lens.errors import DitLensError, OpError, PromptError
from tests import pipelines
from tests.zoo import truth

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(CALL))


@pytest.fixture(scope="module")
def images(lens):
    return seen(lens.run("red", seed=3))


def seen(run):
    return [image.tobytes() for image in run.images]


MEANT = {
    "prompts in a tuple": {"prompt": ("red",)},
    "prompts in an array": {"prompt": np.array(["red"])},
    "a word of numpy": {"prompt": np.array("red")},
    "negative prompts in an array": {"negative_prompt": np.array(["bad"])},
    "seeds in an array": {"seed": np.array([3])},
    "seeds in a tensor": {"seed": torch.tensor([3])},
    "seeds in a range": {"seed": range(3, 4)},
    "a seed of torch": {"seed": torch.tensor(3)},
    "steps of numpy": {"num_inference_steps": np.int32(2)},
    "steps of torch": {"num_inference_steps": torch.tensor(2)},
    "sides": {"height": np.int64(32), "width": torch.tensor(48)},
    "images of a prompt": {"num_images_per_prompt": np.int64(1)},
    "a batch size": {"batch_size": torch.tensor(1)},
    "guidance of numpy": {"true_cfg_scale": np.float32(2.5)},
    "guidance of torch": {"true_cfg_scale": torch.tensor(2.5)},
    "noise levels in an array": {"sigmas": np.array([1.0, 0.5])},
    "noise levels in a tensor": {"sigmas": torch.tensor([1.0, 0.5])},
    "tensors": {"output_type": "pt"},
    "arrays": {"output_type": "np"},
}


@pytest.mark.parametrize("case", MEANT)
def test_what_can_be_meant(case, lens, images):
    assert seen(lens.run(**{"prompt": "red", "seed": 3, **MEANT[case]})) == images


def test_images_are_those_of_the_arrays_that_were_asked_for(lens):
    array = pipelines.flux()("red", generator=torch.Generator().manual_seed(3), **{**CALL, "output_type": "np"}).images
    run = lens.run("red", seed=3, output_type="np")
    assert np.array_equal(np.asarray(run.images[0]), (array[0] * 255).round().astype("uint8"))
    assert run.latents is None


ROW, POOLED = torch.zeros(1, 7, 16), torch.zeros(1, 16)
NOTHING = {"prompt": None, "negative_prompt": None, "prompt_embeds": ROW, "pooled_prompt_embeds": POOLED}
WRONG = {
    "half a character": ({"prompt": "a\ud800b"}, r"a prompt must be text; .* half of a character"),
    "half a character elsewhere": ({"negative_prompt": "\udfff"}, "negative_prompt= must be text"),
    "half a character inside": (
        {"joint_attention_kwargs": {"how": ["\udfff"]}},
        "joint_attention_kwargs= must be text",
    ),
    "very many steps": ({"num_inference_steps": 10**9}, "num_inference_steps= asks for 1,000,000,000 steps"),
    "very many noise levels": (
        {"sigmas": np.linspace(1, 0.1, 10_001)},
        "sigmas= asks for 10,001 steps, more than can be",
    ),
    "noise levels without an end": ({"sigmas": itertools.repeat(0.5)}, r"sigmas=repeat\(0\.5\) does not end"),
    "prompts without an order": ({"prompt": {"red", "blue"}}, "a prompt must be a string"),
    "a word for the batch size": ({"batch_size": "two"}, "batch_size='two' must be a whole number of at least 1"),
    "truth for the batch size": ({"batch_size": True}, "batch_size=True must be a whole number"),
    "half a prompt in a batch": ({"batch_size": 0.5}, r"batch_size=0\.5 must be a whole number"),
    "no guidance": ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    "more guidance than a float holds": ({"true_cfg_scale": 10**400}, "must be a finite number"),
    "more noise than a float holds": ({"sigmas": [10**400, 0.5]}, "must list finite numbers"),
    "more steps than 64 bits hold": ({"num_inference_steps": 10**5000}, "is more than anything can draw"),
    "a larger image than 64 bits hold": ({"height": 2**63}, "is more than anything can draw"),
    "much guidance": ({"true_cfg_scale": float("inf")}, "true_cfg_scale=inf must be a finite number"),
    "guidance in words": ({"true_cfg_scale": "high"}, "true_cfg_scale='high' must be a finite number"),
    "guidance for each": ({"guidance_scale": [1.0, 2.0]}, r"guidance_scale=\[1\.0, 2\.0\] must be a finite number"),
    "a negative size": ({"height": -32}, "height=-32 must be a whole number of at least 1"),
    "no tokens": ({"max_sequence_length": 0}, "max_sequence_length=0 must be a whole number of at least 1"),
    "too many tokens": ({"max_sequence_length": 9999}, r"FluxPipeline cannot be called like this: .*9999"),
    "no function": ({"callback_on_step_end": "x"}, "callback_on_step_end='x' is not a function"),
    "no inputs": ({"callback_on_step_end_tensor_inputs": ["x"]}, "FluxPipeline cannot be called like this"),
    "a word for attention": ({"joint_attention_kwargs": "x"}, "must be a mapping from names to values"),
    "no generator": ({"seed": None, "generator": "x"}, "must be a torch.Generator"),
    "generators": ({"seed": None, "generator": [torch.Generator()] * 2}, "lists 2 generators for 1 images"),
    "a seed in words": ({"seed": "3"}, "seed '3' is not a whole number"),
    "a large seed": ({"seed": 2**64}, "is not a whole number"),
    "half a seed": ({"seed": np.array([1.5])}, r"seed 1\.5 is not a whole number"),
    "noise levels": ({"sigmas": [0.5, float("nan")]}, "sigmas=.* must list finite numbers"),
    "one noise level": ({"sigmas": 3}, "sigmas=3 must list finite numbers"),
    "latents of NaN": ({"latents": torch.full((1, 96, 16), torch.nan)}, "latents= holds NaN"),
    "latents of one image": ({"prompt": ["a", "b"], "latents": torch.zeros(1, 96, 16)}, "for 2 images"),
    "latents of another size": ({"latents": torch.zeros(1, 90, 16)}, r"has 96 tokens \(8 x 12 tokens\)"),
    "latents without a row": ({"latents": torch.zeros(96, 16)}, r"latents= is of shape \[96, 16\] for 1 images"),
    "embeddings without a row": ({**NOTHING, "prompt_embeds": ROW[0]}, r"shape \[7, 16\], without an axis of prompts"),
    "pooled without a row": ({**NOTHING, "pooled_prompt_embeds": POOLED[0]}, r"Pass .*pooled_prompt_embeds\[None\]"),
    "embeddings of NaN": ({**NOTHING, "prompt_embeds": ROW * torch.nan}, "prompt_embeds= holds NaN"),
    "no embeddings": ({**NOTHING, "prompt_embeds": ROW[:0]}, "prompt_embeds= has no entry"),
    "other counts": (
        {**NOTHING, "prompt_embeds": ROW.repeat(3, 1, 1), "pooled_prompt_embeds": POOLED.repeat(2, 1)},
        "pooled_prompt_embeds= has 2 entries for 3 prompts",
    ),
    "half of the embeddings": ({**NOTHING, "pooled_prompt_embeds": None}, "FluxPipeline cannot be called like this"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_told_before_anything_is_drawn(case, lens):
    change, message = WRONG[case]
    calls = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(PromptError, match=message):
        lens.run(**{"prompt": "red", "seed": 3, **change})
    handle.remove()
    assert not calls


UNFIT = {
    "width": ({"prompt_embeds": torch.zeros(1, 7, 15)}, r"prompt_embeds= \[1, 7, 15\] of torch.float32"),
    "pooled width": ({"pooled_prompt_embeds": torch.zeros(1, 15)}, r"pooled_prompt_embeds= \[1, 15\]"),
    "precision": ({"prompt_embeds": ROW.double()}, r"torch.float64.*for a model of torch.float32"),
    "half": ({"prompt_embeds": ROW.bfloat16()}, r"torch.bfloat16.*for a model of torch.float32"),
    "latents": ({"latents": torch.zeros(1, 96, 15)}, r"latents= \[1, 96, 15\]"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_the_model_is_told_before_its_first_block(case, lens):
    change, message = UNFIT[case]
    blocks = []
    handle = lens.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    with pytest.raises(PromptError, match=rf"cannot be called like this: .*Nothing was drawn yet; .*{message}"):
        lens.run(seed=3, **{**NOTHING, **change})
    handle.remove()
    assert not blocks
    assert lens.run(seed=3, **NOTHING).images


@pytest.mark.parametrize("name", ["flux", "krea2", "kandinsky5"])
def test_what_the_model_cannot_compute_with_is_told(name):
    """Negative embeddings are looked at in the pass of their branch, and some positive ones inside the blocks."""
    zoo, told = truth.zoo_of(name), []
    for key, value in zoo.call.items():
        if isinstance(value, torch.Tensor):
            for other in (torch.cat([value, value], -1), value[None], value.int()):
                try:
                    zoo.lens.run(**{**zoo.call, "seed": 1, key: other})
                except DitLensError as problem:
                    told.append(str(problem))
    assert any("fails in its own code" in message for message in told)


@pytest.mark.parametrize("where", ["block", "callback", "transformer"])
def test_errors_from_the_first_block_on_are_not_those_of_the_call(where, lens):
    """A module of the user's that fails in the last block, and a callback, say what they say."""

    def fail(*_):
        raise ValueError("mine")

    call, handle = {}, None
    if where == "callback":
        call["callback_on_step_end"] = fail
    else:
        transformer = lens.pipe.transformer
        part = transformer if where == "transformer" else transformer.single_transformer_blocks[-1]
        handle = part.register_forward_hook(fail)
    try:
        with pytest.raises(ValueError, match="mine") as caught:
            lens.run("red", seed=3, **call)
    finally:
        if handle is not None:
            handle.remove()
    assert not isinstance(caught.value, DitLensError)


@pytest.mark.parametrize(
    ("options", "message"), [({"prefix": "x"}, "prefix= is a str"), ({"record": "yes"}, "record='yes'")]
)
def test_options_that_are_none(options, message, lens):
    with pytest.raises((OpError, PromptError), match=message):
        lens.run("red", seed=3, **options)


def test_errors_of_a_function_that_ops_apply_are_its_own(lens):
    def fail(tensor, hook):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        lens.run("red", Apply("blocks.0.img", fn=fail), seed=3)
    assert not isinstance(caught.value, DitLensError)


# Nothing passed in is kept or changed


class Writes:
    """A pipeline's transformer that writes into whatever tensors and lists it was given, when it is done with them."""

    def __init__(self, pipe):
        self.handle = pipe.transformer.register_forward_hook(self.write, with_kwargs=True)

    def write(self, module, args, kwargs, output):
        for name in ("encoder_hidden_states", "pooled_projections", "hidden_states"):
            kwargs[name].fill_(0.5)
        (kwargs["joint_attention_kwargs"] or {}).clear()


def plain(value):
    """A value as something that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def random_call(number):
    """Arguments with tensors, lists and mappings, of one to three prompts."""
    rng = torch.Generator().manual_seed(number)
    count = int(torch.randint(1, 4, (), generator=rng))
    call = {
        "prompt_embeds": torch.randn(count, 7, 16, generator=rng),
        "pooled_prompt_embeds": torch.randn(count, 16, generator=rng),
        "joint_attention_kwargs": {"scale": 0.5},
        "latents": torch.randn(count, 96, 16, generator=rng),
        "sigmas": [1.0, 0.5],
        "negative_prompt": None,
        "seed": list(range(count)),
    }
    texts = {"prompt": ["red"] * count, "prompt_2": ["blue"] * count, "negative_prompt": ["bad"] * count}
    if number % 2:
        call = {name: value for name, value in call.items() if "embeds" not in name} | texts
    return call | ({"batch_size": 1} if number % 3 == 0 else {})


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_is_passed_in_is_changed(fails):
    defaults = {**CALL, "joint_attention_kwargs": {"scale": 1.0}}
    pipe = pipelines.flux()
    lens = DiTLens(pipe, defaults=defaults)
    Writes(pipe)

    def function(tensor, hook):
        if fails and hook.step == 1:
            raise RuntimeError("stop")

    ops = [Read("blocks.0.img", reduce="mean"), Apply("blocks.1.img", fn=function)]
    for number in range(6):
        call = random_call(number)
        before, of_ops = plain(copy.deepcopy(call)), list(ops)
        try:
            lens.run(call.pop("prompt", None), ops, **call)
        except RuntimeError as problem:
            assert "stop" in str(problem)  # noqa: PT017 only some of these fail
        assert plain(call) == {name: value for name, value in before.items() if name != "prompt"}
        assert ops == of_ops
        assert defaults == {**CALL, "joint_attention_kwargs": {"scale": 1.0}}


def test_generators_are_used_up_as_the_pipeline_does():
    used, wanted = ([torch.Generator().manual_seed(1)] for _ in range(2))
    run = DiTLens(pipelines.flux(), defaults=dict(CALL)).run("red", Read("velocity"), generator=used)
    images = pipelines.flux()("red", generator=wanted, **CALL).images
    assert seen(run) == [image.tobytes() for image in images]
    assert torch.equal(used[0].get_state(), wanted[0].get_state())


def test_a_list_that_a_pipeline_overwrites():
    entry = truth.ENTRIES["zimage"]
    lens = DiTLens(entry.build(), defaults={})
    call = {**entry.call(2), "num_inference_steps": 2}
    before = plain(call)
    lens.run(seed=1, batch_size=1, **call)
    assert plain(call) == before


def test_what_is_changed_after_a_lens_was_made_does_not_reach_it(images):
    defaults = {**CALL, "sigmas": [1.0, 0.5]}
    lens = DiTLens(pipelines.flux(), defaults=defaults)
    defaults["sigmas"][1] = 0.1
    assert seen(lens.run("red", seed=3)) == images


def odd_tensors(like):
    """name -> a tensor of that shape from which nothing can be computed."""
    yield "complex", like.to(torch.complex64)
    yield "infinite", torch.full_like(like, float("inf"))
    yield "minus infinite", torch.full_like(like, -float("inf"))
    yield "NaN", torch.full_like(like, float("nan"))
    yield "meta", like.to("meta")
    yield "sparse", like.to_sparse()
    yield "array of objects", np.full(like.shape, None)
    yield "complex array", like.numpy().astype(np.complex64)


def test_tensors_without_plain_values_are_told(lens):
    texts, forwards = lens.encode("red"), []
    latents = lens.run("red", seed=3, output_type="latent").latents
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    for name, odd in odd_tensors(latents):
        with pytest.raises(PromptError):
            lens.run("red", latents=odd)
        assert not forwards, name
    for argument, value in texts.items():
        for name, odd in odd_tensors(value) if isinstance(value, torch.Tensor) else ():
            with pytest.raises(PromptError):
                lens.run(**{**texts, argument: odd}, seed=3)
            assert not forwards, (argument, name)
    for odd in (torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones((), device="meta")):
        for call in (
            lambda odd=odd: lens.run(odd),
            lambda odd=odd: lens.run("red", seed=odd),
            lambda odd=odd: lens.run_with_cache(odd),
            lambda odd=odd: lens.cost("red", seed=odd),
            lambda odd=odd: lens.massive_channels("red", 2, seed=odd),
            lambda odd=odd: lens.run("red", num_inference_steps=odd),
        ):
            with pytest.raises(DitLensError):
                call()
            assert not forwards, odd
    handle.remove()


def test_arrays_are_taken_where_tensors_are(lens):
    latents = torch.randn_like(lens.run("red", seed=3, output_type="latent").latents)
    plain = lens.run("red", latents=latents)
    for given in (latents.numpy(), latents.numpy()[..., ::-1].copy()[..., ::-1]):
        assert seen(lens.run("red", latents=given)) == seen(plain)


def test_a_callback_may_return_nothing(lens, images):
    steps = []
    run = lens.run("red", seed=3, callback_on_step_end=lambda pipe, step, t, given: steps.append(step))
    assert seen(run) == images
    assert steps == [0, 1]


@pytest.mark.parametrize("count", [10**6, 10**9, 10**30])
def test_more_images_than_can_be_drawn_are_told_at_once(lens, count):
    began = time.monotonic()
    for call in (lens.run, lens.outline, lens.cost):
        with pytest.raises(PromptError):
            call("red", num_images_per_prompt=count)
    assert time.monotonic() - began < 5
