"""Blocks run in the order of their numbers, by which sites are named and visits are planned.

A list of blocks may give them in another order, or one that changes; a run that reads one block would not notice.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from nnsight.intervention.interleaver import OutOfOrderError

from dit_lens.errors import ExecutionError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.core.plan.program import Program


@contextmanager
def refuse_another_order(pipe: DiffusionPipeline, program: Program) -> Generator[None]:
    """One run; ExecutionError if blocks of a list that it visits run in another order than that of their numbers."""
    ran: dict[str, list[int]] = {path: [] for path in _list_stacks(program)}
    wrong: dict[str, list[int]] = {}

    def begin(*_: Any) -> None:
        for numbers in ran.values():
            numbers.clear()

    def note(path: str, number: int) -> None:
        numbers = ran[path]
        if numbers and number < numbers[-1] and number != numbers[0]:  # a stack may run several times in a pass
            wrong.setdefault(path, [*numbers, number])
        numbers.append(number)

    with ExitStack() as stack:
        stack.callback(pipe.transformer.register_forward_pre_hook(begin, prepend=True).remove)
        for path in ran:
            blocks = pipe.transformer.get_submodule(path.removeprefix("transformer."))
            for name, block in blocks.named_children():
                handle = block.register_forward_pre_hook(
                    lambda *_, path=path, number=int(name): note(path, number), prepend=True
                )
                stack.callback(handle.remove)
        try:
            yield
        except OutOfOrderError as problem:
            raise ExecutionError(_say(wrong) or f"{problem}. Nothing was kept of this run.") from problem
    if wrong:
        raise ExecutionError(_say(wrong))


def _say(wrong: dict[str, list[int]]) -> str:
    """The first list whose blocks ran in another order; empty where there is none."""
    return next(
        (
            f"the blocks of pipe.{path} ran in the order {', '.join(map(str, numbers))}, and the plan expects that of "
            "their numbers, by which sites are named. Nothing was kept of this run. Put the blocks into a plain "
            "torch.nn.ModuleList, in the order in which they run."
            for path, numbers in wrong.items()
        ),
        "",
    )


def _list_stacks(program: Program) -> list[str]:
    """The paths of the lists of blocks in which a program visits something."""
    found: dict[str, None] = {}
    for forward in program["forwards"]:
        for visit in forward["visits"]:
            names = visit["module"].split(".")
            numbered = next((i for i, name in enumerate(names) if name.isdecimal()), None)
            if numbered is not None:
                found[".".join(names[:numbered])] = None
    return list(found)
