"""Time: the steps of a run, the branches of each, their noise levels, and what ``steps=`` and ``branch=`` select."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from dit_lens.arguments.numbers import to_int, to_number
from dit_lens.core.request.call import default_argument
from dit_lens.core.request.indices import check_slice, is_span, list_indices
from dit_lens.core.request.json_values import SigmaInterval
from dit_lens.errors import OpError, PromptError, nearest
from dit_lens.families.calls import find_call
from dit_lens.families.levels import list_levels, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.core.request.ops import Steps
    from dit_lens.families import Family, Guidance, Pipeline
    from dit_lens.families.locations import TimeRule

Measure: TypeAlias = "Callable[[int, int], tuple[float, ...] | None]"


@dataclass(frozen=True)
class Timeline:
    """The steps of one run.

    steps: how many denoising steps run (evaluations of the model, for a scheduler of second order).
    forwards: the forward passes of one step, each the branches of its rows in order.
    known_sigmas: the noise level of each step, where the scheduler has a table of them.
    repeats: steps at the same timestep as the one before.
    rule: what the transformer's time means, and what it predicts.
    measure: reads the noise levels off the pipeline, where they are not known.
    guided: whether the pipeline has a guidance that gives this transformer an unconditional branch.
    """

    steps: int
    forwards: tuple[tuple[str, ...], ...]
    known_sigmas: tuple[float, ...] | None = None
    repeats: tuple[int, ...] = ()
    rule: TimeRule | None = None
    measure: Callable[[], tuple[float, ...] | None] | None = field(default=None, repr=False, compare=False)
    guided: bool = True

    @cached_property
    def sigmas(self) -> tuple[float, ...] | None:
        """The noise level of each step; None where it is not known before the run.

        The first look may take as long as the encoding of a prompt: the pipeline is called up to its first step.
        """
        return self.known_sigmas if self.known_sigmas is not None or self.measure is None else self.measure()

    @property
    def kind(self) -> str | None:
        """What is predicted: "flow", "epsilon", "v_prediction", or None for anything else."""
        return None if self.rule is None else self.rule["kind"]

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of one step, in the order in which they are computed."""
        return tuple(branch for branches in self.forwards for branch in branches)

    def locate(self, branch: str) -> tuple[int, int]:
        """Which forward pass of a step computes a branch, and which of its branches it is."""
        return next((i, found.index(branch)) for i, found in enumerate(self.forwards) if branch in found)

    def select(self, steps: Steps) -> list[int]:
        """The step indices that ``steps=`` means, in the order in which they are named.

        >>> timeline = Timeline(4, (("cond",),), (1.0, 0.75, 0.5, 0.25))
        >>> timeline.select((0.0, 0.5)), timeline.select([-1, 0]), timeline.select(SigmaInterval(0.8, 0.3))
        ([0, 1], [3, 0], [1, 2])
        """
        chosen = self._select(steps)
        if not chosen:
            levels = (
                ""
                if not isinstance(steps, SigmaInterval) or self.sigmas is None
                else f" with noise levels {', '.join(f'{level:.3f}' for level in self.sigmas)}"
            )
            raise OpError(
                f"steps={steps!r} selects none of the {self.steps} steps of this run (0 to {self.steps - 1}{levels})."
            )
        return list(dict.fromkeys(chosen))

    def _select(self, steps: Steps) -> list[int]:
        whole = range(self.steps)
        if steps is None:
            return list(whole)
        if isinstance(steps, SigmaInterval):
            if self.sigmas is None:
                raise OpError(
                    "this pipeline's noise levels are not known before it runs. "
                    "Give steps= as indices or fractions instead."
                )
            return [step for step in whole if steps.low < self.sigmas[step] <= steps.high]
        if isinstance(steps, slice):
            return list(whole[check_slice(steps, "steps")])
        if isinstance(steps, tuple) and is_span(steps):
            start, stop = map(to_number, steps) if len(steps) == 2 else (None, None)
            if start is None or stop is None or not 0 <= start < stop <= 1:
                raise OpError(
                    f"steps={steps!r} is not a span of the run. "
                    "Write two fractions such as (0.0, 0.5), the end excluded."
                )
            return [step for step in whole if start <= step / self.steps < stop]
        return [self._index(step) for step in list_indices(steps, "steps=")]

    def _index(self, step: Any) -> int:
        index = to_int(step)
        if index is None:
            raise OpError(
                f"steps={step!r} is not a valid step. Use an index, a list or slice of them, fractions (0.0, 0.5) or "
                "dit_lens.sigma(1.0, 0.3)."
            )
        if not -self.steps <= index < self.steps:
            raise OpError(
                f"step {index} does not exist: this run has {self.steps} steps, 0 to {self.steps - 1}. "
                "Raise num_inference_steps or change steps=."
            )
        return index % self.steps

    def select_branches(self, asked: str) -> list[str]:
        """The branches that "cond", "uncond" or "both" means, in the order in which they are computed."""
        if not isinstance(asked, str) or asked not in ("cond", "uncond", "both"):
            raise OpError(f"branch={asked!r} is not a valid branch.{nearest(str(asked), ('cond', 'uncond', 'both'))}")
        if asked == "both":
            return list(self.branches)
        if asked not in self.branches:
            how = (
                "guidance is off. Turn it on (lens shows how), for instance by a guidance scale above 1 and a negative "
                "prompt."
                if self.guided
                else "this pipeline never gives an unconditional branch to this transformer."
            )
            raise OpError(f"this call has no {asked!r} branch, only {', '.join(self.branches)}: {how}")
        return [asked]


def make_timeline(
    pipe: DiffusionPipeline,
    family: Family,
    rule: TimeRule,
    call: Mapping[str, Any],
    tokens: int | None,
    measure: Measure | None,
) -> Timeline:
    """How a pipeline will denoise.

    pipe: the pipeline.
    family: of its transformer.
    rule: of its time.
    call: its own keyword arguments, ``num_inference_steps`` included.
    tokens: the number of image tokens, on which some schedules depend; None if unknown.
    measure: (steps, steps before them) -> the noise levels of a flow, as the pipeline sets them; None where the
      pipeline cannot be asked, as its model is on a server: then they are computed as FLUX does.
    """
    pipeline = family.pipeline(type(pipe))
    timeline = _make_timeline(pipe, pipeline, rule, call, tokens, measure)
    return replace(timeline, guided=pipeline.guidance is not None)


def _make_timeline(
    pipe: DiffusionPipeline,
    pipeline: Pipeline,
    rule: TimeRule,
    call: Mapping[str, Any],
    tokens: int | None,
    measure: Measure | None,
) -> Timeline:
    _refuse(pipe, pipeline, call)
    given = call.get("sigmas") if call.get("sigmas") is not None else call.get("timesteps")
    total = len(given) if given is not None else call["num_inference_steps"]
    skipped = count_skipped(pipe, pipeline, call, total)
    forwards = plan_forwards(pipe, pipeline.guidance, call)
    order, table = getattr(pipe.scheduler, "order", 1), rule["levels"] is not None
    if order > 1 or (table and given is None):  # the scheduler alone decides how often it calls the model
        times, own = _set_timesteps(pipe.scheduler, total, skipped * order)
        repeats = tuple(i for i in range(1, len(times)) if times[i] == times[i - 1])
        sigmas = tuple(list_levels(rule, times, own)) if table else None
        asked = None if measure is None else partial(measure, len(times), skipped * order)
        return Timeline(len(times), forwards, sigmas, repeats, rule, asked)
    if measure is not None:
        asked = partial(measure, total - skipped, skipped)
        return Timeline(total - skipped, forwards, None, (), rule, asked)
    sigmas = _compute_sigmas(pipe, call, total, tokens)
    return Timeline(total - skipped, forwards, None if sigmas is None else sigmas[skipped:], (), rule)


def count_skipped(pipe: DiffusionPipeline, pipeline: Pipeline, call: Mapping[str, Any], total: int) -> int:
    """How many of the scheduler's steps are left out in front, as by the ``get_timesteps`` of pipelines."""
    strength = call.get(pipeline.strength, default_argument(pipe, pipeline.strength))
    if strength is None:
        return 0
    run = min(total * strength, total)
    skipped = max(total - int(run), 0) if pipeline.whole_strength else int(max(total - run, 0))
    if skipped == total:
        raise PromptError(f"{pipeline.strength}={strength} with {total} steps leaves none to run. Raise one of them.")
    return skipped


def plan_forwards(
    pipe: DiffusionPipeline, guidance: Guidance | None, call: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """The forward passes of one step: those of ``guidance`` where it is on, else a conditional one."""
    if guidance is None or (guidance.distilled is not None and pipe.config.get(guidance.distilled)):
        return (("cond",),)
    negative = not guidance.negative or any(call.get(name) is not None for name in guidance.negative)
    return guidance.forwards if negative and _guidance_scale(pipe, guidance, call) > guidance.above else (("cond",),)


def _guidance_scale(pipe: DiffusionPipeline, guidance: Guidance, call: Mapping[str, Any]) -> float:
    if guidance.scale is None:
        return float("inf")
    value = call.get(guidance.scale)
    value = default_argument(pipe, guidance.scale) if value is None else value
    return value if isinstance(value, int | float) else guidance.above


def _refuse(pipe: DiffusionPipeline, pipeline: Pipeline, call: Mapping[str, Any]) -> None:
    """Refuses, before a run starts, what would change the forward passes inside it."""
    for one in pipeline.refuses:
        value = call.get(one.argument, default_argument(pipe, one.argument))
        if value is not None and (one.off is None or value != one.off):
            given = f"{one.argument}=" if one.off is None else f"{one.argument}={value}"
            remedy = "Leave it out" if one.off is None else f"Pass {one.argument}={one.off}"
            raise PromptError(f"{given} cannot be followed with {type(pipe).__name__}: {one.reason}. {remedy}.")
    guidance = pipeline.guidance
    cut = None if guidance is None or guidance.cut is None else call.get(guidance.cut)
    if guidance is not None and cut is not None and cut < 1:
        raise PromptError(
            f"{guidance.cut}={cut} ends guidance in the middle of a run, so that the number of branches changes. "
            "Leave it at 1, and choose steps= in the ops instead."
        )


def _set_timesteps(scheduler: Any, steps: int, skipped: int) -> tuple[list[float], list[float]]:
    """The timesteps and sigmas that a copy of the scheduler sets. Which are equal does not depend on ``mu``.

    skipped: how many are left out in front.
    """
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        raise PromptError(
            f"{type(scheduler).__name__} cannot make {steps} steps: {str(problem).rstrip('.')}. Change "
            "num_inference_steps=, or the scheduler."
        ) from problem
    return read_schedule(scheduler, skipped, len(scheduler.timesteps) - skipped)


def _compute_sigmas(
    pipe: DiffusionPipeline, call: Mapping[str, Any], steps: int, tokens: int | None
) -> tuple[float, ...] | None:
    """The noise levels that a copy of the scheduler sets; None where they cannot be known before the run.

    As FluxPipeline.__call__: equal steps from 1 to 1 / steps, shifted by ``mu``, which grows with the number of image
    tokens (arXiv 2403.03206, section 5.3.2). Both functions are those of the pipeline's own module.

    pipe, call: the pipeline and its arguments.
    steps: how many there are.
    tokens: image tokens; None if unknown.
    """
    import numpy as np

    module = inspect.getmodule(find_call(type(pipe)))
    shift, retrieve = getattr(module, "calculate_shift", None), getattr(module, "retrieve_timesteps", None)
    scheduler = copy.deepcopy(pipe.scheduler)
    config = scheduler.config
    if shift is None or retrieve is None or tokens is None or "shift" not in config:
        return None
    if len(inspect.signature(shift).parameters) != 5:
        return None
    mu = shift(
        tokens,
        config.get("base_image_seq_len", 256),  # these are the defaults of FluxPipeline
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    levels = call.get("sigmas")
    levels = np.linspace(1.0, 1 / steps, steps) if levels is None else levels
    retrieve(scheduler, steps, "cpu", sigmas=None if config.get("use_flow_sigmas") else levels, mu=mu)
    return tuple(float(level) for level in scheduler.sigmas[:steps])
