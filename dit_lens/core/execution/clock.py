"""The time of every forward pass, and whether it is the one that the plan expects.

Torch and plain data only: this module travels to a server by source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dit_lens.families.layout import PlanMismatchError, argument
from dit_lens.families.levels import (
    choose_level,
    is_exact,
    level_at,
    list_levels,
    measure_rounding,
    pick_time,
    read_schedule,
)
from dit_lens.families.transfers import fetch_numbers, is_queued

if TYPE_CHECKING:
    from dit_lens.core.plan.program import Forward, Program

OUTSIDE = 1e-2  # how far rounding may lead beyond the ends
APART = 1e-2  # how far noise levels of two runs may be apart that count as the same


class Clock:
    """The times of the forward passes so far. A difference to the plan is an error that names both.

    A time on the CPU is compared at once. One on a GPU is compared when it is asked for, or when the run ends: asking
    for it earlier would have the GPU wait.

    program: the rule for the time, and the steps that the plan expects.
    entries: receives (step, first branch, timestep, sigma) of every pass.
    """

    def __init__(self, program: Program, entries: list[tuple[int, str, float, float]]):
        self.program, self.entries = program, entries
        self.pending: list[tuple[int, Any, bool]] = []  # number of the pass, its time, whether that is exact
        self.levels: Sequence[float] = ()  # the scheduler's own noise levels
        self.rounding = 0.0  # how far they may be from what the time means

    def follow(self, scheduler: Any) -> None:
        """Notes the noise levels of a scheduler that has been set up for the run."""
        steps = self.program["forwards"][-1]["step"] + 1
        skipped = len(getattr(scheduler, "timesteps", ())) - steps
        self.levels = list_levels(self.program["time"], *read_schedule(scheduler, skipped, steps))
        self.rounding = measure_rounding(scheduler)

    def note(self, arguments: tuple[tuple, dict], forward: Forward) -> Moment:
        """Takes the time of a forward pass. arguments: of the pass. forward: the pass that is expected."""
        rule, number = self.program["time"], len(self.entries)
        value = argument(arguments, rule["argument"], rule["position"])
        queued = isinstance(value, Tensor) and is_queued(value)
        self.pending.append((number, pick_time(value, rule), is_exact(value)))
        self.entries.append((forward["step"], forward["branches"][0], math.nan, math.nan))
        if not queued:
            self.settle()
        return Moment(self, number, forward)

    def settle(self) -> None:
        """Fetches the times that are not known yet, and compares them with the plan."""
        pending, self.pending = self.pending, []
        tensors = [time for _, time, _ in pending if isinstance(time, Tensor)]
        fetched = iter(fetch_numbers(tensors))
        for number, time, exact in pending:
            timestep = next(fetched) if isinstance(time, Tensor) else float(time)
            self._compare(number, timestep, exact)

    def _compare(self, number: int, timestep: float, exact: bool) -> None:
        program, forward = self.program, self.program["forwards"][number]
        step = forward["step"]
        if number:
            last_step, _, last, _ = self.entries[number - 1]
            same_step, same_time = last_step == step, last == timestep
            if same_step != same_time and (same_step or (exact and step not in program["repeats"])):
                raise PlanMismatchError(
                    f"the plan expects forward pass {number} to be step {step} ({' and '.join(forward['branches'])}), "
                    f"but its time {timestep:.6g} follows {last:.6g}: the pipeline makes another number of forward "
                    "passes per step than the plan"
                )
        sigma = self._measure_noise(step, timestep, exact)
        planned = program["sigmas"]
        if planned is not None and abs(planned[step] - sigma) > (1e-4 if exact else 1e-2):
            raise PlanMismatchError(
                f"the plan expects step {step} at a noise level of {planned[step]:.6g}, by which ops chose their "
                f"steps, but it runs at {sigma:.6g}"
            )
        own = self.levels if number == 0 and self.levels and abs(self.levels[0] - sigma) <= APART else ()
        for source_step, level, name in program["source_levels"]:  # all of them at once, where the scheduler tells
            here = sigma if source_step == step else own[source_step] if source_step < len(own) else level
            if abs(level - here) > APART:
                raise PlanMismatchError(
                    f"{name} takes step {source_step} from a run in which that was at a noise level of {level:.4g}, "
                    f"and it is at {here:.4g} here. Run both with one schedule (scheduler, size, strength=); where "
                    "this is meant, give the tensors themselves: source={site: run[site]}"
                )
        self.entries[number] = (step, forward["branches"][0], timestep, sigma)

    def _measure_noise(self, step: int, timestep: float, exact: bool) -> float:
        """The noise level that a time means: the scheduler's own, where both are the same but for rounding."""
        rule = self.program["time"]
        made = level_at(timestep, rule)
        level = choose_level(made, self.levels, step, self.rounding if exact else 1e-2)
        if not -OUTSIDE <= level <= 1 + OUTSIDE:
            raise PlanMismatchError(
                f"the plan expects step {step} at a noise level from 0 to 1, but its time {timestep:.6g} means "
                f"{level:.6g}: this pipeline with this scheduler tells noise in another way than its family's row says"
            )
        return level


class Moment:
    """When a forward pass takes place.

    clock, number: of the pass.
    forward: the pass that is expected.
    """

    def __init__(self, clock: Clock, number: int, forward: Forward):
        self._clock, self._number = clock, number
        self.step, self.branches = forward["step"], forward["branches"]

    @property
    def timestep(self) -> float:
        """As the transformer is given it."""
        self._clock.settle()
        return self._clock.entries[self._number][2]

    @property
    def sigma(self) -> float:
        """The noise level that it means."""
        self._clock.settle()
        return self._clock.entries[self._number][3]
