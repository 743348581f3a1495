"""Pipelines in use: LoRA that comes and goes, quantised and offloaded weights, images to start from, samplers."""

import inspect
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, PyramidAttentionBroadcastConfig
from PIL import Image

import dit_lens as dl
from dit_lens import Read, Swap, Zero
from dit_lens.errors import FamilyError, PromptError
from tests import oracle, pipelines
from tests.zoo import truth
from tests.zoo.parts import autoencoder
from tests.zoo.truth import ENTRIES

CPU = torch.device("cpu")
ROWS = 2
CALL = ENTRIES["sd3"].call(ROWS)
# Site -> the module that holds it, and whether it is what enters there.
SITES = {
    "blocks.1.img": ("transformer_blocks.1", False),
    "blocks.1.img.attn.q": ("transformer_blocks.1.attn.to_q", False),
    "blocks.1.img.attn.v": ("transformer_blocks.1.attn.to_v", False),
    "blocks.1.img.attn.z": ("transformer_blocks.1.attn.to_out.0", True),
    "blocks.1.img.mlp.post": ("transformer_blocks.1.ff.net.2", True),
}


def sd3():
    return ENTRIES["sd3"].build()


def generators(rows):
    return [torch.Generator().manual_seed(truth.SEED) for _ in range(rows)]


def hooked(pipe, call=CALL):
    """What plain torch hooks see at this moment in the conditional rows: site -> [step, row, token, channel]."""
    seen, handles = {site: [] for site in SITES}, []

    def keeps(site, enters):
        def hook(module, args, output):
            value = args[0] if enters else output
            seen[site].append((value[1] if isinstance(value, tuple) else value)[ROWS:].clone())

        return hook

    for site, (path, enters) in SITES.items():
        handles.append(pipe.transformer.get_submodule(path).register_forward_hook(keeps(site, enters)))
    try:
        drawn = pipe(**call, generator=generators(ROWS)).images
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.stack(values) for site, values in seen.items()}, drawn


def sees(lens):
    """Asserts that a run reads what plain hooks see and draws what the pipeline draws; returns the latents."""
    run = lens.run(ops=[Read(list(SITES))], seed=truth.SEED, **CALL)  # first: hooks after a run may differ
    seen, drawn = hooked(lens.pipe)
    for site, value in seen.items():
        assert torch.equal(run[site], value), site
    assert torch.equal(run.latents, drawn)
    edited = lens.run(ops=[Zero("blocks.1.img.attn.q", channels=[1])], seed=truth.SEED, **CALL)
    assert not torch.equal(edited.latents, drawn)
    return drawn


# LoRA


def add_lora(pipe, name="one", seed=1):
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["to_q", "to_v", "to_out.0", "ff.net.2", "norm1.linear"]
    pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets), adapter_name=name)


@pytest.fixture
def lora_folder(tmp_path):
    from peft.utils import get_peft_model_state_dict

    pipe = sd3()
    add_lora(pipe)
    weights = get_peft_model_state_dict(pipe.transformer, adapter_name="one")
    diffusers.StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    return tmp_path


def test_lora_comes_and_goes_under_a_lens():
    pipe = sd3()
    lens = dl.DiTLens(pipe)
    plain = sees(lens)
    add_lora(pipe)
    one = sees(lens)
    add_lora(pipe, "two", seed=2)
    pipe.set_adapters(["one", "two"], [0.5, 2.0])
    both = sees(lens)
    assert not torch.equal(plain, one)
    assert not torch.equal(one, both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert torch.equal(sees(lens), one)
    pipe.disable_lora()
    assert torch.equal(sees(lens), plain)
    pipe.enable_lora()
    pipe.fuse_lora()
    assert torch.allclose(sees(lens), one, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(sees(lens), plain, atol=1e-4)


def test_lora_loaded_before_the_lens(lora_folder):
    pipe = sd3()
    pipe.load_lora_weights(lora_folder)
    lens = dl.DiTLens(pipe)
    adapted = sees(lens)
    pipe.unload_lora_weights()
    assert not torch.equal(sees(lens), adapted)
    pipe.load_lora_weights(lora_folder)
    assert torch.equal(sees(lens), adapted)


def test_lora_and_offloading_of_a_pipeline_with_prompts():
    from peft import LoraConfig

    pipe = pipelines.flux()
    lens = dl.DiTLens(pipe, defaults=dict(pipelines.TRUE_CFG))
    prompts, seeds = ["a red one", "blue"], [3, 3]
    before = lens.run(prompts, seed=3)
    pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "proj_mlp"]))
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        run = lens.run(prompts, [Read("blocks.*.img"), Read("blocks.4.img.attn.q", name="q")], seed=3)
        images, records = oracle.draw(pipe, prompts, seeds, pipelines.TRUE_CFG)
        for block in range(pipelines.DEPTH):
            wanted = torch.stack([record[block, "img", "post"] for record in records[::2]])
            assert torch.equal(run[f"blocks.{block}.img"], wanted)
        assert torch.equal(truth.pixels(run.images), truth.pixels(images))
        assert not torch.equal(truth.pixels(run.images), truth.pixels(before.images))


def test_names_inside_nnsight_follow_lora():
    pipe = sd3()
    lens = dl.DiTLens(pipe)
    before = lens.nnsight
    add_lora(pipe)
    assert lens.nnsight is before
    assert lens.nnsight.transformer.transformer_blocks[1].attn.to_q.base_layer is not None
    pipe.unload_lora_weights()
    assert not hasattr(lens.nnsight.transformer.transformer_blocks[1].attn.to_q, "base_layer")


def test_another_transformer_in_the_same_pipeline():
    pipe = sd3()
    lens = dl.DiTLens(pipe)
    first = sees(lens)
    assert "blocks.1.img.attn2_out" not in lens.sites()
    pipe.transformer = ENTRIES["sd35"].build().transformer
    assert "blocks.1.img.attn2_out" in lens.sites()
    assert lens.anatomy.transformer is pipe.transformer
    assert not torch.equal(sees(lens), first)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:2]
    sees(lens)
    assert lens.anatomy.depth == len(lens.blocks) == 2


def test_a_transformer_that_no_family_describes_is_refused_every_time():
    pipe = sd3()
    lens = dl.DiTLens(pipe)
    pipe.transformer = torch.nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(FamilyError, match="no family describes Linear"):
            lens.run(ops=[Read("blocks.1.img")], seed=0, **CALL)


# Weights


def test_torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    pipe = sd3()
    lens = dl.DiTLens(pipe)
    exact = sees(lens)
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    quantised = sees(lens)
    assert not torch.equal(exact, quantised)
    assert torch.equal(sees(dl.DiTLens(pipe)), quantised)


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    transformer = sd3().transformer
    writer = gguf.GGUFWriter(tmp_path / "sd3.gguf", "sd3")
    for name, value in transformer.state_dict().items():
        matrix = value.ndim == 2 and value.shape[1] % 32 == 0 and "blocks" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    transformer.save_config(tmp_path)
    pipe = sd3()
    pipe.transformer = diffusers.SD3Transformer2DModel.from_single_file(
        tmp_path / "sd3.gguf",
        config=str(tmp_path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    assert pipe.transformer.transformer_blocks[1].attn.to_q.weight.dtype == torch.uint8
    sees(dl.DiTLens(pipe))


def test_layerwise_casting():
    pipe = sd3()
    lens = dl.DiTLens(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    sees(lens)
    sees(dl.DiTLens(pipe))


# Offloading


def group(part, kind):
    """Group offloading of a model or of all parts of a pipeline."""
    size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    part.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **size)


OFFLOADS = {
    "the model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "leaves of the pipeline": lambda pipe: group(pipe, "leaf_level"),
    "blocks of the pipeline": lambda pipe: group(pipe, "block_level"),
    "leaves of the transformer": lambda pipe: group(pipe.transformer, "leaf_level"),
    "blocks of the transformer": lambda pipe: group(pipe.transformer, "block_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.filterwarnings("error")
def test_offloading_before_and_after_the_lens(offload):
    pipe = sd3()
    plain = sees(dl.DiTLens(sd3()))
    early = dl.DiTLens(pipe)
    OFFLOADS[offload](pipe)
    assert torch.equal(sees(early), plain)
    late = dl.DiTLens(pipe)
    fresh = sd3()
    OFFLOADS[offload](fresh)
    for lens in (late, dl.DiTLens(fresh), early):
        assert torch.equal(sees(lens), plain)
        assert torch.equal(sees(lens), plain)
        split = lens.run(ops=[Read("blocks.1.img")], seed=truth.SEED, batch_size=1, **CALL)
        assert torch.allclose(split.latents, plain, atol=1e-4)


def test_offloading_that_ends_and_lora_under_it(lora_folder):
    pipe = sd3()
    group(pipe.transformer, "leaf_level")
    lens = dl.DiTLens(pipe)
    plain = sees(lens)
    pipe.load_lora_weights(lora_folder)
    assert not torch.equal(sees(lens), plain)
    pipe.unload_lora_weights()
    assert torch.equal(sees(lens), plain)
    for module in pipe.transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in list(registry.hooks if registry else ()):
            registry.remove_hook(name, recurse=False)
    assert torch.equal(sees(lens), plain)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sees(lens), plain)
    pipe.remove_all_hooks()
    assert torch.equal(sees(lens), plain)


def test_embeddings_are_not_moved_to_weights_that_are_elsewhere(monkeypatch):
    """Sequentially offloaded weights are on "meta" between calls: nothing may follow them there."""
    lens, call = dl.DiTLens(ENTRIES["sana"].build(), defaults={}), ENTRIES["sana"].call(ROWS)
    plain = lens.run(ops=[Read("blocks.1.img")], seed=truth.SEED, **call)
    transformer = lens.pipe.transformer
    weights = {"absent": torch.nn.Parameter(torch.empty(1, device="meta")), **transformer._parameters}  # noqa: SLF001
    monkeypatch.setattr(transformer, "_parameters", weights)
    monkeypatch.setattr(type(lens.pipe), "_execution_device", CPU)
    assert next(transformer.parameters()).is_meta
    run = lens.run(ops=[Read("blocks.1.img")], seed=truth.SEED, **call)
    assert torch.equal(run.latents, plain.latents)


# Calls


def agrees(entry, steps, *, rows=ROWS, seeds=None, **call):
    """Asserts that every branch of every step reads as under plain hooks; returns the run."""
    zoo = truth.Zoo(replace(entry, call=lambda prompts: {**entry.call(prompts), **call}))
    zoo.rows = rows
    return agrees_in(zoo, steps, seeds)


def agrees_in(zoo, steps, seeds=None):
    """The same of a pipeline that is there."""
    entry = zoo.entry
    sites = [zoo.sites_of_image[0], zoo.sites_of_image[-1]]
    both = [Read(sites, branch=branch, name=branch) for branch in zoo.branches]
    arguments = dict(zoo.call)
    run = zoo.lens.run(ops=[*both, Read("velocity")], seed=seeds or truth.SEED, **arguments)
    plain = zoo.plain_of(zoo.call)
    assert run.grid == entry.grid
    assert len(plain.texts) == steps * len(entry.branches)
    for branch in zoo.branches:
        for site in sites:
            wanted = torch.stack([zoo.tokens(plain, step, branch, site) for step in range(steps)])
            assert torch.equal(run[branch][site], wanted), (site, branch)
    assert torch.equal(zoo.drawn(run), plain.drawn)
    return run


def qwen_autoencoder():
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[False] * 3,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


IMAGES = {
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "StableDiffusion3InpaintPipeline": "sd3",
    "QwenImageImg2ImgPipeline": "qwen",
    "QwenImageInpaintPipeline": "qwen",
    "ChromaImg2ImgPipeline": "chroma",
    "ChromaInpaintPipeline": "chroma",
    "ZImageImg2ImgPipeline": "zimage",
    "ZImageInpaintPipeline": "zimage",
}


@cache
def zoo_from_images(kind):
    """A pipeline that starts from images, made once; no strength is chosen yet."""
    entry = ENTRIES[IMAGES[kind]]

    def build():
        parts = entry.build().components
        torch.manual_seed(0)
        if kind == "StableDiffusion3InpaintPipeline":  # it takes 16 channels only
            config = {**parts["transformer"].config, "in_channels": 16, "out_channels": 16}
            parts["transformer"] = diffusers.SD3Transformer2DModel.from_config(config).eval()
            parts["vae"] = diffusers.AutoencoderKL.from_config({**autoencoder().config, "latent_channels": 16}).eval()
        if kind == "ChromaInpaintPipeline":  # it asks for an entry that Chroma's config lacks
            parts["transformer"].register_to_config(guidance_embeds=False)
        if parts["vae"] is None:
            parts["vae"] = qwen_autoencoder() if kind.startswith("Qwen") else autoencoder()
        pipe = getattr(diffusers, kind)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    image = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    call = {"image": [image, image.rotate(180)], "num_inference_steps": 4}
    if "Inpaint" in kind:
        call["mask_image"] = Image.new("L", (96, 64), 255)
    if kind == "ChromaInpaintPipeline":
        call["true_cfg_scale"] = 3.0
    return truth.Zoo(replace(entry, build=build, call=lambda prompts: {**entry.call(prompts), **call}))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 2), (0.6, 3), (1.0, 4)])
def test_images_to_start_from(kind, strength, steps):
    zoo = zoo_from_images(kind)
    zoo.call["strength"] = strength
    run = agrees_in(zoo, steps)
    assert len(run.timesteps) == steps
    whole, split = (zoo.lens.run(ops=[Read("velocity")], seed=0, batch_size=size, **zoo.call) for size in (2, 1))
    assert torch.allclose(whole["velocity"], split["velocity"], atol=1e-4)


def of_parts(cls, pipe, **options):
    """A pipeline of another class with the same parts; those that are new are missing."""
    parts = {name: getattr(pipe, name, None) for name in inspect.signature(cls).parameters if name != "is_distilled"}
    return cls(**{**parts, **options})


def of_size(lens, entry, height, width, **call):
    return lens.run(
        ops=[Read("blocks.*.img", name="image")], seed=3, **{**entry.call(1), "height": height, "width": width, **call}
    )


def same(one, other):
    return one.grid == other.grid and all(
        torch.equal(one["image"][site], other["image"][site]) for site in one["image"]
    )


@pytest.mark.parametrize("name", ["flux2", "klein", "klein-kv"])
def test_images_that_set_the_size(name):
    """Editing without height and width, as most do: the plan leaves the grid to the pipeline."""
    lens, image = dl.DiTLens(ENTRIES[name].build()), Image.linear_gradient("L").convert("RGB").resize((64, 96))
    for asked, size in {(None, None): (96, 64), (32, None): (32, 64), (None, 32): (96, 32)}.items():
        found = of_size(lens, ENTRIES[name], *asked, image=image)
        assert found.grid == (size[0] // 16, size[1] // 16)
        assert same(found, of_size(lens, ENTRIES[name], *size, image=image))


RESIZING = {
    "FluxKontextInpaintPipeline": ("flux-embedded", {"_auto_resize": False, "max_area": 96 * 64}, (6, 4)),
    "Flux2KleinInpaintPipeline": ("klein", {}, (6, 4)),
    "QwenImageEditInpaintPipeline": ("qwen-edit", {}, (4, 3)),
}


@pytest.mark.parametrize("kind", RESIZING)
def test_images_whose_size_overrules_what_is_asked(kind):
    name, options, grid = RESIZING[kind]
    lens = dl.DiTLens(of_parts(getattr(diffusers, kind), ENTRIES[name].build()))
    image = Image.linear_gradient("L").convert("RGB").resize((64, 96))
    call = {"image": image, "mask_image": Image.new("L", (64, 96), 255), "strength": 1.0, **options}
    found = of_size(lens, ENTRIES[name], 64, 128, **call)
    assert found.grid == grid
    assert same(found, of_size(lens, ENTRIES[name], 96, 64, **call))


@pytest.mark.parametrize("name", ["qwen", "sana", "pixart-sigma", "zimage"])
def test_several_images_of_a_prompt(name):
    """Rows of a call: both images of the first prompt, then both of the second."""
    seeds = [truth.SEED] * 4
    run = agrees(ENTRIES[name], 2, rows=4, seeds=seeds, num_images_per_prompt=2)
    assert len(run["velocity"][0]) == 4


def test_seeds_of_several_images():
    lens = dl.DiTLens(ENTRIES["sana"].build(), defaults={})
    call = {**ENTRIES["sana"].call(ROWS), "num_images_per_prompt": 2}
    run = lens.run(ops=[Read("blocks.1.img")], seed=5, **call)
    listed = lens.run(ops=[Read("blocks.1.img")], seed=[5, 6, 5, 6], **call)
    split = lens.run(ops=[Read("blocks.1.img")], seed=5, batch_size=1, **call)
    assert torch.equal(run["blocks.1.img"], listed["blocks.1.img"])
    assert torch.allclose(run["blocks.1.img"], split["blocks.1.img"], atol=1e-4)
    assert not torch.equal(run.latents[0], run.latents[1])


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.rows > 1])
def test_embeddings_are_split_into_batches(name):
    """One prompt after the other, as if each were alone."""
    entry, lens = ENTRIES[name], truth.zoo_of(name).lens
    site = lens.sites("blocks.*.img")[-1]

    def run(rows, **options):
        call = {**entry.call(rows), **options}
        return lens.run(call.pop("prompt", None), [Read(site)], seed=truth.SEED, **call)[site].as_subclass(torch.Tensor)

    whole, split, first = run(2), run(2, batch_size=1), run(1)
    assert torch.equal(split[:, :1], first)
    assert torch.allclose(split, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert not torch.allclose(split[:, 0], split[:, 1], rtol=1e-3)


def test_latents_are_split_into_batches():
    lens = dl.DiTLens(ENTRIES["sana"].build(), defaults={})
    noise = torch.randn(4, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    call = {**ENTRIES["sana"].call(ROWS), "latents": noise, "num_images_per_prompt": 2}
    whole = lens.run(ops=[Read("blocks.1.img")], seed=0, **call)
    split = lens.run(ops=[Read("blocks.1.img")], seed=0, batch_size=1, **call)
    assert torch.allclose(whole.latents, split.latents, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "sana", "pixart-sigma", "chroma", "zimage"])
@pytest.mark.parametrize("turned", [False, True])
def test_sizes_that_are_not_square(name, turned):
    entry = ENTRIES[name]
    call = entry.call(ROWS)
    sizes = {"height": call["width"], "width": call["height"]} if turned else {}
    grid = entry.grid[::-1] if turned else entry.grid
    run = agrees(replace(entry, grid=grid), 2, **sizes)
    assert run["velocity"].grid().shape[2:4] == grid


SDE = {"algorithm_type": "sde-dpmsolver++"}
FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SAMPLERS = {
    "sd3 Heun": ("sd3", diffusers.FlowMatchHeunDiscreteScheduler, {}, 5),
    "sana UniPC": ("sana", diffusers.UniPCMultistepScheduler, FLOW_DPM, 3),
    "sana DPM++": ("sana", diffusers.DPMSolverMultistepScheduler, {**FLOW_DPM, "solver_order": 3}, 3),
    "sana Euler": ("sana", diffusers.FlowMatchEulerDiscreteScheduler, {}, 3),
    "pixart UniPC": ("pixart-sigma", diffusers.UniPCMultistepScheduler, {}, 3),
    "pixart DPM++ SDE": ("pixart-sigma", diffusers.DPMSolverMultistepScheduler, SDE, 3),
    "pixart Euler": ("pixart-sigma", diffusers.EulerDiscreteScheduler, {}, 3),
    "pixart Heun": ("pixart-sigma", diffusers.HeunDiscreteScheduler, {}, 5),
    "dit DDIM": ("dit", diffusers.DDIMScheduler, {}, 3),
    "dit DPM++": ("dit", diffusers.DPMSolverMultistepScheduler, {}, 3),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name):
    model, kind, settings, steps = SAMPLERS[name]
    entry = ENTRIES[model]

    def build():
        pipe = entry.build()
        pipe.scheduler = kind(**settings)
        return pipe

    agrees(replace(entry, build=build), steps, num_inference_steps=3)
    lens = dl.DiTLens(build(), defaults={})
    call = {**entry.call(ROWS), "num_inference_steps": 3}
    last = lens.run(ops=[Swap("blocks.1.img", source="row:0", rows=1, steps=-1)], seed=truth.SEED, **call)
    assert {entry.steps for entry in last.receipt.entries} == {(steps - 1,)}


def test_a_image_to_start_from_with_heun():
    entry = ENTRIES["sd3"]

    def build():
        parts = {**entry.build().components, "scheduler": diffusers.FlowMatchHeunDiscreteScheduler()}
        pipe = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    image = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    agrees(replace(entry, build=build), 3, image=[image] * ROWS, strength=0.5, num_inference_steps=4)


def test_rows_of_perturbed_attention_are_refused():
    """Their pipelines add them unless told otherwise; without them they are like any other."""
    entry = ENTRIES["sd3"]

    def build():
        pipe = of_parts(diffusers.StableDiffusion3PAGPipeline, entry.build(), pag_applied_layers="blocks.1")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    agrees(replace(entry, build=build), 2, pag_scale=0.0)
    lens = dl.DiTLens(build(), defaults={})
    for options in ({}, {"pag_scale": 2.0}):
        with pytest.raises(PromptError, match=r"pag_scale=[23]\.0 .* adds rows .* Pass pag_scale=0"):
            lens.cost(ops=[Read("blocks.0.img")], **entry.call(1), **options)


GUIDED = [name for name, entry in ENTRIES.items() if "uncond" in str(entry.branches)]


@pytest.mark.parametrize("name", [name for name in GUIDED if name != "hunyuan_image"])  # it has no scale
def test_a_scale_that_turns_guidance_off(name):
    """The rows and calls of a step are counted as the pipeline makes them, or the run ends in an error."""
    lens, call = truth.zoo_of(name).lens, ENTRIES[name].call(1)
    guidance = lens.family.pipeline(type(lens.pipe)).guidance
    call[guidance.scale or "guidance_scale"] = guidance.above
    run = lens.run(call.pop("prompt", None), [Read("velocity")], seed=0, **call)
    assert len(run["velocity"]) == len(run.timesteps)
    assert lens.outline(**{**ENTRIES[name].call(1), **call}).branches == (
        ("cond", "uncond") if name == "omnigen" else ("cond",)
    )


# Refusals


def refused(lens, match):
    calls = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    with pytest.raises(FamilyError, match=match):
        lens.run("red", [Read("blocks.0.img")], seed=0)
    with pytest.raises(FamilyError, match=match):
        dl.DiTLens(lens.pipe)
    handle.remove()
    assert not calls


@pytest.fixture
def flux():
    return dl.DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))


def test_step_caches_are_refused(flux):
    transformer = flux.pipe.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    refused(flux, "step cache is enabled.*disable_cache")
    transformer.disable_cache()
    assert flux.run("red", [Read("blocks.0.img")], seed=0).images
    transformer.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )
    refused(flux, "step cache is enabled.*disable_cache")
    transformer.disable_cache()
    assert flux.run("red", [Read("blocks.0.img")], seed=0).images


def test_a_step_cache_applied_by_hand_is_refused():
    from diffusers.hooks import apply_pyramid_attention_broadcast

    pipe = sd3()
    lens = dl.DiTLens(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    refused(lens, "step cache is enabled")
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook("pyramid_attention_broadcast")
    sees(lens)


@pytest.mark.parametrize(
    "compiled",
    [
        lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
        lambda pipe: pipe.transformer.compile(backend="eager"),
        lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
        lambda pipe: pipe.transformer.transformer_blocks.__setitem__(
            0, torch.compile(pipe.transformer.transformer_blocks[0], backend="eager")
        ),
    ],
)
def test_compiled_transformers_are_refused(flux, compiled):
    compiled(flux.pipe)
    refused(flux, "compiled.*Load the pipeline again")


@pytest.mark.parametrize("name", ["flux", "klein", "sd3", "pixart-sigma"])
def test_fused_projections_are_refused(name):
    lens = dl.DiTLens(ENTRIES[name].build())
    lens.pipe.transformer.fuse_qkv_projections()
    refused(lens, r"fused.*unfuse_qkv_projections\(\)")
    lens.pipe.transformer.unfuse_qkv_projections()
    assert lens.run(ops=[Read("blocks.0.img.attn.q")], seed=0, **ENTRIES[name].call(1)).spec
