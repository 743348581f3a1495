"""Tiny random pipelines of HunyuanImage 2.1 and HunyuanVideo."""

import torch
from diffusers import (
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance

from tests.zoo import Entry
from tests.zoo.parts import FEATURES, GRID, SECOND, SIZE, SPLIT, TOKENS, absent, flow, masks, pair, texts, tiny


@tiny
def hunyuan_image():
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=FEATURES,
        text_embed_2_dim=10,
        rope_axes_dim=(8, 8),
    )
    guiders = {"guider": AdaptiveProjectedMixGuidance(), "ocr_guider": AdaptiveProjectedMixGuidance()}
    return absent(HunyuanImagePipeline, transformer=transformer, scheduler=flow(), **guiders)


def hunyuan_image_call(rows):
    return {
        **SIZE,
        "height": 128,
        "width": 192,
        **pair("prompt_embeds", rows, TOKENS, FEATURES),
        **masks("prompt_embeds_mask", rows),
        **pair("prompt_embeds_2", rows, SECOND, 10),
        **masks("prompt_embeds_mask_2", rows, SECOND),
    }


@tiny
def hunyuan_video():
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=FEATURES,
        pooled_projection_dim=10,
        rope_axes_dim=(4, 6, 6),
    )
    return absent(HunyuanVideoPipeline, transformer=transformer, scheduler=flow())


def hunyuan_video_call(rows):
    return {
        **SIZE,
        "num_frames": 5,
        "prompt_embeds": texts("prompt_embeds", rows, TOKENS, FEATURES),
        "pooled_prompt_embeds": texts("pooled", rows, 10),
        "prompt_attention_mask": torch.ones(rows, TOKENS, dtype=torch.long),
    }


ENTRIES = (
    Entry("hunyuan_image", "HunyuanImageTransformer2DModel", hunyuan_image, hunyuan_image_call, GRID, SPLIT, 12, 6),
    Entry(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        hunyuan_video,
        hunyuan_video_call,
        (2, *GRID),
        (("cond",),),
        TOKENS,
        6,
    ),
)
