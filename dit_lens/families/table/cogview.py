"""CogView3-Plus, CogView4 and GLM-Image: a tensor for each stream, and one MLP for both."""

from __future__ import annotations

from dataclasses import replace

from dit_lens.families.row import Example, Family, Latents, Pipeline, Time
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import gated_output, input_of, joined_attention, neurons
from dit_lens.families.table.shared import (
    CALLS,
    HEADS,
    IMAGE,
    IMAGE_FIRST,
    IMAGE_OUT,
    LATENTS,
    NORM_OUT,
    PACKED,
    ROWS,
    SMALL,
    double_stack,
    not_returned,
)

_CONFIG = {
    **SMALL,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 2,
}
_CALL = {
    "hidden_states": LATENTS,
    "encoder_hidden_states": "randn b t text_embed_dim",
    "timestep": "full 500 b",
    "original_size": "full 64 b 2",
    "target_size": "full 64 b 2",
    "crop_coords": "zeros b 2",
}

_SHARED = "the module is shared by both streams, and its second call, for the text, is not followed"
_COGVIEW4_POINTS = {
    "img": {
        "attn_out": gated_output("attn1", PointSpec("norm1", slot=1), slot=0),
        "resid_mid": input_of("norm2"),
        "mlp_out": gated_output("ff", PointSpec("norm1", slot=4)),
        **neurons("ff"),
        **joined_attention("attn1", "text_first", "img"),
    },
    "txt": {
        "attn_out": gated_output("attn1", PointSpec("norm1", slot=6), slot=1),
        "resid_mid": input_of("norm2_context"),
        "mlp_out": _SHARED,
        "mlp.in": _SHARED,
        "mlp.pre": _SHARED,
        "mlp.post": _SHARED,
        **joined_attention("attn1", "text_first", "txt"),
    },
}

_COGVIEW4 = Pipeline("CogView4Pipeline", CALLS)
COGVIEW4 = Family(
    name="CogView4",
    transformer="CogView4Transformer2DModel",
    pipelines=(_COGVIEW4, *_COGVIEW4.copy_for("CogView4ControlPipeline")),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=_COGVIEW4_POINTS),),
    width=HEADS,
    grid=IMAGE,
    final=replace(NORM_OUT, mod_width="config.time_embed_dim"),
    prediction=IMAGE_OUT,
    readout=PACKED,
    example=Example({**_CONFIG, "pos_embed_max_size": 16, "sample_size": 16, "rope_axes_dim": (8, 8)}, _CALL),
)

_COGVIEW3_POINTS = {
    stream: {
        "attn_out": gated_output("attn1", PointSpec("norm1", slot=first), slot=slot),
        "resid_mid": input_of(norm),
        "mlp_out": replace(gated_output("ff", PointSpec("norm1", slot=second)), layout="text_first"),
        **neurons("ff", layout="text_first"),
        **joined_attention("attn1", "text_first", stream),
    }
    for stream, slot, first, second, norm in (("img", 0, 1, 4, "norm2"), ("txt", 1, 6, 9, "norm2_context"))
}
COGVIEW3 = replace(
    COGVIEW4,
    name="CogView3-Plus",
    transformer="CogView3PlusTransformer2DModel",
    pipelines=(Pipeline("CogView3PlusPipeline", ROWS, takes_latents=None),),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=_COGVIEW3_POINTS),),
    width="inner_dim",
    example=Example({**_CONFIG, "pos_embed_max_size": 16, "sample_size": 16}, _CALL),
)

GLM_IMAGE = replace(
    COGVIEW4,
    name="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    pipelines=(
        Pipeline("GlmImagePipeline", CALLS, Time(offset=1e-3, scale=1e-3), encodes=not_returned("prior_token_ids")),
    ),
    latents=Latents(normalised="channel"),
    example=Example(
        {**_CONFIG, "prior_vq_quantizer_codebook_size": 16},
        {
            **{name: value for name, value in _CALL.items() if name != "original_size"},
            "prior_token_id": "ones_long b n",
            "prior_token_drop": "false b n",
        },
    ),
)

COGVIEW = (COGVIEW3, COGVIEW4, GLM_IMAGE)
