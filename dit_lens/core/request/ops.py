"""Operations: frozen data that says what to read or change, where and when. They go to JSON and back.

>>> op = Zero("blocks.*.img", channels=[3, 17], steps=(0.0, 0.5))
>>> from_json(to_json(op))
Zero(site='blocks.*.img', channels=[3, 17], steps=(0.0, 0.5))
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from dit_lens.errors import OpError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dit_lens.core.runs.run import Run

Pattern: TypeAlias = "str | Sequence[str]"
Channels: TypeAlias = "int | Sequence[int] | Mapping[str, Sequence[int]] | None"
Tokens: TypeAlias = "int | str | Sequence[int] | None"
Mask: TypeAlias = "np.ndarray | Tensor | Sequence[Sequence[bool]] | None"
Steps: TypeAlias = "int | Sequence[int] | slice | tuple[float, float] | SigmaInterval | None"
Rows: TypeAlias = "int | Sequence[int] | None"
Branch: TypeAlias = "Literal['cond', 'uncond', 'both'] | None"
Source: TypeAlias = "str | Run | Tensor | Mapping[str, Tensor]"


@dataclass(frozen=True)
class SigmaInterval:
    """Steps whose noise level lies in (low, high]: written ``dit_lens.sigma(1.0, 0.3)``, from noisy to clean."""

    high: float
    low: float


def sigma(high: float, low: float) -> SigmaInterval:
    """A span of noise levels, from ``high`` (included) down to ``low`` (excluded): noise is 1.0, a clean image 0.0.

    >>> sigma(1.0, 0.3)
    SigmaInterval(high=1.0, low=0.3)
    """
    if not 0 <= low < high:
        raise OpError(
            f"sigma({high}, {low}) is empty. Noise falls during a run, so write the larger level first: sigma(1.0, "
            "0.3)."
        )
    return SigmaInterval(high, low)


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """What every operation shares.

    site: a pattern of sites, or several. channels: indices, a mapping site -> indices (a ChannelSet), or None for all.
    tokens: image or text token indices; on the text stream a word of the prompt. mask: bool [h, w] over image tokens.
    steps: an index, a list or slice of indices, a pair of floats (fractions of the run), ``sigma(high, low)``, or all.
    rows: indices into the batch of images, or all. branch: "cond", "uncond" or "both"; None is the op's own default.
    """

    site: Pattern
    channels: Channels = field(default=None, kw_only=True)
    tokens: Tokens = field(default=None, kw_only=True)
    mask: Mask = field(default=None, kw_only=True)
    steps: Steps = field(default=None, kw_only=True)
    rows: Rows = field(default=None, kw_only=True)
    branch: Branch = field(default=None, kw_only=True)

    default_branch: ClassVar[str] = "both"

    def __repr__(self) -> str:
        set_ = [(f.name, getattr(self, f.name)) for f in _ordered(self) if getattr(self, f.name) is not f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in set_)})"


@dataclass(frozen=True, eq=False, repr=False)
class Read(Op):
    """Keeps the values at a site: [step, row, token, channel], or [step, row, channel, ...] after a reduction.

    reduce: how tokens are reduced on the model's device: "mean", "|mean|", "mean|x|", "rms", "max", "p99.9",
    "quantile(0.1,0.9)", "histogram(-10,10,64)", "topk(12)"; None keeps every token.
    name: the key of the result; the site's own name by default.
    """

    reduce: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    default_branch: ClassVar[str] = "cond"


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Op):
    """Sets the chosen elements to zero."""


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Op):
    """Multiplies the chosen elements by ``factor``."""

    factor: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Op):
    """Adds ``value``, a number or a vector over the chosen channels, to every chosen token."""

    value: float | Tensor = field(default=0.0, kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class Swap(Op):
    """Replaces the chosen elements by those of a source: x <- (1 - strength) x + strength source.

    source: "row:0" (another image of the same batch, at the same site, step and branch: lockstep transport), a Run
        that read the site, a mapping site -> tensor, or one tensor [step, row, token, channel] (leading axes of size 1,
        or left out, apply to every step and row).
    strength: in [0, 1]; 1 assigns, 0 does nothing.
    """

    source: Source = field(default="", kw_only=True)
    strength: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class Resample(Op):
    """Replaces the chosen elements by those of a randomly chosen row of another run (resample ablation)."""

    source: Run | Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    seed: int = field(default=0, kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class TokenMean(Op):
    """Keeps one part of each channel: its mean over the chosen tokens, or the spatial residual around that mean."""

    keep: Literal["mean", "residual"] = field(default="mean", kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Op):
    """Replaces the chosen elements by a fixed mean per channel, taken from a data set.

    mean: a mapping site -> tensor [channel] or [step, channel], or a Run that read the sites with reduce="mean".
    """

    mean: Run | Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Op):
    """Calls ``fn(tensor, hook)`` with the chosen elements [row, token, channel]; what it returns replaces them.

    ``hook`` has ``name``, ``step``, ``timestep``, ``sigma`` and ``branch``. Returning None changes nothing. A function
    has no JSON form.
    """

    fn: Callable[[Tensor, Any], Tensor | None] | None = field(default=None, kw_only=True)


OPS: dict[str, type[Op]] = {
    op.__name__: op for op in (Read, Zero, Scale, Add, Swap, Resample, TokenMean, MeanAblate, Apply)
}


def to_json(op: Op) -> dict[str, Any]:
    """An op as plain data; what is left at its default is left out."""
    if isinstance(op, Apply):
        raise OpError(
            "Apply holds a Python function, which has no JSON form. "
            "Save the results of its run instead, or use another op."
        )
    values = {f.name: getattr(op, f.name) for f in fields(op)}
    return {"op": type(op).__name__, **{name: _plain(value) for name, value in values.items() if value is not None}}


def from_json(data: Mapping[str, Any]) -> Op:
    """The op that :func:`to_json` wrote."""
    values = dict(data)
    kind = values.pop("op", None)
    if kind not in OPS:
        raise OpError(f"{kind!r} is not an op.{nearest(str(kind), OPS)}")
    known = [f.name for f in fields(OPS[kind])]
    for name in values:
        if name not in known:
            raise OpError(f"{kind} takes no {name!r}.{nearest(name, known)}")
    return OPS[kind](**{name: _restore(value) for name, value in values.items()})


def _ordered(op: Op) -> list[Any]:
    first = ("site",)
    return sorted(fields(op), key=lambda f: f.name not in first)


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"<{type(value).__name__.lower()} {list(shape)}>"
    text = repr(value)
    return (
        text if len(text) <= 80 else f"<{type(value).__name__} of {len(value) if hasattr(value, '__len__') else '...'}>"
    )


def _plain(value: Any) -> Any:
    import numpy as np

    if isinstance(value, SigmaInterval):
        return {"sigma": [value.high, value.low]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple) and any(isinstance(end, float) for end in value):
        return {"fraction": list(value)}
    if hasattr(value, "reference"):  # a Run names itself
        return value.reference()
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _plain(item) for key, item in value.items()}}
    if type(value).__module__.startswith("torch") or hasattr(value, "as_subclass"):
        return _plain_tensor(value)
    if isinstance(value, np.ndarray):
        return {"array": _plain(value.tolist())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _plain_tensor(value: Tensor) -> dict[str, Any]:
    import torch

    raw = value.detach().cpu().contiguous().as_subclass(torch.Tensor)
    data = base64.b64encode(raw.reshape(-1).view(torch.uint8).numpy().tobytes()).decode("ascii")
    return {"tensor": data, "dtype": str(raw.dtype).removeprefix("torch."), "shape": list(raw.shape)}


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "sigma" in value:
        return SigmaInterval(*value["sigma"])
    if "slice" in value:
        return slice(*value["slice"])
    if "fraction" in value:
        return tuple(value["fraction"])
    if "mapping" in value:
        return {key: _restore(item) for key, item in value["mapping"].items()}
    if "array" in value:
        import numpy as np

        return np.asarray(value["array"])
    if "run" in value:
        from dit_lens.core.runs.run import Run

        return Run.load(value["run"])
    if "tensor" in value:
        import torch

        flat = torch.frombuffer(bytearray(base64.b64decode(value["tensor"])), dtype=torch.uint8)
        return flat.view(getattr(torch, value["dtype"])).reshape(value["shape"])
    raise OpError(f"no op was ever written with a value like {value!r}; was the JSON changed by hand?")
