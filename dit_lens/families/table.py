"""The table of families. A new DiT is a new row here, or one given to ``dit_lens.register_family``."""

from __future__ import annotations

from dit_lens.families.row import Family, Guidance, Stack

_JOINT_INPUTS = {"img": "hidden_states", "txt": "encoder_hidden_states"}

FLUX1 = Family(
    name="FLUX.1",
    transformer="FluxTransformer2DModel",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"),
    stacks=(
        Stack("double", "transformer_blocks", _JOINT_INPUTS, {"txt": 0, "img": 1}),
        Stack("single", "single_transformer_blocks", _JOINT_INPUTS, {"txt": 0, "img": 1}),
    ),
    final="norm_out",
    width="inner_dim",
    out_width="out_channels",
    grid="img_ids",
    guidance=Guidance(
        ("cond", "uncond"), scale="true_cfg_scale", negative=("negative_prompt", "negative_prompt_embeds")
    ),
    resizing=("FluxKontextPipeline",),
    tokenizer="tokenizer_2",
    embedded="guidance_embeds",
    tiny={
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "in_channels": 8,
        "out_channels": None,
    },
)

TABLE = (FLUX1,)
