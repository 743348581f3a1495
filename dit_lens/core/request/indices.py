"""Indices as they are written by hand, or come out of numpy and torch: one, several, slices, and spans of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from dit_lens.arguments.numbers import MOST, to_int, to_number
from dit_lens.errors import OpError


def is_span(value: Any) -> bool:
    """Whether a value is written as fractions of a run are: a tuple with a number that is not whole by its type."""
    return isinstance(value, tuple) and any(to_int(end) is None and to_number(end) is not None for end in value)


def list_items(values: Iterable[Any], what: str) -> list[Any]:
    """The items of an iterable; OpError if it has none to give, or does not seem to end. what: its name."""
    try:
        given = iter(values)
    except TypeError as problem:  # arrays without an axis look as if they could be gone through
        raise OpError(f"{what} takes a list; it was given {values!r}, a {type(values).__name__}.") from problem
    found = list(itertools.islice(given, MOST + 1))
    if len(found) > MOST:
        raise OpError(f"{what} gives more than {MOST} values. Give a list.")
    return found


def list_indices(asked: Any, what: str) -> list[Any]:
    """What was given as one index or several, as a list, in plain numbers where it came from numpy or torch.

    They stay in the order in which they are named; a set has none, and ascends.

    >>> import numpy as np
    >>> list_indices(3, "rows="), list_indices(np.array([2, 1]), "rows="), list_indices({8, 1}, "rows=")
    ([3], [2, 1], [1, 8])
    """
    if hasattr(asked, "tolist"):
        try:
            asked = asked.tolist()
        except (TypeError, ValueError, RuntimeError) as problem:
            raise OpError(f"{what} is a {type(asked).__name__} without values to read ({problem}).") from problem
    if isinstance(asked, str | bytes | bytearray | Mapping) or not isinstance(asked, Iterable):
        return [asked]
    found = list_items(asked, what)
    unordered = isinstance(asked, set | frozenset) and all(to_int(one) is not None for one in found)
    return sorted(found) if unordered else found


def to_indices(asked: Any, size: int | None, what: str, owner: str, plural: str) -> list[int]:
    """Explicit indices, negative ones counted from the end; OpError if one is out of range or not an integer.

    asked: an index, several, a slice or a range.
    size: how many there are; None where only the run can tell.
    what, owner, plural: for messages, such as "row", "this run has", "images".
    """
    values = list_indices(_slice_to_range(asked, size, what) if isinstance(asked, slice) else asked, f"{what}s=")
    found = []
    for value in values:
        index = to_int(value)
        if index is None:
            raise OpError(
                f"{what} {value!r} is not an index. Use integers; a bool selection over the grid goes into mask=."
            )
        if size is None and index < 0:
            raise OpError(
                f"{what} {index} counts from the end, but how many there are only the run can tell. Count from 0."
            )
        if size is not None and not -size <= index < size:
            raise OpError(f"{what} {index} does not exist: {owner} {size} {plural}, 0 to {size - 1}.")
        found.append(index % size if size is not None else index)
    if len(set(found)) != len(found):
        raise OpError(f"{plural} are named twice in {asked!r}. Name each once.")
    return found


def check_slice(asked: slice, what: str) -> slice:
    """A slice of plain integers; OpError if it is of anything else, or its step is 0."""
    given = (asked.start, asked.stop, asked.step)
    ends = [to_int(end) for end in given]
    if any(end is None for end, one in zip(ends, given, strict=True) if one is not None):
        raise OpError(f"{what}={asked!r} is not a slice of whole numbers.")
    if ends[2] == 0:
        raise OpError(f"{what}={asked!r} has a step of 0, which leads nowhere.")
    return slice(*ends)


def _slice_to_range(asked: slice, size: int | None, what: str) -> range:
    """A slice as numbers; where the size is known only during the run, it must say where it ends."""
    asked = check_slice(asked, f"{what}s")
    if size is not None:
        return range(size)[asked]
    start, stop, step = asked.start or 0, asked.stop, asked.step or 1
    if stop is None or start < 0 or stop < 0 or step < 1:
        raise OpError(
            f"{what}s {asked!r}: how many there are only the run can tell. Give numbers from 0 up, or a slice that "
            "says where it ends."
        )
    return range(start, stop, step)
