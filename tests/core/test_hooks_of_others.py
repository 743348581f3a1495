"""Hooks of others that look are no harm; those that change what a run reads or edits are told."""

import copy

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_layerwise_casting
from torch.nn.modules.module import register_module_forward_hook

from dit_lens import Add, DiTLens, Read
from dit_lens.errors import ExecutionError, FamilyError, OpError
from tests import pipelines

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "output_type": "latent"}
SINGLE = ("blocks.3.img.resid_pre", "blocks.3.img.attn_out", "blocks.3.img.mlp_out", "blocks.3.img")


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


def returns_more(_module, _args, output):
    return tuple(1.5 * one for one in output)


def writes(_module, _args, output):
    output[1].mul_(1.5)


@pytest.mark.parametrize("hook", [returns_more, writes])
@pytest.mark.parametrize("op", [Read("blocks.0.img"), Add("blocks.0.img", value=1.0), Read("blocks.0.img.x0")], ids=str)
def test_a_hook_that_changes_is_told(lens, hook, op):
    block = lens.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_hook(hook)
    try:
        with pytest.raises(ExecutionError, match=r"changes what pipe\.transformer\.transformer_blocks\.0 returns"):
            lens.run("red", op, seed=0)
        changed = lens.run("red", Read("blocks.1.img.resid_pre"), seed=0)  # what block 1 is given is what is read
    finally:
        handle.remove()
    seen = []
    handles = [
        block.register_forward_hook(hook),
        lens.pipe.transformer.transformer_blocks[1].register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        ),
    ]
    plain = lens.pipe("red", generator=torch.Generator().manual_seed(0), **CALL).images
    [handle.remove() for handle in handles]
    assert torch.equal(changed.latents, plain)
    read = changed["blocks.1.img.resid_pre"].as_subclass(torch.Tensor)[:, 0]
    assert torch.equal(read, torch.cat(seen[::2]))


def test_a_hook_that_looks_is_no_harm(lens):
    seen = []
    block = lens.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_hook(lambda _module, _args, output: seen.append(output[1]))
    run = lens.run("red", [Add("blocks.0.img", value=1.0), Read("blocks.0.img")], seed=0)
    handle.remove()
    assert torch.equal(run["blocks.0.img"].as_subclass(torch.Tensor)[:, 0], torch.cat(seen[::2]))
    assert not block._forward_hooks  # noqa: SLF001 nothing stays


def test_a_hook_on_all_modules_that_changes_is_told(lens):
    block = lens.pipe.transformer.transformer_blocks[0]
    handle = register_module_forward_hook(
        lambda module, args, output: returns_more(module, args, output) if module is block else None
    )
    try:
        with pytest.raises(
            ExecutionError, match=r"changes what pipe\.transformer\.transformer_blocks\.0 returns, after"
        ):
            lens.run("red", Read("blocks.0.img"), seed=0)
        assert lens.run("red", Read("blocks.1.img"), seed=0).latents is not None
    finally:
        handle.remove()


def halves(name):
    def hook(_module, args, kwargs):
        return args, {**kwargs, name: kwargs[name] / 2}

    return hook


def halves_in_place(_module, _args, kwargs):
    kwargs["hidden_states"].mul_(0.5)


GIVEN = {
    "latents": ("", halves("hidden_states"), Read("x0", steps=-1)),
    "time": ("", halves("timestep"), ()),
    "a block": ("transformer_blocks.1", halves("hidden_states"), Read("blocks.1.img.resid_pre")),
    "a block in place": ("transformer_blocks.1", halves_in_place, Read("blocks.1.img.resid_pre")),
    "an edited input": ("transformer_blocks.1", halves("hidden_states"), Add("blocks.1.img.resid_pre", value=1.0)),
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_hook_that_changes_what_is_given_is_told(lens, case):
    path, hook, op = GIVEN[case]
    module = lens.pipe.transformer.get_submodule(path)
    before = len(module._forward_pre_hooks)  # noqa: SLF001 nothing stays
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    name = f"transformer{'.' * bool(path)}{path}".replace(".", r"\.")
    with pytest.raises(
        ExecutionError, match=rf"forward pre hook .* changes what pipe\.{name} is given, before the run"
    ):
        lens.run("red", op, seed=0)
    handle.remove()
    assert len(module._forward_pre_hooks) == before  # noqa: SLF001
    assert lens.run("red", op, seed=0).latents is not None


def test_a_hook_that_changes_a_text_or_looks_at_what_is_given_is_no_harm(lens):
    seen, block = [], lens.pipe.transformer.transformer_blocks[1]
    handles = [
        lens.pipe.transformer.register_forward_pre_hook(halves("encoder_hidden_states"), with_kwargs=True),
        block.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["hidden_states"]), with_kwargs=True),
    ]
    plain = lens.pipe("red", generator=torch.Generator().manual_seed(0), **CALL).images
    seen.clear()
    run = lens.run("red", Read("blocks.1.img.resid_pre"), seed=0)
    [handle.remove() for handle in handles]
    assert torch.equal(run.latents, plain)
    assert torch.equal(run["blocks.1.img.resid_pre"].as_subclass(torch.Tensor)[:, 0], torch.cat(seen[::2]))


class More(ModelHook):
    def post_forward(self, module, output):
        return tuple(1.5 * one for one in output)


def test_hooks_of_diffusers_that_may_change_are_refused(lens):
    block = lens.pipe.transformer.transformer_blocks[0]
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(More(), "more")
    try:
        with pytest.raises(FamilyError, match=r"the hook More on pipe\.transformer\.transformer_blocks\.0 may change"):
            lens.run("red", seed=0)
    finally:
        registry.remove_hook("more")
    assert lens.run("red", seed=0).latents is not None


def test_hooks_that_cast_weights_are_no_harm():
    pipe = pipelines.flux()
    apply_layerwise_casting(pipe.transformer, storage_dtype=torch.float16, compute_dtype=torch.float32)
    run = DiTLens(pipe, defaults=CALL).run("red", Read(SINGLE), seed=0)
    assert torch.equal(run.latents, pipe("red", generator=torch.Generator().manual_seed(0), **CALL).images)


# Projections that add up what attention and MLP write


class Curved(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.gelu(super().forward(x))


def exchange(lens, change):
    block = lens.pipe.transformer.single_transformer_blocks[1]
    before = block.proj_out
    block.proj_out = change(copy.deepcopy(before))
    return block, before


def curved(module):
    module.__class__ = Curved
    return module


def patched(module):
    before = module.forward
    module.forward = lambda x: before(x).tanh()
    return module


def bent(module):
    module.register_forward_hook(lambda _module, _args, output: output.tanh())
    return module


@pytest.mark.parametrize("change", [curved, patched, bent])
def test_a_projection_that_is_not_linear_loses_its_parts(lens, change):
    block, before = exchange(lens, change)
    try:
        with pytest.raises(OpError, match=r"single_transformer_blocks\.1\.proj_out, which is not linear.*attn\.z"):
            lens.run("red", Read(SINGLE), seed=0)
        assert lens.run("red", Read("blocks.3.img"), seed=0).latents is not None
    finally:
        block.proj_out = before


def adapted(module):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, init_lora_weights=False)
    return Linear(module, "one", config=settings, r=2, lora_alpha=4, lora_dropout=0.5, init_lora_weights=False)


def test_a_lora_is_linear_and_its_dropout_is_told(lens):
    block, before = exchange(lens, adapted)
    try:
        block.proj_out.eval()
        run = lens.run("red", Read(SINGLE), seed=0)
        parts = [run[name].as_subclass(torch.Tensor) for name in SINGLE]
        torch.testing.assert_close(sum(parts[:3]), parts[3])
        block.proj_out.train()
        with pytest.raises(OpError, match="draws random numbers, as dropout does in training mode"):
            lens.run("red", Read(SINGLE), seed=0)
        torch.manual_seed(5)
        run = lens.run("red", Read("blocks.3.img"), seed=0)
        torch.manual_seed(5)
        assert torch.equal(run.latents, lens.pipe("red", generator=torch.Generator().manual_seed(0), **CALL).images)
    finally:
        block.proj_out = before


def test_a_pipeline_without_its_transformer(lens):
    pipe = copy.copy(lens.pipe)
    other = DiTLens(pipe, defaults=CALL)
    pipe.transformer = None
    for attempt in (lambda: other.run("red", seed=0), lambda: other.cost("red"), lambda: other.outline("red")):
        with pytest.raises(ExecutionError, match=r"pipe\.transformer is None"):
            attempt()
