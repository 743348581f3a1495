"""One or several of something, each named once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dit_lens.arguments.numbers import as_seed, list_entries
from dit_lens.errors import DitLensError, OpError, PromptError, show


def check_once(
    name: str,
    values: Sequence[Any],
    what: str,
    error: type[DitLensError] = OpError,
    by: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Raises an error for a list that names something twice: its one measurement would count as two.

    >>> check_once("strengths", [0.5, 1, 1.0], "a strength")
    Traceback (most recent call last):
    ...
    dit_lens.errors.OpError: strengths=[0.5, 1, 1.0] names a strength twice, 1.0. Name each once: what is measured ...

    name: of the argument.
    values: what it lists.
    what: one of them, in words.
    error: the error.
    by: value -> what is equal, and can be hashed, where two values are the same.
    """
    seen = set()
    for value in values:
        if (same := by(value)) in seen:
            raise error(
                f"{name}={show(list(values))} names {what} twice, {show(value)}. Name each once: what is measured "
                "again is no second measurement."
            )
        seen.add(same)


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One or several prompts as a list; PromptError if it is empty."""
    found = [prompts] if isinstance(prompts, str) else list_entries(prompts)
    if found is None:
        raise PromptError(f"prompts={show(prompts)} is not a prompt or a list of prompts.")
    if not found:
        raise PromptError("the list of prompts is empty. Pass at least one prompt.")
    for one in found:
        if not isinstance(one, str):
            raise PromptError(f"a prompt must be a string; one is {show(one)} ({type(one).__name__}).")
    check_once("prompts", found, "a prompt", PromptError)
    return found


def as_seeds(seeds: int | Sequence[int]) -> list[int]:
    """One or several seeds as a list; PromptError if it is empty or names a seed twice."""
    found = [as_seed(seed) for seed in as_tuple(seeds)]
    if not found:
        raise PromptError("the list of seeds is empty. Pass at least one seed.")
    check_once("seeds", found, "a seed", PromptError)
    return found


def as_tuple(values: Any) -> tuple[Any, ...]:
    """One or several numbers as a tuple; what lists none stands for itself."""
    found = list_entries(values)
    return (values,) if found is None else tuple(found)
