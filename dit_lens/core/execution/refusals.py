"""What a pipeline itself refuses about a call, told as an error of this library."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dit_lens.errors import DitLensError, PromptError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def tell_refusals(pipe: DiffusionPipeline) -> Generator[None]:
    """Whatever fails inside before the transformer is first called is the call's fault: a PromptError.

    Errors from then on are those of the run: a function that ops apply, a callback, memory.
    """
    began = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: began.append(True), prepend=True)
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError) as problem:
        if began or isinstance(problem, DitLensError | torch.OutOfMemoryError):
            raise
        raise PromptError(
            f"{type(pipe).__name__} cannot be called like this: {str(problem).rstrip('.')}. Nothing was drawn yet; "
            "change the arguments that concern it."
        ) from problem
    finally:
        handle.remove()
