"""Mappings whose error for a missing key names what is nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class NamedMapping(Mapping[str, Value]):
    """A mapping of which ``in`` and ``get`` look at the keys alone.

    Those of Mapping ask for the item and drop the error, and to look for the nearest name takes a thousand times as
    long as the answer.
    """

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and any(key == known for known in self)

    def get(self, key: str, default: Any = None) -> Any:  # ty: ignore[incompatible-method-override]
        """The item of a key. default: what is returned where there is none."""
        if key not in self:
            return default
        return self[key]
