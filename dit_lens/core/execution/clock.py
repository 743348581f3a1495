"""The time of every forward pass, and whether it is the one that the plan expects.

Torch and plain data only: this module travels to a server by source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_lens.families.layout import PlanMismatchError, argument
from dit_lens.families.transfers import fetch_numbers, is_queued

if TYPE_CHECKING:
    from dit_lens.core.plan.program import Forward, Program


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
        self.levels = list_levels(scheduler, len(getattr(scheduler, "timesteps", ())) - steps, steps)
        self.rounding = measure_rounding(scheduler)

    def note(self, arguments: tuple[tuple, dict], forward: Forward) -> Moment:
        """Takes the time of a forward pass. arguments: of the pass. forward: the pass that is expected."""
        rule, number = self.program["time"], len(self.entries)
        value = argument(arguments, rule["argument"], rule["position"])
        queued = isinstance(value, Tensor) and is_queued(value)
        time = value.detach().flatten()[:1].clone() if isinstance(value, Tensor) else value
        self.pending.append((number, time, is_exact(value)))
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
        self.entries[number] = (step, forward["branches"][0], timestep, sigma)

    def _measure_noise(self, step: int, timestep: float, exact: bool) -> float:
        """The noise level that a time means: the scheduler's own, where both are the same but for rounding."""
        rule = self.program["time"]
        if rule["levels"] is not None:
            return rule["levels"][round(timestep)]
        made = rule["offset"] + rule["scale"] * timestep
        return choose_level(made, self.levels, step, self.rounding if exact else 1e-2)


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


def list_levels(scheduler: Any, skipped: int, steps: int) -> list[float]:
    """The noise level of every step as a scheduler of flows has it; empty where it keeps none. It waits for a GPU.

    skipped: how many of its steps come before them.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas[skipped : skipped + steps].tolist() if isinstance(sigmas, Tensor) and skipped >= 0 else []


def measure_rounding(scheduler: Any) -> float:
    """How far a noise level that is made of a scheduler's time may be from its own: it may keep whole times only."""
    timesteps = getattr(scheduler, "timesteps", None)
    if isinstance(timesteps, Tensor) and not timesteps.is_floating_point():
        return 1.001 / scheduler.config.get("num_train_timesteps", 1000)
    return 1e-4


def choose_level(made: float, own: Sequence[float], step: int, within: float) -> float:
    """The scheduler's own noise level of a step, where that which was made of the time is the same but for rounding.

    made: of the time.
    own: of every step; perhaps none.
    step: its number.
    within: how far rounding may lead.
    """
    return own[step] if step < len(own) and abs(own[step] - made) <= within else made


def is_exact(value: Any) -> bool:
    """Whether a time is not rounded to half precision, in which neighbouring timesteps may be equal."""
    return not isinstance(value, Tensor) or value.dtype not in (torch.float16, torch.bfloat16)
