"""FLUX.1, FLUX.2, and the models that took over FLUX.1's two stacks."""

from __future__ import annotations

from dataclasses import replace

from dit_lens.families.row import Family, Grid, Guidance, Time
from dit_lens.families.table import points
from dit_lens.families.table.shared import (
    CALLS,
    PACKED,
    ROWS,
    SMALL,
    TRUE_CFG,
    TWO_CALLS,
    double_stack,
    joint_stack,
)

DOUBLE = double_stack(points=points.FLUX_DOUBLE)
SINGLE = double_stack("single_transformer_blocks", "single", points=points.FLUX_SINGLE)
FUSED = joint_stack("single_transformer_blocks", "single", "text_first", points=points.FLUX_SINGLE)
IDS = Grid("ids", "img_ids")

_TINY = {**SMALL, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 8}
_CALL = {
    "hidden_states": "randn b n in_channels",
    "encoder_hidden_states": "randn b t joint_attention_dim",
    "timestep": "full 0.5 b",
    "img_ids": "ids",
    "txt_ids": "zeros t 3",
}

FLUX1 = Family(
    name="FLUX.1",
    transformer="FluxTransformer2DModel",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"),
    stacks=(DOUBLE, SINGLE),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=TRUE_CFG,
    time=Time(),
    chooses_size=("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
    tokenizer="tokenizer_2",
    plain_text=True,
    embedded="guidance_embeds",
    check_config={**_TINY, "pooled_projection_dim": 8, "in_channels": 8, "out_channels": None},
    call={**_CALL, "pooled_projections": "randn b pooled_projection_dim", "guidance": "full 1 b"},
)

FLUX2 = Family(
    name="FLUX.2",
    transformer="Flux2Transformer2DModel",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline"),
    stacks=(replace(DOUBLE, points=points.FLUX2_DOUBLE), replace(FUSED, points=points.FLUX2_SINGLE)),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=None,
    variants={
        "Flux2KleinPipeline": Guidance(TWO_CALLS, distilled="is_distilled"),
        "Flux2KleinInpaintPipeline": Guidance(TWO_CALLS, distilled="is_distilled"),
    },
    time=Time(),
    caching=("Flux2KleinKVPipeline",),
    returns_vae_latents=("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline"),
    chooses_size=("Flux2KleinInpaintPipeline",),
    size_from_image=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline"),
    embedded="guidance_embeds",
    check_config={**_TINY, "in_channels": 8, "out_channels": None, "axes_dims_rope": (4, 4, 4, 4), "mlp_ratio": 2.0},
    call={**_CALL, "img_ids": "ids4", "txt_ids": "zeros t 4", "guidance": "full 1 b"},
)

CHROMA = Family(
    name="Chroma",
    transformer="ChromaTransformer2DModel",
    pipelines=("ChromaPipeline",),
    stacks=(DOUBLE, FUSED),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=CALLS,
    time=Time(),
    check_config={
        **_TINY,
        "in_channels": 8,
        "out_channels": None,
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    call=_CALL,
)

BRIA = Family(
    name="Bria 3.2",
    transformer="BriaTransformer2DModel",
    pipelines=("BriaPipeline",),
    stacks=(DOUBLE, SINGLE),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=ROWS,
    patch=1,
    check_config={**_TINY, "in_channels": 8, "axes_dims_rope": [4, 6, 6]},
    call={**_CALL, "timestep": "full 500 b"},
)

BRIA_FIBO = Family(
    name="Bria FIBO",
    transformer="BriaFiboTransformer2DModel",
    pipelines=("BriaFiboPipeline",),
    stacks=(replace(DOUBLE, rewritten=("txt",)), replace(FUSED, rewritten=("txt",))),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=ROWS,
    patch=1,
    size_from_image=("BriaFiboEditPipeline",),
    check_config={
        **_TINY,
        "in_channels": 8,
        "axes_dims_rope": [4, 6, 6],
        "text_encoder_dim": 8,
        "joint_attention_dim": 16,
    },
    call={**_CALL, "timestep": "full 500 b", "text_encoder_layers": "layers 4 b t text_encoder_dim"},
)

OVIS = Family(
    name="Ovis-Image",
    transformer="OvisImageTransformer2DModel",
    pipelines=("OvisImagePipeline",),
    stacks=(DOUBLE, SINGLE),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=CALLS,
    time=Time(),
    check_config={**_TINY, "in_channels": 8, "out_channels": 8},
    call=_CALL,
)

LONGCAT = Family(
    name="LongCat-Image",
    transformer="LongCatImageTransformer2DModel",
    pipelines=("LongCatImagePipeline",),
    stacks=(DOUBLE, SINGLE),
    final="norm_out",
    readout=PACKED,
    width="inner_dim",
    out_width="out_channels",
    grid=IDS,
    guidance=CALLS,
    time=Time(),
    check_config={**_TINY, "in_channels": 8, "axes_dims_rope": [4, 6, 6], "pooled_projection_dim": 8},
    call=_CALL,
)

FLUX = (FLUX1, FLUX2, CHROMA, BRIA, BRIA_FIBO, OVIS, LONGCAT)
