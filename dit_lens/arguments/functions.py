"""Functions that users give: whether they can be called as they will be, and their names in messages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from dit_lens.errors import OpError


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many values; True where Python cannot tell.

    A module of torch counts by its ``forward``: its own call passes everything on.

    >>> takes(lambda x: x, 1), takes(lambda x: x, 2), takes(lambda *x: x, 2)
    (True, False, True)
    """
    try:
        signature = inspect.signature(getattr(function, "forward", function))
    except (TypeError, ValueError):  # some that are written in C
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


@contextmanager
def told_end(whose: str) -> Generator[None]:
    """Turns a StopIteration of a user's function into an OpError: loops on the way would end there, or fail namelessly.

    whose: the function, in words.
    """
    try:
        yield
    except StopIteration as end:
        notes = "".join(f" ({note})" for note in getattr(end, "__notes__", ()))
        raise OpError(
            f"{whose} raised StopIteration{notes}, as next() does where nothing is left. Give it as many values as "
            "there are calls, or a default: next(values, None)."
        ) from end


def name_of(function: Any) -> str:
    """How a function is called in messages.

    >>> name_of(len), name_of(lambda x: x)
    ('len', '<lambda>')
    """
    name = getattr(function, "__qualname__", None)
    return name.rsplit("<locals>.", 1)[-1] if isinstance(name, str) else repr(function)
