"""What every op is: the fields they share, how one is laid out at a site, and what an edit is given.

The ops themselves are in ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Required, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from dit_lens.arguments.functions import name_of
from dit_lens.arguments.numbers import as_plain, list_entries, to_number
from dit_lens.arguments.saving import saved_by
from dit_lens.core.request.indices import list_items
from dit_lens.core.request.token_set import TokenSet
from dit_lens.errors import OpError
from dit_lens.families.layout import PlanMismatchError
from dit_lens.families.sites import DEFAULT_POINT, Pattern
from dit_lens.families.tensors import take

if TYPE_CHECKING:
    import numpy as np

    from dit_lens.core.request.json_values import SigmaInterval
    from dit_lens.core.runs.reading import Reading
    from dit_lens.core.runs.run import Run
    from dit_lens.families import Anatomy
    from dit_lens.families.locations import GridRule, ImageTokens, TimeRule
    from dit_lens.families.sites import Site

Channels: TypeAlias = "int | Sequence[int] | Mapping[str, Sequence[int]] | None"
Tokens: TypeAlias = "int | str | Sequence[int] | TokenSet | None"
Mask: TypeAlias = "np.ndarray | Tensor | Sequence[Sequence[bool]] | None"
Steps: TypeAlias = "int | Sequence[int] | slice | tuple[float, float] | SigmaInterval | None"
Rows: TypeAlias = "int | Sequence[int] | None"
Branch: TypeAlias = "Literal['cond', 'uncond', 'both'] | None"
Source: TypeAlias = "str | Run | Reading | Tensor | Mapping[str, Tensor]"
Vectors: TypeAlias = "float | Tensor | np.ndarray | Mapping[str, Vectors]"


class ActionDetails(TypedDict, total=False):
    """What an op says of its action at one site, beside the rows, tokens and channels that it selects.

    kind: "Read", or the name of an edit (``dit_lens.ops.EDITS``).
    reduce: how a read is reduced over tokens (``core.request.reduce``).
    key_tokens: for every step, or for all, and for every target row the keys that it no longer reads; None: all.
    key: under which the payload holds an edit's tensor or function, or the dictionary whose features are meant.
    source_rows: for every target row the row its values come from.
    source_tokens: the tokens there, where they are not those that are replaced.
    held: the site of the same forward pass that the values come from.
    source_mask: under which the payload holds the tokens that a source has, bool [row, token]; left out: all.
    strength: in (0, 1]; 1 assigns.
    parameters: what else an edit of this kind needs, such as a factor.
    """

    kind: Required[str]
    reduce: list[Any] | None
    key: str
    source_rows: list[int]
    source_tokens: list[int]
    source_mask: str
    held: str
    key_tokens: list[list[list[int]]] | None
    strength: float
    parameters: dict[str, Any]


Lowered: TypeAlias = list[tuple[str, ActionDetails]]  # for every branch


class Lowering(Protocol):
    """What an op may ask of the plan while it is laid out at one site."""

    @property
    def site(self) -> str:
        """The name of the site."""
        ...

    @property
    def size(self) -> int:
        """The number of channels chosen there."""
        ...

    def on_branches(self, **action: Unpack[ActionDetails]) -> Lowered:
        """The same action on every branch the op touches."""
        ...

    def give(self, value: Any) -> str:
        """The key under which the executor finds a tensor or a function."""
        ...

    def add(self, value: Any) -> Lowered:
        """Adding a number or vectors over the chosen channels, on every branch the op touches.

        value: a number, [channel], or [step, channel]; branch -> one of these; or site -> any of them.
        """
        ...

    def copy(self, source: str, *, strength: float = 1.0) -> Lowered:
        """Replacing by another row of the batch, ``"row:0"``, or by another site of the same row, ``"site:..."``.

        strength: in (0, 1]; 1 assigns.
        """
        ...

    def hold(self, source: str) -> str:
        """The name of a site computed before, of the same stream, whose tokens an edit is given as well."""
        ...

    def attend(self, keys: str, tokens: Any, mask: Any) -> Lowered:
        """Attention of the chosen tokens without some keys.

        keys: their stream.
        tokens, mask: which of its tokens, as an op names them.
        """
        ...

    def turn_back(self) -> Lowered:
        """Replacing queries or keys by what they are before their rotation."""
        ...

    def put(
        self,
        source: Any,
        *,
        strength: float = 1.0,
        means: bool = False,
        pick_rows: Callable[[Sequence[int], list[int]], list[int]] | None = None,
    ) -> Lowered:
        """Replacing by a source's values.

        source: a Run, one of its reads, a tensor, or site -> tensor.
        strength: in (0, 1]; 1 assigns.
        means: whether the source holds means per channel.
        pick_rows: (rows of the source, target rows) -> the row for each target; the same rows by default.
        """
        ...


class Forecast(Protocol):
    """What an op may ask of a run before it is laid out."""

    @property
    def rows(self) -> int:
        """How many images are drawn."""
        ...

    @property
    def draws(self) -> tuple[tuple[str | None, int | None], ...]:
        """Of each row its prompt and its seed; None for what is given otherwise."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """What every operation shares.

    site: a pattern of sites, a function fn(name) that says whether a site is meant, or several of these.
    channels: indices, a mapping site -> indices (a ChannelSet), or None for all.
    tokens: image or text token indices; on the text stream also a word of the prompt, a list of words, or a class of
        tokens: "prompt", "template", "eos" or "pad" (``["pad"]`` is the word); or a TokenSet, with other tokens at
        every site and step.
    mask: bool [h, w] over image tokens; of a video [f, h, w], or [h, w] for every frame.
    steps: an index, a list or slice of indices, a pair of floats (fractions of the run), ``sigma(high, low)``, or all.
    rows: indices into the batch of images, or all.
    branch: "cond", "uncond" or "both"; None is the op's own default.

    Steps, rows, tokens and channels keep the order in which they are named, in what is read and in what is given; those
    of a set or a mask ascend.
    """

    site: Pattern
    channels: Channels = field(default=None, kw_only=True)
    tokens: Tokens = field(default=None, kw_only=True)
    mask: Mask = field(default=None, kw_only=True)
    steps: Steps = field(default=None, kw_only=True)
    rows: Rows = field(default=None, kw_only=True)
    branch: Branch = field(default=None, kw_only=True)

    default_branch: ClassVar[str] = "both"
    edits: ClassVar[bool] = True  # whether it changes what it finds
    sees_rows: ClassVar[bool] = False  # whether it is given its rows in the order in which they are named
    exact_under_gate: ClassVar[bool] = False  # whether op(gate * x) = gate * op(x), so that x may be edited instead

    save = saved_by("dit_lens.ops.to_json(op) is plain data, and from_json the way back; a run saves its ops with it.")

    def __init_subclass__(cls) -> None:
        OPS[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Iterators, which are empty after one site, become lists, and so do words in whatever lists them."""
        for name in ("site", "channels", "tokens", "steps", "rows"):
            value = getattr(self, name)
            if hasattr(value, "__next__"):
                object.__setattr__(self, name, list_items(value, f"{name}="))
            elif isinstance(value, Mapping) and any(hasattr(item, "__next__") for item in value.values()):
                object.__setattr__(self, name, {key: _as_list(item, name) for key, item in value.items()})
        if not isinstance(self.tokens, TokenSet):
            object.__setattr__(self, "tokens", list_words(self.tokens))

    def does_nothing(self) -> bool:
        """Whether there is nothing to carry out, whatever the site; what it names is checked all the same."""
        return False

    @property
    def words_of_rows(self) -> Tokens:
        """Words, beside those of ``tokens``, without which in its text a row has no part in an edit; None: none."""
        return None

    def prepare(self, sites: list[Site], anatomy: Anatomy, run: Forecast) -> tuple[Op, list[Site]]:  # noqa: ARG002 for ops
        """The op and its sites as they are laid out, where a model or a run decides more than fields say."""
        return self, sites

    def lower(self, at: Lowering) -> Lowered:
        """What its action holds at one site, beside the rows, tokens and channels that it selects."""
        return at.on_branches(kind=type(self).__name__)

    def __repr__(self) -> str:
        set_ = [(f.name, getattr(self, f.name)) for f in _order_fields(self) if getattr(self, f.name) is not f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={_shorten(value)}' for name, value in set_)})"


def check_outputs(op: Op, sites: Sequence[Site], tokens: str) -> None:
    """OpError where an op is not of the outputs of blocks. tokens: whose stream they name, in words."""
    if odd := [site for site in sites if site.block is None or site.point != DEFAULT_POINT]:
        raise OpError(
            f"{type(op).__name__} is for blocks, by the stream of the tokens that {tokens}, such as "
            f"'blocks[3:5].img', and {odd[0]} is none."
        )


def move_tokens(tokens: Tokens, moves: Iterable[tuple[Site, Site]]) -> Tokens:
    """The tokens of a TokenSet at the sites where an op is laid out; other ones as they are.

    moves: pairs of a site that the op names, and one where it is laid out.
    """
    if not isinstance(tokens, TokenSet):
        return tokens
    return replace(tokens, tokens={to.name: tokens[site.name] for site, to in moves})


OPS: dict[str, type[Op]] = {}  # every op by its name


class Edit:
    """One edit while it is carried out.

    old: the chosen elements [row, token, channel].
    stream: the whole tensor they were taken from.
    action: of the program.
    hook: where and when: ``name``, ``step``, ``timestep``, ``sigma``, ``branch``.
    payload: key -> tensor or function.
    indices: index tensors that were made before.
    mask: which of the chosen tokens take part in attention [row, token]; None: all.
    held: site -> its tokens in this forward pass, where an action takes values from them.
    call: the arguments of the attention whose result it is.
    image: where image tokens are in this forward pass.
    inputs: the arguments of the forward pass, (args, kwargs).
    grid: how image tokens are found in them.
    time: how the time is.
    """

    call: dict[str, Any]
    image: ImageTokens
    inputs: tuple[tuple, dict]
    grid: GridRule
    time: TimeRule

    def __init__(
        self,
        old: Tensor,
        stream: Tensor,
        action: Any,
        hook: Any,
        payload: dict[str, Any],
        indices: dict[Any, Tensor],
        mask: Tensor | None = None,
        held: dict[str, Tensor] | None = None,
    ):
        self.old, self.stream, self.action, self.mask = old, stream, action, mask
        self.hook, self.payload, self.indices, self.held = hook, payload, indices, held or {}

    def take_held(self, channels: list[int] | None) -> Tensor:
        """The same rows and tokens of the tensor that the action holds, with some of its channels; None means all."""
        source, action = self.held[self.action["held"]], self.action
        if source.shape[1] != self.stream.shape[1]:
            raise PlanMismatchError(
                f"{self.hook.name} has {self.stream.shape[1]} tokens at step {self.hook.step}, and {action['held']} "
                f"{source.shape[1]}"
            )
        rows = len(self.stream)
        own = source[action["branch_index"] * rows :][:rows]
        return take(own, action["rows"], action["tokens"], channels, self.indices)


def _as_list(value: Any, name: str) -> Any:
    return list_items(value, f"{name}=") if hasattr(value, "__next__") else value


def list_words(tokens: Any) -> Any:
    """Words in an array or a set as a list, those of a set in alphabetical order; anything else as it is."""
    plain = as_plain(tokens)
    listed = None if isinstance(plain, str | list | tuple) else list_entries(plain)
    if not listed or not all(isinstance(word, str) for word in listed):
        return plain if isinstance(plain, str) else tokens
    words = [str(word) for word in listed]
    return sorted(words) if isinstance(tokens, set | frozenset) else words


def to_strength(value: Any) -> float:
    """How far an edit goes, in [0, 1]; OpError if it is not a number of that range."""
    number = to_number(value)
    if number is None or not 0 <= number <= 1:
        raise OpError(
            f"strength={value!r} lies outside [0, 1]: 0 leaves the target as it is, 1 replaces it. "
            "To exaggerate, use Scale or Apply."
        )
    return number


def to_real_tensor(value: Any, what: str) -> Tensor:
    """A value as a plain tensor of real numbers; OpError if it is not one. what: its name, for the message."""
    if any(stride < 0 for stride in getattr(value, "strides", None) or ()):  # reversed in numpy, which torch refuses
        value = value.copy()
    try:
        tensor = torch.as_tensor(value)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as problem:
        raise OpError(
            f"{what} is {type(value).__name__}, not a number or a tensor of numbers ({problem})."
        ) from problem
    if tensor.is_complex():
        raise OpError(f"{what} is complex; hidden states are real.")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        raise OpError(f"{what} is a tensor without plain values ({tensor.layout}, {tensor.device}). Give a dense one.")
    tensor = tensor.as_subclass(Tensor)
    if bool((tensor.float() if tensor.element_size() == 1 else tensor).isnan().any()):
        raise OpError(f"{what} holds values that are no numbers (NaN).")
    return tensor


def _order_fields(op: Op) -> list[Any]:
    first = ("site",)
    return sorted(fields(op), key=lambda f: f.name not in first)


def _shorten(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"<{type(value).__name__.lower()} {list(shape)}>"
    if callable(value):
        return f"<function {name_of(value)}>"
    text = repr(value)
    return (
        text if len(text) <= 80 else f"<{type(value).__name__} of {len(value) if hasattr(value, '__len__') else '...'}>"
    )
