"""What a live model runs is what was tried, or is tried, or is refused; and a pipeline stays as it was found."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxTransformerBlock,
)

import dit_lens as dl
from dit_lens import Apply, Read, Zero
from dit_lens.errors import FamilyError, SiteError
from dit_lens.families.live import find_difference
from tests import pipelines
from tests.zoo.truth import ENTRIES

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def parts():
    return pipelines.flux().components


@pytest.fixture
def pipe(parts):
    """A pipeline of one's own, with the parts of all."""
    return made(FluxPipeline, parts)


@pytest.fixture
def lens(pipe):
    return dl.DiTLens(pipe, defaults=CALL)


def made(kind, parts):
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, **call):
    return pipe("red", generator=torch.Generator().manual_seed(0), **{**CALL, **call}).images


def value(run, name):
    found = run[name]
    return (found if isinstance(found, torch.Tensor) else found[next(iter(found))]).as_subclass(torch.Tensor)


# What is there


class Engine(torch.nn.Module):
    """All blocks of a stack in one module, as an engine of fused kernels replaces them."""

    def __init__(self, blocks):
        super().__init__()
        self.inner = blocks

    def forward(self, hidden_states, encoder_hidden_states, **rest):
        for block in self.inner:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, **rest)
        return encoder_hidden_states, hidden_states


Engine.__name__ = "FluxTransformerBlock"


def refused(lens, match):
    """A run and a new lens are refused before the transformer is called."""
    called = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    for attempt in (lambda: lens.run("red", [Read("blocks.0.img")], seed=0), lambda: dl.DiTLens(lens.pipe)):
        with pytest.raises(FamilyError, match=match):
            attempt()
    handle.remove()
    assert not called


def test_blocks_replaced_by_one_engine_are_refused(lens, monkeypatch):
    transformer = lens.pipe.transformer
    whole = plain(lens.pipe)
    engine = torch.nn.ModuleList([Engine(transformer.transformer_blocks)])
    monkeypatch.setitem(transformer._modules, "transformer_blocks", engine)  # noqa: SLF001 put back by itself
    assert torch.equal(plain(lens.pipe), whole)
    refused(
        lens, r"transformer_blocks\.0, a FluxTransformerBlock, .*runs Engine\.forward .*FluxTransformerBlock\.forward"
    )


def other_forward(module):
    before = module.forward

    def patched(*args, **kwargs):
        return before(*args, **kwargs)

    return patched


@pytest.mark.parametrize("path", ["", "transformer_blocks.1", "single_transformer_blocks.2.attn", "norm_out"])
def test_a_forward_replaced_on_an_instance_is_refused(lens, path):
    module = lens.pipe.transformer.get_submodule(path)
    module.forward = other_forward(module)
    try:
        refused(lens, r"pipe\.transformer.* runs other_forward.*patched.*this family was tried with \w+\.forward")
    finally:
        del module.forward
    assert lens.run("red", seed=0).latents is not None


def test_a_class_patched_after_the_lens_is_tried_again_and_called(lens, monkeypatch):
    untouched = plain(lens.pipe)
    assert torch.equal(lens.run("red", seed=0).latents, untouched)
    calls, before = [], FluxTransformer2DModel.forward

    def doubled(self, *args, **kwargs):
        calls.append(1)
        return (2 * before(self, *args, **kwargs)[0],)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", doubled)
    with pytest.raises(FamilyError, match="do not make the model's prediction"):  # twice what the readout makes
        lens.run("red", seed=0)
    calls.clear()
    patched = plain(lens.pipe)
    assert len(calls) == 4
    assert not torch.equal(patched, untouched)

    def counted(self, *args, **kwargs):
        calls.append(1)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", counted)
    lens.sites()  # tries a clone
    calls.clear()
    assert torch.equal(lens.run("red", [Read("blocks.0.img")], seed=0).latents, untouched)
    assert len(calls) == 4


def test_a_block_class_patched_to_write_more_is_refused(lens, monkeypatch):
    before = FluxTransformerBlock.forward

    def more(self, *args, **kwargs):
        text, image = before(self, *args, **kwargs)
        return text, image + 1

    monkeypatch.setattr(FluxTransformerBlock, "forward", more)
    refused(lens, "is not its input plus attn_out plus mlp_out")


def test_looking_at_57_blocks_takes_milliseconds(lens):
    import time

    one = lens.anatomy
    started = time.perf_counter()
    for _ in range(20):
        assert find_difference(one, one.tried) is None
    assert (time.perf_counter() - started) / 20 / one.depth < 1e-3


# A pipeline stays as it was found


def attributes(pipe):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [
        {name: one for name, one in vars(module).items() if name not in ("_modules", "_diffusers_hook")}
        for part in modules
        for module in part.modules()
    ]


def test_modules_are_left_as_they_were(parts):
    pipe = made(FluxPipeline, parts)
    before = attributes(pipe)

    def fails(tensor, hook):
        raise ZeroDivisionError

    def unchanged():
        return all(
            one.keys() == other.keys() and all(one[name] is other[name] for name in one)
            for one, other in zip(before, attributes(pipe), strict=True)
        )

    first, second = (dl.DiTLens(pipe, defaults=CALL) for _ in range(2))
    assert unchanged()
    for lens in (first, second, first):
        lens.run("red", [Zero("blocks.1.img.attn.q")], seed=0)
        assert unchanged()
        with pytest.raises(ZeroDivisionError):
            lens.run("red", [Apply("blocks.1.img", fn=fails)], seed=0)
        assert unchanged()
    with first.nnsight.generate("red", **CALL):
        kept = first.blocks[3].img.save()
    assert kept.shape[1:] == (96, 32)
    assert unchanged()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_patches_of_other_parts_act_as_without_a_lens(lens, part):
    module, calls = getattr(lens.pipe, part), []
    module = module.decoder if part == "vae" else module
    before = module.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return before(*args, **kwargs)

    call = {"output_type": "pil"}
    plain(lens.pipe, **call)
    module.forward = counted
    try:
        plain(lens.pipe, **call)
        once = len(calls)
        assert once > 0
        lens.run("red", seed=0, **call)
        assert len(calls) == 2 * once
        assert vars(module)["forward"] is counted
    finally:
        del module.forward
    lens.run("red", seed=0, **call)
    assert len(calls) == 2 * once


# Processors of attention


@pytest.fixture
def adapted():
    """FLUX with an IP-Adapter, whose tokens are given."""
    pipe = pipelines.flux()
    torch.manual_seed(3)
    before = pipe.transformer.attn_processors
    return pipe, {n: one if n.startswith("single") else FluxIPAdapterAttnProcessor(32, 16) for n, one in before.items()}


def test_what_an_ip_adapter_writes_has_a_name(adapted):
    pipe, processors = adapted
    lens = dl.DiTLens(pipe, defaults=CALL)
    with pytest.raises(SiteError, match="no IP-Adapter is loaded"):
        lens.sites("blocks.0.img.ip_out")
    before = copy.copy(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(processors)
    assert lens.sites("blocks.*.img.ip_out") == ["blocks.0.img.ip_out", "blocks.1.img.ip_out"]
    assert any("ip_out" in check.says for check in lens.checks)
    images = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 16)]}}
    seen, block = [], pipe.transformer.transformer_blocks[1]
    handle = block.attn.register_forward_hook(lambda _module, _args, output: seen.append(output[2]))
    drawn = plain(pipe, **images)
    handle.remove()
    points = ["resid_pre", "attn_out", "mlp_out", "ip_out", "resid_post"]
    run = lens.run("red", [Read(f"blocks.1.img.{point}", name=point) for point in points], seed=0, **images)
    assert torch.equal(run.latents, drawn)
    assert torch.equal(value(run, "ip_out"), torch.stack(seen[::2]))
    written = sum(value(run, point) for point in points[:-1])
    torch.testing.assert_close(written, value(run, "resid_post"))
    assert value(run, "ip_out").abs().max() > 0.1

    def silence(_module, _args, output):
        return (*output[:2], torch.zeros_like(output[2]))

    handles = [one.attn.register_forward_hook(silence) for one in pipe.transformer.transformer_blocks]
    without = plain(pipe, **images)
    [handle.remove() for handle in handles]
    zeroed = lens.run("red", [Zero("blocks.*.img.ip_out", branch="both")], seed=0, **images)
    assert torch.equal(zeroed.latents, without)
    assert not torch.equal(without, drawn)
    pipe.transformer.set_attn_processor(before)
    with pytest.raises(SiteError, match="no IP-Adapter is loaded"):
        lens.run("red", [Read("blocks.0.img.ip_out")], seed=0)


def test_a_processor_that_computes_what_was_tried_is_used(lens):
    calls = []

    class Watched(FluxAttnProcessor):
        def __init__(self, note):
            super().__init__()
            self.note = note

        def __call__(self, *args, **kwargs):
            calls.append(self.note)
            return super().__call__(*args, **kwargs)

    untouched, before = plain(lens.pipe), dict(lens.pipe.transformer.attn_processors)
    lens.pipe.transformer.set_attn_processor(Watched("live"))
    try:
        lens.sites()  # tries a copy
        calls.clear()
        assert torch.equal(lens.run("red", [Read("blocks.*.img.attn.q")], seed=0).latents, untouched)
        assert len(calls) == 2 * 2 * pipelines.DEPTH
    finally:
        lens.pipe.transformer.set_attn_processor(before)


def test_a_processor_that_leaves_projections_out_loses_their_names(lens):
    class Still:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
            return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    before = dict(lens.pipe.transformer.attn_processors)
    lens.pipe.transformer.set_attn_processor(Still())
    try:
        drawn = plain(lens.pipe)
        assert torch.equal(lens.run("red", [Read("blocks.*.img.attn_out")], seed=0).latents, drawn)
        with pytest.raises(SiteError, match=r"was not called when FLUX\.1 was checked"):
            lens.run("red", [Read("blocks.0.img.attn.q")], seed=0)
    finally:
        lens.pipe.transformer.set_attn_processor(before)


def test_processors_of_adapters_without_a_row_are_refused():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    lens = dl.DiTLens(ENTRIES["sd3"].build())
    transformer = lens.pipe.transformer
    size = transformer.inner_dim
    one = SD3IPAdapterJointAttnProcessor2_0(size, 8, size // transformer.config.num_attention_heads)
    transformer.set_attn_processor(one)
    with pytest.raises(FamilyError, match=r"SD3IPAdapterJointAttnProcessor2_0.*unload_ip_adapter"):
        lens.sites()


def test_another_backend_of_attention(lens, monkeypatch):
    # diffusers sets it for all models of the process as well, and resets it for one.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)  # noqa: SLF001
    untouched = lens.run("red", [Read("blocks.1.img.attn.q")], seed=0)
    lens.pipe.transformer.set_attention_backend("_native_math")
    try:
        run = lens.run("red", [Read("blocks.1.img.attn.q")], seed=0)
        assert torch.equal(run.latents, plain(lens.pipe))
        torch.testing.assert_close(value(run, "blocks.1.img.attn.q"), value(untouched, "blocks.1.img.attn.q"))
    finally:
        lens.pipe.transformer.reset_attention_backend()


# Classes of one's own, and wrappers


def passing_on(kind):
    """A subclass that passes all arguments on."""

    def call(self, *args, **kwargs):
        return super(own, self).__call__(*args, **kwargs)

    own = type(f"Own{kind.__name__}", (kind,), {"__call__": call})
    return own


@pytest.mark.parametrize("subclass", [lambda kind: type("Own", (kind,), {}), passing_on])
def test_subclasses_of_pipelines_are_like_their_parents(parts, lens, subclass):
    own = dl.DiTLens(made(subclass(FluxPipeline), parts), defaults=CALL)
    run, expected = (one.run("red", [Read("blocks.*.img")], seed=0) for one in (own, lens))
    assert torch.equal(run.latents, expected.latents)
    assert run.sigmas == expected.sigmas
    texts, wanted = (one.encode("red") for one in (own, lens))
    assert texts.keys() == wanted.keys()
    options = {"metric": lambda x: x.square().mean(), "seed": 0}
    call = {name: one for name, one in CALL.items() if name != "output_type"}
    found, right = (
        one.gradients("red", "blocks.1.img", **options)
        for one in (dl.DiTLens(own.pipe, defaults=call), dl.DiTLens(lens.pipe, defaults=call))
    )
    assert torch.equal(found["blocks.1.img"], right["blocks.1.img"])
    with pytest.raises(dl.errors.PromptError, match="guidance_scal"):
        own.run("red", guidance_scal=3.0)


@pytest.mark.parametrize("name", ["kontext", "klein", "sd3", "sana", "qwen"])
def test_subclasses_of_other_pipelines(name):
    """An override passes everything on: the same plan and the same answers."""
    entry = ENTRIES["flux" if name == "kontext" else name]
    pipe, call = entry.build(), entry.call(1)
    kind = diffusers.FluxKontextPipeline if name == "kontext" else type(pipe)
    if name == "kontext":
        from PIL import Image

        call = {**call, "image": Image.linear_gradient("L").convert("RGB").resize((48, 32)), "_auto_resize": False}
        call["max_area"] = 48 * 32
    taken = {key: part for key, part in pipe.components.items() if key in inspect.signature(kind).parameters}
    runs = []
    for one in (kind, passing_on(kind)):
        arguments, prompt = dict(call), call.get("prompt")
        arguments.pop("prompt", None)
        lens = dl.DiTLens(made(one, taken), defaults={})
        runs.append(lens.run(prompt, [Read("blocks.0.img")], seed=0, **arguments))
    assert torch.equal(value(runs[0], "blocks.0.img"), value(runs[1], "blocks.0.img"))


def test_subclasses_of_transformers(lens):
    config = lens.pipe.transformer.config
    lens.pipe.transformer = type("Same", (FluxTransformer2DModel,), {}).from_config(config).eval()
    assert torch.equal(lens.run("red", [Read("blocks.1.img")], seed=0).latents, plain(lens.pipe))

    class Other(FluxTransformer2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    lens.pipe.transformer = Other.from_config(config)
    with pytest.raises(FamilyError, match=r"Other overrides the forward of FluxTransformer2DModel.*register_family"):
        lens.run("red", seed=0)


def test_wrappers_are_told_how_to_unwrap(lens):
    from peft import LoraConfig, get_peft_model

    transformer = copy.deepcopy(lens.pipe.transformer)
    lens.pipe.transformer = torch.nn.DataParallel(transformer)
    refused(lens, r"a DataParallel around a FluxTransformer2DModel.*pipe\.transformer = pipe\.transformer\.module\.")
    lens.pipe.transformer = get_peft_model(
        transformer, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    )
    refused(
        lens, r"a PeftModel around a FluxTransformer2DModel.*= pipe\.transformer\.base_model\.model\. Adapters stay"
    )
    lens.pipe.transformer = lens.pipe.transformer.base_model.model
    run = lens.run("red", [Read("blocks.1.img")], seed=0)
    assert torch.equal(run.latents, plain(lens.pipe))


def test_two_denoisers_are_refused_at_once():
    wan = ENTRIES["wan"].build()
    two = type(wan)(**{**wan.components, "transformer_2": copy.deepcopy(wan.transformer)}, boundary_ratio=0.5)
    with pytest.raises(FamilyError, match=r"two denoisers, transformer and transformer_2.*boundary_ratio=None"):
        dl.DiTLens(two)
    parts = {**two.components, "transformer_2": None}
    assert dl.DiTLens(type(wan)(**parts, boundary_ratio=None)).anatomy.depth == 3


def test_gradients_with_lora():
    from peft import LoraConfig

    pipe = pipelines.flux()
    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    lens = dl.DiTLens(pipe, defaults={k: v for k, v in CALL.items() if k != "output_type"})
    options = {"metric": lambda x: x.square().mean(), "seed": 0}
    found = lens.gradients("red", "blocks.3.img", **options, steps=1)["blocks.3.img"]
    block = pipe.transformer.single_transformer_blocks[1]

    def square(change):
        step = iter(range(4))

        def hook(_module, _args, output):
            return (output[0], output[1] + change) if next(step) == 2 else output

        handle = block.register_forward_hook(hook)
        latents = plain(pipe)
        handle.remove()
        return latents.square().mean()

    towards = found[0] / found[0].norm()
    slope = (square(1e-2 * towards) - square(-1e-2 * towards)) / 2e-2
    torch.testing.assert_close(slope, found.norm(), rtol=2e-2, atol=0)
