"""Parts to put the points of a block together from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dit_lens.families.stack import PointSpec

Points = Mapping[str, PointSpec | str]  # point -> where it is, or why there is none

WHOLE = "whole"  # one vector per row, no tokens

# What a modulation is cut into, in the order of its channels.
SIX = tuple(f"mod.{part}.{name}" for part in ("attn", "mlp") for name in ("shift", "scale", "gate"))
SCALE_FIRST = tuple(f"mod.{part}.{name}" for part in ("attn", "mlp") for name in ("scale", "shift", "gate"))
THREE = ("mod.shift", "mod.scale", "mod.gate")
NO_SHIFTS = tuple(f"mod.{part}.{name}" for part in ("attn", "mlp") for name in ("scale", "gate"))

IP_ADAPTER = "FluxIPAdapterAttnProcessor"  # adds a third output to an attention, and it to the block's

PER_TOKEN = "its gates differ from token to token; attn.o and mlp.o are what they multiply"


def input_of(module: str, slot: str | int = 0) -> PointSpec:
    """An argument of a module, the first by default."""
    return PointSpec(module, "input", slot)


def attention(
    module: str,
    q: str = "to_q",
    k: str = "to_k",
    v: str = "to_v",
    out: str = "to_out.0",
    layout: str | None = None,
    given: str | int = 0,
) -> dict[str, PointSpec]:
    """What enters an attention, its projections, and what enters the last: heads side by side in the channels.

    module: the attention.
    q, k, v, out: the projections in it.
    layout: where the stream's tokens lie, if not as in the stack.
    given: its argument that holds the stream.
    """
    specs = {f"attn.{name}": PointSpec(f"{module}.{path}") for name, path in zip("qkv", (q, k, v), strict=True)}
    specs |= {"attn.in": input_of(module, given), "attn.z": input_of(f"{module}.{out}")}
    return {name: replace(spec, layout=layout) for name, spec in specs.items()}


def fused_qkv(projection: str) -> dict[str, PointSpec]:
    """Query, key and value where one projection makes them, side by side in its channels."""
    return {f"attn.{part}": PointSpec(projection, span=(i, i + 1)) for i, part in enumerate("qkv")}


def text_attention(module: str = "attn") -> dict[str, PointSpec]:
    """The text stream's own projections in an attention of both streams."""
    return attention(module, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", given="encoder_hidden_states")


def with_cross(
    inside: Points,
    module: str,
    q: str = "to_q",
    k: str = "to_k",
    v: str = "to_v",
    out: str | None = "to_out.0",
) -> Mapping[str, Points]:
    """Blocks of image tokens that read a text: its keys and values are points of the text, by their tokens.

    inside: the points of the image.
    module: the cross-attention.
    q, k, v, out: the projections in it; None where the output is projected with that of another attention.
    """
    specs = {part: PointSpec(f"{module}.{path}") for part, path in zip("qkv", (q, k, v), strict=True)}
    return {
        "img": {
            **inside,
            "cross.q": specs["q"],
            **dict.fromkeys(("cross.k", "cross.v"), "they are made of the text: name the txt stream"),
            **({} if out is None else {"cross.z": input_of(f"{module}.{out}")}),
        },
        "txt": {"cross.k": specs["k"], "cross.v": specs["v"]},
    }


def joined_attention(module: str, layout: str, stream: str) -> dict[str, PointSpec]:
    """The same of a stream whose tokens its attention is given by themselves, and joins to those of the other.

    layout: where they lie then.
    """
    given = {"img": "hidden_states", "txt": "encoder_hidden_states"}[stream]
    return {**attention(module, layout=layout), "attn.in": input_of(module, given)}


def neurons(
    module: str, pre: str = "net.0.proj", post: str = "net.2", layout: str | None = None
) -> dict[str, PointSpec]:
    """What enters an MLP, and its hidden layer: the output of its first projection, and the input of its last.

    module: the MLP.
    pre, post: the projections in it.
    layout: where the stream's tokens lie, if not as in the stack.
    """
    return {
        "mlp.in": replace(input_of(module), layout=layout),
        "mlp.pre": PointSpec(f"{module}.{pre}", layout=layout),
        "mlp.post": replace(input_of(f"{module}.{post}"), layout=layout),
    }


def control(argument: str = "controlnet_block_samples", entry: str = "share", layout: str | None = None) -> Points:
    """What a ControlNet adds after a block.

    argument: of the transformer, which lists it.
    entry: which of the list is a block's, as in :class:`~dit_lens.PointSpec`.
    layout: where the stream's tokens lie in it, if not as in the stack.
    """
    return {"control_out": PointSpec("", "input", argument, entry=entry, layout=layout)}


def both_streams(inside: Points) -> Mapping[str, Points]:
    """The same points for image and text, which lie in one tensor."""
    return {"img": inside, "txt": inside}


def modulation(spec: PointSpec, names: tuple[str, ...] = SIX, start: int = 0) -> dict[str, PointSpec]:
    """A vector per row, cut into shifts, scales and gates, of which the first begins at ``start`` hidden sizes."""
    return {name: replace(spec, span=(start + i, start + i + 1), layout=WHOLE) for i, name in enumerate(names)}


def gated_output(
    module: str, gate: PointSpec, slot: int | None = None, axes: str = "tokens", *, tanh: bool = False
) -> PointSpec:
    """A module's output times a gate, as it is added to the residual.

    module: path within the block.
    gate: where the gate is.
    slot: position in the output tuple.
    axes: those of an image, or "tokens".
    tanh: whether the hyperbolic tangent of the gate is taken.
    """
    return PointSpec(module, slot=slot, axes=axes, gate=replace(gate, tanh=tanh))


def adaln_zero(
    norm: str, attn: PointSpec, mlp: str, middle: str, *, gates: tuple[int, int] = (1, 4), linear: str | None = "linear"
) -> Points:
    """A block whose first norm also returns the gates of attention and MLP (diffusers' AdaLayerNormZero).

    norm: the first norm.
    attn: the output of attention.
    mlp: the MLP.
    middle: the module that is given the residual between attention and MLP.
    gates: positions of both gates in what the norm returns.
    linear: the projection inside the norm that makes the modulation; None: it has none.
    """
    first, second = (PointSpec(norm, slot=slot) for slot in gates)
    return {
        **(modulation(PointSpec(f"{norm}.{linear}")) if linear else {}),
        "attn_out": replace(attn, gate=first),
        "resid_mid": input_of(middle),
        "mlp_out": gated_output(mlp, second),
        **neurons(mlp),
    }


def side_by_side(projection: str, gate: PointSpec, layout: str | None = None) -> dict[str, PointSpec | str]:
    """What attention and MLP write where one projection adds them up, under one gate."""
    write = replace(input_of(projection), layout=layout, gate=gate)
    return {
        "attn_out": replace(write, half=(0, 1)),
        "mlp_out": replace(write, half=(1, None)),
        "resid_mid": "attention and MLP run side by side",
    }


def single_stream(layout: str, z: PointSpec) -> Points:
    """A stream of FLUX's single blocks, in which both streams lie in one tensor. z: the output of attention."""
    return {
        **modulation(PointSpec("norm.linear"), THREE),
        **attention("attn", layout=layout),
        "attn.z": z,
        "mlp.in": replace(input_of("proj_mlp"), layout=layout),
        "mlp.pre": PointSpec("proj_mlp", layout=layout),
        "mlp.post": replace(input_of("proj_out"), layout=layout, span=(1, None)),
        **side_by_side("proj_out", PointSpec("norm", slot=1), layout),
    }


def double_block() -> Mapping[str, Points]:
    """FLUX's double blocks: a tensor for each stream, which meet in attention."""
    return {
        "img": {
            **adaln_zero("norm1", PointSpec("attn", slot=0), "ff", "norm2"),
            **attention("attn"),
            "ip_out": PointSpec("attn", slot=2, adapter=IP_ADAPTER),
        },
        "txt": {
            **adaln_zero("norm1_context", PointSpec("attn", slot=1), "ff_context", "norm2_context"),
            **text_attention(),
        },
    }


def table_block(
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
    """Blocks whose modulation is a table of their own plus an argument (PixArt's ``scale_shift_table``).

    argument: of the block, to which its table is added.
    attn: the attention.
    mlp: the MLP.
    middle: the module that is given the residual between attention and MLP.
    inside: points inside the MLP.
    cross: the cross-attention, which is added without a gate.
    names: of the parts of the modulation.
    mlp_axes: the axes of the MLP's output.
    """
    table = replace(input_of("", argument), table="scale_shift_table")
    return {
        **modulation(table, names),
        "attn_out": gated_output(attn, replace(table, span=(2, 3))),
        **({} if cross is None else {"cross_out": PointSpec(cross)}),
        "resid_mid": input_of(middle),
        "mlp_out": gated_output(mlp, replace(table, span=(5, 6)), axes=mlp_axes),
        **attention(attn),
        **inside,
    }


def sandwich_block(
    attn: str, attn_norm: str, mlp: str, gates: tuple[PointSpec, PointSpec] | None, hidden: tuple[str, str]
) -> Points:
    """Blocks that normalise the outputs of attention and MLP before they are added (Next-DiT's sandwich norms).

    attn: the attention.
    attn_norm: the norm of its output.
    mlp: the MLP.
    gates: whose hyperbolic tangent scales what both norms return; None: nothing does.
    hidden: the first and the last projection of the MLP.
    """
    first, second = gates or (None, None)
    return {
        "attn_out": PointSpec(attn_norm) if first is None else gated_output(attn_norm, first, tanh=True),
        "resid_mid": input_of("ffn_norm1"),
        "mlp_out": PointSpec("ffn_norm2") if second is None else gated_output("ffn_norm2", second, tanh=True),
        **attention(attn),
        **neurons(mlp, *hidden),
    }
