"""What the process that holds a study and its workers say to each other: orders, and one reply to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from dit_lens.studies.shared.shares import StudyJob


class Make(NamedTuple):
    """Order: make the cell of a number. key: its name, which must be the same there."""

    number: int
    key: str


class Give(NamedTuple):
    """Order: go on with the cell that was asked for. files: it, packed; None: make it yourself."""

    files: Mapping[str, bytes] | None


class GoOn(NamedTuple):
    """Order: go on with the cell that is in work, now that one that it needed is made."""


class Ready(NamedTuple):
    """Reply: the worker has its lens."""


class Made(NamedTuple):
    """Reply: a cell is made. files: it, packed. warnings: what was warned of on the way."""

    number: int
    files: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()


class Needs(NamedTuple):
    """Reply: another cell is needed first."""

    number: int


class Failed(NamedTuple):
    """Reply: an error that would have ended the study here as well."""

    problem: Exception


class Died(NamedTuple):
    """Said of a worker that cannot reply any more. why: in words."""

    why: str


Order = Make | Give | GoOn
Reply = Ready | Made | Needs | Failed | Died


class Crew(Protocol):
    """Some workers, by their numbers from 0. Each has one order at a time."""

    size: int

    def begin(self, worker: int, job: StudyJob) -> None:
        """Lets a worker take up a study; one that died is there anew. It replies ``Ready``."""
        ...

    def send(self, worker: int, order: Order) -> None:
        """Gives an order to a worker that has replied to the one before."""
        ...

    def receive(self, timeout: float | None) -> tuple[int, Reply] | None:
        """The next reply and who gave it; None after a timeout in seconds."""
        ...
