"""One run at a time on the same parts: other threads wait, and a run inside a run is an error.

A run changes what its pipeline is made of: nnsight stands in the transformer, the scheduler counts steps, encoders and
autoencoders are moved and keep caches. Pipelines may share each of these, so each has a lock, and a run takes them all,
in one order, so that two runs cannot wait for each other.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from itertools import count
from types import FrameType
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from dit_lens.errors import ExecutionError

PATIENCE = (
    20.0  # seconds for which a run may stand still in a wait for a thread before another, waiting for it, gives up
)
LOOK = 0.5  # seconds between two looks at it


class _Lock:
    """Who may use one part of a pipeline. A thread that holds it may take it again."""

    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.running = False
        self.holder: int | None = None  # the thread
        self._lock, self._depth = threading.RLock(), 0

    def take(self) -> None:
        """Waits for its turn; ExecutionError where it would wait for ever."""
        me, still = threading.get_ident(), _Still()
        with _CHANGING:
            _WAITING[me] = self
        try:
            while not self._lock.acquire(blocking=False):
                with _CHANGING:
                    self._refuse_circle(me)
                if self._lock.acquire(timeout=LOOK):
                    break
                if still.seconds(self.holder) > PATIENCE:
                    raise ExecutionError(
                        "a run of the same model waits for another thread, in a function of Apply, a callback or a "
                        f"hook, since {PATIENCE:g} s, and this thread waits for that run. Do not wait inside a run for "
                        "a thread that runs the model: finish the first run, and start the second with what it read."
                    )
        finally:
            with _CHANGING:
                del _WAITING[me]
        self.holder, self._depth = me, self._depth + 1

    def give(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.holder = None
        self._lock.release()

    def _refuse_circle(self, me: int) -> None:
        """ExecutionError if the thread that holds it waits, through others, for this one."""
        lock: _Lock | None = self
        seen: set[int] = set()
        while lock is not None and lock.holder is not None and lock.holder not in seen:
            if lock.holder == me:
                raise ExecutionError(
                    "two threads wait for each other: each runs inside a run of its own, of models that share parts. "
                    "Finish one run before the next is started."
                )
            seen.add(lock.holder)
            lock = _WAITING.get(lock.holder)


class _Still:
    """For how long a thread has stood at one place where it waits for another thread."""

    def __init__(self) -> None:
        self._place: tuple[FrameType, int] | None = None
        self._since = time.monotonic()

    def seconds(self, thread: int | None) -> float:
        frame = None if thread is None else sys._current_frames().get(thread)  # noqa: SLF001 no other way to see it
        waits = frame is not None and frame.f_code.co_filename == threading.__file__
        place = (frame, frame.f_lasti) if frame is not None and waits else None
        if place is None or place != self._place:
            self._place, self._since = place, time.monotonic()
        return time.monotonic() - self._since


_LOCKS: WeakKeyDictionary[Any, _Lock] = WeakKeyDictionary()
_MAKING = threading.Lock()
_WAITING: dict[int, _Lock] = {}  # thread -> what it waits for
_CHANGING = threading.Lock()


class Turn:
    """Who may use a pipeline, which all lenses on any of its parts share.

    parts: gives what a run changes now.
    busy: gives those of them that no other run may use before it is over, not even one of the same thread.
    """

    def __init__(self, parts: Callable[[], Iterable[Any]], busy: Callable[[], Iterable[Any]]) -> None:
        self._parts, self._busy = parts, busy

    @contextmanager
    def hold(self) -> Generator[None]:
        """Keeps other threads away, for what is changed around a run as well."""
        with ExitStack() as held:
            while True:
                locks = _locks_of(self._parts())
                with ExitStack() as taken:
                    for lock in locks:
                        lock.take()
                        taken.callback(lock.give)
                    if _locks_of(self._parts()) == locks:  # else a part was replaced while this thread waited
                        held.push(taken.pop_all())
                        break
            yield

    @contextmanager
    def run(self) -> Generator[None]:
        """One run. Raises ExecutionError inside another run of the same thread, which would wait for itself."""
        with self.hold():
            locks = _locks_of(self._busy())
            if any(lock.running for lock in locks):
                raise ExecutionError(
                    "a run was started inside another run of the same model, by a function of Apply or a callback. "
                    "Finish the first run, and start the second with what it read."
                )
            try:
                for lock in locks:
                    lock.running = True
                yield
            finally:
                for lock in locks:
                    lock.running = False


def _locks_of(parts: Iterable[Any]) -> list[_Lock]:
    """The locks of parts, in the order in which every thread takes them."""
    with _MAKING:
        return sorted({_LOCKS.setdefault(part, _Lock()) for part in parts}, key=lambda lock: lock.number)


Given = ParamSpec("Given")
Returned = TypeVar("Returned")
Owner = TypeVar("Owner", bound=Any)


def in_turn(
    method: Callable[Concatenate[Owner, Given], Returned],
) -> Callable[Concatenate[Owner, Given], Returned]:
    """A lens's method that has the pipeline to itself: what it sees and changes stays as it is until it returns."""

    @functools.wraps(method)
    def hold(lens: Owner, /, *args: Given.args, **kwargs: Given.kwargs) -> Returned:
        with lens.engine.turn.hold():
            return method(lens, *args, **kwargs)

    return hold


def turn_of(pipe: Any) -> Turn:
    """The turn of a pipeline."""

    def parts() -> list[Any]:
        return [part for part in pipe.components.values() if part is not None and _holds_state(part)]

    return Turn(parts, lambda: [pipe.transformer, pipe.scheduler])


def _holds_state(part: Any) -> bool:
    """Whether a component is an object that can be changed: not a number or a text of the configuration."""
    return hasattr(part, "__dict__") and hasattr(part, "__weakref__") and type(part).__hash__ is not None
