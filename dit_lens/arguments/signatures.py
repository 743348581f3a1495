"""Which arguments a call has: those that a function names, and none that it could only pass on to nobody."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dit_lens.errors import CallError, nearest

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
OWNERS = ("self", "cls")
TAKES = "It takes"


def match_call(
    function: Callable[..., Any], signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call by name; a CallError names the one that is unknown, missing or too many.

    function, signature: what is called, and what it takes.
    args, kwargs: what was given.
    """
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as problem:
        where, known = name_call(function), _list_known(signature)
        by_place = [name for name, one in signature.parameters.items() if one.kind in PLACED][: len(args)]
        if twice := [name for name in by_place if name in kwargs and name in known]:
            raise CallError(f"{where} was given {twice[0]} twice, by its place and as {twice[0]}=. Give one.") from None
        passes_on = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
        unknown = [name for name in kwargs if name not in known and (name in OWNERS or not passes_on)]
        if unknown:
            raise CallError(f"{where} has no argument {unknown[0]!r}.{nearest(unknown[0], known, TAKES)}") from None
        raise CallError(f"{where}: {problem}. {TAKES}: {', '.join(known) or 'nothing'}.") from None
    _refuse_set(function, signature, kwargs)
    return given


def sets(*names: str) -> Callable[[F], F]:
    """Marks a function that passes ``**call`` on beside arguments of its own making: those cannot be in the call.

    >>> @told
    ... @sets("ops", "seed")
    ... def measure(prompt, *, seeds=(0,), **call): ...
    >>> measure("a dog", seed=1)
    Traceback (most recent call last):
    ...
    dit_lens.errors.CallError: measure has no argument 'seed': it takes seeds=.
    >>> measure("a dog", ops=[])
    Traceback (most recent call last):
    ...
    dit_lens.errors.CallError: measure has no argument 'ops': it sets this itself. It takes: prompt, seeds, and ...

    names: of the arguments that it sets.
    """

    def mark(function: F) -> F:
        vars(function)["sets"] = names
        return function

    return mark


def _refuse_set(function: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """CallError for an argument that a function takes in passing, and could pass on to nobody."""
    where, known, own = name_call(function), _list_known(signature), vars(function).get("sets", ())
    for name in given:
        if name in known or name not in (*own, *OWNERS, "lens"):
            continue
        alike = [one for one in known if one.removesuffix("s") == name.removesuffix("s")]
        if alike:
            raise CallError(f"{where} has no argument {name!r}: it takes {alike[0]}=.")
        why = ": it sets this itself" if name in own else ""
        raise CallError(f"{where} has no argument {name!r}{why}. {TAKES}: {', '.join(known)}, and what it passes on.")


def _list_known(signature: inspect.Signature) -> list[str]:
    """The arguments that a function names itself."""
    return [name for name, one in signature.parameters.items() if one.kind not in UNNAMED and name not in OWNERS]


def told(function: F) -> F:
    """A function that tells which argument is unknown or missing; what they hold it checks itself."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        match_call(function, signature, args, kwargs)
        return function(*args, **kwargs)

    return call  # ty: ignore[invalid-explicit-return]


def told_fields(cls: C) -> C:
    """A class that tells which argument is unknown or missing; what they hold it checks itself."""
    plain: Any = cls
    plain.__init__ = told(plain.__init__)
    return cls


def name_call(function: Callable[..., Any]) -> str:
    """A function as messages name it: with its class, without the function that it is made in."""
    return getattr(function, "__qualname__", "").removesuffix(".__init__").rsplit("<locals>.", 1)[-1]
