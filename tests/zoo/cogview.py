"""Tiny random pipelines of CogView3-Plus, CogView4 and GLM-Image."""

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)

from tests.zoo import Entry
from tests.zoo.parts import FEATURES, GRID, JOINT, SPLIT, TOKENS, absent, flow, guided_call, texts, tiny


def cogview3(scheduler):
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=FEATURES,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return absent(CogView3PlusPipeline, transformer=transformer, scheduler=scheduler)


@tiny
def cogview3_ddim():
    return cogview3(CogVideoXDDIMScheduler())


@tiny
def cogview3_dpm():
    return cogview3(CogVideoXDPMScheduler())


def cogview3_call(rows):
    """Without a negative prompt the pipeline takes zeros, whatever negative embeddings it is given."""
    return {key: value for key, value in guided_call(rows).items() if not key.startswith("negative")}


@tiny
def cogview4():
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=FEATURES,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return absent(CogView4Pipeline, transformer=transformer, scheduler=flow())


@tiny
def glm_image():
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=FEATURES,
        time_embed_dim=8,
        condition_dim=2,
        prior_vq_quantizer_codebook_size=64,
    )
    return absent(GlmImagePipeline, transformer=transformer, scheduler=flow())


def glm_image_call(rows):
    prior = (texts("prior", rows, GRID[0] * GRID[1]) * 16).long() % 64
    return {**guided_call(rows), "prior_token_ids": prior}


ENTRIES = (
    Entry("cogview3", "CogView3PlusTransformer2DModel", cogview3_ddim, cogview3_call, GRID, JOINT, TOKENS, 3),
    Entry("cogview3-dpm", "CogView3PlusTransformer2DModel", cogview3_dpm, cogview3_call, GRID, JOINT, TOKENS, 3),
    Entry("cogview4", "CogView4Transformer2DModel", cogview4, guided_call, GRID, SPLIT, TOKENS, 3),
    Entry("glm_image", "GlmImageTransformer2DModel", glm_image, glm_image_call, GRID, SPLIT, TOKENS, 3),
)
