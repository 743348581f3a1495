"""Models whose blocks hold text and image tokens in one tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dit_lens.families.row import (
    Example,
    Family,
    Final,
    Grid,
    Guidance,
    Pipeline,
    Prediction,
    Prompts,
    Readout,
    Refusal,
    Time,
)
from dit_lens.families.stack import PointSpec
from dit_lens.families.table.points import (
    NO_SHIFTS,
    PER_TOKEN,
    SCALE_FIRST,
    SIX,
    attention,
    both_streams,
    input_of,
    modulation,
    neurons,
    sandwich_block,
    table_block,
)
from dit_lens.families.table.shared import (
    CALLS,
    COND_UNCOND,
    FLUX2_VAE,
    HEADS,
    IMAGE,
    LATENTS,
    NO_EMBEDDINGS,
    NO_ENCODER,
    PACKED,
    ROWS,
    SECOND,
    SMALL,
    TRUE_CFG,
    TWO_CALLS,
    WAN_VAE,
    WITH_IMAGES,
    WITH_MASK,
    image_stack,
    joint_stack,
    not_returned,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families.example_call import CallSizes

_OMNIGEN_POINTS = {
    "attn_out": PointSpec("self_attn"),
    "resid_mid": input_of("post_attention_layernorm"),
    "mlp_out": PointSpec("mlp"),
    **neurons("mlp", "gate_up_proj", "down_proj"),
    **attention("self_attn"),
}
OMNIGEN = Family(
    name="OmniGen",
    transformer="OmniGenTransformer2DModel",
    pipelines=(
        Pipeline(
            "OmniGenPipeline",
            Guidance(COND_UNCOND, scale=None),
            Time(offset=1.0, scale=-1.0, inverted=True),
            encodes=NO_ENCODER,
            refuses=(Refusal("input_images", "they add rows that see the images without the prompt"),),
        ),
    ),
    stacks=(joint_stack("layers", "layer", "text_first", points=both_streams(_OMNIGEN_POINTS)),),
    width="hidden_size",
    grid=IMAGE,
    final=Final("norm", layout="text_first", mod=PointSpec("norm_out", "input", "temb")),
    prediction=Prediction("in_channels*patch_size*patch_size", "bchw"),
    readout=Readout(("norm_out", "proj_out"), "yxc", shift=("t_embedder", None), passes_temb=True),
    prompts=Prompts(text=("input_ids",), after=1, masks=("attention_mask",), masked_by="last"),
    example=Example(
        config={
            "in_channels": 4,
            "hidden_size": 40,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 128,
            "rope_scaling": {"short_factor": [1.0] * 10, "long_factor": [1.0] * 10},
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
        },
        call={
            "hidden_states": LATENTS,
            "timestep": "full 0.5 b",
            "input_ids": "ones_long b t",
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": "ones_long b t+1+n t+1+n",
            "position_ids": "count b t+1+n",
        },
    ),
)

_KREA2_POINTS = both_streams(
    table_block("temb", "attn", "ff", "norm2", neurons("ff", "gate", "down"), names=SCALE_FIRST)
)
KREA2 = Family(
    name="Krea 2",
    transformer="Krea2Transformer2DModel",
    pipelines=(Pipeline("Krea2Pipeline", Guidance(TWO_CALLS, above=0), Time(), encodes=WITH_MASK),),
    stacks=(joint_stack("transformer_blocks", "block", "text_first", points=_KREA2_POINTS),),
    width=HEADS,
    grid=Grid("positions", "position_ids"),
    final=Final("final_layer", mod=SECOND),
    prediction=Prediction("out_channels"),
    readout=Readout(()),
    latents=WAN_VAE,
    prompts=Prompts(masks=("encoder_attention_mask",)),
    example=Example(
        config={
            **SMALL,
            "in_channels": 8,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 8,
            "num_text_layers": 4,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 20,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        call={
            "hidden_states": "randn b n in_channels",
            "encoder_hidden_states": "randn b t num_text_layers text_hidden_dim",
            "timestep": "full 0.5 b",
            "position_ids": "positions",
            "encoder_attention_mask": "true b t",
        },
    ),
)

_TEXT_MARK, _IMAGE_MARK = 3, 2  # transformer_ideogram4.LLM_TOKEN_INDICATOR and OUTPUT_IMAGE_INDICATOR


def _marks(sizes: CallSizes) -> Tensor:
    """What every token is: text first, then the image."""
    import torch

    return torch.tensor([_TEXT_MARK] * sizes.text + [_IMAGE_MARK] * sizes.tokens).expand(sizes.rows, -1)


_IDEOGRAM_MODULATION = PointSpec("adaln_modulation")
_IDEOGRAM_GATES = (replace(_IDEOGRAM_MODULATION, span=(1, 2)), replace(_IDEOGRAM_MODULATION, span=(3, 4)))
_IDEOGRAM_POINTS = {
    **sandwich_block("attention", "attention_norm2", "feed_forward", _IDEOGRAM_GATES, ("w1", "w2")),
    **modulation(_IDEOGRAM_MODULATION, NO_SHIFTS),
}
IDEOGRAM4 = Family(
    name="Ideogram 4",
    transformer="Ideogram4Transformer2DModel",
    pipelines=(
        Pipeline(
            "Ideogram4Pipeline",
            None,
            Time(offset=1.0, scale=-1.0),
            encodes=NO_EMBEDDINGS,
            second_model=True,
        ),
    ),
    stacks=(joint_stack("layers", "layer", "text_first", points=both_streams(_IDEOGRAM_POINTS)),),
    width=HEADS,
    grid=Grid("marks", "position_ids", layout="text_first", marks="indicator", marked=_IMAGE_MARK),
    final=Final("final_layer", layout="text_first", mod=SECOND, mod_width="config.adaln_dim"),
    prediction=Prediction("out_channels", layout="text_first", sign=-1),
    readout=Readout(()),
    latents=replace(FLUX2_VAE, packing="yxc"),
    note="Its unconditional branch is a second transformer, `unconditional_transformer`, which is not looked into: "
    "`cond` is all there is, and the image is guided by a model that no op touches.",
    prompts=Prompts(masks=("indicator",), masked_by=_TEXT_MARK),
    example=Example(
        config={
            **SMALL,
            "in_channels": 8,
            "num_layers": 2,
            "intermediate_size": 48,
            "adaln_dim": 8,
            "llm_features_dim": 8,
            "mrope_section": (4, 2, 2),
        },
        call={
            "hidden_states": "randn b t+n in_channels",
            "timestep": "full 0.5 b",
            "encoder_hidden_states": "randn b t+n llm_features_dim",
            "position_ids": "positions b",
            "segment_ids": "ones_long b t+n",
            "indicator": _marks,
        },
    ),
)

_IN_A_LIST = "its modulation comes as a list of tensors, one for each part"
_ERNIE_POINTS = {
    **dict.fromkeys(SIX, _IN_A_LIST),
    "attn.o": PointSpec("self_attention", batch_first=True),
    "mlp.o": PointSpec("mlp"),
    "attn_out": _IN_A_LIST,
    "mlp_out": _IN_A_LIST,
    "resid_mid": input_of("adaLN_mlp_ln"),
    **{name: replace(spec, batch_first=True) for name, spec in attention("self_attention").items()},
    **neurons("mlp", "gate_proj", "linear_fc2"),
}
ERNIE = Family(
    name="ERNIE-Image",
    transformer="ErnieImageTransformer2DModel",
    pipelines=(Pipeline("ErnieImagePipeline", ROWS, encodes=not_returned("prompt_embeds"), takes_latents=None),),
    stacks=(joint_stack("layers", "layer", "image_first", "x", both_streams(_ERNIE_POINTS), sequence_first=True),),
    width="hidden_size",
    grid=IMAGE,
    final=Final("final_norm", layout="image_first", sequence_first=True, mod=SECOND),
    prediction=Prediction("out_channels", "bchw"),
    readout=Readout(("final_linear",)),
    latents=replace(FLUX2_VAE, patch=1),
    prompts=Prompts(text=("text_bth",), masks=("text_lens",), masked_by="length"),
    example=Example(
        config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        call={
            "hidden_states": LATENTS,
            "timestep": "full 500 b",
            "text_bth": "randn b t text_in_dim",
            "text_lens": "lengths b",
        },
    ),
)


def _slots(sizes: CallSizes) -> Tensor:
    """Where image tokens belong: text, then one slot for four of them."""
    import torch

    text = torch.zeros(sizes.rows, sizes.text, dtype=torch.bool)
    return torch.nn.functional.pad(text, (0, sizes.tokens // 4), value=True)


_QWEN21_POINTS = {
    "attn.o": PointSpec("attn"),
    "mlp.o": PointSpec("img_mlp"),
    "attn_out": PER_TOKEN,
    "mlp_out": PER_TOKEN,
    "resid_mid": input_of("img_norm2"),
    **neurons("img_mlp", "proj", "out"),
    **attention("attn"),
}
QWEN21 = Family(
    name="Qwen-Image 2.1",
    transformer="QwenImage21Transformer2DModel",
    pipelines=(Pipeline("QwenImage21Pipeline", TRUE_CFG, Time(), encodes=WITH_IMAGES, caches=True),),
    stacks=(joint_stack("transformer_blocks", "block", "text_first", points=both_streams(_QWEN21_POINTS)),),
    width="inner_dim",
    grid=Grid("shapes", "img_shapes", target="last"),
    final=Final(
        layout="text_first", mod="it is one vector for each time, not for each image, and made of the time alone"
    ),
    prediction=Prediction("out_channels", layout="text_first"),
    readout=PACKED,
    latents=replace(WAN_VAE, patch=1),
    prompts=Prompts(masks=("encoder_hidden_states_mask",)),
    example=Example(
        config={
            **SMALL,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "context_in_dim": 8,
            "axes_dims_rope": (4, 6, 6),
        },
        call={
            "hidden_states": "randn b n in_channels",
            "encoder_hidden_states": "randn b t context_in_dim",
            "timestep": "full 0.5 b",
            "img_shapes": "shapes",
            "img_mask": _slots,
        },
        grid=(2, 4),
    ),
)

_FIBO2_POINTS = {
    **attention("attention"),
    **neurons("feed_forward", "w1", "w2"),
    "attn.o": PointSpec("attention_norm2"),
    "mlp.o": PointSpec("ffn_norm2"),
    "attn_out": PER_TOKEN,
    "mlp_out": PER_TOKEN,
}
FIBO2 = Family(
    name="Bria FIBO 2",
    transformer="BriaFibo2Transformer2DModel",
    pipelines=(
        Pipeline(
            "BriaFibo2Pipeline",
            CALLS,
            Time(),
            encodes=WITH_IMAGES,
            refuses=(Refusal("image", "context images move the image tokens inside the joint sequence"),),
        ),
    ),
    stacks=(
        image_stack("noise_refiner", "noise_refiner", "x", points=both_streams(_FIBO2_POINTS)),
        joint_stack("layers", "layer", "text_first", "x", points=both_streams(_FIBO2_POINTS)),
    ),
    width="config.dim",
    grid=IMAGE,
    final=Final("final_layer", mod=SECOND),
    prediction=Prediction("in_channels*patch_size*patch_size", "bchw"),
    readout=Readout(()),
    latents=FLUX2_VAE,
    prompts=Prompts(
        mixed="a perceiver makes a few tokens of all of the prompt's",
        masks=("encoder_attention_mask",),
        masked_by="even",
    ),
    example=Example(
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (0,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 8,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 16, 16),
        },
        call={"hidden_states": LATENTS, "timestep": "full 0.5 b", "encoder_hidden_states": "randn b 2 t cap_feat_dim"},
    ),
)

JOINT = (OMNIGEN, KREA2, IDEOGRAM4, ERNIE, QWEN21, FIBO2)
