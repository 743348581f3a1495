"""What the plan expects, compared with what a forward pass has. A difference is a PlanMismatchError that names both.

Torch and plain data only: this module travels to a server by source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dit_lens.families.layout import PlanMismatchError
from dit_lens.families.tensors import sum_bits

if TYPE_CHECKING:
    from dit_lens.core.plan.program import Action, Forward, Part


def check_rows(given: int, rows: int, forward: Forward) -> None:
    """Fails where a forward pass in which something is to be done has other rows than images times branches.

    given: how many rows the transformer is given.
    rows: images of one branch.
    forward: the pass that is expected.
    """
    expected = rows * len(forward["branches"])
    if given != expected:
        raise PlanMismatchError(
            f"the plan expects {expected} rows in a forward pass of step {forward['step']} "
            f"({' and '.join(forward['branches'])} of {rows} {'image' if rows == 1 else 'images'}), but the "
            f"transformer is given {given}. Does a callback end guidance, or change the batch?"
        )


def sum_arguments(arguments: tuple[tuple, dict]) -> dict[str, list[Any]]:
    """What changes with any bit that a forward pass is given. Sums stay where the tensors are, so nothing waits.

    Returns name of the argument -> for every value in it (precision, shape, sums), or the value itself if it is plain.
    """
    args, kwargs = arguments
    named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
    return {name: [sum_value(leaf) for leaf in tree_leaves(value)] for name, value in named.items()}


def sum_value(value: Any) -> Any:
    """A tensor's precision, shape and sums of its bits; of an object its class."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), sum_bits(value.detach()))
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def check_recorded(given: dict[str, list[Any]], recorded: dict[str, list[Any]], forward: Forward) -> None:
    """Fails where a forward pass is given something else than the recorded one, which stands in its place.

    given, recorded: as :func:`sum_arguments` makes them.
    forward: the pass that is expected.
    """
    odd = [name for name in {**recorded, **given} if not is_same(given.get(name), recorded.get(name))]
    if odd:
        raise PlanMismatchError(
            f"the transformer was given other {', '.join(odd)} in step {forward['step']} "
            f"({' and '.join(forward['branches'])}) when the run of prefix= was recorded. A function or a hook that "
            "the pipeline calls was changed since, or computes something else each time. Record it again"
        )


def is_same(given: Any, recorded: Any) -> bool:
    """Whether sums are equal, wherever they lie."""
    if isinstance(given, Tensor) and isinstance(recorded, Tensor):
        return torch.equal(given.cpu(), recorded.cpu())
    if isinstance(given, list | tuple) and isinstance(recorded, list | tuple):
        return len(given) == len(recorded) and all(map(is_same, given, recorded))
    return bool(given == recorded)


def check_sizes(stream: Tensor, action: Action, part: Part, moment: tuple[int, Tensor | None]) -> None:
    """Fails where a part has other tokens or channels than those in which the selections of the ops were counted.

    stream: the tokens of one branch.
    action: what it chooses of them.
    part: whose site it is.
    moment: the step, and which of the tokens a row has, where rows have other numbers of text tokens.
    """
    step, there = moment
    tokens, channels = stream.shape[1:]
    planned = action["text_tokens"]
    if planned is not None and planned != tokens and part["location"]["layout"] != "ragged":
        raise PlanMismatchError(
            f"the pipeline's own tokenisation gives {planned} text tokens, by which ops chose theirs, but "
            f"{part['name']} has {tokens}: where a word is cannot be told there. Use token indices"
        )
    if part["tokens"] not in (None, tokens) or part["channels"] not in (None, channels):
        raise PlanMismatchError(
            f"the plan expects {part['tokens'] or 'any number of'} tokens and {part['channels']} channels at "
            f"{part['name']}, but there are {tokens} tokens and {channels} channels (step {step})"
        )
    highest = action["highest_token"]
    if highest is not None and there is not None:
        tokens = int(there[slice(None) if action["rows"] is None else action["rows"]].sum(1).min())
    if highest is not None and highest >= tokens:
        raise PlanMismatchError(
            f"token {highest} does not exist at {part['name']}, which has {tokens}, 0 to {tokens - 1} (step {step})"
        )


def match_rows(tensor: Tensor, part: Part, rows: int) -> Tensor:
    """Fails where a tensor has other rows than its forward pass.

    What is computed once for all rows, such as the modulation of PRX without guidance, is laid out for each of them.

    part: whose site it is.
    rows: of the forward pass.
    """
    if part["location"]["once"] and tensor.shape[0] == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    if tensor.shape[0] != rows:
        raise PlanMismatchError(
            f"the plan expects {rows} rows at {part['name']}, but the forward pass has {tensor.shape[0]}"
        )
    return tensor
