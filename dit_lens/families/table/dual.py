"""Models whose blocks keep a tensor for the image and one for the text."""

from __future__ import annotations

from dataclasses import replace

from dit_lens.families.row import Family, Grid, Guidance, Readout, Time
from dit_lens.families.table import more_points, points
from dit_lens.families.table.shared import (
    CALLS,
    HEADS,
    IMAGE_FIRST,
    PACKED,
    PATCHED,
    PIXELS,
    ROWS,
    SMALL,
    TRUE_CFG,
    TWO_CALLS,
    double_stack,
    joint_stack,
    text_stack,
)

_IMAGE = Grid("bchw", patch="patch_size")
_LATENTS = "randn b in_channels h w"

QWEN_IMAGE = Family(
    name="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    stacks=(double_stack(name="block", points=points.QWEN),),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width=PIXELS,
    grid=Grid("shapes", "img_shapes"),
    guidance=TRUE_CFG,
    time=Time(),
    chooses_size=("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"),
    check_config={
        **SMALL,
        "num_layers": 2,
        "in_channels": 8,
        "out_channels": 2,
        "joint_attention_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    },
    call={
        "hidden_states": "randn b n in_channels",
        "encoder_hidden_states": "randn b t joint_attention_dim",
        "encoder_hidden_states_mask": "true b t",
        "timestep": "full 0.5 b",
        "img_shapes": "shapes",
    },
)

SD3 = Family(
    name="Stable Diffusion 3",
    transformer="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline",),
    stacks=(replace(double_stack(name="block", points=points.SD3, attends="image_first"), ends_without=("txt",)),),
    final="norm_out",
    readout=PATCHED,
    width="inner_dim",
    out_width=PIXELS,
    grid=_IMAGE,
    guidance=ROWS,
    prediction="bchw",
    tokenizer="tokenizer_3",
    check_config={
        **SMALL,
        "num_layers": 2,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 8,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
    },
    call={
        "hidden_states": _LATENTS,
        "encoder_hidden_states": "randn b t joint_attention_dim",
        "pooled_projections": "randn b pooled_projection_dim",
        "timestep": "full 500 b",
    },
    refuses={"skip_guidance_layers": "it adds a call of the transformer at some steps, whose blocks are skipped"},
)

_COG_TINY = {
    **SMALL,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 2,
}
_COG_CALL = {
    "hidden_states": _LATENTS,
    "encoder_hidden_states": "randn b t text_embed_dim",
    "timestep": "full 500 b",
    "original_size": "full 64 b 2",
    "target_size": "full 64 b 2",
    "crop_coords": "zeros b 2",
}

COGVIEW3 = Family(
    name="CogView3-Plus",
    transformer="CogView3PlusTransformer2DModel",
    pipelines=("CogView3PlusPipeline",),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=more_points.COGVIEW3),),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width=PIXELS,
    grid=_IMAGE,
    guidance=ROWS,
    prediction="bchw",
    check_config={**_COG_TINY, "pos_embed_max_size": 16, "sample_size": 16},
    call=_COG_CALL,
)

COGVIEW4 = Family(
    name="CogView4",
    transformer="CogView4Transformer2DModel",
    pipelines=("CogView4Pipeline",),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=points.COGVIEW4),),
    final="norm_out",
    readout=PACKED,
    width=HEADS,
    out_width=PIXELS,
    grid=_IMAGE,
    guidance=CALLS,
    prediction="bchw",
    check_config={**_COG_TINY, "pos_embed_max_size": 16, "sample_size": 16, "rope_axes_dim": (8, 8)},
    call=_COG_CALL,
)

GLM_IMAGE = Family(
    name="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    pipelines=("GlmImagePipeline",),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=points.COGVIEW4),),
    final="norm_out",
    readout=PACKED,
    width=HEADS,
    out_width=PIXELS,
    grid=_IMAGE,
    guidance=CALLS,
    time=Time(offset=1e-3, scale=1e-3),
    prediction="bchw",
    check_config={**_COG_TINY, "prior_vq_quantizer_codebook_size": 16},
    call={
        **{name: value for name, value in _COG_CALL.items() if name != "original_size"},
        "prior_token_id": "long b n",
        "prior_token_drop": "false b n",
    },
)

HIDREAM = Family(
    name="HiDream-I1",
    transformer="HiDreamImageTransformer2DModel",
    pipelines=("HiDreamImagePipeline",),
    stacks=(
        replace(
            double_stack(
                "double_stream_blocks", outputs=IMAGE_FIRST, points=more_points.HIDREAM_DOUBLE, attends="image_first"
            ),
            rewritten=("txt",),
        ),
        replace(
            joint_stack("single_stream_blocks", "single", "image_first", points=more_points.HIDREAM_SINGLE),
            rewritten=("txt",),
        ),
    ),
    final="final_layer",
    readout=Readout((), "yxc"),
    width="inner_dim",
    out_width=PIXELS,
    grid=Grid("bchw", patch="patch_size", pad="square"),
    guidance=ROWS,
    time=Time("timesteps", scale=1e-3),
    prediction="bchw",
    sign=-1,
    chooses_size=("HiDreamImagePipeline",),
    check_config={
        **SMALL,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "caption_channels": [8, 8],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (12, 12),
        "llama_layers": [0, 1, 0, 1],
    },
    call={
        "hidden_states": _LATENTS,
        "timesteps": "full 500 b",
        "encoder_hidden_states_t5": "randn b t 8",
        "encoder_hidden_states_llama3": "randn 2 b t 8",
        "pooled_embeds": "randn b text_emb_dim",
    },
)

HUNYUAN_IMAGE = Family(
    name="HunyuanImage 2.1",
    transformer="HunyuanImageTransformer2DModel",
    pipelines=("HunyuanImagePipeline",),
    stacks=(
        text_stack("context_embedder.token_refiner.refiner_blocks", "refiner"),
        double_stack(outputs=IMAGE_FIRST, points=points.FLUX_DOUBLE, attends="image_first"),
        double_stack(
            "single_transformer_blocks",
            "single",
            outputs=IMAGE_FIRST,
            points=more_points.HUNYUAN_SINGLE,
            attends="image_first",
        ),
    ),
    final="norm_out",
    readout=PACKED,
    width=HEADS,
    out_width="out_channels",
    grid=_IMAGE,
    guidance=Guidance(TWO_CALLS, scale=None),
    prediction="bchw",
    patch=1,
    check_config={
        **SMALL,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 8,
        "text_embed_2_dim": 8,
        "rope_axes_dim": (8, 8),
    },
    call={
        "hidden_states": _LATENTS,
        "timestep": "full 500 b",
        "encoder_hidden_states": "randn b t text_embed_dim",
        "encoder_attention_mask": "ones_long b t",
        "encoder_hidden_states_2": "randn b t text_embed_2_dim",
        "encoder_attention_mask_2": "ones_long b t",
    },
)

AURA_FLOW = Family(
    name="AuraFlow",
    transformer="AuraFlowTransformer2DModel",
    pipelines=("AuraFlowPipeline",),
    stacks=(
        double_stack("joint_transformer_blocks", points=more_points.AURA_FLOW_DOUBLE),
        joint_stack("single_transformer_blocks", "single", "text_first", points=more_points.AURA_FLOW_SINGLE),
    ),
    final="norm_out",
    readout=PATCHED,
    width="inner_dim",
    out_width=PIXELS,
    grid=_IMAGE,
    guidance=ROWS,
    time=Time(),
    prediction="bchw",
    check_config={
        **SMALL,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "joint_attention_dim": 8,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    },
    call={
        "hidden_states": _LATENTS,
        "encoder_hidden_states": "randn b t joint_attention_dim",
        "timestep": "full 0.5 b",
    },
)

JOY_IMAGE = Family(
    name="JoyImage-Edit",
    transformer="JoyImageEditTransformer3DModel",
    pipelines=("JoyImageEditPipeline",),
    stacks=(double_stack("double_blocks", outputs=IMAGE_FIRST, points=more_points.JOY_IMAGE, attends="image_first"),),
    final="norm_out",
    readout=PATCHED,
    width="hidden_size",
    out_width="out_channels*patch_size",
    grid=Grid("bicfhw", patch="patch_size"),
    guidance=CALLS,
    prediction="bicfhw",
    chooses_size=("JoyImageEditPipeline",),
    check_config={
        "num_attention_heads": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "text_dim": 8,
        "mlp_width_ratio": 2.0,
        "num_layers": 2,
        "rope_dim_list": [4, 6, 6],
    },
    call={
        "hidden_states": "randn b 1 in_channels 1 h w",
        "timestep": "full 500 b",
        "encoder_hidden_states": "randn b t text_dim",
    },
)

DUAL = (QWEN_IMAGE, SD3, COGVIEW3, COGVIEW4, GLM_IMAGE, HIDREAM, HUNYUAN_IMAGE, AURA_FLOW, JOY_IMAGE)
