"""HunyuanImage 2.1 and HunyuanVideo: FLUX's two stacks behind a refiner of the text."""

from __future__ import annotations

from dataclasses import replace

from dit_lens.families.row import Example, Family, Grid, Guidance, Latents, Pipeline, Prediction, Prompts
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import double_block, input_of, single_stream
from dit_lens.families.table.shared import (
    BOTH,
    HEADS,
    IMAGE,
    IMAGE_FIRST,
    NORM_OUT,
    PACKED,
    SMALL,
    TWO_CALLS,
    VIDEO_VAE,
    WITH_IMAGES,
    WITH_MASK,
    double_stack,
    text_stack,
)

_CONFIG = {
    **SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
}
_CALL = {"encoder_hidden_states": "randn b t text_embed_dim", "encoder_attention_mask": "ones_long b t"}

_SINGLE_POINTS = {
    stream: {
        **single_stream("image_first", PointSpec("attn", slot=slot)),
        "attn.in": input_of("attn", BOTH[stream]),
    }
    for stream, slot in (("img", 0), ("txt", 1))
}
_IMAGE = Pipeline(
    "HunyuanImagePipeline",
    Guidance(TWO_CALLS, scale=None),
    encodes=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
)
HUNYUAN_IMAGE = Family(
    name="HunyuanImage 2.1",
    transformer="HunyuanImageTransformer2DModel",
    pipelines=(
        _IMAGE,
        *_IMAGE.copy_for("HunyuanImageRefinerPipeline", encodes=WITH_MASK, takes_latents=None, row_images=("image",)),
    ),
    stacks=(
        text_stack("context_embedder.token_refiner.refiner_blocks", "refiner"),
        double_stack(outputs=IMAGE_FIRST, points=double_block(), attends="image_first"),
        double_stack(
            "single_transformer_blocks",
            "single",
            outputs=IMAGE_FIRST,
            points=_SINGLE_POINTS,
            attends="image_first",
        ),
    ),
    width=HEADS,
    grid=IMAGE,
    final=NORM_OUT,
    prediction=Prediction("out_channels", "bchw"),
    readout=PACKED,
    latents=Latents(patch=1),
    prompts=Prompts(
        text=("encoder_hidden_states", "encoder_hidden_states_2"),
        gathered=True,
        masks=("encoder_attention_mask", "encoder_attention_mask_2"),
        masked_by="count",
    ),
    example=Example(
        config={**_CONFIG, "text_embed_2_dim": 8, "rope_axes_dim": (8, 8)},
        call={
            **_CALL,
            "hidden_states": "randn b in_channels h w",
            "timestep": "full 500 b",
            "encoder_hidden_states_2": "randn b t text_embed_2_dim",
            "encoder_attention_mask_2": "ones_long b t",
        },
    ),
)

_VIDEO = Pipeline(
    "HunyuanVideoPipeline", None, encodes=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
)
HUNYUAN_VIDEO = replace(
    HUNYUAN_IMAGE,
    name="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    pipelines=(
        _VIDEO,
        *_VIDEO.copy_for("HunyuanSkyreelsImageToVideoPipeline"),
        *_VIDEO.copy_for("HunyuanVideoImageToVideoPipeline", encodes=WITH_IMAGES, takes_latents=None),
    ),
    grid=Grid("bcfhw", patch="patch_size"),
    prediction=Prediction("config.out_channels*patch_size*patch_size", "bcfhw"),
    latents=VIDEO_VAE,
    guidance_flag="guidance_embeds",
    prompts=Prompts(masks=("encoder_attention_mask",), masked_by="count"),
    example=Example(
        config={**_CONFIG, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)},
        call={
            **_CALL,
            "hidden_states": "randn b in_channels 2 h w",
            "timestep": "ones_long b",
            "pooled_projections": "randn b pooled_projection_dim",
            "guidance": "full 1 b",
        },
    ),
)

HUNYUAN = (HUNYUAN_IMAGE, HUNYUAN_VIDEO)
