"""What draws noise where no seed reaches: from the random numbers of the process.

Of a scheduler it is known before a run. What else a pipeline does with them, such as an image that it encodes without
the call's generator, is seen by the run: afterwards they are not as they were.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.request.ops import Apply, Op
from dit_lens.errors import OpError, warn
from dit_lens.families.calls import find_call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from dit_lens.core.request.call import Call


def refuse_unseeded(pipe: DiffusionPipeline, *, repeated: bool) -> bool:
    """Tells that ``seed=`` does not fix an image. OpError where a run is to be repeated, else a warning.

    Returns whether it was told.

    pipe: the pipeline, whose scheduler is tried on a copy.
    repeated: whether the run is recorded, or takes steps from one that was.
    """
    if not draws_unseeded(pipe):
        return False
    what = (
        f"{type(pipe.scheduler).__name__} draws noise at every step, and {type(pipe).__name__} gives it no generator, "
        "so it takes the random numbers of the process: seed= does not fix the image, and rows of equal seeds differ"
    )
    if repeated:
        raise OpError(f"{what}. record= and prefix= cannot repeat that. Set a scheduler that draws nothing.")
    warn(f"{what}. Set a scheduler that draws nothing, or compare no two runs or rows.")
    return True


def random_state() -> list[Tensor]:
    """The random numbers of the process: where its generators are, of the processor and of GPUs in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


def tell_draws(
    pipe: DiffusionPipeline, before: Sequence[Tensor], ops: Sequence[Op], call: Call, *, repeated: bool
) -> None:
    """Tells that a run which has ended took random numbers of the process. OpError if it is to be repeated.

    Where functions of the user took part, they may have taken them, for whatever purpose.

    pipe: the pipeline.
    before: the random numbers as :func:`random_state` gave them before the run.
    ops, call: of the run.
    repeated: whether the run is recorded, or takes steps from one that was.
    """
    if any(isinstance(op, Apply) for op in ops) or any(map(callable, call.arguments.values())):
        return
    if all(map(torch.equal, before, random_state())):
        return
    what = (
        f"{type(pipe).__name__} took random numbers of the process in this run, as pipelines do that encode an image "
        "without the generator of the call, and modules in training mode: seed= does not fix the image"
    )
    if repeated:
        raise OpError(f"{what}. record= and prefix= cannot repeat that. Nothing was kept of this run.")
    warn(f"{what}. Call torch.manual_seed(...) before every run that is to be compared.")


def draws_unseeded(pipe: DiffusionPipeline) -> bool:
    """Whether the first steps of the scheduler, as the pipeline calls it, take random numbers of the process.

    >>> from diffusers import FluxPipeline, FlowMatchEulerDiscreteScheduler
    >>> from dit_lens import DiTLens
    >>> pipe = DiTLens.toy().pipe
    >>> draws_unseeded(pipe)
    False
    >>> pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    >>> draws_unseeded(pipe)
    True
    """
    scheduler: Any = copy.deepcopy(pipe.scheduler)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    given = {"generator": torch.Generator()} if takes and _passes_generator(find_call(type(pipe))) else {}
    shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    with torch.random.fork_rng(devices=[]):
        sample = torch.ones(1, 4, 4, 4)
        before = torch.get_rng_state()
        with suppress(Exception):  # a scheduler may ask what only its pipeline gives
            scheduler.set_timesteps(4, **shifted)
            for time in scheduler.timesteps[:2]:
                sample = scheduler.step(torch.ones_like(sample), time, sample, **given)[0]
        return not torch.equal(before, torch.get_rng_state())


@functools.lru_cache(256)  # reading source takes longer than all else that precedes a small run
def _passes_generator(draw: Callable[..., Any]) -> bool:
    """Whether a pipeline's source gives its generator to the scheduler's step. draw: its call."""
    try:
        source = inspect.getsource(draw)
    except (OSError, TypeError):  # a class that was made on the way
        return False
    return any(
        re.search(r"generator|extra_step_kwargs", call) for call in re.findall(r"scheduler\.step\(([^)]*)", source)
    )
