"""Mappings whose error for a missing key names what is nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


class NamedMapping(Mapping[str, Value]):
    """A mapping of which ``in`` looks at the keys alone.

    That of Mapping asks for the item and drops the error, and to look for the nearest name takes a thousand times as
    long as the answer.
    """

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and any(key == known for known in self)
