"""Where swapped-in values come from: a tensor, a tensor per site, or a Run. All become [step, row, token, channel]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.ops import MeanAblate, Op
from dit_lens.errors import OpError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.plan.selection import Batch
    from dit_lens.core.request.timeline import Timeline
    from dit_lens.families.sites import Site


@dataclass(frozen=True)
class Values:
    """What an op needs from its source at one site."""

    family: str
    site: Site
    steps: list[int]
    timeline: Timeline
    tokens: list[int] | None
    channels: list[int] | None
    batch: Batch
    width: int

    @property
    def text(self) -> str:
        return str(self.site)


def given_values(op: Op, source: Any, wanted: Values) -> dict[str | None, Tensor]:
    """The source's values by branch (None: the same for all), each [s or 1, b or 1, n or 1, d] as chosen."""
    from dit_lens.core.runs.run import Run

    if isinstance(source, Run):
        return _from_run(op, source, wanted)
    if isinstance(source, Mapping):
        if wanted.text not in source:
            raise OpError(
                f"{type(op).__name__}: the source has no tensor for {wanted.text}.{nearest(wanted.text, source)}"
            )
        source = source[wanted.text]
    if not hasattr(source, "shape"):
        raise OpError(
            f"{type(op).__name__} at {wanted.text}: {type(source).__name__} is no source. "
            "Give a Run, a tensor, or a mapping site -> tensor."
        )
    return {None: _fitted(op, source, wanted)}


def resampled_rows(seed: int, available: int, targets: list[int]) -> list[int]:
    """For every target row a random row of the source, never the one of the same number where there is a choice."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [int(rng.choice([row for row in range(available) if row != target or available == 1])) for target in targets]


def _from_run(op: Op, run: Any, wanted: Values) -> dict[str | None, Tensor]:
    if run.provenance["family"] != wanted.family:
        raise OpError(
            f"{type(op).__name__}: the source run is of {run.provenance['family']}, this model is {wanted.family}. "
            "Channels of one family mean nothing in another."
        )
    reading = run.reading(wanted.text)
    if isinstance(op, MeanAblate):
        if reading.reduce != "mean":
            raise OpError(
                f"MeanAblate needs a run that read {wanted.text} with reduce='mean'; this one was read with "
                f"reduce={reading.reduce!r}."
            )
        values = reading.by_branch(wanted.text)
        return {
            branch: _picked(op, value.mean(1, keepdim=True).unsqueeze(2), reading, wanted)
            for branch, value in values.items()
        }
    if reading.reduce is not None:
        raise OpError(
            f"{type(op).__name__}: the source run kept {wanted.text} only as reduce={reading.reduce!r}. "
            "Read it without reduce= to swap it."
        )
    if wanted.site.stream == "img" and wanted.batch.grid not in (None, run.grid):
        raise OpError(
            f"{type(op).__name__}: the source run has a grid of {run.grid[0]} x {run.grid[1]} tokens, this one "
            f"{wanted.batch.grid[0]} x {wanted.batch.grid[1]}. Run both at one size."
        )
    return {branch: _picked(op, value, reading, wanted) for branch, value in reading.by_branch(wanted.text).items()}


def _picked(op: Op, value: Tensor, reading: Any, wanted: Values) -> Tensor:
    """The steps, tokens and channels an op wants, out of what a run has read."""
    if reading.total_steps != wanted.timeline.steps:
        raise OpError(
            f"{type(op).__name__}: the source run has {reading.total_steps} steps, this one {wanted.timeline.steps}. "
            "Use the same num_inference_steps."
        )
    value = value[_positions(op, wanted, wanted.steps, reading.steps, "steps")]
    channels = list(range(wanted.width)) if wanted.channels is None else wanted.channels
    if reading.channels[wanted.text] is not None:
        value = value[..., _positions(op, wanted, channels, reading.channels[wanted.text], "channels")]
    elif wanted.channels is not None:
        value = value[..., channels]
    if value.shape[2] == 1 or (reading.tokens is None and wanted.tokens is None):
        return value
    tokens = (
        list(range(wanted.batch.tokens(wanted.site.stream) or value.shape[2]))
        if wanted.tokens is None
        else wanted.tokens
    )
    return value[:, :, tokens if reading.tokens is None else _positions(op, wanted, tokens, reading.tokens, "tokens")]


def _positions(op: Op, wanted: Values, asked: list[int], kept: Any, what: str) -> list[int]:
    place = {index: i for i, index in enumerate(kept)}
    missing = [index for index in asked if index not in place]
    if missing:
        raise OpError(
            f"{type(op).__name__}: the source run read {wanted.text} without {what} {_some(missing)}; it has "
            f"{_some(list(kept))}. Read more, or narrow {what}=."
        )
    return [place[index] for index in asked]


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f" ... ({len(values)} in all)" if len(values) > 8 else "")


def _fitted(op: Op, source: Tensor, wanted: Values) -> Tensor:
    """A plain tensor as [s, b, n, d]; axes that are full are narrowed to what the op chose."""
    import torch

    tensor = torch.as_tensor(source).detach().as_subclass(torch.Tensor)
    if isinstance(op, MeanAblate) and tensor.ndim == 2:  # [step, channel]
        tensor = tensor[:, None, None]
    if not 1 <= tensor.ndim <= 4:
        raise OpError(
            f"{type(op).__name__} at {wanted.text}: a source tensor is [step, row, token, channel] or its last axes; "
            f"this one has {tensor.ndim}."
        )
    tensor = tensor.reshape(*(1,) * (4 - tensor.ndim), *tensor.shape)
    all_tokens = wanted.batch.tokens(wanted.site.stream)
    tensor = _axis(op, tensor, 3, wanted.channels, wanted.width, wanted, "channels")
    tensor = _axis(op, tensor, 2, wanted.tokens, all_tokens, wanted, "tokens")
    tensor = _axis(op, tensor, 1, None, wanted.batch.rows, wanted, "rows")
    return _axis(op, tensor, 0, wanted.steps, wanted.timeline.steps, wanted, "steps")


def _axis(
    op: Op, tensor: Tensor, axis: int, chosen: list[int] | None, full: int | None, wanted: Values, what: str
) -> Tensor:
    size = tensor.shape[axis]
    if size == 1 or (chosen is None and full in (None, size)) or (chosen is not None and size == len(chosen)):
        return tensor
    if chosen is not None and size == full:
        import torch

        return tensor.index_select(axis, torch.tensor(chosen))
    allowed = sorted({1, *([len(chosen)] if chosen is not None else []), *([full] if full is not None else [])})
    raise OpError(
        f"{type(op).__name__} at {wanted.text}: the source has shape {list(tensor.shape)} as [step, row, token, "
        f"channel]; {what} may be {' or '.join(map(str, allowed))}, not {size}."
    )
