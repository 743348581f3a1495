"""How a pipeline class is called, which may be somebody's own and pass its arguments on to a parent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dit_lens.families.module_tree import parameters_of


@lru_cache
def list_calls(kind: type) -> tuple[tuple[type, Callable[..., Any]], ...]:
    """The ``__call__`` of a class, and what it passes ``**kwargs`` on to: each with the class that defines it."""
    found = []
    for base in kind.__mro__:
        call = vars(base).get("__call__")
        if call is None:
            continue
        found.append((base, call))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters_of(call).values()):
            break
    return tuple(found)


def call_parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of a pipeline class, those included that it passes on to its parent.

    >>> class Parent:
    ...     def __call__(self, prompt, steps=28): ...
    >>> class Child(Parent):
    ...     def __call__(self, *args, **kwargs):
    ...         return super().__call__(*args, **kwargs)
    >>> list(call_parameters(Child))
    ['self', 'prompt', 'steps']
    """
    calls = [parameters_of(call) for _, call in list_calls(kind)]
    merged: dict[str, inspect.Parameter] = {}
    for number, parameters in enumerate(calls):
        passed_on = number < len(calls) - 1
        for name, one in parameters.items():
            if not (passed_on and one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)):
                merged.setdefault(name, one)
    return merged


def find_call(kind: type) -> Callable[..., Any]:
    """The ``__call__`` that draws: that of the last parent to which arguments are passed on."""
    return list_calls(kind)[-1][1]
