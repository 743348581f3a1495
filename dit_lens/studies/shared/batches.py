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


class SeededPrompts(Protocol):
    """What runs together: prompts, from one seed."""

    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that run together from one seed.

    seed: seed of the noise.
    rows: numbers of the prompts in the study.
    prompts: the prompts, one per row.
    """

    seed: int
    rows: range
    prompts: tuple[str, ...]

    @property
    def key(self) -> str:
        """The batch in the key of a cell."""
        return f"{self.seed}/{self.rows.start}"


@dataclass(kw_only=True)
class BatchRunner:
    """Runs batches, with and without edits.

    Where edits leave the first step alone, a batch is recorded once and its edits start from there, bit for bit.

    lens: the lens that runs them.
    call: the other arguments of the pipeline.
    twice: whether every batch has its prompts once more below, untouched, as sources of values.
    late: whether edits leave the first step alone.
    """

    lens: DiTLens
    call: Mapping[str, Any]
    twice: bool = False
    late: bool = False
    _recorded: tuple[SeededPrompts, Run] | None = field(default=None, init=False)

    def run(self, batch: SeededPrompts, reads: Sequence[Read] = (), *, record: bool = False) -> Run:
        """Runs a batch without edits.

        batch: the prompts and their seed.
        reads: what is read.
        record: whether later runs can start from it.
        """
        return self.lens.run(self._prompts(batch), reads, seed=batch.seed, record=record, **self.call)

    def run_edited(self, batch: SeededPrompts, ops: Sequence[Op]) -> Run:
        """Runs a batch under edits."""
        prefix = None
        if self.late:
            if self._recorded is None or self._recorded[0] != batch:
                self._recorded = (batch, self.run(batch, record=True))
            prefix = self._recorded[1]
        return self.lens.run(self._prompts(batch), ops, seed=batch.seed, prefix=prefix, **self.call)

    def _prompts(self, batch: SeededPrompts) -> Sequence[str]:
        return batch.prompts * 2 if self.twice else batch.prompts


def skips_first_step(lens: DiTLens, prompt: str, steps: Steps, call: Mapping[str, Any]) -> bool:
    """Whether steps leave out the first one of a run.

    lens: the lens that would run it.
    prompt: a prompt of the run.
    steps: the steps of an edit.
    call: the other arguments of the pipeline.
    """
    return min(lens.outline(prompt, **call).select(steps)) > 0


def make_batches(prompts: Sequence[str], seeds: Sequence[int], batch_size: int | None) -> list[PromptBatch]:
    """The batches of a study: for every seed, consecutive prompts.

    prompts: all prompts of the study.
    seeds: seeds of the noise.
    batch_size: number of prompts that run together; None for all of them.
    """
    size = len(prompts) if batch_size is None else batch_size
    if size < 1:
        raise PromptError(f"batch_size={batch_size} must be at least 1.")
    spans = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    return [PromptBatch(seed, rows, tuple(prompts[i] for i in rows)) for seed in seeds for rows in spans]
