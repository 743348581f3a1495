"""Models whose blocks hold image tokens only: text, where there is any, enters by cross-attention."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dit_lens.families.row import (
    Example,
    Family,
    Final,
    Grid,
    Guidance,
    Latents,
    Pipeline,
    Prediction,
    Prompts,
    Readout,
    Time,
)
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import (
    NO_SHIFTS,
    adaln_zero,
    attention,
    control,
    fused_qkv,
    gated_output,
    input_of,
    modulation,
    neurons,
    table_block,
    with_cross,
)
from dit_lens.families.table.shared import (
    COND_UNCOND,
    HEADS,
    IMAGE,
    IMAGE_OUT,
    LATENTS,
    NEGATIVE,
    NO_ENCODER,
    NORM_OUT,
    OF_TIME,
    PACKED,
    PAG,
    PATCHED,
    PIXELS,
    ROWS,
    SECOND,
    SMALL,
    STARTS,
    TWO_CALLS,
    UNNAMED,
    WAN_VAE,
    WITH_MASK,
    WITH_MASKS,
    image_stack,
    not_returned,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families.example_call import CallSizes

_DIT_POINTS = {"img": {**adaln_zero("norm1", PointSpec("attn1"), "ff", "norm3"), **attention("attn1")}}
DIT = Family(
    name="DiT",
    transformer="DiTTransformer2DModel",
    pipelines=(
        Pipeline("DiTPipeline", Guidance(COND_UNCOND), encodes=NO_ENCODER, takes_latents=None, returns_latents=None),
    ),
    stacks=(image_stack("transformer_blocks", points=_DIT_POINTS),),
    width="inner_dim",
    grid=IMAGE,
    final=Final(mod=PointSpec("proj_out_1"), mod_width="2*inner_dim"),
    prediction=IMAGE_OUT,
    readout=Readout(("proj_out_2",), "yxc", shift=("transformer_blocks.0.norm1.emb", None), projection="proj_out_1"),
    prompts=Prompts(text=(), classes="num_embeds_ada_norm"),
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 4,
            "num_embeds_ada_norm": 4,
        },
        call={"hidden_states": LATENTS, "timestep": "ones_long b", "class_labels": "ones_long b"},
        grid=(2, 2),
    ),
)

_PIXART_POINTS = with_cross(table_block("timestep", "attn1", "ff", "norm2", neurons("ff"), cross="attn2"), "attn2")
_PIXART = Pipeline("PixArtAlphaPipeline", ROWS, encodes=WITH_MASKS, takes_latents=None)
PIXART = Family(
    name="PixArt",
    transformer="PixArtTransformer2DModel",
    pipelines=(
        _PIXART,
        *_PIXART.copy_for("PixArtSigmaPipeline", tested=True),
        *_PIXART.copy_for("PixArtSigmaPAGPipeline", refuses=(PAG,)),
    ),
    stacks=(image_stack("transformer_blocks", points=_PIXART_POINTS),),
    width="inner_dim",
    grid=IMAGE,
    final=Final(mod=OF_TIME),
    prediction=IMAGE_OUT,
    readout=Readout(order="yxc", shift=("adaln_single", 1), table="scale_shift_table"),
    prompts=Prompts(masks=("encoder_attention_mask",)),
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
        call={
            "hidden_states": LATENTS,
            "encoder_hidden_states": "randn b t caption_channels",
            "timestep": "full 500 b",
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
)

_CONVOLUTIONS = {
    "mlp.in": replace(input_of("ff"), axes="bchw"),
    "mlp.pre": PointSpec("ff.conv_inverted", axes="bchw"),
    "mlp.post": replace(input_of("ff.conv_point"), axes="bchw"),
}
_SANA_POINTS = with_cross(
    {
        **table_block("timestep", "attn1", "ff", "norm2", _CONVOLUTIONS, cross="attn2", mlp_axes="bchw"),
        **control(entry="before"),
    },
    "attn2",
)
_SANA = Pipeline("SanaPipeline", ROWS, encodes=WITH_MASKS)
_SPRINT = Pipeline("SanaSprintPipeline", None, Time(), encodes=("prompt_embeds", "prompt_attention_mask"))
SANA = Family(
    name="SANA",
    transformer="SanaTransformer2DModel",
    pipelines=(
        _SANA,
        _SPRINT,
        *_SPRINT.copy_for("SanaSprintImg2ImgPipeline", needs_image=True, row_images=STARTS),
        *_SANA.copy_for("SanaControlNetPipeline"),
        *_SANA.copy_for("SanaPAGPipeline", refuses=(PAG,)),
    ),
    stacks=(image_stack("transformer_blocks", points=_SANA_POINTS, attends="its attention is linear and forms none"),),
    width=HEADS,
    grid=IMAGE,
    final=NORM_OUT,
    prediction=IMAGE_OUT,
    readout=PACKED,
    latents=Latents(patch=1),
    guidance_flag="guidance_embeds",
    prompts=Prompts(masks=("encoder_attention_mask",)),
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 8,
            "sample_size": 8,
        },
        call={
            "hidden_states": LATENTS,
            "encoder_hidden_states": "randn b t caption_channels",
            "timestep": "full 500 b",
            "guidance": "full 1 b",
        },
    ),
)


def _rope(sizes: CallSizes) -> tuple[Tensor, Tensor]:
    """Cosines and sines of no rotation at all."""
    import torch

    shape = (sizes.tokens, sizes.config["attention_head_dim"])
    return torch.ones(shape), torch.zeros(shape)


_SKIPS = "blocks of the second half begin from a mixture with an earlier block"
_HUNYUAN_DIT_POINTS = with_cross(
    {
        "attn.o": PointSpec("attn1"),
        "mlp.o": PointSpec("ff"),
        "attn_out": _SKIPS,
        "mlp_out": _SKIPS,
        "cross_out": PointSpec("attn2"),
        "resid_mid": input_of("norm3"),
        **neurons("ff"),
        **attention("attn1"),
    },
    "attn2",
)
_HUNYUAN_DIT = Pipeline(
    "HunyuanDiTPipeline",
    ROWS,
    encodes=not_returned("prompt_embeds_2", "prompt_attention_mask_2"),
    takes_latents=None,
)
HUNYUAN_DIT = Family(
    name="Hunyuan-DiT",
    transformer="HunyuanDiT2DModel",
    pipelines=(
        _HUNYUAN_DIT,
        *_HUNYUAN_DIT.copy_for("HunyuanDiTControlNetPipeline"),
        *_HUNYUAN_DIT.copy_for("HunyuanDiTPAGPipeline", refuses=(PAG,)),
    ),
    stacks=(image_stack("blocks", points=_HUNYUAN_DIT_POINTS),),
    width="inner_dim",
    grid=IMAGE,
    final=NORM_OUT,
    prediction=IMAGE_OUT,
    readout=PATCHED,
    prompts=Prompts(text=("encoder_hidden_states", "encoder_hidden_states_t5")),
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 8,
            "text_len": 5,
            "text_len_t5": 5,
        },
        call={
            "hidden_states": LATENTS,
            "timestep": "full 500 b",
            "encoder_hidden_states": "randn b t cross_attention_dim",
            "text_embedding_mask": "ones_long b t",
            "encoder_hidden_states_t5": "randn b t cross_attention_dim_t5",
            "text_embedding_mask_t5": "ones_long b t",
            "image_meta_size": "full 64 b 6",
            "style": "zeros_long b",
            "image_rotary_emb": _rope,
        },
    ),
)

_PRX_MODULATION = PointSpec("modulation.lin")
_PRX_POINTS = {
    "img": {
        **modulation(_PRX_MODULATION),
        "attn_out": gated_output("attention", replace(_PRX_MODULATION, span=(2, 3))),
        "resid_mid": input_of("post_attention_layernorm"),
        "mlp_out": gated_output("down_proj", replace(_PRX_MODULATION, span=(5, 6))),
        "attn.in": input_of("attention"),
        "mlp.in": "two modules read it, one for the gates of its neurons",
        "mlp.pre": PointSpec("gate_proj"),
        "mlp.post": input_of("down_proj"),
        **fused_qkv("attention.img_qkv_proj"),
        "attn.z": input_of("attention.to_out.0"),
    }
}
_PRX = Pipeline("PRXPipeline", ROWS, Time(), encodes=UNNAMED)
PRX = Family(
    name="PRX",
    transformer="PRXTransformer2DModel",
    pipelines=(_PRX, *_PRX.copy_for("PRXPixelPipeline")),
    stacks=(image_stack("blocks", points=_PRX_POINTS, attends="text_first"),),
    width="hidden_size",
    grid=IMAGE,
    final=Final("final_layer", mod=SECOND),
    prediction=Prediction("in_channels*patch_size*patch_size", "bchw"),
    readout=Readout(()),
    example=Example(
        config={
            "in_channels": 4,
            "context_in_dim": 8,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        call={
            "hidden_states": LATENTS,
            "timestep": "full 0.5 b",
            "encoder_hidden_states": "randn b t context_in_dim",
            "attention_mask": "true b t",
        },
    ),
)

_CLAMPED = "its gates are clamped before the hyperbolic tangent"
_NUCLEUS_POINTS = {
    "img": {
        "attn.o": PointSpec("attn"),
        "mlp.in": input_of("img_mlp"),
        "mlp.o": PointSpec("img_mlp"),
        "attn_out": _CLAMPED,
        "mlp_out": _CLAMPED,
        "resid_mid": input_of("pre_mlp_norm"),
        **modulation(PointSpec("img_mod.1"), NO_SHIFTS),
        **attention("attn"),
    }
}
NUCLEUS = Family(
    name="Nucleus-Image",
    transformer="NucleusMoEImageTransformer2DModel",
    pipelines=(
        Pipeline(
            "NucleusMoEImagePipeline",
            Guidance(TWO_CALLS, negative=NEGATIVE),
            Time(),
            encodes=WITH_MASK,
        ),
    ),
    stacks=(image_stack("transformer_blocks", points=_NUCLEUS_POINTS, attends="image_first"),),
    width="inner_dim",
    grid=Grid("shapes", "img_shapes"),
    final=NORM_OUT,
    prediction=Prediction(PIXELS, sign=-1),
    readout=PACKED,
    latents=WAN_VAE,
    example=Example(
        config={
            **SMALL,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 5,
            "num_key_value_heads": 1,
            "joint_attention_dim": 8,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 6.0,
            "num_experts": 2,
            "moe_intermediate_dim": 16,
            "capacity_factors": 1.0,
        },
        call={
            "hidden_states": "randn b n in_channels",
            "encoder_hidden_states": "randn b t joint_attention_dim",
            "timestep": "full 0.5 b",
            "img_shapes": "shapes_flat",
        },
    ),
)

CROSS = (DIT, PIXART, SANA, HUNYUAN_DIT, PRX, NUCLEUS)
