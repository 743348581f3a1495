"""The noise levels of a run before it runs: read off the pipeline itself, which is stopped at its first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.execution.refusals import tell_refusals
from dit_lens.families.layout import argument
from dit_lens.families.levels import choose_level, level_at, list_levels, measure_rounding, pick_time, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families.locations import TimeRule

# How pipelines make the transformer's time of a scheduler's timestep.
FORMS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t,
    lambda t: t - 1,  # GLM-Image
    lambda t: t / 1000,
    lambda t: 1 - t / 1000,
)


class _Stop(Exception):  # noqa: N818 not an error: it ends the call at its first step
    pass


def measure_sigmas(
    pipe: DiffusionPipeline, call: Mapping[str, Any], time: TimeRule, steps: int, skipped: int
) -> tuple[float, ...] | None:
    """The noise level of every step; None where the first step does not tell how the others follow.

    The pipeline encodes its texts and images and sets its scheduler up with its own arguments; then the transformer is
    called, and the call ends. Nothing is drawn, and pipeline and random numbers are left as they were.

    pipe: the pipeline.
    call: its keyword arguments; generators among them are copied.
    time: how the transformer's time is read.
    steps: how many steps run.
    skipped: how many of the scheduler's come before them, as with ``strength=``.
    """
    seen: list[tuple[torch.Tensor, list[float], list[float], float]] = []

    def note(arguments: tuple[tuple, dict]) -> None:
        value = torch.as_tensor(argument(arguments, time["argument"], time["position"]))
        scheduler = pipe.scheduler
        timesteps, sigmas = read_schedule(scheduler, skipped, steps)
        own = list_levels(time, timesteps, sigmas)
        seen.append((pick_time(value, time), timesteps, own, measure_rounding(scheduler)))

    call_to_first_step(pipe, call, note)
    if not seen:
        return None
    first, timesteps, own, rounding = seen[0]
    levels = _follow(first, torch.tensor(timesteps).double(), own, time)
    return None if levels is None else tuple(choose_level(one, own, i, rounding) for i, one in enumerate(levels))


def call_to_first_step(
    pipe: DiffusionPipeline, call: Mapping[str, Any], note: Callable[[tuple[tuple, dict]], None] = lambda _: None
) -> None:
    """Calls a pipeline up to its first forward pass; PromptError where it refuses the call.

    pipe: the pipeline.
    call: its keyword arguments; generators among them are copied.
    note: is given the arguments of that pass.
    """

    def stop(_: Any, args: tuple, kwargs: dict) -> None:
        note((args, kwargs))
        raise _Stop

    handle = pipe.transformer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with _keep_pipeline_as_it_is(pipe), suppress(_Stop), tell_refusals(pipe, call):
            pipe(**{name: copy_generators(value) for name, value in call.items()})
    finally:
        handle.remove()
        pipe.maybe_free_model_hooks()


def _follow(first: torch.Tensor, timesteps: torch.Tensor, own: list[float], time: TimeRule) -> tuple[float, ...] | None:
    """The levels by the one form that gives the first time."""
    within = 5e-3 if first.dtype in (torch.float16, torch.bfloat16) else 1e-5
    value = float(first)
    found = {
        tuple(level_at(value, time) for value in form(timesteps).tolist())
        for form in FORMS
        if len(timesteps) and abs(float(form(timesteps[0])) - value) <= within * max(1.0, abs(value))
    }
    if len(found) > 1 and len(own) == len(timesteps):  # in the middle t and 1 - t are equal
        levels_here = torch.tensor(own).double()
        found = {levels for levels in found if torch.allclose(torch.tensor(levels).double(), levels_here, atol=5e-3)}
    return found.pop() if len(found) == 1 else None


@contextmanager
def _keep_pipeline_as_it_is(pipe: DiffusionPipeline) -> Generator[None]:
    """Puts a copy in place of the scheduler, and puts the scheduler and random numbers back."""
    scheduler = pipe.scheduler
    pipe.scheduler = copy.deepcopy(scheduler)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        pipe.scheduler = scheduler


def copy_generators(value: Any) -> Any:
    """The same value, with copies of the generators in it."""
    if isinstance(value, list | tuple):
        return [copy_generators(one) for one in value]
    if not isinstance(value, torch.Generator):
        return value
    return torch.Generator(value.device).set_state(value.get_state())
