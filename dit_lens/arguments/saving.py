"""What ``.save`` says of objects without a file of their own.

nnsight gives every object a method ``save``, which marks values inside its traces and speaks of those elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from dit_lens.errors import StoreError


def saved_by(instead: str) -> Callable[..., NoReturn]:
    """A method ``save`` that says what to save instead.

    >>> class Sketch:
    ...     save = saved_by("Save its run: sketch.run.save(folder).")
    >>> Sketch().save("file")
    Traceback (most recent call last):
    ...
    dit_lens.errors.StoreError: a Sketch has no file of its own. Save its run: sketch.run.save(folder).
    """

    def save(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise StoreError(f"a {type(self).__name__} has no file of its own. {instead}")

    save.__doc__ = instead
    return save
