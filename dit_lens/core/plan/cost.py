"""What a run would keep, before it is run: bytes per read."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.ops import Op
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor

    from dit_lens.core.plan.compile import Plan, PlannedRead
    from dit_lens.families import Anatomy

HEADROOM = 0.8  # share of what is free that reads may fill


class Spill(dict):
    """A dictionary whose tensors lie in files instead of memory."""

    def __setitem__(self, key: Any, tensor: Tensor) -> None:
        super().__setitem__(key, map_to_file(tensor))


def map_to_file(tensor: Tensor) -> Tensor:
    """The same values, read from a temporary file as they are used.

    The file has lost its name already, so that its room on the disk is given back with the tensor.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.NamedTemporaryFile(prefix="dit_lens-", suffix=".safetensors") as file:
        save_file({"tensor": tensor.contiguous()}, file.name)
        return load_file(file.name)["tensor"]


def reads_container(cost: Cost) -> type[dict]:
    """The kind of dictionary for the reads of a run: in memory, or where they do not fit there, in files.

    Warns of the latter. Raises OpError, before anything is drawn, where the disk is too small as well.
    """
    import psutil

    free = psutil.virtual_memory().available
    if cost.bytes <= HEADROOM * free:
        return dict
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    if cost.bytes > HEADROOM * room:
        raise OpError(
            f"the reads of this run would keep {format_bytes(cost.bytes)}, but only {format_bytes(free)} of memory and "
            f"{format_bytes(room)} of disk in {folder} are free. Reduce tokens at the source (reduce='|mean|'), choose "
            "channels= or tokens=, fewer steps= or sites, run fewer prompts at once, or name a larger disk in the "
            "environment variable TMPDIR."
        )
    warnings.warn(
        f"the reads of this run keep {format_bytes(cost.bytes)}, more than fits into the {format_bytes(free)} of "
        f"memory that are free: they go to files in {folder} (TMPDIR), which are removed with the run.",
        stacklevel=3,
    )
    return Spill


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
        lines = [f"  {text}: {sites} sites, {format_bytes(size)}" for text, sites, size in self.reads]
        return "\n".join([f"Cost: {format_bytes(self.bytes)} of reads{'' if self.complete else ' at least'}", *lines])


def cost_of(plan: Plan, ops: Sequence[Op], anatomy: Anatomy, dtype: torch.dtype) -> Cost:
    """Adds up what every read of a plan will hold in main memory."""
    grid = plan.program["expected"]
    lines, complete = [], True
    for read in plan.reads:
        size, known = _bytes(read, anatomy, None if grid is None else math.prod(grid), plan.text_tokens, dtype)
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


def _bytes(
    read: PlannedRead, anatomy: Anatomy, image_tokens: int | None, text_tokens: int | None, dtype: torch.dtype
) -> tuple[int, bool]:
    from dit_lens.core.request.reduce import parse

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
        tokens = 1 if ".mod." in site else tokens  # one vector for each image
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
