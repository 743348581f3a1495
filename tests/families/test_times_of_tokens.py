"""Pipelines that give tokens times of their own, as where a first frame is given: read as plain hooks see them."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from dit_lens import DiTLens, Read, sigma
from tests.zoo import video
from tests.zoo.parts import absent, flow, wake

POINTS = ("attn_out", "cross_out", "mlp_out")
BLOCK = "blocks.1.img"
LTX_CALL = {**video.ltx_call(1), "num_inference_steps": 2}


def picture(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))


def wan():
    torch.manual_seed(0)
    autoencoder = {"base_dim": 4, "z_dim": 16, "dim_mult": [1] * 4, "num_res_blocks": 1}
    vae = AutoencoderKLWan(**autoencoder, temperal_downsample=[False, True, True]).eval()
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16}
    transformer = WanTransformer3DModel(**heads, text_dim=12, freq_dim=8, ffn_dim=48, num_layers=3, rope_max_seq_len=32)
    wake(transformer)
    pipe = absent(WanImageToVideoPipeline, transformer=transformer, scheduler=flow(), vae=vae, expand_timesteps=True)
    texts = {name: torch.randn(1, 7, 12) for name in ("prompt_embeds", "negative_prompt_embeds")}
    size = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0}
    return pipe, {**texts, **size, "image": picture((32, 48)), "output_type": "latent"}, "blocks"


def ltx(kind, **call):
    torch.manual_seed(0)
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    widths = {"block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    scaling = (True, True, True, False)
    vae = AutoencoderKLLTXVideo(latent_channels=4, **widths, **layers, spatio_temporal_scaling=scaling).eval()
    pipe = absent(kind, transformer=video.ltx().transformer, scheduler=flow(), vae=vae)
    return pipe, {**LTX_CALL, "image": picture((128, 192)), **call}, "transformer_blocks"


PIPELINES = {
    "wan": wan,
    "ltx": lambda: ltx(LTXImageToVideoPipeline),
    "ltx, half given": lambda: ltx(LTXConditionPipeline, strength=0.5),
    "ltx, a later frame": lambda: ltx(LTXConditionPipeline, frame_index=8),
    "ltx, nothing given": lambda: ltx(LTXConditionPipeline, image=None),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_reads_are_those_of_plain_hooks(name):
    pipe, call, blocks = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    lens, block, passes = DiTLens(pipe), getattr(pipe.transformer, blocks)[1], []
    handles = [
        block.register_forward_hook(lambda _, __, output: passes[-1].append(output)),
        pipe.transformer.register_forward_pre_hook(
            lambda _, __, given: passes.append([given["hidden_states"], given["timestep"]]), with_kwargs=True
        ),
        pipe.transformer.register_forward_hook(lambda _, __, output: passes[-1].append(output[0])),
    ]
    drawn = pipe(generator=[torch.Generator().manual_seed(3)], **call).frames
    for handle in handles:
        handle.remove()
    reads = [Read([f"{BLOCK}.{point}" for point in (*POINTS, "resid_pre")], name="parts"), Read([BLOCK, "x0"])]
    run = lens.run(ops=[*reads, Read(BLOCK, steps=sigma(1.0, 0.7), name="early")], seed=3, **call)
    assert torch.equal(run.latents, drawn)
    rows = 2 if blocks == "transformer_blocks" else 1  # both branches in one pass, the unconditional one first
    passes = passes if rows == 2 else passes[::2]
    assert len(passes) == len(run.sigmas)
    count = run[BLOCK].shape[2]
    for step, (latents, time, after, predicted) in enumerate(passes):
        assert torch.equal(run[BLOCK][step, 0], after[-1, -count:])
        assert run.sigmas[step] == pytest.approx(float(time.max()) / 1000, abs=1e-4)
        own = time[-1].flatten().expand(count if time[-1].numel() == 1 else time[-1].numel())[-count:, None] / 1000
        clean = [latents[-1], predicted[-1]] if latents.ndim == 3 else [pack(latents[-1]), pack(predicted[-1])]
        wanted = clean[0][-count:] - own * clean[1][-count:]
        torch.testing.assert_close(run["x0"][step, 0], wanted, atol=2e-3, rtol=0)
    parts = run["parts"]
    summed = sum(parts[f"{BLOCK}.{point}"] for point in (*POINTS, "resid_pre"))
    torch.testing.assert_close(summed, run[BLOCK].as_subclass(torch.Tensor), atol=1e-6, rtol=0)
    assert run["early"].steps == tuple(step for step, level in enumerate(run.sigmas) if level > 0.7)


def pack(latents):
    """Tokens of an image [channel, frame, y, x], patches of 2 x 2."""
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # [channel, frame, y, x, 2, 2]
    return patches.permute(1, 2, 3, 0, 4, 5).flatten(3).flatten(0, 2)
