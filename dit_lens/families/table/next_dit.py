"""Lumina-Next, Lumina-Image 2.0 and Z-Image: norms before and after attention and MLP, refiners before the blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dit_lens.families.row import Example, Family, Final, Grid, Guidance, Pipeline, Prediction, Prompts, Readout, Time
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import (
    NO_SHIFTS,
    both_streams,
    control,
    input_of,
    modulation,
    sandwich_block,
    with_cross,
)
from dit_lens.families.table.shared import (
    COND_UNCOND,
    IMAGE,
    IMAGE_OUT,
    LATENTS,
    NORM_OUT,
    SECOND,
    STARTS,
    TWO_CALLS,
    WITH_MASKS,
    image_stack,
    joint_stack,
    text_stack,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families.example_call import CallSizes

_FALLING = Time(offset=1.0, scale=-1.0)  # the transformer gets 1 - t
_UNPROJECTED = Readout((), "yxc")
_GATES = (PointSpec("norm1", slot=1), PointSpec("norm1", slot=3))


def _rope(sizes: CallSizes) -> Tensor:
    """Rotations of more positions than there are tokens; 8 is half of a head of the example's config."""
    import torch

    height, _ = sizes.latents
    return torch.ones(height // 2 * 96, 96, 8, dtype=torch.complex64)


_LUMINA_POINTS = with_cross(
    {
        **sandwich_block("attn1", "norm2", "feed_forward", _GATES, ("linear_1", "linear_2")),
        "attn.z": input_of("attn2.to_out.0"),  # self- and cross-attention are mixed before they are projected out
        "cross.z": "self- and cross-attention are mixed before they are projected out, as attn.z",
    },
    "attn2",
    out=None,
)
LUMINA = Family(
    name="Lumina-Next",
    transformer="LuminaNextDiT2DModel",
    pipelines=(Pipeline("LuminaPipeline", Guidance(COND_UNCOND), _FALLING, encodes=WITH_MASKS),),
    stacks=(image_stack("layers", "layer", points=_LUMINA_POINTS),),
    width="hidden_size",
    grid=IMAGE,
    final=NORM_OUT,
    prediction=replace(IMAGE_OUT, sign=-1),
    readout=_UNPROJECTED,
    prompts=Prompts(masks=("encoder_mask",)),
    example=Example(
        config={
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 8,
        },
        call={
            "hidden_states": LATENTS,
            "timestep": "full 0.5 b",
            "encoder_hidden_states": "randn b t cross_attention_dim",
            "encoder_mask": "ones_long b t",
            "image_rotary_emb": _rope,
            "cross_attention_kwargs": {"base_sequence_length": 4},
        },
    ),
)

_LUMINA2_INSIDE = ("attn", "norm2", "feed_forward")
_LUMINA2 = both_streams(sandwich_block(*_LUMINA2_INSIDE, _GATES, ("linear_1", "linear_2")))
_LUMINA2_TEXT = {"txt": sandwich_block(*_LUMINA2_INSIDE, None, ("linear_1", "linear_2"))}
LUMINA2 = Family(
    name="Lumina-Image 2.0",
    transformer="Lumina2Transformer2DModel",
    pipelines=(Pipeline("Lumina2Pipeline", Guidance(TWO_CALLS, cut="cfg_trunc_ratio"), _FALLING, encodes=WITH_MASKS),),
    stacks=(
        text_stack("context_refiner", "context_refiner", points=_LUMINA2_TEXT),
        image_stack("noise_refiner", "noise_refiner", points=_LUMINA2),
        joint_stack("layers", "layer", "ragged", points=_LUMINA2),
    ),
    width="hidden_size",
    grid=replace(IMAGE, mask="encoder_attention_mask"),
    final=replace(NORM_OUT, layout="ragged"),
    prediction=replace(IMAGE_OUT, sign=-1),
    readout=_UNPROJECTED,
    prompts=Prompts(masks=("encoder_attention_mask",), masked_by="count"),
    example=Example(
        config={
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 8,
        },
        call={
            "hidden_states": LATENTS,
            "timestep": "full 0.5 b",
            "encoder_hidden_states": "randn b t cap_feat_dim",
            "encoder_attention_mask": "ones_long b t",
        },
    ),
)

_MODULATION = PointSpec("adaLN_modulation.0")
_ZIMAGE_GATES = (replace(_MODULATION, span=(1, 2)), replace(_MODULATION, span=(3, 4)))
_ZIMAGE_INSIDE = ("attention", "attention_norm2", "feed_forward")
_ZIMAGE_POINTS = both_streams(
    {**sandwich_block(*_ZIMAGE_INSIDE, _ZIMAGE_GATES, ("w1", "w2")), **modulation(_MODULATION, NO_SHIFTS)}
)
_ZIMAGE_JOINT = {stream: {**points, **control(entry="named")} for stream, points in _ZIMAGE_POINTS.items()}
_ZIMAGE_TEXT = {"txt": sandwich_block(*_ZIMAGE_INSIDE, None, ("w1", "w2"))}
_ZIMAGE = Pipeline(
    "ZImagePipeline", Guidance(COND_UNCOND, above=0, cut="cfg_truncation"), Time("t", offset=1.0, scale=-1.0)
)
ZIMAGE = Family(
    name="Z-Image",
    transformer="ZImageTransformer2DModel",
    pipelines=(
        _ZIMAGE,
        *_ZIMAGE.copy_for("ZImageImg2ImgPipeline", needs_image=True, row_images=STARTS),
        *_ZIMAGE.copy_for("ZImageControlNetInpaintPipeline", needs_image=True),
        *_ZIMAGE.copy_for("ZImageInpaintPipeline", takes_latents=None, needs_image=True, row_images=STARTS),
        *_ZIMAGE.copy_for("ZImageControlNetPipeline"),
        *_ZIMAGE.copy_for("ZImageOmniPipeline", size_from_image=True),
    ),
    stacks=(
        image_stack("noise_refiner", "noise_refiner", "x", points=_ZIMAGE_POINTS),
        text_stack("context_refiner", "context_refiner", "x", points=_ZIMAGE_TEXT),
        joint_stack("layers", "layer", "image_first", "x", points=_ZIMAGE_JOINT),
    ),
    width="dim",
    grid=Grid("list", "x", "x", patch=2, pad=32),
    final=Final("all_final_layer.2-1", layout="image_first", mod=SECOND),
    prediction=Prediction("out_channels*4", "list", sign=-1),
    readout=_UNPROJECTED,
    prompts=Prompts(text=("cap_feats",), masks=("cap_feats",), masked_by="list", multiple=32),
    example=Example(
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 64, 64],
        },
        call={"x": "each_row in_channels 1 h w", "t": "full 0.5 b", "cap_feats": "each_row t cap_feat_dim"},
    ),
)

NEXT_DIT = (LUMINA, LUMINA2, ZIMAGE)
