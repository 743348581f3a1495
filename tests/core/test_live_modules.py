"""Modules in two places, methods that are others than those tried, and what is compiled, are told by name."""

import copy

import pytest
import torch

from dit_lens import DiTLens, Read, Zero
from dit_lens.errors import ExecutionError, FamilyError
from tests import pipelines
from tests.zoo.truth import ENTRIES

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def flux():
    return pipelines.flux()


@pytest.fixture(scope="module")
def qwen():
    entry = ENTRIES["qwen"]
    return DiTLens(entry.build(), defaults={**entry.call(1), "output_type": "latent"})


def refused(pipe, lens, match, **call):
    """A run and a new lens are refused before the transformer is called."""
    called = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    for attempt in (lambda: lens.run(ops=Zero("blocks.1.img"), seed=0, **call), lambda: DiTLens(pipe)):
        with pytest.raises(FamilyError, match=match):
            attempt()
    handle.remove()
    assert not called


def test_a_block_that_stands_twice(flux):
    lens = DiTLens(flux, defaults=CALL)
    blocks = flux.transformer.transformer_blocks
    blocks[1] = blocks[0]
    refused(
        flux,
        lens,
        r"transformer\.transformer_blocks\.0 and pipe\.transformer\.transformer_blocks\.1 are one module",
        prompt="red",
    )
    blocks[1] = copy.deepcopy(blocks[0])
    seen = []
    handle = blocks[1].register_forward_hook(lambda _module, _args, output: seen.append(output[1]))
    plain = flux("red", generator=torch.Generator().manual_seed(0), **CALL).images
    handle.remove()
    run = lens.run("red", Read("blocks.1.img"), seed=0)
    assert torch.equal(run.latents, plain)
    assert torch.equal(run["blocks.1.img"].as_subclass(torch.Tensor)[:, 0], torch.cat(seen[::2]))


@pytest.mark.parametrize("path", ["ff", "norm1.linear", "attn.to_q"])
def test_a_part_that_stands_twice(flux, path):
    lens = DiTLens(flux, defaults=CALL)
    first, second = flux.transformer.transformer_blocks
    if path == "ff":
        second.ff_context = second.ff
    else:
        second.set_submodule(path, first.get_submodule(path))
    refused(flux, lens, r"transformer_blocks\.[01]\.\S+ and pipe\S+ are one module.*deepcopy", prompt="red")


def double(before):
    return lambda *args, **kwargs: tuple(2 * one for one in before(*args, **kwargs))


def test_a_method_put_on_a_block(qwen):
    block = qwen.pipe.transformer.transformer_blocks[2]
    before = block._modulate  # noqa: SLF001 the method that the block's forward calls
    block._modulate = double(before)  # noqa: SLF001
    try:
        match = r"transformer_blocks\.2, a QwenImageTransformerBlock, has another _modulate: .*was tried with"
        refused(qwen.pipe, qwen, match)
        block._modulate = before  # noqa: SLF001 the same method, kept on the block
        assert qwen.run(seed=0).latents is not None
    finally:
        del block._modulate  # noqa: SLF001
    assert qwen.run(seed=0).latents is not None


def test_a_method_of_a_subclass(qwen):
    block = qwen.pipe.transformer.transformer_blocks[1]
    kind = type(block)

    class Own(kind):
        def _modulate(self, *args, **kwargs):
            return double(super()._modulate)(*args, **kwargs)

    class Quiet(kind):
        """Adds a method and changes none."""

        def note(self):
            return 1

    block.__class__ = Own
    try:
        refused(qwen.pipe, qwen, r"transformer_blocks\.1, a Own, has another _modulate")
        block.__class__ = Quiet
        assert qwen.run(seed=0).latents is not None
    finally:
        block.__class__ = kind


def test_a_method_patched_on_the_class_is_tried(qwen, monkeypatch):
    kind = type(qwen.pipe.transformer.transformer_blocks[0])
    before = kind._modulate  # noqa: SLF001
    monkeypatch.setattr(kind, "_modulate", double(before))
    with pytest.raises(FamilyError, match="is not its input plus attn_out plus mlp_out"):
        qwen.run(seed=0)  # the gate is doubled too, behind what attn_out is multiplied by


def test_a_compiled_forward_is_told_as_that(flux):
    lens = DiTLens(flux, defaults=CALL)
    flux.transformer.forward = torch.compile(flux.transformer.forward)
    refused(flux, lens, "the transformer or a part of it is compiled", prompt="red")
    del flux.transformer.forward
    block = flux.transformer.transformer_blocks[0]
    block.forward = torch.compile(block.forward)
    refused(flux, lens, "compiled", prompt="red")


# What comes between the call of a module and its forward


def more(function):
    return lambda self, *args, **kwargs: tuple(one + 1 for one in function(self, *args, **kwargs))


@pytest.mark.parametrize("early", [True, False], ids=["before the lens", "after"])
@pytest.mark.parametrize("where", ["class", "subclass", "instance", "torch"])
def test_a_call_that_is_not_torch_s(flux, monkeypatch, where, early):
    lens = None if early else DiTLens(flux, defaults=CALL)
    block = flux.transformer.transformer_blocks[1]
    kind, call = type(block), torch.nn.Module.__call__
    plain = flux("red", generator=torch.Generator().manual_seed(0), **CALL).images
    if where == "class":
        monkeypatch.setattr(kind, "__call__", more(call))
    elif where == "subclass":
        block.__class__ = type(kind.__name__, (kind,), {"__call__": more(call)})
    elif where == "instance":
        before = block._call_impl  # noqa: SLF001 what torch calls
        monkeypatch.setattr(
            block, "_call_impl", lambda *args, **kwargs: tuple(one + 1 for one in before(*args, **kwargs))
        )
    else:
        monkeypatch.setattr(
            torch.nn.Module, "__call__", lambda self, *a, **k: (more(call) if self is block else call)(self, *a, **k)
        )
    changed = flux("red", generator=torch.Generator().manual_seed(0), **CALL).images
    assert not torch.equal(plain, changed)
    match = r"pipe\.transformer.* has .* as its (__call__|_call_impl) in the place of torch's own"
    if early:
        with pytest.raises(FamilyError, match=match):
            DiTLens(flux, defaults=CALL)
    else:
        refused(flux, lens, match, prompt="red")


class Turned(torch.nn.ModuleList):
    turned = True

    def __iter__(self):
        found = list(super().__iter__())
        return iter(found[::-1] if self.turned else found)


def test_blocks_in_another_order_than_their_numbers(flux):
    lens = DiTLens(flux, defaults=CALL)
    flux.transformer.single_transformer_blocks = Turned(flux.transformer.single_transformer_blocks)
    refused(flux, lens, r"single_transformer_blocks, a Turned, gives its blocks in another order", prompt="red")


@pytest.mark.parametrize("op", [Read("blocks.*.img"), Read("blocks.3.img"), Zero("blocks.4.img.attn.q")], ids=str)
def test_blocks_that_run_in_another_order_than_they_are_listed(flux, op):
    lens = DiTLens(flux, defaults=CALL)
    blocks = flux.transformer.single_transformer_blocks = Turned(flux.transformer.single_transformer_blocks)
    blocks.turned = False
    handles = [
        flux.transformer.register_forward_pre_hook(lambda *_: setattr(blocks, "turned", True)),
        flux.transformer.register_forward_hook(lambda *_: setattr(blocks, "turned", False)),
    ]
    with pytest.raises(ExecutionError, match=r"single_transformer_blocks ran in the order 2, 1.*that of their numbers"):
        lens.run("red", op, seed=0)
    blocks.turned = False
    [handle.remove() for handle in handles]
    assert lens.run("red", op, seed=0).latents is not None


SCRIPTS = {
    "a traced MLP": lambda block: setattr(block, "ff", torch.jit.trace(block.ff, torch.randn(1, 4, pipelines.WIDTH))),
    "a scripted projection": lambda block: block.ff.net.__setitem__(2, torch.jit.script(block.ff.net[2])),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_parts_made_by_torchscript_are_told(name):
    """At load, and where they come later, in every use of the lens."""
    pipe = pipelines.flux()
    lens, said = DiTLens(pipe, defaults=dict(pipelines.EMBEDDED)), r"transformer_blocks\.0\.ff.* was made by torch\.jit"
    block = pipe.transformer.transformer_blocks[0]
    before = block.ff
    SCRIPTS[name](block)
    for use in (lambda: DiTLens(pipe), lens.sites, lambda: lens.run("red", seed=0), lambda: lens.outline("red")):
        with pytest.raises(FamilyError, match=said):
            use()
    if block.ff is not before:  # put back, it works again
        block.ff = before
        assert lens.run("red", seed=0).images
