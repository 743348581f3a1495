"""The names of measures that users bring: each is a column of its own, beside those of the study."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar

from dit_lens.errors import OpError

# What the columns of a summary are called that are made of a measure.
DERIVED = ("_low", "_high", "_top_minus", "_top_minus_low", "_top_minus_high")

COUNT = "n"  # every summary has it

# Arguments that a sweep puts in front of the tables, where they take the place of columns of that name.
_SWEPT: ContextVar[tuple[str, ...]] = ContextVar("swept", default=())


def check_measures(names: Iterable[str], taken: Collection[str], who: str) -> None:
    """Raises OpError for measures of which one would be written over another column, or another over it.

    >>> check_measures(["bright", "arm"], ["prompt", "arm"], "the judge")
    Traceback (most recent call last):
    ...
    dit_lens.errors.OpError: the judge calls a measure 'arm', and the table has another column of that name. ...

    names: of the measures that a user brings.
    taken: columns that the study's table has without them.
    who: what brings them.
    """
    names = list(names)
    others = {*taken, *_SWEPT.get(), COUNT}
    every = {*others, *names}
    made = {name + end: name for name in every for end in DERIVED}
    for name in names:
        if name in others:
            raise OpError(
                f"{who} calls a measure {name!r}, and the table has another column of that name. Choose another name; "
                f"taken are {', '.join(sorted(others))}."
            )
    for name in {*names, *others} & made.keys():
        if name in names or made[name] in names:
            raise OpError(
                f"{who}: {name!r} and {made[name]!r} would be one column, as the summary has {name!r} of "
                f"{made[name]!r}. Choose another name."
            )


@contextmanager
def keep_for_sweep(arguments: Iterable[str]) -> Generator[None]:
    """No measure of a study that runs inside may have the name of a swept argument."""
    outer = _SWEPT.set(tuple(arguments))
    try:
        yield
    finally:
        _SWEPT.reset(outer)
