"""The batches of a study, what of its call belongs to each, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dit_lens.core.request.division import Division, refuse_several_images
from dit_lens.core.request.ops import Read
from dit_lens.errors import PromptError, show

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Op, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens


@dataclass(frozen=True)
class StudyCall:
    """The other arguments of the pipeline, for all prompts of a study.

    division: whose each argument is.
    arguments: as they were given.
    count: how many prompts there are; a pair is two.
    """

    division: Division
    arguments: Mapping[str, Any]
    count: int

    def of(self, prompts: Sequence[int]) -> dict[str, Any]:
        """The arguments for some of the prompts, by their numbers: lists with one entry for each prompt are divided."""
        return self.division.share(self.arguments, prompts, self.count)

    def of_pairs(self, pairs: Sequence[int]) -> dict[str, Any]:
        """The arguments for both prompts of some pairs, where the study's prompts are sources and targets in turn."""
        return self.of([2 * pair + end for pair in pairs for end in (0, 1)])


def divide_call(lens: DiTLens, call: Mapping[str, Any], count: int, *, images: bool = True) -> StudyCall:
    """The other arguments of the pipeline, once they are what a study can count by; else PromptError.

    A study takes the rows of its runs for its prompts, its seeds for their noise, and looks at their images.

    lens: the lens that runs it.
    call: the arguments.
    count: how many prompts there are.
    images: whether the study looks at images.
    """
    asked = {**lens.defaults, **call}
    refuse_several_images(asked, "every row of a study is one latent of one prompt")
    for name in ("generator", "latents"):
        if asked.get(name) is not None:
            raise PromptError(
                f"{name}= fixes the noise, which a study draws from its seeds: each would give the same image again. "
                "Leave it out, and choose seeds=."
            )
    if images and asked.get("output_type") == "latent":
        raise PromptError(f"output_type={show(asked['output_type'])}: this study looks at images. Leave it out.")
    return StudyCall(Division.of(lens.pipe, lens.family), call, count)


def share_call(lens: DiTLens, batch: SeededPrompts, rows: Sequence[int]) -> dict[str, Any]:
    """The other arguments of the pipeline, for some of the prompts of a batch, by their places in it."""
    return Division.of(lens.pipe, lens.family).share(batch.call, rows, len(batch.prompts))


class SeededPrompts(Protocol):
    """What runs together: prompts, from one seed."""

    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...
    @property
    def call(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that run together from one seed.

    seed: seed of the noise.
    rows: numbers of the prompts in the study.
    prompts: the prompts, one per row.
    call: the other arguments of the pipeline, for these prompts.
    """

    seed: int
    rows: range
    prompts: tuple[str, ...]
    call: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """The batch in the key of a cell."""
        return f"{self.seed}/{self.rows.start}"


@dataclass(kw_only=True)
class BatchRunner:
    """Runs batches, with and without edits.

    Where edits leave the first step alone, a batch is recorded once and its edits start from there, bit for bit.

    lens: the lens that runs them.
    twice: whether every batch has its prompts once more below, untouched, as sources of values.
    late: whether edits leave the first step alone.
    """

    lens: DiTLens
    twice: bool = False
    late: bool = False
    _recorded: tuple[SeededPrompts, Run] | None = field(default=None, init=False)

    def run(self, batch: SeededPrompts, reads: Sequence[Read] = (), *, record: bool = False) -> Run:
        """Runs a batch without edits.

        batch: the prompts and their seed.
        reads: what is read.
        record: whether later runs can start from it.
        """
        prompts, call = self._draw(batch)
        return self.lens.run(prompts, reads, seed=batch.seed, record=record, **call)

    def run_edited(self, batch: SeededPrompts, ops: Sequence[Op]) -> Run:
        """Runs a batch under edits."""
        prefix = None
        if self.late:
            if self._recorded is None or self._recorded[0] != batch:
                self._recorded = (batch, self.run(batch, record=True))
            prefix = self._recorded[1]
        prompts, call = self._draw(batch)
        return self.lens.run(prompts, ops, seed=batch.seed, prefix=prefix, **call)

    def _draw(self, batch: SeededPrompts) -> tuple[Sequence[str], Mapping[str, Any]]:
        """The prompts that are drawn for a batch, and the other arguments of the pipeline for them."""
        if not self.twice:
            return batch.prompts, batch.call
        rows = [*range(len(batch.prompts))] * 2
        return batch.prompts * 2, share_call(self.lens, batch, rows)


def skips_first_step(lens: DiTLens, batch: SeededPrompts, steps: Steps) -> bool:
    """Whether steps leave out the first one of a run.

    lens: the lens that would run it.
    batch: any batch of the study.
    steps: the steps of an edit.
    """
    return min(lens.outline(batch.prompts, seed=batch.seed, **batch.call).select(steps)) > 0


def make_batches(
    prompts: Sequence[str], seeds: Sequence[int], batch_size: int | None, call: StudyCall | None = None
) -> list[PromptBatch]:
    """The batches of a study: for every seed, consecutive prompts.

    prompts: all prompts of the study.
    seeds: seeds of the noise.
    batch_size: number of prompts that run together; None for all of them.
    call: the other arguments of the pipeline.
    """
    size = len(prompts) if batch_size is None else batch_size
    if size < 1:
        raise PromptError(f"batch_size={batch_size} must be at least 1.")
    spans = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    shares = [{} if call is None else call.of(rows) for rows in spans]
    return [
        PromptBatch(seed, rows, tuple(prompts[i] for i in rows), share)
        for seed in seeds
        for rows, share in zip(spans, shares, strict=True)
    ]
