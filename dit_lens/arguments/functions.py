"""Functions that users give: whether they can be called as they will be, and their names in messages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


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


def name_of(function: Any) -> str:
    """How a function is called in messages.

    >>> name_of(len), name_of(lambda x: x)
    ('len', '<lambda>')
    """
    name = getattr(function, "__qualname__", None)
    return name.rsplit("<locals>.", 1)[-1] if isinstance(name, str) else repr(function)
