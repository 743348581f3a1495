"""What a pipeline itself refuses about a call, told as an error of this library."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.errors import DitLensError, PromptError
from dit_lens.families.layout import PlanMismatchError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OTHERS = (DitLensError, PlanMismatchError, torch.OutOfMemoryError)  # that say themselves what they are


@contextmanager
def tell_refusals(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Generator[None]:
    """Whatever fails inside before the first block of the transformer is the call's fault: a PromptError.

    What embeds the arguments of the transformer takes what the call gave, such as embeddings of another width. Errors
    from then on are those of the run: a function that ops apply, a callback, memory.

    call: the keyword arguments of the pipeline.
    """
    entered: list[None] = []
    began: list[None] = []
    transformer = pipe.transformer
    lists = [module for module in transformer.modules() if isinstance(module, torch.nn.ModuleList)]

    def enter(*_: Any) -> None:
        (began if entered else entered).append(None)

    handles = [
        transformer.register_forward_pre_hook(enter, prepend=True),
        transformer.register_forward_hook(lambda *_: began.append(None), prepend=True),
        *(
            block.register_forward_pre_hook(lambda *_: began.append(None), prepend=True)
            for blocks in lists
            for block in blocks
        ),
    ]
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RuntimeError) as problem:
        if began or isinstance(problem, OTHERS) or getattr(problem, "__notes__", None):
            raise
        tensors = _list_tensors(call) if entered else ""
        given = f": {tensors}, for a model of {transformer.dtype}" if tensors else ""
        raise PromptError(
            f"{type(pipe).__name__} cannot be called like this: {str(problem).rstrip('.')}. Nothing was drawn yet; "
            f"change the arguments that concern it{given}."
        ) from problem
    finally:
        for handle in handles:
            handle.remove()


def _list_tensors(call: Mapping[str, Any]) -> str:
    """The tensors of a call, with shape and precision."""
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    found = [f"{name}= {list(value.shape)} of {value.dtype}" for name, value in tensors.items()]
    return ", ".join(found)
