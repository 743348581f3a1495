"""What every op is: the fields they share, how one is laid out at a site, and what an edit is given.

The ops themselves are in ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Required, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor

from dit_lens.errors import OpError

if TYPE_CHECKING:
    import numpy as np

    from dit_lens.core.request.json_values import SigmaInterval
    from dit_lens.core.runs.run import Run

Pattern: TypeAlias = "str | Sequence[str]"
Channels: TypeAlias = "int | Sequence[int] | Mapping[str, Sequence[int]] | None"
Tokens: TypeAlias = "int | str | Sequence[int] | None"
Mask: TypeAlias = "np.ndarray | Tensor | Sequence[Sequence[bool]] | None"
Steps: TypeAlias = "int | Sequence[int] | slice | tuple[float, float] | SigmaInterval | None"
Rows: TypeAlias = "int | Sequence[int] | None"
Branch: TypeAlias = "Literal['cond', 'uncond', 'both'] | None"
Source: TypeAlias = "str | Run | Tensor | Mapping[str, Tensor]"


class ActionDetails(TypedDict, total=False):
    """What an op says of its action at one site, beside the rows, tokens and channels that it selects.

    kind: "Read", or the name of an edit (``dit_lens.ops.EDITS``).
    reduce: how a read is reduced over tokens (``core.request.reduce``).
    key: under which the payload holds an edit's tensor or function.
    source_rows: for every target row the row its values come from.
    strength: in (0, 1]; 1 assigns.
    parameters: what else an edit of this kind needs, such as a factor.
    """

    kind: Required[str]
    reduce: list[Any] | None
    key: str
    source_rows: list[int]
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

    def row(self, source: str) -> list[int]:
        """The row that ``"row:0"`` names."""
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

        source: a Run, a tensor, or site -> tensor.
        strength: in (0, 1]; 1 assigns.
        means: whether the source holds means per channel.
        pick_rows: (rows of the source, target rows) -> the row for each target; the same rows by default.
        """
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """What every operation shares.

    site: a pattern of sites, or several.
    channels: indices, a mapping site -> indices (a ChannelSet), or None for all.
    tokens: image or text token indices; on the text stream a word of the prompt.
    mask: bool [h, w] over image tokens.
    steps: an index, a list or slice of indices, a pair of floats (fractions of the run), ``sigma(high, low)``, or all.
    rows: indices into the batch of images, or all.
    branch: "cond", "uncond" or "both"; None is the op's own default.
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
    exact_under_gate: ClassVar[bool] = False  # whether op(gate * x) = gate * op(x), so that x may be edited instead
    has_json: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        OPS[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Iterators, which are empty after one site, become lists."""
        for name in ("site", "channels", "tokens", "steps", "rows"):
            value = getattr(self, name)
            if hasattr(value, "__next__"):
                object.__setattr__(self, name, list(value))

    def does_nothing(self) -> bool:
        """Whether there is nothing to carry out, whatever the site; what it names is checked all the same."""
        return False

    def lower(self, at: Lowering) -> Lowered:
        """What its action holds at one site, beside the rows, tokens and channels that it selects."""
        return at.on_branches(kind=type(self).__name__)

    def __repr__(self) -> str:
        set_ = [(f.name, getattr(self, f.name)) for f in _order_fields(self) if getattr(self, f.name) is not f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={_shorten(value)}' for name, value in set_)})"


OPS: dict[str, type[Op]] = {}  # every op by its name


class Edit:
    """One edit while it is carried out.

    old: the chosen elements [row, token, channel].
    stream: the whole tensor they were taken from.
    action: of the program.
    hook: where and when: ``name``, ``step``, ``timestep``, ``sigma``, ``branch``.
    payload: key -> tensor or function.
    indices: index tensors that were made before.
    """

    def __init__(
        self, old: Tensor, stream: Tensor, action: Any, hook: Any, payload: dict[str, Any], indices: dict[Any, Tensor]
    ):
        self.old, self.stream, self.action = old, stream, action
        self.hook, self.payload, self.indices = hook, payload, indices


def to_real_tensor(value: Any, what: str) -> Tensor:
    """A value as a plain tensor of real numbers; OpError if it is not one. what: its name, for the message."""
    try:
        tensor = torch.as_tensor(value).as_subclass(Tensor)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise OpError(
            f"{what} is {type(value).__name__}, not a number or a tensor of numbers ({problem})."
        ) from problem
    if tensor.is_complex():
        raise OpError(f"{what} is complex; hidden states are real.")
    return tensor


def _order_fields(op: Op) -> list[Any]:
    first = ("site",)
    return sorted(fields(op), key=lambda f: f.name not in first)


def _shorten(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"<{type(value).__name__.lower()} {list(shape)}>"
    text = repr(value)
    return (
        text if len(text) <= 80 else f"<{type(value).__name__} of {len(value) if hasattr(value, '__len__') else '...'}>"
    )
