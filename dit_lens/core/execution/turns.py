"""One run at a time on the same weights: other threads wait, and a run inside a run is an error."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from dit_lens.errors import ExecutionError

if TYPE_CHECKING:
    from torch import nn


class Turn:
    """Who may use one model. A thread that holds it may take it again, but not run while it runs."""

    def __init__(self) -> None:
        self._lock, self._running = threading.RLock(), False

    @contextmanager
    def hold(self) -> Generator[None]:
        """Keeps other threads away, for what is changed around a run as well."""
        with self._lock:
            yield

    @contextmanager
    def run(self) -> Generator[None]:
        """One run. Raises ExecutionError inside another run of the same thread, which would wait for itself."""
        with self._lock:
            if self._running:
                raise ExecutionError(
                    "a run was started inside another run of the same model, by a function of Apply or a callback. "
                    "Finish the first run, and start the second with what it read."
                )
            self._running = True
            try:
                yield
            finally:
                self._running = False


Given = ParamSpec("Given")
Returned = TypeVar("Returned")
Owner = TypeVar("Owner", bound=Any)


def in_turn(
    method: Callable[Concatenate[Owner, Given], Returned],
) -> Callable[Concatenate[Owner, Given], Returned]:
    """A lens's method that has the pipeline to itself: what it sees and changes stays as it is until it returns."""

    @functools.wraps(method)
    def hold(lens: Owner, *args: Given.args, **kwargs: Given.kwargs) -> Returned:
        with lens.engine.turn.hold():
            return method(lens, *args, **kwargs)

    return hold


_TURNS: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()
_MAKING = threading.Lock()


def turn_of(model: nn.Module) -> Turn:
    """The turn of a model, which all lenses on its weights share."""
    with _MAKING:
        return _TURNS.setdefault(model, Turn())
