"""What a pipeline itself refuses about a call, or fails in, told as an error of this library."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.execution import execute
from dit_lens.core.runs.values import in_packages
from dit_lens.errors import DitLensError, ExecutionError, PromptError
from dit_lens.families.arguments import explain_unread
from dit_lens.families.layout import PlanMismatchError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OTHERS = (DitLensError, PlanMismatchError, torch.OutOfMemoryError)  # that say themselves what they are


@contextmanager
def tell_refusals(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Generator[None]:
    """Whatever fails inside before the first block of the transformer is the call's fault: a PromptError.

    What embeds the arguments of the transformer takes what the call gave, such as embeddings of another width. What
    fails from then on in the pipeline's own code, as with negative embeddings of another width, is an ExecutionError.
    Functions of the user, such as those that ops apply, and a lack of memory raise their own errors.

    call: the keyword arguments of the pipeline.
    """
    entered: list[None] = []
    began: list[None] = []
    transformer = pipe.transformer
    lists = [module for module in transformer.modules() if isinstance(module, torch.nn.ModuleList)]

    def enter(*_: Any) -> None:
        (begin if entered else entered.append)(None)

    def begin(*_: Any) -> None:
        """From here on nothing more is asked, and hooks would cost time at every block."""
        began.append(None)
        for handle in handles:
            handle.remove()

    handles = [
        transformer.register_forward_pre_hook(enter, prepend=True),
        transformer.register_forward_hook(begin, prepend=True),
        *(block.register_forward_pre_hook(begin, prepend=True) for blocks in lists for block in blocks),
    ]
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError) as problem:
        if (
            isinstance(problem, OTHERS)
            or getattr(problem, "__notes__", None)
            or (began and not _is_of_packages(problem))
        ):
            raise
        tensors = _list_tensors(call) if entered else ""
        given = f": {tensors}, for a model of {transformer.dtype}" if tensors else ""
        if began:
            raise ExecutionError(
                f"{type(pipe).__name__} fails in its own code ({type(problem).__name__}: {str(problem).rstrip('.')}). "
                f"Nothing was kept of this run; change the arguments that concern it{given}."
            ) from problem
        if call.get("prompt") is not None and (why := explain_unread(pipe)):
            raise PromptError(why) from problem
        raise PromptError(
            f"{type(pipe).__name__} cannot be called like this: {str(problem).rstrip('.')}. Nothing was drawn yet; "
            f"change the arguments that concern it{given}."
        ) from problem
    finally:
        for handle in handles:
            handle.remove()


def _is_of_packages(problem: Exception) -> bool:
    """Whether nothing that a user wrote or gave took part in an error: all code in its traceback is of packages."""
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(problem.__traceback__)}
    return execute.__file__ not in files and all(map(in_packages, files))


def _list_tensors(call: Mapping[str, Any]) -> str:
    """The tensors of a call, with shape and precision."""
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    found = [f"{name}= {list(value.shape)} of {value.dtype}" for name, value in tensors.items()]
    return ", ".join(found)
