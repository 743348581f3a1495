"""What fits into a GPU, by arithmetic: the real FLUX.1-dev from its configs, without a weight."""

import ast
import json

import diffusers
import pytest
import torch
import transformers

import dit_lens as dl
from dit_lens.errors import FamilyError, OpError, StoreError
from dit_lens.instruments.recommend import CONTEXT, DECODING, DENOISING, GB, recommend
from dit_lens.toys import path
from tests import pipelines

NF4 = 0.5625
DENOISER, T5, CLIP, VAE = 11_901_408_320, 4_762_310_656, 123_060_480, 83_819_683


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """A folder with the configs of FLUX.1-dev and nothing else."""
    folder = tmp_path_factory.mktemp("FLUX.1-dev")
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    t5 = transformers.T5Config(
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        architectures=["T5EncoderModel"],
    )
    t5.save_pretrained(folder / "text_encoder_2")
    clip = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768)
    clip.save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "FluxPipeline",
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_parameters_of_flux_dev(dev):
    found = {part.name: part.parameters for part in recommend(dev).parts}
    assert found == {"text_encoder": CLIP, "text_encoder_2": T5, "transformer": DENOISER, "vae": VAE}


def test_the_arithmetic_of_flux_dev(dev):
    found = {choice.name: choice for choice in recommend(dev, gb=24).choices}
    texts, whole, vae = 2 * (T5 + CLIP), 2 * DENOISER, 2 * VAE
    assert found["all in bf16"].peak == pytest.approx(texts + whole + vae + DECODING + CONTEXT)
    first = found["texts first, then bf16"]
    assert first.encode == pytest.approx(texts + CONTEXT)
    assert first.denoise == pytest.approx(whole + vae + DENOISING + CONTEXT)
    assert first.decode == pytest.approx(whole + vae + DECODING + CONTEXT)
    offload = found["model CPU offload"]
    assert offload.encode == pytest.approx(2 * T5 + CONTEXT)
    assert offload.peak == pytest.approx(whole + DENOISING + CONTEXT)
    assert found["texts first, then int8 transformer"].decode == pytest.approx(
        DENOISER + vae + DECODING + CONTEXT, rel=1e-3
    )
    assert found["texts first, then nf4 transformer"].denoise == pytest.approx(
        NF4 * DENOISER + vae + DENOISING + CONTEXT, rel=1e-3
    )
    # 19 + 38 blocks pass through two at a time; the largest is a double block of 339.8 M
    double, single = 339_831_296, 141_591_808
    assert found["texts first, group offload"].denoise == pytest.approx(
        2 * (DENOISER - 19 * double - 38 * single + 2 * double) + vae + DENOISING + CONTEXT, rel=1e-3
    )


@pytest.mark.parametrize(
    ("gb", "best", "exact"),
    [
        (80, "all in bf16", "all in bf16"),
        (40, "all in bf16", "all in bf16"),
        (32, "texts first, then bf16", "texts first, then bf16"),
        (24, "texts first, then int8 transformer", "texts first, group offload"),
        (16, "texts first, then nf4 transformer", "texts first, group offload"),
        (8, "texts first, group offload", "texts first, group offload"),
    ],
)
def test_what_is_recommended_for_flux_dev(dev, gb, best, exact):
    advice = recommend(dev, gb=gb)
    assert advice.best.name == best
    assert advice.exact.name == exact
    assert best in repr(advice)
    assert advice.lines in repr(advice)


def test_more_images_take_more_and_tiny_cards_are_refused(dev):
    assert recommend(dev, gb=40, images=4).best.name != "all in bf16"
    with pytest.raises(OpError, match=r"nothing fits into 2 GB: the least is .*enable_tiling"):
        recommend(dev, gb=2).lines  # noqa: B018
    assert "nothing fits" in repr(recommend(dev, gb=2))


def test_encoders_that_do_not_fit_work_on_the_cpu(dev):
    advice = recommend(dev, gb=8)
    assert '.to("cpu")' in advice.lines
    assert advice.best.encode == 0
    assert '.to("cpu")' not in recommend(dev, gb=24).lines


def test_every_line_is_python_and_names_what_diffusers_has(dev):
    for choice in recommend(dev).choices:
        for node in ast.walk(ast.parse(choice.lines)):
            if isinstance(node, ast.ImportFrom) and node.module == "diffusers":
                assert all(hasattr(diffusers, name.name) for name in node.names)
    assert hasattr(diffusers.FluxTransformer2DModel, "enable_group_offload")


@pytest.mark.parametrize("choice", ["all in bf16", "texts first, then bf16"])
def test_the_lines_run(choice):
    """On the toy, with the CPU in the place of the GPU."""
    prompts = ["a big red circle left on a plain blue background"]
    (found,) = [one for one in recommend(path("flux")).choices if one.name == choice]
    names = {"prompts": prompts}
    lines = found.lines.replace('"cuda"', '"cpu"').replace(
        "prompts)", 'prompts, negative_prompt="", max_sequence_length=16)'
    )
    exec(lines.replace(".run(", ".run(num_inference_steps=2, "), names)
    run = names["run"] if "run" in names else names["lens"].run(prompts, seed=0, num_inference_steps=2)
    assert len(run.images) == 1


def test_folder_configs_and_pipeline_agree(tmp_path):
    pipe = pipelines.flux()
    pipe.save_pretrained(tmp_path)
    live = {part.name: part for part in recommend(pipe).parts}
    headers = {part.name: part for part in recommend(tmp_path).parts}
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    configs = {part.name: part for part in recommend(str(tmp_path)).parts}
    for name, part in live.items():
        for other in (headers[name], configs[name]):
            assert (part.parameters, part.matrices, part.block) == (other.parameters, other.matrices, other.block)
        assert part.bytes == 4 * part.parameters


def test_a_group_offloaded_transformer_gives_the_same_reads():
    lens = dl.DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    ops = [dl.Zero("blocks.1.img", channels=[3]), dl.Read("blocks.*.*")]
    before = lens.run("red", ops, seed=3)
    lens.pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    after = lens.run("red", ops, seed=3)
    assert all(torch.equal(before[name], after[name]) for name in before.keys())  # noqa: SIM118 a Run is no mapping
    assert before.images[0].tobytes() == after.images[0].tobytes()


def test_weights_that_are_quantised_already_count_as_they_are(tmp_path):
    pipelines.flux().save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}})
    )
    advice = recommend(tmp_path)
    (part,) = [part for part in advice.parts if part.name == "transformer"]
    assert part.size() == part.size("nf4") == part.bytes
    assert not any("nf4" in choice.name for choice in advice.choices)


def test_int8_weights_are_counted_and_run():
    pytest.importorskip("torchao")
    prompts = ["a big red circle left on a plain blue background"]
    (found,) = [one for one in recommend(path("flux")).choices if "int8" in one.name]
    names = {"prompts": prompts}
    lines = found.lines.replace('"cuda"', '"cpu"').replace(".run(", ".run(num_inference_steps=2, ")
    exec(lines.replace("prompts)", 'prompts, negative_prompt="", max_sequence_length=16)'), names)
    assert len(names["run"].images) == 1
    whole = {part.name: part for part in recommend(path("flux")).parts}["transformer"]
    small = {part.name: part for part in recommend(names["lens"].pipe).parts}["transformer"]
    assert small.quantised
    assert small.parameters == whole.parameters
    assert small.bytes == pytest.approx(whole.size("int8"), rel=0.05)


def test_a_pipeline_whose_prompts_cannot_be_encoded_is_offloaded():
    from tests import zoo

    entry = next(entry for entry in zoo.entries() if entry.name == "dit")
    names = [choice.name for choice in recommend(entry.build()).choices]
    assert names == [
        "all in bf16",
        "model CPU offload",
        "int8 transformer, model CPU offload",
        "nf4 transformer, model CPU offload",
    ]


@pytest.mark.parametrize(
    ("source", "gb", "kind", "message"),
    [
        ("nowhere/at-all", 24, StoreError, "could not be fetched"),
        (".", 24, StoreError, "no model_index.json"),
        (None, 0, OpError, "must be more than 0"),
    ],
)
def test_what_cannot_be_measured(source, gb, kind, message):
    with pytest.raises(kind, match=message):
        recommend(source or path("flux"), gb=gb)


def test_a_pipeline_without_a_transformer():
    pipe = diffusers.FluxPipeline(**{**pipelines.flux().components, "transformer": None})
    with pytest.raises(FamilyError, match="has no transformer"):
        recommend(pipe)


def test_the_tables(dev):
    advice = dl.recommend(dev)
    assert list(advice.table.columns) == ["choice", "encode", "denoise", "decode", "peak", "fits", "exact", "note"]
    assert advice.weights.set_index("part").loc["transformer", "bf16"] == pytest.approx(2 * DENOISER / GB)
