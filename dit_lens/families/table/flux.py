"""FLUX.1, FLUX.2, and the models that took over FLUX.1's two stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dit_lens.families.row import Example, Family, Grid, Guidance, Latents, Pipeline, Prediction, Prompts, Time
from dit_lens.families.stack import Adapter, PointSpec
from dit_lens.families.table.points import (
    IP_ADAPTER,
    THREE,
    Points,
    attention,
    both_streams,
    control,
    double_block,
    gated_output,
    input_of,
    modulation,
    neurons,
    side_by_side,
    single_stream,
    text_attention,
)
from dit_lens.families.table.shared import (
    CALLS,
    FLUX2_VAE,
    NO_EMBEDDINGS,
    NO_ENCODER,
    NORM_OUT,
    PACKED,
    ROWS,
    SMALL,
    STARTS,
    TRUE_CFG,
    TWO_CALLS,
    UNNAMED,
    WAN_VAE,
    WITH_IMAGES,
    double_stack,
    joint_stack,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families.example_call import CallSizes

_SINGLE_STREAM = single_stream("text_first", PointSpec("attn", layout="text_first"))
SINGLE_POINTS = {
    "img": {**_SINGLE_STREAM, **control("controlnet_single_block_samples", layout="own")},
    "txt": _SINGLE_STREAM,
}
_DOUBLE_POINTS = double_block()
DOUBLE = double_stack(points={**_DOUBLE_POINTS, "img": {**_DOUBLE_POINTS["img"], **control()}})
SINGLE = double_stack("single_transformer_blocks", "single", points=SINGLE_POINTS)
JOINED = joint_stack("single_transformer_blocks", "single", "text_first", points=SINGLE_POINTS)

_EXAMPLE = Example(
    config={
        **SMALL,
        "num_layers": 2,
        "num_single_layers": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 8,
        "in_channels": 8,
    },
    call={
        "hidden_states": "randn b n in_channels",
        "encoder_hidden_states": "randn b t joint_attention_dim",
        "timestep": "full 0.5 b",
        "img_ids": "ids",
        "txt_ids": "zeros t 3",
    },
)


def _example(config: Mapping[str, object], **call: str) -> Example:
    """The example of these models, with what one of them takes besides."""
    return Example({**_EXAMPLE.config, **config}, {**_EXAMPLE.call, **call})


def _images(sizes: CallSizes) -> dict[str, list[Tensor]]:
    """Tokens of one image of every row, as an IP-Adapter projects them."""
    import torch

    return {"ip_hidden_states": [torch.randn(sizes.rows, 4, sizes.config["joint_attention_dim"])]}


_FLUX = Pipeline("FluxPipeline", TRUE_CFG, Time(), encodes=("prompt_embeds", "pooled_prompt_embeds", "text_ids"))
FLUX1 = Family(
    name="FLUX.1",
    transformer="FluxTransformer2DModel",
    pipelines=(
        _FLUX,
        *_FLUX.copy_for("FluxImg2ImgPipeline", needs_image=True, row_images=STARTS, tested=True),
        *_FLUX.copy_for("FluxInpaintPipeline", takes_latents=None, needs_image=True, row_images=STARTS, tested=True),
        *_FLUX.copy_for("FluxKontextPipeline", needs_image=True, chooses_size=True, row_images=("image",), tested=True),
        *_FLUX.copy_for(
            "FluxKontextInpaintPipeline", takes_latents=None, needs_image=True, chooses_size=True, row_images=STARTS
        ),
        *_FLUX.copy_for("FluxControlPipeline", prompt_images=("control_image",)),
        *_FLUX.copy_for("FluxControlNetPipeline"),  # a list may hold an image for each of several ControlNets
        *_FLUX.copy_for("FluxFillPipeline", row_images=STARTS),
        *_FLUX.copy_for(
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            needs_image=True,
            row_images=STARTS,
            prompt_images=("control_image",),
        ),
        *_FLUX.copy_for("FluxControlNetImg2ImgPipeline", needs_image=True, row_images=STARTS),
        *_FLUX.copy_for("FluxControlNetInpaintPipeline", takes_latents=None, needs_image=True, row_images=STARTS),
        *_FLUX.copy_for("VisualClozeGenerationPipeline", encodes=UNNAMED, takes_latents=None),
        *_FLUX.copy_for("VisualClozePipeline", encodes=NO_ENCODER, takes_latents=None, returns_latents=None),
    ),
    stacks=(DOUBLE, SINGLE),
    width="inner_dim",
    grid=Grid("ids", "img_ids"),
    final=NORM_OUT,
    prediction=Prediction("out_channels"),
    readout=PACKED,
    guidance_flag="guidance_embeds",
    adapters=(
        Adapter(
            IP_ADAPTER,
            {"hidden_size": "inner_dim", "cross_attention_dim": "joint_attention_dim"},
            {"joint_attention_kwargs": _images},
        ),
    ),
    example=_example(
        {"pooled_projection_dim": 8, "out_channels": None},
        pooled_projections="randn b pooled_projection_dim",
        guidance="full 1 b",
    ),
)

# What the others share with FLUX.1.
_LIKE_FLUX = replace(FLUX1, guidance_flag=None)


def _flux2_stream(stream: str, suffix: str) -> Points:
    """One stream of FLUX.2's double blocks, whose modulation is computed once for all blocks and passed in."""
    mod = input_of("", f"temb_mod_{stream}")
    mlp = f"ff{suffix}"
    return {
        **modulation(mod),
        "attn_out": gated_output("attn", replace(mod, span=(2, 3)), slot=0 if stream == "img" else 1),
        "resid_mid": input_of(f"norm2{suffix}"),
        "mlp_out": gated_output(mlp, replace(mod, span=(5, 6))),
        **neurons(mlp, "linear_in", "linear_out"),
    }


_FLUX2_DOUBLE = {
    "img": {**_flux2_stream("img", ""), **attention("attn")},
    "txt": {**_flux2_stream("txt", "_context"), **text_attention()},
}
_FUSED = PointSpec("attn.to_qkv_mlp_proj")
_FLUX2_SINGLE = {
    **modulation(input_of("", "temb_mod"), THREE),
    **dict.fromkeys(("attn.in", "mlp.in"), input_of("attn")),  # one projection reads it for both
    **{f"attn.{name}": replace(_FUSED, span=(i, i + 1)) for i, name in enumerate("qkv")},
    "attn.z": replace(input_of("attn.to_out"), span=(0, 1)),
    "mlp.pre": replace(_FUSED, span=(3, None)),
    "mlp.post": replace(input_of("attn.to_out"), span=(1, None)),
    **side_by_side("attn.to_out", replace(input_of("", "temb_mod"), span=(2, 3))),
}

_FLUX2 = Pipeline(
    "Flux2Pipeline",
    None,
    Time(),
    encodes=("prompt_embeds", "text_ids"),
    takes_latents="flattened",
    size_from_image=True,
    references=("image",),
)
_KLEIN = replace(
    _FLUX2, name="Flux2KleinPipeline", guidance=Guidance(TWO_CALLS, distilled="is_distilled"), returns_latents="vae"
)
FLUX2 = replace(
    _LIKE_FLUX,
    name="FLUX.2",
    transformer="Flux2Transformer2DModel",
    pipelines=(
        _FLUX2,
        _KLEIN,
        *_KLEIN.copy_for("Flux2KleinKVPipeline", guidance=None, caches=True, tested=True),
        *_KLEIN.copy_for(
            "Flux2KleinInpaintPipeline",
            takes_latents=None,
            size_from_image=False,
            chooses_size=True,
            needs_image=True,
            row_images=STARTS,
            references=(),
        ),
    ),
    stacks=(replace(DOUBLE, points=_FLUX2_DOUBLE), replace(JOINED, points=both_streams(_FLUX2_SINGLE))),
    latents=FLUX2_VAE,
    guidance_flag="guidance_embeds",
    example=_example(
        {"out_channels": None, "axes_dims_rope": (4, 4, 4, 4), "mlp_ratio": 2.0},
        img_ids="ids4",
        txt_ids="zeros t 4",
        guidance="full 1 b",
    ),
)

_CHROMA = Pipeline(
    "ChromaPipeline",
    CALLS,
    Time(),
    encodes=(
        "prompt_embeds",
        "text_ids",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_text_ids",
        "negative_prompt_attention_mask",
    ),
)
CHROMA = replace(
    _LIKE_FLUX,
    name="Chroma",
    transformer="ChromaTransformer2DModel",
    pipelines=(
        _CHROMA,
        *_CHROMA.copy_for("ChromaImg2ImgPipeline", needs_image=True, row_images=STARTS),
        *_CHROMA.copy_for("ChromaInpaintPipeline", takes_latents=None, needs_image=True, row_images=STARTS),
    ),
    stacks=(DOUBLE, JOINED),
    prompts=Prompts(masks=("attention_mask",)),
    example=_example(
        {
            "out_channels": None,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
    ),
)

BRIA = replace(
    _LIKE_FLUX,
    name="Bria 3.2",
    transformer="BriaTransformer2DModel",
    pipelines=(Pipeline("BriaPipeline", ROWS, encodes=("prompt_embeds", "negative_prompt_embeds", "text_ids")),),
    latents=Latents(patch=1),
    example=_example({"axes_dims_rope": [4, 6, 6]}, timestep="full 500 b"),
)

_FIBO = Pipeline("BriaFiboPipeline", ROWS, encodes=NO_EMBEDDINGS)
BRIA_FIBO = replace(
    _LIKE_FLUX,
    name="Bria FIBO",
    transformer="BriaFiboTransformer2DModel",
    pipelines=(_FIBO, *_FIBO.copy_for("BriaFiboEditPipeline", needs_image=True, size_from_image=True)),
    stacks=(replace(DOUBLE, rewritten=("txt",)), replace(JOINED, rewritten=("txt",))),
    latents=replace(WAN_VAE, patch=1),
    prompts=Prompts(masks=("joint_attention_kwargs.attention_mask",)),
    example=_example(
        {"axes_dims_rope": [4, 6, 6], "text_encoder_dim": 8, "joint_attention_dim": 16},
        timestep="full 500 b",
        text_encoder_layers="layers 4 b t text_encoder_dim",
    ),
)

OVIS = replace(
    _LIKE_FLUX,
    name="Ovis-Image",
    transformer="OvisImageTransformer2DModel",
    pipelines=(
        Pipeline(
            "OvisImagePipeline",
            CALLS,
            Time(),
            encodes=("prompt_embeds", "negative_prompt_embeds", "text_ids", "negative_text_ids"),
        ),
    ),
    example=_example({"out_channels": 8}),
)

_LONGCAT = Pipeline("LongCatImagePipeline", CALLS, Time(), encodes=UNNAMED)
LONGCAT = replace(
    _LIKE_FLUX,
    name="LongCat-Image",
    transformer="LongCatImageTransformer2DModel",
    pipelines=(_LONGCAT, *_LONGCAT.copy_for("LongCatImageEditPipeline", encodes=WITH_IMAGES, needs_image=True)),
    example=_example({"axes_dims_rope": [4, 6, 6], "pooled_projection_dim": 8}),
)

FLUX = (FLUX1, FLUX2, CHROMA, BRIA, BRIA_FIBO, OVIS, LONGCAT)
