"""Points inside blocks that many families share, as parts to put a row together from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dit_lens.families.row import PointSpec

Points = Mapping[str, PointSpec | str]

WHOLE = "whole"  # one vector per row, no tokens


def entering(module: str) -> PointSpec:
    """What a module is given as its first argument."""
    return PointSpec(module, "input", 0)


def attention(
    module: str, q: str = "to_q", k: str = "to_k", v: str = "to_v", out: str = "to_out.0", layout: str | None = None
) -> dict[str, PointSpec]:
    """The projections of an attention, and what enters its output projection: heads side by side in the channels."""
    taps = {f"attn.{name}": PointSpec(f"{module}.{path}") for name, path in zip("qkv", (q, k, v), strict=True)}
    taps["attn.z"] = entering(f"{module}.{out}")
    return {name: replace(tap, layout=layout) for name, tap in taps.items()}


def neurons(
    module: str, pre: str = "net.0.proj", post: str = "net.2", layout: str | None = None
) -> dict[str, PointSpec]:
    """The hidden layer of an MLP: what the first projection gives, and what enters the last."""
    return {
        "mlp.pre": PointSpec(f"{module}.{pre}", layout=layout),
        "mlp.post": replace(entering(f"{module}.{post}"), layout=layout),
    }


def added(module: str = "attn") -> dict[str, PointSpec]:
    """The text stream's own projections in an attention of both streams."""
    return attention(module, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def both(inside: Points) -> Mapping[str, Points]:
    """The same points for image and text, which lie in one tensor."""
    return {"img": inside, "txt": inside}


SIX = tuple(f"mod.{part}.{name}" for part in ("attn", "mlp") for name in ("shift", "scale", "gate"))
THREE = ("mod.shift", "mod.scale", "mod.gate")
NO_SHIFTS = tuple(f"mod.{part}.{name}" for part in ("attn", "mlp") for name in ("scale", "gate"))


def modulation(tap: PointSpec, names: tuple[str, ...] = SIX) -> dict[str, PointSpec]:
    """A vector per row, cut into shifts, scales and gates."""
    return {name: replace(tap, span=(i, i + 1), layout=WHOLE) for i, name in enumerate(names)}


def gated(
    module: str, gate: PointSpec, slot: int | None = None, axes: str = "tokens", *, tanh: bool = False
) -> PointSpec:
    """A module's output times a gate, as it is added to the residual."""
    return PointSpec(module, slot=slot, axes=axes, gate=replace(gate, tanh=tanh))


def adaln_zero(
    norm: str, attn: PointSpec, mlp: str, middle: str, *, gates: tuple[int, int] = (1, 4), linear: str | None = "linear"
) -> Points:
    """A block whose first norm also returns the gates of attention and MLP (AdaLayerNormZero)."""
    first, second = (PointSpec(norm, slot=slot) for slot in gates)
    return {
        **(modulation(PointSpec(f"{norm}.{linear}")) if linear else {}),
        "attn_out": replace(attn, gate=first),
        "resid_mid": entering(middle),
        "mlp_out": gated(mlp, second),
        **neurons(mlp),
    }


FLUX_DOUBLE = {
    "img": {
        **adaln_zero("norm1", PointSpec("attn", slot=0), "ff", "norm2"),
        **attention("attn"),
    },
    "txt": {
        **adaln_zero("norm1_context", PointSpec("attn", slot=1), "ff_context", "norm2_context"),
        **added(),
    },
}


def side_by_side(projection: str, gate: PointSpec, layout: str | None = None) -> dict[str, PointSpec | str]:
    """What attention and MLP write where one projection adds them up, under one gate."""
    write = PointSpec(projection, "input", 0, layout=layout, gate=gate)
    return {
        "attn_out": replace(write, half=(0, 1)),
        "mlp_out": replace(write, half=(1, None)),
        "resid_mid": "attention and MLP run side by side",
    }


def single(layout: str, z: PointSpec) -> Points:
    """A stream of single blocks, in which both streams lie in one tensor; ``z``: what attention gives."""
    return {
        **modulation(PointSpec("norm.linear"), THREE),
        **attention("attn", layout=layout),
        "attn.z": z,
        "mlp.pre": PointSpec("proj_mlp", layout=layout),
        "mlp.post": PointSpec("act_mlp", layout=layout),
        **side_by_side("proj_out", PointSpec("norm", slot=1), layout),
    }


FLUX_SINGLE = both(single("text_first", PointSpec("attn", layout="text_first")))


def flux2_stream(stream: str, suffix: str) -> Points:
    """One stream of FLUX.2's double blocks, whose modulation is computed once for all blocks and passed in."""
    mod = PointSpec("", "input", f"temb_mod_{stream}")
    mlp = f"ff{suffix}"
    return {
        **modulation(mod),
        "attn_out": gated("attn", replace(mod, span=(2, 3)), slot=0 if stream == "img" else 1),
        "resid_mid": entering(f"norm2{suffix}"),
        "mlp_out": gated(mlp, replace(mod, span=(5, 6))),
        **neurons(mlp, "linear_in", "linear_out"),
    }


FLUX2_DOUBLE = {
    "img": {**flux2_stream("img", ""), **attention("attn")},
    "txt": {
        **flux2_stream("txt", "_context"),
        **added(),
    },
}

_PACKED = PointSpec("attn.to_qkv_mlp_proj")
_FLUX2_INSIDE = {
    **modulation(PointSpec("", "input", "temb_mod"), THREE),
    **{f"attn.{name}": replace(_PACKED, span=(i, i + 1)) for i, name in enumerate("qkv")},
    "attn.z": replace(entering("attn.to_out"), span=(0, 1)),
    "mlp.pre": replace(_PACKED, span=(3, None)),
    "mlp.post": replace(entering("attn.to_out"), span=(1, None)),
    **side_by_side("attn.to_out", PointSpec("", "input", "temb_mod", span=(2, 3))),
}
FLUX2_SINGLE = both(_FLUX2_INSIDE)


def qwen_stream(stream: str, slot: int) -> Points:
    """One stream of Qwen-Image."""
    mod = PointSpec(f"{stream}_mod")
    return {
        **modulation(mod),
        "attn_out": gated("attn", replace(mod, span=(2, 3)), slot=slot),
        "resid_mid": entering(f"{stream}_norm2"),
        "mlp_out": gated(f"{stream}_mlp", replace(mod, span=(5, 6))),
        **neurons(f"{stream}_mlp"),
    }


QWEN = {
    "img": {**qwen_stream("img", 0), **attention("attn")},
    "txt": {
        **qwen_stream("txt", 1),
        **added(),
    },
}

SD3 = {
    "img": {**FLUX_DOUBLE["img"], "attn2_out": gated("attn2", PointSpec("norm1", slot=6))},
    "txt": FLUX_DOUBLE["txt"],
}

_SHARED = "the module is shared by both streams, and its second call, for the text, is not followed"
COGVIEW4 = {
    "img": {
        "attn_out": gated("attn1", PointSpec("norm1", slot=1), slot=0),
        "resid_mid": entering("norm2"),
        "mlp_out": gated("ff", PointSpec("norm1", slot=4)),
        **neurons("ff"),
        **attention("attn1", layout="text_first"),
    },
    "txt": {
        "attn_out": gated("attn1", PointSpec("norm1", slot=6), slot=1),
        "resid_mid": entering("norm2_context"),
        "mlp_out": _SHARED,
        "mlp.pre": _SHARED,
        "mlp.post": _SHARED,
        **attention("attn1", layout="text_first"),
    },
}

DIT = {
    "img": {
        **adaln_zero("norm1", PointSpec("attn1"), "ff", "norm3"),
        **attention("attn1"),
    }
}


def tabled(
    argument: str,
    attn: str,
    mlp: str,
    middle: str,
    inside: Points,
    *,
    cross: str | None = None,
    names: tuple[str, ...] = SIX,
    mlp_axes: str = "tokens",
) -> Points:
    """Blocks whose modulation is a table of their own plus an argument; cross-attention is added ungated."""
    table = PointSpec("", "input", argument, table="scale_shift_table")
    return {
        **modulation(table, names),
        "attn_out": gated(attn, replace(table, span=(2, 3))),
        **({} if cross is None else {"cross_out": PointSpec(cross)}),
        "resid_mid": entering(middle),
        "mlp_out": gated(mlp, replace(table, span=(5, 6)), axes=mlp_axes),
        **attention(attn),
        **inside,
    }


PIXART = {"img": tabled("timestep", "attn1", "ff", "norm2", neurons("ff"), cross="attn2")}
_CONVOLUTIONS = {
    "mlp.pre": PointSpec("ff.conv_inverted", axes="bchw"),
    "mlp.post": replace(entering("ff.conv_point"), axes="bchw"),
}
SANA = {"img": tabled("timestep", "attn1", "ff", "norm2", _CONVOLUTIONS, cross="attn2", mlp_axes="bchw")}


def sandwich(
    attn: str, attn_norm: str, mlp: str, gates: tuple[PointSpec, PointSpec] | None, hidden: tuple[str, str]
) -> Points:
    """Blocks that normalise what attention and MLP give before they add it, under tanh gates or none."""
    first, second = gates or (None, None)
    return {
        "attn_out": PointSpec(attn_norm) if first is None else gated(attn_norm, first, tanh=True),
        "resid_mid": entering("ffn_norm1"),
        "mlp_out": PointSpec("ffn_norm2") if second is None else gated("ffn_norm2", second, tanh=True),
        **attention(attn),
        **neurons(mlp, *hidden),
    }


_Z_MOD = PointSpec("adaLN_modulation.0")
_Z_GATES = (replace(_Z_MOD, span=(1, 2)), replace(_Z_MOD, span=(3, 4)))
_Z_BLOCK = sandwich("attention", "attention_norm2", "feed_forward", _Z_GATES, ("w1", "w2"))
_Z_MODULATED = {**_Z_BLOCK, **modulation(_Z_MOD, NO_SHIFTS)}
ZIMAGE = both(_Z_MODULATED)
ZIMAGE_TEXT = {"txt": sandwich("attention", "attention_norm2", "feed_forward", None, ("w1", "w2"))}

LUMINA_GATES = (PointSpec("norm1", slot=1), PointSpec("norm1", slot=3))
LUMINA2 = both(sandwich("attn", "norm2", "feed_forward", LUMINA_GATES, ("linear_1", "linear_2")))
LUMINA2_TEXT = {"txt": sandwich("attn", "norm2", "feed_forward", None, ("linear_1", "linear_2"))}
