"""What a run would keep, before it is run: bytes per read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from dit_lens.core.request.ops import Op
from dit_lens.core.request.reduce import parse

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from dit_lens.core.plan.compile import Plan, PlannedRead
    from dit_lens.core.plan.outline import Outline
    from dit_lens.families import Anatomy


@dataclass(frozen=True)
class Cost:
    """What the reads of a run would keep.

    bytes: in all.
    reads: for every read its text, the number of its sites, and bytes.
    complete: False where the pipeline alone knows the number of tokens, so that the true cost is larger.
    """

    bytes: int
    reads: tuple[tuple[str, int, int], ...]
    complete: bool = True

    @property
    def table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.reads, columns=["read", "sites", "bytes"])

    def __repr__(self) -> str:
        lines = [f"  {text}: {sites} sites, {format_bytes(size)}" for text, sites, size in self.reads]
        return "\n".join([f"Cost: {format_bytes(self.bytes)} of reads{'' if self.complete else ' at least'}", *lines])


def cost_of(plan: Plan, ops: Sequence[Op], anatomy: Anatomy, dtype: torch.dtype) -> Cost:
    """Adds up what every read of a plan will hold in main memory.

    plan, ops: the reads as they were asked for and laid out.
    anatomy: of the model.
    dtype: of its hidden states.
    """
    lines, complete = [], True
    for read in plan.reads:
        size, known = _read_bytes(read, anatomy, plan.outline, dtype)
        complete &= known
        lines.append((repr(ops[read.op]), len(read.sites), size))
    return Cost(sum(size for *_, size in lines), tuple(lines), complete)


def format_bytes(size: float) -> str:
    """Bytes in the unit a person would use.

    >>> format_bytes(1_500_000)
    '1.5 MB'
    """
    units = ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.4g} {units[0]}"


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes, also where a quantised one says it is of another type."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return tensor.numel() * tensor.element_size()
    return sum(nbytes(getattr(tensor, name)) for name in inner()[0])


def _read_bytes(read: PlannedRead, anatomy: Anatomy, outline: Outline, dtype: torch.dtype) -> tuple[int, bool]:
    """The bytes of one read, and whether all of them are known.

    read: as planned.
    anatomy: of the model.
    outline: what the run is known to be beforehand.
    dtype: of the hidden states.
    """
    tensors = len(read.steps) * len(read.branches) * len(read.rows)
    total, known = 0, True
    for name in read.sites:
        site, kept = anatomy.site(name), read.channels[name]
        channels = anatomy.channels(site) if kept is None else len(kept)
        if read.reduce is not None:
            total += 4 * tensors * _reduced_size(parse(read.reduce), channels)  # float32
            continue
        tokens = outline.tokens(site.stream) if read.tokens is None else _longest(read.tokens)
        tokens = 1 if site.point.startswith("mod.") else tokens  # one vector for each image
        known &= tokens is not None
        total += (4 if read.features else dtype.itemsize) * tensors * channels * (tokens or 1)
    return total, known


def _longest(tokens: Sequence[int] | Mapping[str, Sequence[Sequence[int]]]) -> int:
    """How many tokens a row has; where rows have other numbers, they are filled up to the longest."""
    return max(map(len, chain(*tokens.values()))) if isinstance(tokens, Mapping) else len(tokens)


def _reduced_size(spec: list, channels: int) -> int:
    """How many numbers a reduction keeps of one row."""
    name, *arguments = spec
    return {
        "quantile": len(arguments) * channels,
        "histogram": arguments[-1] * channels if arguments else 0,
        "topk": 2 * sum(arguments),
    }.get(name, channels)
