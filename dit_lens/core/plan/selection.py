"""Which rows, tokens and channels an op means, as explicit indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dit_lens.errors import OpError


@dataclass(frozen=True)
class Batch:
    """What is known of a run's batch before it starts.

    rows: images. grid: (h, w) image tokens, None when only the pipeline knows. text_tokens: length of the text
    stream, None when unknown. find_word: (row, word) -> its text token indices.
    """

    rows: int
    grid: tuple[int, int] | None
    text_tokens: int | None
    find_word: Callable[[int, str], list[int]]

    def tokens(self, stream: str) -> int | None:
        if stream == "txt":
            return self.text_tokens
        return None if self.grid is None else self.grid[0] * self.grid[1]


def _indices(asked: Any, size: int | None, what: str, owner: str, plural: str) -> list[int]:
    """Explicit indices, negative ones counted from the end; OpError when one is out of range or no integer."""
    if isinstance(asked, slice | range):
        asked = _slice(asked, size, what) if isinstance(asked, slice) else asked
    values = asked if isinstance(asked, Sequence) or hasattr(asked, "__iter__") else [asked]
    found = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise OpError(
                f"{what} {value!r} is not an index. Use integers; a bool selection over the grid goes into mask=."
            )
        index = value.__index__()
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


def _slice(asked: slice, size: int | None, what: str) -> range:
    """A slice as numbers; where the size is known only during the run, it must say where it ends."""
    if size is not None:
        return range(size)[asked]
    start, stop, step = asked.start or 0, asked.stop, asked.step or 1
    if stop is None or start < 0 or stop < 0 or step < 1:
        raise OpError(
            f"{what}s {asked!r}: how many there are only the run can tell. Give numbers from 0 up, or a slice that "
            "says where it ends."
        )
    return range(start, stop, step)
