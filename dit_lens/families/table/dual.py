"""Models whose blocks keep a tensor for the image and one for the text."""

from __future__ import annotations

from dataclasses import replace

from dit_lens.families.row import (
    Example,
    Family,
    Final,
    Grid,
    Pipeline,
    Prediction,
    Prompts,
    Readout,
    Refusal,
    Time,
)
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import (
    Points,
    attention,
    both_streams,
    control,
    double_block,
    fused_qkv,
    gated_output,
    input_of,
    modulation,
    neurons,
    text_attention,
)
from dit_lens.families.table.shared import (
    BOTH,
    CALLS,
    IMAGE,
    IMAGE_FIRST,
    IMAGE_OUT,
    LATENTS,
    NORM_OUT,
    PACKED,
    PAG,
    PATCHED,
    PIXELS,
    ROWS,
    SECOND,
    SMALL,
    STARTS,
    TRUE_CFG,
    WAN_VAE,
    WITH_IMAGES,
    WITH_MASK,
    WITH_MASKS,
    double_stack,
    joint_stack,
)


def _qwen(stream: str, slot: int) -> Points:
    mod = PointSpec(f"{stream}_mod")
    return {
        **modulation(mod),
        "attn_out": gated_output("attn", replace(mod, span=(2, 3)), slot=slot),
        "resid_mid": input_of(f"{stream}_norm2"),
        "mlp_out": gated_output(f"{stream}_mlp", replace(mod, span=(5, 6))),
        **neurons(f"{stream}_mlp"),
    }


_QWEN_POINTS = {
    "img": {**_qwen("img", 0), **attention("attn"), **control()},
    "txt": {**_qwen("txt", 1), **text_attention()},
}
_QWEN = Pipeline("QwenImagePipeline", TRUE_CFG, Time(), encodes=WITH_MASK)
QWEN_IMAGE = Family(
    name="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    pipelines=(
        _QWEN,
        *_QWEN.copy_for(
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            encodes=WITH_IMAGES,
            needs_image=True,
            chooses_size=True,
            tested=True,
        ),
        *_QWEN.copy_for(
            "QwenImageEditInpaintPipeline",
            encodes=WITH_IMAGES,
            needs_image=True,
            chooses_size=True,
            row_images=STARTS,
        ),
        *_QWEN.copy_for("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", needs_image=True, row_images=STARTS),
        *_QWEN.copy_for(
            "QwenImageControlNetPipeline", "QwenImageControlNetInpaintPipeline", "QwenImageLayeredPipeline"
        ),
    ),
    stacks=(double_stack(name="block", points=_QWEN_POINTS),),
    width="inner_dim",
    grid=Grid("shapes", "img_shapes"),
    final=NORM_OUT,
    prediction=Prediction(PIXELS),
    readout=PACKED,
    latents=WAN_VAE,
    prompts=Prompts(masks=("encoder_hidden_states_mask",)),
    example=Example(
        config={
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
    ),
)

_SD3_POINTS = {
    **double_block(),
    "img": {
        **double_block()["img"],
        "attn2_out": gated_output("attn2", PointSpec("norm1", slot=6)),
        **control("block_controlnet_hidden_states", "ratio"),
    },
}
_SKIPPED = Refusal(
    "skip_guidance_layers", "it adds a forward pass of the transformer at some steps, whose blocks are skipped"
)
_SD3 = Pipeline(
    "StableDiffusion3Pipeline",
    ROWS,
    encodes=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    refuses=(_SKIPPED,),
)
SD3 = Family(
    name="Stable Diffusion 3",
    transformer="SD3Transformer2DModel",
    pipelines=(
        _SD3,
        *_SD3.copy_for("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline"),
        *_SD3.copy_for(
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            takes_latents=None,
            needs_image=True,
            row_images=STARTS,
        ),
        *_SD3.copy_for("StableDiffusion3PAGPipeline", refuses=(_SKIPPED, PAG)),
        *_SD3.copy_for(
            "StableDiffusion3PAGImg2ImgPipeline",
            takes_latents=None,
            needs_image=True,
            refuses=(_SKIPPED, PAG),
            row_images=STARTS,
        ),
    ),
    stacks=(replace(double_stack(name="block", points=_SD3_POINTS, attends="image_first"), ends_without=("txt",)),),
    width="inner_dim",
    grid=IMAGE,
    final=NORM_OUT,
    prediction=IMAGE_OUT,
    readout=PATCHED,
    example=Example(
        config={
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
            "hidden_states": LATENTS,
            "encoder_hidden_states": "randn b t joint_attention_dim",
            "pooled_projections": "randn b pooled_projection_dim",
            "timestep": "full 500 b",
        },
    ),
)

_EXPERTS = "its neurons are those of experts, which differ from token to token"


def _experts(module: str) -> Points:
    """What enters an MLP of experts."""
    return {"mlp.in": input_of(module), "mlp.pre": _EXPERTS, "mlp.post": _EXPERTS}


def _hidream(suffix: str, slot: int | None, start: int, ends: str = "") -> Points:
    """One stream of HiDream's blocks.

    suffix: of its norms.
    slot: position of its tokens in the output of attention.
    start: where its modulation begins, in hidden sizes.
    ends: of the names of its own projections and MLP, where it has them.
    """
    mod = PointSpec("block.adaLN_modulation.1")
    mlp = f"block.ff{ends or '_i'}"
    return {
        **modulation(mod, start=start),
        "attn_out": gated_output("block.attn1", replace(mod, span=(start + 2, start + 3)), slot=slot),
        "resid_mid": input_of(f"block.norm3{suffix}"),
        "mlp_out": gated_output(mlp, replace(mod, span=(start + 5, start + 6))),
        **(neurons(mlp, "w1", "w2") if ends else _experts(mlp)),
        **attention(
            "block.attn1",
            f"to_q{ends}",
            f"to_k{ends}",
            f"to_v{ends}",
            f"to_out{ends}",
            given=f"norm_{'encoder_' if ends else ''}hidden_states",
        ),
    }


_HIDREAM_DOUBLE = {"img": _hidream("_i", 0, 0), "txt": _hidream("_t", 1, 6, "_t")}
HIDREAM = Family(
    name="HiDream-I1",
    transformer="HiDreamImageTransformer2DModel",
    pipelines=(
        Pipeline(
            "HiDreamImagePipeline",
            ROWS,
            Time("timesteps", scale=1e-3),
            encodes=(
                "prompt_embeds_t5",
                "negative_prompt_embeds_t5",
                "prompt_embeds_llama3",
                "negative_prompt_embeds_llama3",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            ),
            chooses_size=True,
        ),
    ),
    stacks=(
        replace(
            double_stack("double_stream_blocks", outputs=IMAGE_FIRST, points=_HIDREAM_DOUBLE, attends="image_first"),
            rewritten=("txt",),
        ),
        replace(
            joint_stack("single_stream_blocks", "single", "image_first", points=both_streams(_hidream("_i", None, 0))),
            rewritten=("txt",),
        ),
    ),
    width="inner_dim",
    grid=replace(IMAGE, pad_to="max_seq"),
    final=Final("final_layer", mod=SECOND),
    prediction=replace(IMAGE_OUT, sign=-1),
    readout=Readout((), "yxc"),
    prompts=Prompts(
        text=("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "encoder_hidden_states_llama3"),
        layered=("prompt_embeds_llama3", "negative_prompt_embeds_llama3"),
    ),
    without_gradient=("MOEFeedForwardSwiGLU.moe_infer",),
    example=Example(
        config={
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
            "hidden_states": LATENTS,
            "timesteps": "full 500 b",
            "encoder_hidden_states_t5": "randn b t 8",
            "encoder_hidden_states_llama3": "randn 2 b t 8",
            "pooled_embeds": "randn b text_emb_dim",
        },
    ),
)

_NO_WRITE = "attention is not added to the residual, only the MLP that follows it is"


def _aura_flow(suffix: str, projections: dict[str, PointSpec], slot: int | None) -> Points:
    mlp = f"ff{suffix}"
    return {
        **modulation(PointSpec(f"norm1{suffix}.linear")),
        "attn.o": PointSpec("attn", slot=slot),
        "attn_out": _NO_WRITE,
        "resid_mid": _NO_WRITE,
        "mlp_out": gated_output(mlp, PointSpec(f"norm1{suffix}", slot=4)),
        **neurons(mlp, "linear_1", "out_projection"),
        **projections,
    }


_AURA_FLOW_DOUBLE = {
    "img": _aura_flow("", attention("attn"), 0),
    "txt": _aura_flow("_context", text_attention(), 1),
}
_AURA_FLOW_SINGLE = both_streams(_aura_flow("", attention("attn"), None))
AURA_FLOW = Family(
    name="AuraFlow",
    transformer="AuraFlowTransformer2DModel",
    pipelines=(
        Pipeline(
            "AuraFlowPipeline",
            ROWS,
            Time(),
            encodes=WITH_MASKS,
        ),
    ),
    stacks=(
        double_stack("joint_transformer_blocks", points=_AURA_FLOW_DOUBLE),
        joint_stack("single_transformer_blocks", "single", "text_first", points=_AURA_FLOW_SINGLE),
    ),
    width="inner_dim",
    grid=IMAGE,
    final=NORM_OUT,
    prediction=IMAGE_OUT,
    readout=PATCHED,
    prompts=Prompts(before="register_tokens"),
    example=Example(
        config={
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
            "hidden_states": LATENTS,
            "encoder_hidden_states": "randn b t joint_attention_dim",
            "timestep": "full 0.5 b",
        },
    ),
)

_JOY_POINTS = {
    stream: {
        "attn_out": gated_output("attn", PointSpec(f"{stream}_mod", slot=2), slot=slot),
        "resid_mid": input_of(f"{stream}_norm2"),
        "mlp_out": gated_output(f"{stream}_mlp", PointSpec(f"{stream}_mod", slot=5)),
        **neurons(f"{stream}_mlp"),
        "attn.in": input_of("attn", BOTH[stream]),
        **fused_qkv(f"attn.{stream}_attn_qkv"),
        "attn.z": input_of(f"attn.{stream}_attn_proj"),
    }
    for stream, slot in IMAGE_FIRST.items()
}
JOY_IMAGE = Family(
    name="JoyImage-Edit",
    transformer="JoyImageEditTransformer3DModel",
    pipelines=(
        Pipeline(
            "JoyImageEditPipeline",
            CALLS,
            encodes="it also encodes by encode_prompt_multiple_images",
            takes_latents=None,
            needs_image=True,
            chooses_size=True,
        ),
    ),
    stacks=(double_stack("double_blocks", outputs=IMAGE_FIRST, points=_JOY_POINTS, attends="image_first"),),
    width="hidden_size",
    grid=Grid("bicfhw", patch="patch_size"),
    final=Final(mod="its final norm has no shift and no scale"),
    prediction=Prediction("out_channels*patch_size", "bicfhw"),
    readout=PATCHED,
    latents=WAN_VAE,
    example=Example(
        config={
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
    ),
)

DUAL = (QWEN_IMAGE, SD3, HIDREAM, AURA_FLOW, JOY_IMAGE)
