"""Runs that start from images of one's own: what they need of a pipeline, and steps at levels of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_lens.core.execution.at_weights import Probe
from dit_lens.errors import FamilyError, PromptError
from dit_lens.families.sources import check_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from dit_lens.core.execution.engine import Engine
    from dit_lens.core.session import Session


def check_start(lens: Session, why: str, instead: str) -> None:
    """Raises FamilyError unless a pipeline samples a flow by Euler's method, from latents it is given.

    why: what needs it, a sentence.
    instead: what else can be done, without a capital.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = lens.pipe
    scheduler, pipeline = pipe.scheduler, lens.family.pipeline(type(pipe))
    euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if not euler or scheduler.config.stochastic_sampling:
        raise FamilyError(
            f"{why}, and this pipeline samples with {'noise of its own' if euler else type(scheduler).__name__}. "
            f"Exchange it, or {instead}."
        )
    check_source(type(pipe), lens.family, "takes_latents")
    if lens.family.grid.axes not in ("tokens", "bchw", "list") or pipeline.takes_latents is None:
        raise FamilyError(
            f"{type(pipe).__name__} does not pass latents= to its transformer as they are, so it cannot start from "
            f"latents made here. {instead[0].upper()}{instead[1:]}."
        )


def list_images(images: Image | Sequence[Image]) -> list[Image]:
    """One image or several, as a list."""
    return list(images) if isinstance(images, Sequence) else [images]


def list_prompts(prompts: Sequence[str] | str | None, images: Sequence[Image]) -> list[str] | None:
    """A prompt for every image, where there are prompts; PromptError for a list of another number."""
    if prompts is None or isinstance(prompts, str):
        return None if prompts is None else [prompts] * len(images)
    if len(prompts) != len(images):
        raise PromptError(
            f"{_count(len(prompts), 'prompt')} for {_count(len(images), 'image')}. Give one prompt for all images, as "
            "a string, or one for each."
        )
    return list(prompts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def turn_off_guidance(lens: Session, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call in which the pipeline makes conditional forward passes only."""
    guidance = lens.family.pipeline(type(lens.pipe)).guidance
    if guidance is None or guidance.scale is None:
        return dict(call)
    unused = dict.fromkeys(name for name in guidance.negative if lens.defaults.get(name) is not None)
    return {**unused, **call, guidance.scale: guidance.above}  # pipelines warn of a negative prompt without guidance


@dataclass(eq=False)
class Schedule(Probe):
    """Has a run take other steps than its scheduler's own.

    once: the noise level of the only one, which leads to the clean image; None: the scheduler's, from clean to noise.
    """

    once: float | None = None

    plans: ClassVar[bool] = True

    @contextmanager
    def around(self, engine: Engine) -> Generator[None]:
        """The scheduler is put back afterwards."""
        with change_schedule(engine.pipe, self.change):
            yield

    def change(self, scheduler: Any) -> None:
        """Replaces the steps that were set."""
        if self.once is None:
            scheduler.timesteps, scheduler.sigmas = scheduler.timesteps.flip(0), scheduler.sigmas.flip(0)
        else:  # neither shifted nor spaced by the scheduler
            scheduler.sigmas = scheduler.sigmas.new_tensor([self.once, 0.0])
            scheduler.timesteps = scheduler.timesteps.new_tensor([self.once * scheduler.config.num_train_timesteps])


@contextmanager
def change_schedule(pipe: DiffusionPipeline, change: Callable[[Any], None]) -> Generator[None]:
    """Lets a function change the steps of the pipeline's scheduler after they are set; puts the scheduler back.

    change: is given the scheduler, whose ``timesteps`` and ``sigmas`` it replaces.
    """
    forward = pipe.scheduler
    scheduler = type(forward).from_config(forward.config)  # of the same class: pipelines ask for it
    ahead = scheduler.set_timesteps

    @functools.wraps(ahead)  # pipelines look at what it takes
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        ahead(*args, **kwargs)
        change(scheduler)

    scheduler.set_timesteps = set_timesteps
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = forward
