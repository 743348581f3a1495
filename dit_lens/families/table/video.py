"""Video models that the same row describes; their grid is (f, h, w)."""

from __future__ import annotations

from dit_lens.families.row import Family, Grid, Readout
from dit_lens.families.table import more_points, points
from dit_lens.families.table.shared import (
    CALLS,
    HEADS,
    IMAGE_FIRST,
    PACKED,
    ROWS,
    SMALL,
    double_stack,
    image_stack,
    text_stack,
)

WAN = Family(
    name="Wan 2.1",
    transformer="WanTransformer3DModel",
    pipelines=("WanPipeline",),
    stacks=(image_stack("blocks", points=more_points.WAN),),
    final="norm_out",
    readout=Readout(order="yxc", shift=("condition_embedder", 0), table="scale_shift_table"),
    width=HEADS,
    out_width="out_channels*patch_size",
    grid=Grid("bcfhw", patch="patch_size"),
    guidance=CALLS,
    prediction="bcfhw",
    check_config={
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
)

LTX = Family(
    name="LTX-Video",
    transformer="LTXVideoTransformer3DModel",
    pipelines=("LTXPipeline",),
    stacks=(image_stack("transformer_blocks", points=more_points.LTX),),
    final="norm_out",
    readout=Readout(shift=("time_embed", 1), table="scale_shift_table"),
    width=HEADS,
    out_width="out_channels",
    grid=Grid("counts", "num_frames"),
    guidance=ROWS,
    patch=1,
    check_config={
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
)

COGVIDEOX = Family(
    name="CogVideoX",
    transformer="CogVideoXTransformer3DModel",
    pipelines=("CogVideoXPipeline",),
    stacks=(double_stack(name="block", outputs=IMAGE_FIRST, points=more_points.COGVIDEOX),),
    final="norm_final",
    readout=Readout(("norm_out", "proj_out"), shift=("time_embedding", None), passes_temb=True),
    width=HEADS,
    out_width="config.out_channels*patch_size*patch_size",
    grid=Grid("bfchw", patch="patch_size"),
    guidance=ROWS,
    prediction="bfchw",
    check_config={
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
        "timestep": "long b",
    },
)

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline",),
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
    out_width="config.out_channels*patch_size*patch_size",
    grid=Grid("bcfhw", patch="patch_size"),
    guidance=None,
    prediction="bcfhw",
    embedded="guidance_embeds",
    check_config={
        **SMALL,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 8,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    },
    call={
        "hidden_states": "randn b in_channels 2 h w",
        "timestep": "long b",
        "encoder_hidden_states": "randn b t text_embed_dim",
        "encoder_attention_mask": "ones_long b t",
        "pooled_projections": "randn b pooled_projection_dim",
        "guidance": "full 1 b",
    },
)

VIDEO = (WAN, LTX, COGVIDEOX, HUNYUAN_VIDEO)
