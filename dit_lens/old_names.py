"""Names of the previous release, kept for one more: using one works, and warns of the name it has now."""

from __future__ import annotations

import warnings
from typing import Any

PUBLIC = {"Tap": "PointSpec", "views": "explorer_reads"}  # of dit_lens itself


class OldName:
    """An attribute under its old name.

    new: the name it has now.
    """

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn_of_old_name(self.old, self.new, stacklevel=3)
        return getattr(instance, self.new)


def warn_of_old_name(old: str, new: str, stacklevel: int = 2) -> None:
    """Says how something is called now."""
    warnings.warn(f"{old} is called {new} now; the old name goes with the next release.", FutureWarning, stacklevel)
