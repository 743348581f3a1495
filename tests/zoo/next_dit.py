"""Tiny random pipelines of Lumina-Next, Lumina-Image 2.0 and Z-Image."""

import torch
from diffusers import (
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.zoo import Entry
from tests.zoo.parts import (
    COND_UNCOND,
    FEATURES,
    GRID,
    SIZE,
    SPLIT,
    TOKENS,
    absent,
    autoencoder,
    flow,
    masked_call,
    pair,
    tiny,
)


@tiny
def lumina2():
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 8, 8),
        cap_feat_dim=FEATURES,
    )
    return absent(Lumina2Pipeline, transformer=transformer, scheduler=flow())


def ragged_call(rows):
    """Row r has TOKENS - r words; the negatives have 4."""
    call = masked_call(rows)
    lengths = torch.arange(TOKENS, TOKENS - rows, -1)
    call["prompt_attention_mask"] = (torch.arange(TOKENS) < lengths[:, None]).long()
    call["negative_prompt_attention_mask"] = (torch.arange(TOKENS) < 4).long().expand(rows, -1)
    return call


@tiny
def lumina():
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=FEATURES,
    )
    torch.nn.init.normal_(transformer.pad_token)
    return absent(LuminaPipeline, transformer=transformer, scheduler=flow())


@tiny
def zimage():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=FEATURES,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(transformer, name), std=0.1)
    return absent(ZImagePipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())


def zimage_call(rows):
    embeds = {name: list(value) for name, value in pair("prompt_embeds", rows, TOKENS, FEATURES).items()}
    return {**SIZE, "guidance_scale": 3.0, **embeds}


ENTRIES = (
    Entry("lumina2", "Lumina2Transformer2DModel", lumina2, masked_call, GRID, SPLIT, TOKENS, 7),
    Entry("lumina2-ragged", "Lumina2Transformer2DModel", lumina2, ragged_call, GRID, SPLIT, TOKENS, 7),
    Entry("lumina", "LuminaNextDiT2DModel", lumina, masked_call, GRID, (("cond", "uncond"),), None, 3),
    Entry("zimage", "ZImageTransformer2DModel", zimage, zimage_call, GRID, COND_UNCOND, 32, 5),
)
