"""The batches of a study, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dit_lens.core.request.ops import Read
from dit_lens.errors import PromptError

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Op, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens


class Drawn(Protocol):
    """What is drawn together: prompts, from one seed."""

    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


@dataclass
class Drawing:
    """Runs batches. Where edits begin late, a batch is recorded once and its edits start from there, bit for bit.

    twice: with the same prompts once more below, untouched, as sources of values. late: edits leave the first step be.
    """

    lens: DiTLens
    call: Mapping[str, Any]
    twice: bool = False
    late: bool = False
    _recorded: tuple[Drawn, Run] | None = field(default=None, init=False)

    def clean(self, part: Drawn, reads: Sequence[Read] = (), *, record: bool = False) -> Run:
        """A batch without edits."""
        return self.lens.run(self._prompts(part), reads, seed=part.seed, record=record, **self.call)

    def edited(self, part: Drawn, ops: Sequence[Op]) -> Run:
        """A batch under edits."""
        prefix = None
        if self.late:
            if self._recorded is None or self._recorded[0] != part:
                self._recorded = (part, self.clean(part, record=True))
            prefix = self._recorded[1]
        return self.lens.run(self._prompts(part), ops, seed=part.seed, prefix=prefix, **self.call)

    def _prompts(self, part: Drawn) -> Sequence[str]:
        return part.prompts * 2 if self.twice else part.prompts


def begins_late(lens: DiTLens, prompt: str, steps: Steps, call: Mapping[str, Any]) -> bool:
    """Whether steps leave out the first one of a run."""
    return lens.planned(prompt, **call)[0].select(steps)[0] > 0


@dataclass(frozen=True)
class Batch:
    """Prompts that run together from one seed. rows: their numbers in the study."""

    seed: int
    rows: range
    prompts: tuple[str, ...]

    @property
    def key(self) -> str:
        """The batch in the key of a cell."""
        return f"{self.seed}/{self.rows.start}"


def batches(prompts: Sequence[str], seeds: Sequence[int], batch_size: int | None) -> list[Batch]:
    """The batches of a study: for every seed consecutive prompts, all of them where no size is given."""
    size = len(prompts) if batch_size is None else batch_size
    if size < 1:
        raise PromptError(f"batch_size={batch_size} must be at least 1.")
    spans = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    return [Batch(seed, rows, tuple(prompts[i] for i in rows)) for seed in seeds for rows in spans]
