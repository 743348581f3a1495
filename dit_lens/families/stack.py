"""Where tensors are inside the blocks of a transformer, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dit_lens.arguments.checks import checked_fields
from dit_lens.arguments.signatures import told_fields

# What the call of attention itself is given, which is inside of its module.
CALLED = {"attn.q_rot": "query", "attn.k_rot": "key"}
# The norms in an attention that make queries ("q", "query") and keys of what is projected, those of the text first.
NORMS_OF_TEXT = ("norm_added_{0}", "{0}_rms_norm_t", "txt_attn_{0}_norm")
NORMS = ("norm_{0}", "{0}_rms_norm", "img_attn_{0}_norm", "{1}_norm")
# The arguments of blocks that hold the rotation by a token's position.
ROTARY = ("image_rotary_emb", "rotary_emb", "rotary_pos_emb", "freqs_cis", "rope")
# What a module gives, by what it adds to the residual: the same before a gate multiplies it.
UNGATED = {"attn.o": "attn_out", "cross.o": "cross_out", "mlp.o": "mlp_out"}


@checked_fields
@dataclass(frozen=True)
class PointSpec:
    """Where a tensor inside a block is.

    module: path within the block; "" is the block itself.
    side: "output" or "input" of that module, or "attention" for the call of attention in it.
    slot: of an output its position in the tuple (None: a bare tensor); of an input the argument, by name or position;
      of a call of attention "query", "key" or "result".
    span: which channels, in units of the hidden size: (start, stop), stop None for the end; None: all.
    layout: where the stream's tokens lie in it, as in :class:`Stack`; None: as in the stack's tensors; "whole": it is
      one vector per row, without tokens.
    axes: "tokens", or those of an image, as in :class:`~dit_lens.Grid`.
    batch_first: whether it is [row, token, channel] also where the stack's tensors are sequence_first.
    half: of a module that projects attention and MLP at once, which part of its input belongs to one of them: (start,
      stop) in units of the hidden size, stop None for the end. The tensor is what the module makes of that alone; a
      bias counts with the last part.
    gate: what it is multiplied by before it is added to the residual.
    tanh: of a gate, whether its hyperbolic tangent is taken.
    table: a parameter of the block, [part, channel], that is added to the argument.
    adapter: the class of the processor without which the module has no such output.
    entry: the slot is an argument of the transformer that lists residuals which a ControlNet adds after blocks; which
      of them is a block's, by its number i of n and the length m of the list: "share" (i // ceil(n / m)), "ratio"
      (int(i m / n)), "before" (i - 1), or "named" (a dictionary, by i).
    """

    module: str
    side: str = "output"
    slot: str | int | None = None
    span: tuple[int, int | None] | None = None
    layout: str | None = None
    axes: str = "tokens"
    batch_first: bool = False
    half: tuple[int, int | None] | None = None
    gate: PointSpec | None = None
    tanh: bool = False
    table: str | None = None
    adapter: str | None = None
    entry: str | None = None


@told_fields
@dataclass(frozen=True)
class Adapter:
    """A processor of attention with weights of its own, and how one is made and called for the check at load.

    processor: its class.
    arguments: what makes one of the transformer's sizes, each as ``Family.width`` is written.
    call: argument of the transformer -> what it is, see :mod:`dit_lens.families.example_call`.
    """

    processor: str
    arguments: Mapping[str, str]
    call: Mapping[str, object]


@checked_fields
@dataclass(frozen=True)
class Stack:
    """A list of equal blocks. Stacks run in the order in which the family lists them.

    name: what people call it ("double").
    path: the attribute of the transformer that holds it.
    inputs: stream -> argument of the blocks.
    outputs: stream -> position in their output tuple (None: a bare tensor).
    layout: where a stream's tokens lie in that tensor: "own" (each stream has a tensor), or, of one tensor for both:
      "text_first", "image_first" or "ragged" (text first, of another length in every row).
    sequence_first: whether the blocks' tensors are [token, row, channel].
    rewritten: streams that the model changes between blocks.
    ends_without: streams that the last block does not return.
    points: stream -> point -> where it is, or a text that says why these blocks have none.
    attends: the order of the streams inside attention, "text_first" or "image_first"; "own" where the image attends
      to itself; another text says why there is no attention pattern. "": as :attr:`attention` infers it.
    """

    name: str
    path: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, int | None]
    layout: str = "own"
    sequence_first: bool = False
    rewritten: tuple[str, ...] = ()
    ends_without: tuple[str, ...] = ()
    points: Mapping[str, Mapping[str, PointSpec | str]] = field(default_factory=dict)
    attends: str = ""

    @property
    def key_layout(self) -> str:
        """Where the streams' tokens lie among the keys of attention."""
        return "ragged" if self.layout == "ragged" else self.attention

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths within a block of the modules whose tensors have names; "" is the block."""
        specs = [one for points in self.points.values() for one in points.values() if isinstance(one, PointSpec)]
        gates = [one.gate for one in specs if one.gate is not None]
        return tuple(dict.fromkeys(["", *(one.module for one in [*specs, *gates] if one.entry is None)]))

    @property
    def attention(self) -> str:
        """``attends``, which follows from the streams and their layout where the row does not say it."""
        if self.attends:
            return self.attends
        if len(self.outputs) == 1:
            return "own"
        return "text_first" if self.layout in ("own", "ragged") else self.layout


def find_point(stack: Stack, stream: str, point: str) -> PointSpec | str | None:
    """Where a point is, or why these blocks have none; None where the row does not say.

    What modules give before a gate follows from what they add, where the row does not say more.
    """
    inside = stack.points.get(stream, {})
    if (point in CALLED or point == "attn.pattern") and point not in inside:
        return _find_call(stack, CALLED.get(point, "result"), inside.get("attn.in"))
    if point == "cross.pattern":
        spec = stack.points.get("img", {}).get("cross.q")
        path = spec.module.rpartition(".")[0] if isinstance(spec, PointSpec) else ""
        return PointSpec(path, "attention", "result", layout="own", batch_first=True) if path else None
    spec = inside.get(point, inside.get(UNGATED.get(point, point)))
    return replace(spec, gate=None) if isinstance(spec, PointSpec) and point in UNGATED else spec


def _find_call(stack: Stack, slot: str, given: PointSpec | str | None) -> PointSpec | str | None:
    """Where a tensor of the call of attention is.

    slot: "query", "key" or "result".
    given: what enters the module in which it is called.
    """
    if not isinstance(given, PointSpec):
        return given
    if stack.attention not in ("text_first", "image_first", "own"):
        return stack.attention
    asks = slot == "key" or len(stack.outputs) > 1  # else the text is read, and asks nothing
    layout = stack.key_layout if asks else "own"
    return PointSpec(given.module, "attention", slot, layout=layout, batch_first=True)
