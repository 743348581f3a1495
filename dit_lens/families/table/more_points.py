"""Points inside the blocks of the other families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dit_lens.families.row import PointSpec
from dit_lens.families.table.points import (
    LUMINA_GATES,
    NO_SHIFTS,
    SIX,
    Points,
    added,
    attention,
    both,
    entering,
    gated,
    modulation,
    neurons,
    sandwich,
    single,
    tabled,
)

_EXPERTS = "its neurons are those of experts, which differ from token to token"

COGVIEW3 = {
    stream: {
        "attn_out": gated("attn1", PointSpec("norm1", slot=first), slot=slot),
        "resid_mid": entering(norm),
        "mlp_out": replace(gated("ff", PointSpec("norm1", slot=second)), layout="text_first"),
        **neurons("ff", layout="text_first"),
        **attention("attn1", layout="text_first"),
    }
    for stream, slot, first, second, norm in (("img", 0, 1, 4, "norm2"), ("txt", 1, 6, 9, "norm2_context"))
}


def _hidream(stream: str, suffix: str, slot: int | None, at: int) -> Points:
    mod = PointSpec("block.adaLN_modulation.1")
    ends = "_t" if stream == "txt" and slot is not None else ""
    mlp = "block.ff_t" if ends else "block.ff_i"
    return {
        **{name: replace(tap, span=(at + i, at + i + 1)) for i, (name, tap) in enumerate(modulation(mod).items())},
        "attn_out": gated("block.attn1", replace(mod, span=(at + 2, at + 3)), slot=slot),
        "resid_mid": entering(f"block.norm3{suffix}"),
        "mlp_out": gated(mlp, replace(mod, span=(at + 5, at + 6))),
        **({"mlp.pre": _EXPERTS, "mlp.post": _EXPERTS} if mlp == "block.ff_i" else neurons(mlp, "w1", "w2")),
        **attention("block.attn1", f"to_q{ends}", f"to_k{ends}", f"to_v{ends}", f"to_out{ends}"),
    }


HIDREAM_DOUBLE = {"img": _hidream("img", "_i", 0, 0), "txt": _hidream("txt", "_t", 1, 6)}
HIDREAM_SINGLE = {stream: _hidream(stream, "_i", None, 0) for stream in ("img", "txt")}

_NO_WRITE = "attention is not added to the residual, only the MLP that follows it is"


def _aura_flow(suffix: str, projections: dict[str, PointSpec]) -> Points:
    mlp = f"ff{suffix}"
    return {
        **modulation(PointSpec(f"norm1{suffix}.linear")),
        "attn_out": _NO_WRITE,
        "resid_mid": _NO_WRITE,
        "mlp_out": gated(mlp, PointSpec(f"norm1{suffix}", slot=4)),
        **neurons(mlp, "linear_1", "out_projection"),
        **projections,
    }


AURA_FLOW_DOUBLE = {
    "img": _aura_flow("", attention("attn")),
    "txt": _aura_flow("_context", added()),
}
AURA_FLOW_SINGLE = {stream: _aura_flow("", attention("attn")) for stream in ("img", "txt")}

JOY_IMAGE = {
    stream: {
        "attn_out": gated("attn", PointSpec(f"{stream}_mod", slot=2), slot=slot),
        "resid_mid": entering(f"{stream}_norm2"),
        "mlp_out": gated(f"{stream}_mlp", PointSpec(f"{stream}_mod", slot=5)),
        **neurons(f"{stream}_mlp"),
        **{f"attn.{part}": PointSpec(f"attn.{stream}_attn_qkv", span=(i, i + 1)) for i, part in enumerate("qkv")},
        "attn.z": entering(f"attn.{stream}_attn_proj"),
    }
    for stream, slot in (("img", 0), ("txt", 1))
}

_OMNIGEN = {
    "attn_out": PointSpec("self_attn"),
    "resid_mid": entering("post_attention_layernorm"),
    "mlp_out": PointSpec("mlp"),
    **neurons("mlp", "gate_up_proj", "down_proj"),
    **attention("self_attn"),
}
OMNIGEN = both(_OMNIGEN)


_SCALE_FIRST = tuple(f"mod.{part}.{name}" for part in ("attn", "mlp") for name in ("scale", "shift", "gate"))
KREA2 = both(tabled("temb", "attn", "ff", "norm2", neurons("ff", "gate", "down"), names=_SCALE_FIRST))
WAN = {"img": tabled("temb", "attn1", "ffn", "norm3", neurons("ffn"), cross="attn2")}
LTX = {"img": tabled("temb", "attn1", "ff", "norm2", neurons("ff"), cross="attn2")}

_IDEOGRAM_MOD = PointSpec("adaln_modulation")
_IDEOGRAM_GATES = (replace(_IDEOGRAM_MOD, span=(1, 2)), replace(_IDEOGRAM_MOD, span=(3, 4)))
_IDEOGRAM4 = {
    **sandwich("attention", "attention_norm2", "feed_forward", _IDEOGRAM_GATES, ("w1", "w2")),
    **modulation(_IDEOGRAM_MOD, NO_SHIFTS),
}
IDEOGRAM4 = both(_IDEOGRAM4)

_PER_TOKEN = "its gates differ from token to token"
_QWEN21 = {
    "attn_out": _PER_TOKEN,
    "mlp_out": _PER_TOKEN,
    "resid_mid": entering("img_norm2"),
    **neurons("img_mlp", "proj", "out"),
    **attention("attn"),
}
QWEN21 = both(_QWEN21)

_IN_A_LIST = "its modulation comes as a list of tensors, one for each part"
_ERNIE = {
    **dict.fromkeys(SIX, _IN_A_LIST),
    "attn_out": _IN_A_LIST,
    "mlp_out": _IN_A_LIST,
    "resid_mid": entering("adaLN_mlp_ln"),
    **{name: replace(tap, batch_first=True) for name, tap in attention("self_attention").items()},
    **neurons("mlp", "gate_proj", "linear_fc2"),
}
ERNIE = both(_ERNIE)

LUMINA = {
    "img": {
        **sandwich("attn1", "norm2", "feed_forward", LUMINA_GATES, ("linear_1", "linear_2")),
        "attn.z": entering("attn2.to_out.0"),  # self- and cross-attention are mixed before they are projected out
    }
}

_PRX_MOD = PointSpec("modulation.lin")
PRX = {
    "img": {
        **modulation(_PRX_MOD),
        "attn_out": gated("attention", replace(_PRX_MOD, span=(2, 3))),
        "resid_mid": entering("post_attention_layernorm"),
        "mlp_out": gated("down_proj", replace(_PRX_MOD, span=(5, 6))),
        "mlp.pre": PointSpec("gate_proj"),
        "mlp.post": entering("down_proj"),
        **{f"attn.{part}": PointSpec("attention.img_qkv_proj", span=(i, i + 1)) for i, part in enumerate("qkv")},
        "attn.z": entering("attention.to_out.0"),
    }
}

_CLAMPED = "its gates are clamped before the hyperbolic tangent"
NUCLEUS = {
    "img": {
        "attn_out": _CLAMPED,
        "mlp_out": _CLAMPED,
        "resid_mid": entering("pre_mlp_norm"),
        **modulation(PointSpec("img_mod.1"), NO_SHIFTS),
        **attention("attn"),
    }
}

COSMOS = {
    "img": {
        "attn_out": gated("attn1", PointSpec("norm1", slot=1)),
        "cross_out": gated("attn2", PointSpec("norm2", slot=1)),
        "resid_mid": entering("norm3"),
        "mlp_out": gated("ff", PointSpec("norm3", slot=1)),
        **neurons("ff"),
        **attention("attn1"),
    }
}

_KANDINSKY = attention("self_attention", "to_query", "to_key", "to_value", "out_layer")
_VISUAL_MOD = PointSpec("visual_modulation.out_layer")
_TEXT_MOD = PointSpec("text_modulation.out_layer")
KANDINSKY5 = {
    "img": {
        "attn_out": gated("self_attention", replace(_VISUAL_MOD, span=(2, 3))),
        "cross_out": gated("cross_attention", replace(_VISUAL_MOD, span=(5, 6))),
        "resid_mid": entering("feed_forward_norm"),
        "mlp_out": gated("feed_forward", replace(_VISUAL_MOD, span=(8, 9))),
        **neurons("feed_forward", "in_layer", "out_layer"),
        **_KANDINSKY,
    }
}
KANDINSKY5_TEXT = {
    "txt": {
        **modulation(_TEXT_MOD),
        "attn_out": gated("self_attention", replace(_TEXT_MOD, span=(2, 3))),
        "resid_mid": entering("feed_forward_norm"),
        "mlp_out": gated("feed_forward", replace(_TEXT_MOD, span=(5, 6))),
        **neurons("feed_forward", "in_layer", "out_layer"),
        **_KANDINSKY,
    }
}

COGVIDEOX = {
    stream: {
        "attn_out": gated("attn1", PointSpec("norm1", slot=gate), slot=slot),
        "resid_mid": PointSpec("norm2", "input", slot),
        "mlp_out": replace(gated("ff", PointSpec("norm2", slot=gate)), layout="text_first"),
        **neurons("ff", layout="text_first"),
        **attention("attn1", layout="text_first"),
    }
    for stream, slot, gate in (("img", 0, 2), ("txt", 1, 3))
}

_SKIPS = "blocks of the second half begin from a mixture with an earlier block"
HUNYUAN_DIT: Mapping[str, Points] = {
    "img": {
        "attn_out": _SKIPS,
        "mlp_out": _SKIPS,
        "cross_out": PointSpec("attn2"),
        "resid_mid": entering("norm3"),
        **neurons("ff"),
        **attention("attn1"),
    }
}

_FIBO2 = {
    **attention("attention"),
    **neurons("feed_forward", "w1", "w2"),
    "attn_out": _PER_TOKEN,
    "mlp_out": _PER_TOKEN,
}
FIBO2 = both(_FIBO2)

HUNYUAN_SINGLE = {
    stream: single("image_first", PointSpec("attn", slot=slot)) for stream, slot in (("img", 0), ("txt", 1))
}
