"""What a run would keep, before it is run: bytes per read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_lens.ops import Op

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from dit_lens.families import Anatomy
    from dit_lens.plan import Plan, PlannedRead


@dataclass(frozen=True)
class Cost:
    """What the reads of a run would keep.

    bytes: in all. reads: for every read its text, sites, and bytes. complete: False where the pipeline alone knows the
    number of tokens, so that the true cost is larger.
    """

    bytes: int
    reads: tuple[tuple[str, int, int], ...]
    complete: bool = True

    @property
    def table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.reads, columns=["read", "sites", "bytes"])

    def __repr__(self) -> str:
        lines = [f"  {text}: {sites} sites, {human(size)}" for text, sites, size in self.reads]
        return "\n".join([f"Cost: {human(self.bytes)} of reads{'' if self.complete else ' at least'}", *lines])


def cost_of(plan: Plan, ops: Sequence[Op], anatomy: Anatomy, dtype: torch.dtype) -> Cost:
    """Adds up what every read of a plan will hold in main memory."""
    grid = plan.program["expected"]
    lines, complete = [], True
    for read in plan.reads:
        size, known = _bytes(read, anatomy, None if grid is None else math.prod(grid), plan.text_tokens, dtype)
        complete &= known
        lines.append((repr(ops[read.op]), len(read.sites), size))
    return Cost(sum(size for *_, size in lines), tuple(lines), complete)


def human(size: float) -> str:
    """Bytes in the unit a person would use.

    >>> human(1_500_000)
    '1.5 MB'
    """
    units = ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.4g} {units[0]}"


def stored(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes, also where a quantised one says it is of another type."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return tensor.numel() * tensor.element_size()
    return sum(stored(getattr(tensor, name)) for name in inner()[0])


def _bytes(
    read: PlannedRead, anatomy: Anatomy, image_tokens: int | None, text_tokens: int | None, dtype: torch.dtype
) -> tuple[int, bool]:
    from dit_lens.reduce import parse

    calls = len(read.steps) * len(read.branches) * len(read.rows)
    total, known = 0, True
    for site in read.sites:
        kept = read.channels[site]
        channels = anatomy.channels(anatomy.site(site)) if kept is None else len(kept)
        if read.reduce is not None:
            total += 4 * calls * _reduced(parse(read.reduce), channels)
            continue
        stream = text_tokens if ".txt" in site else image_tokens
        tokens = stream if read.tokens is None else len(read.tokens)
        tokens = 1 if ".mod." in site else tokens  # one vector for each picture
        known &= tokens is not None
        total += dtype.itemsize * calls * channels * (tokens or 1)
    return total, known


def _reduced(spec: list, channels: int) -> int:
    """How many numbers a reduction keeps of one row."""
    name, *arguments = spec
    return {
        "quantile": len(arguments) * channels,
        "histogram": arguments[-1] * channels if arguments else 0,
        "topk": 2 * sum(arguments),
    }.get(name, channels)
