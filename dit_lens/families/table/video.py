"""Transformers of videos, of which Cosmos-Predict2 and Kandinsky 5 draw images; the grid of a video is (f, h, w)."""

from __future__ import annotations

from dataclasses import replace

from dit_lens.families.row import Example, Family, Final, Grid, Pipeline, Prediction, Prompts, Readout, Refusal, Time
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import (
    attention,
    gated_output,
    input_of,
    joined_attention,
    modulation,
    neurons,
    table_block,
    with_cross,
)
from dit_lens.families.table.shared import (
    CALLS,
    HEADS,
    IMAGE_FIRST,
    NO_EMBEDDINGS,
    OF_TIME,
    PATCHED,
    ROWS,
    SMALL,
    VIDEO_VAE,
    WAN_VAE,
    WITH_IMAGES,
    WITH_MASKS,
    double_stack,
    image_stack,
    not_returned,
    text_stack,
)

_COSMOS_POINTS = with_cross(
    {
        "attn_out": gated_output("attn1", PointSpec("norm1", slot=1)),
        "cross_out": gated_output("attn2", PointSpec("norm2", slot=1)),
        "resid_mid": input_of("norm3"),
        "mlp_out": gated_output("ff", PointSpec("norm3", slot=1)),
        **neurons("ff"),
        **attention("attn1"),
    },
    "attn2",
)
_COSMOS = Pipeline("Cosmos2TextToImagePipeline", CALLS, Time())
COSMOS = Family(
    name="Cosmos-Predict2",
    transformer="CosmosTransformer3DModel",
    pipelines=(
        _COSMOS,
        *_COSMOS.copy_for("CosmosTextToWorldPipeline", time=Time(edm=True)),
        *_COSMOS.copy_for("CosmosVideoToWorldPipeline", time=Time(edm=True), takes_latents=None),
        *_COSMOS.copy_for(
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
            takes_latents=None,
        ),
    ),
    stacks=(image_stack("transformer_blocks", points=_COSMOS_POINTS),),
    width=HEADS,
    grid=Grid("bcfhw", patch="patch_size"),
    final=Final(mod="there are two, both made of the time alone"),
    prediction=Prediction("out_channels*patch_size", "bcfhw"),
    readout=PATCHED,
    latents=WAN_VAE,
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 8,
            "adaln_lora_dim": 6,
            "max_size": (1, 16, 16),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        call={
            "hidden_states": "randn b in_channels 1 h w",
            "timestep": "full 0.5 b",
            "encoder_hidden_states": "randn b t text_embed_dim",
        },
    ),
)

_KANDINSKY_PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")
_KANDINSKY_INSIDE = {
    **neurons("feed_forward", "in_layer", "out_layer"),
    **attention("self_attention", *_KANDINSKY_PROJECTIONS),
}
_VISUAL_MODULATION = PointSpec("visual_modulation.out_layer")
_TEXT_MODULATION = PointSpec("text_modulation.out_layer")
_VISUAL_POINTS = with_cross(
    {
        "attn_out": gated_output("self_attention", replace(_VISUAL_MODULATION, span=(2, 3))),
        "cross_out": gated_output("cross_attention", replace(_VISUAL_MODULATION, span=(5, 6))),
        "resid_mid": input_of("feed_forward_norm"),
        "mlp_out": gated_output("feed_forward", replace(_VISUAL_MODULATION, span=(8, 9))),
        **_KANDINSKY_INSIDE,
    },
    "cross_attention",
    *_KANDINSKY_PROJECTIONS,
)
_TEXT_POINTS = {
    "txt": {
        **modulation(_TEXT_MODULATION),
        "attn_out": gated_output("self_attention", replace(_TEXT_MODULATION, span=(2, 3))),
        "resid_mid": input_of("feed_forward_norm"),
        "mlp_out": gated_output("feed_forward", replace(_TEXT_MODULATION, span=(5, 6))),
        **_KANDINSKY_INSIDE,
    }
}
_KANDINSKY = Pipeline("Kandinsky5T2IPipeline", CALLS, encodes=not_returned("prompt_cu_seqlens"), chooses_size=True)
KANDINSKY5 = Family(
    name="Kandinsky 5",
    transformer="Kandinsky5Transformer3DModel",
    pipelines=(
        _KANDINSKY,
        *_KANDINSKY.copy_for("Kandinsky5I2IPipeline", encodes=WITH_IMAGES),
        *_KANDINSKY.copy_for("Kandinsky5T2VPipeline", chooses_size=False),
        *_KANDINSKY.copy_for("Kandinsky5I2VPipeline", chooses_size=False, row_images=("image",)),
    ),
    stacks=(
        text_stack("text_transformer_blocks", "text", "x", points=_TEXT_POINTS),
        image_stack("visual_transformer_blocks", "visual", "visual_embed", points=_VISUAL_POINTS),
    ),
    width="config.model_dim",
    grid=Grid("bfhwc", patch="patch_size"),
    final=Final("out_layer", axes="bfhwc", mod=PointSpec("", "input", "time_embed"), mod_width="config.time_dim"),
    prompts=Prompts(offsets=("prompt_cu_seqlens", "negative_prompt_cu_seqlens")),
    prediction=Prediction("config.out_visual_dim*patch_size", "bfhwc"),
    readout=Readout(()),
    example=Example(
        config={
            "in_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        call={
            "hidden_states": "randn b 1 h w in_visual_dim",
            "encoder_hidden_states": "randn b t in_text_dim",
            "pooled_projections": "randn b in_text_dim2",
            "timestep": "full 500 b",
            "visual_rope_pos": "axes",
            "text_rope_pos": "count t",
        },
    ),
)

_WAN_POINTS = with_cross(table_block("temb", "attn1", "ffn", "norm3", neurons("ffn"), cross="attn2"), "attn2")
_ONE_VIDEO = Refusal("num_videos_per_prompt", "it draws one of each prompt, whatever that says", off=1)
_WAN = Pipeline("WanPipeline", CALLS)
WAN = Family(
    name="Wan 2.1",
    transformer="WanTransformer3DModel",
    pipelines=(
        _WAN,
        *_WAN.copy_for("WanVideoToVideoPipeline", refuses=(_ONE_VIDEO,), whole_strength=True),
        *_WAN.copy_for("WanImageToVideoPipeline", "LucyEditPipeline", takes_latents=None),
    ),
    stacks=(image_stack("blocks", points=_WAN_POINTS),),
    width=HEADS,
    grid=Grid("bcfhw", patch="patch_size"),
    final=Final(mod=OF_TIME),
    prediction=Prediction("out_channels*patch_size", "bcfhw"),
    readout=Readout(order="yxc", shift=("condition_embedder", 0), table="scale_shift_table"),
    latents=WAN_VAE,
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 8,
            "freq_dim": 8,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        call={
            "hidden_states": "randn b in_channels 2 h w",
            "timestep": "full 500 b",
            "encoder_hidden_states": "randn b t text_dim",
        },
    ),
)

_LTX_POINTS = with_cross(table_block("temb", "attn1", "ff", "norm2", neurons("ff"), cross="attn2"), "attn2")
_LTX = Pipeline("LTXPipeline", ROWS, encodes=WITH_MASKS)
LTX = Family(
    name="LTX-Video",
    transformer="LTXVideoTransformer3DModel",
    pipelines=(
        _LTX,
        *_LTX.copy_for("LTXImageToVideoPipeline", takes_latents=None),
        *_LTX.copy_for("LTXConditionPipeline", takes_latents=None, strength="denoise_strength", whole_strength=True),
        *_LTX.copy_for("LTXI2VLongMultiPromptPipeline", encodes=NO_EMBEDDINGS, takes_latents=None),
    ),
    stacks=(image_stack("transformer_blocks", points=_LTX_POINTS),),
    width=HEADS,
    grid=Grid("counts", "num_frames", coordinates="video_coords"),
    final=Final(mod=OF_TIME),
    prediction=Prediction("out_channels"),
    readout=Readout(shift=("time_embed", 1), table="scale_shift_table"),
    latents=replace(VIDEO_VAE, patch=1, normalised="channel"),
    prompts=Prompts(masks=("encoder_attention_mask",)),
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 8,
        },
        call={
            "hidden_states": "randn b 2*n in_channels",
            "encoder_hidden_states": "randn b t caption_channels",
            "timestep": "full 500 b",
            "encoder_attention_mask": "ones_long b t",
            "num_frames": 2,
            "height": "rows",
            "width": "columns",
        },
    ),
)

_COGVIDEOX_POINTS = {
    stream: {
        "attn_out": gated_output("attn1", PointSpec("norm1", slot=gate), slot=slot),
        "resid_mid": PointSpec("norm2", "input", slot),
        "mlp_out": replace(gated_output("ff", PointSpec("norm2", slot=gate)), layout="text_first"),
        **neurons("ff", layout="text_first"),
        **joined_attention("attn1", "text_first", stream),
    }
    for stream, slot, gate in (("img", 0, 2), ("txt", 1, 3))
}
_COGVIDEOX = Pipeline("CogVideoXPipeline", ROWS, takes_latents=None, refuses=(_ONE_VIDEO,))
COGVIDEOX = Family(
    name="CogVideoX",
    transformer="CogVideoXTransformer3DModel",
    pipelines=(
        _COGVIDEOX,
        *_COGVIDEOX.copy_for("CogVideoXImageToVideoPipeline", "CogVideoXFunControlPipeline"),
        *_COGVIDEOX.copy_for("CogVideoXVideoToVideoPipeline", whole_strength=True),
    ),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=_COGVIDEOX_POINTS),),
    width=HEADS,
    grid=Grid("bfchw", patch="patch_size"),
    final=Final("norm_final", mod=PointSpec("norm_out", "input", "temb"), mod_width="config.time_embed_dim"),
    prediction=Prediction("config.out_channels*patch_size*patch_size", "bfchw"),
    readout=Readout(("norm_out", "proj_out"), shift=("time_embedding", None), passes_temb=True),
    latents=VIDEO_VAE,
    example=Example(
        config={
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 6,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 5,
        },
        call={
            "hidden_states": "randn b 2 in_channels h w",
            "encoder_hidden_states": "randn b t text_embed_dim",
            "timestep": "ones_long b",
        },
    ),
)

VIDEO = (COSMOS, KANDINSKY5, WAN, LTX, COGVIDEOX)
