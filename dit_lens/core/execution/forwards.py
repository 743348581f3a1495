"""nnsight's place as the forward of modules: taken when a trace begins to run, and given back when it ends.

nnsight puts an object of its own where a module's ``forward`` is looked up, and leaves it there for good. Whatever is
later put in that place, or into the class, would not be called, not even by a pipeline without a lens. A run of a lens
takes the places of those modules alone that its program visits, as each place costs time at every call.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.source import STATE, Controller, State, module_body

from dit_lens.errors import ExecutionError

if TYPE_CHECKING:
    from torch import nn

ENTRY = "model.transformer.input"  # what nnsight calls the place where a transformer is called


class Forwards:
    """What nnsight has put into modules, kept outside of them."""

    def __init__(self) -> None:
        self._states: dict[nn.Module, State] = {}
        self._controllers: dict[nn.Module, Controller] = {}
        self._own: dict[nn.Module, Any] = {}  # the forward that a module has beside its class's
        self.owner: int | None = None  # the thread of the run of a lens that goes on
        self._visited: frozenset[nn.Module] | None = None  # modules of which that run takes the places
        self._disturbed = False

    @contextmanager
    def for_run(self, visited: Iterable[nn.Module]) -> Generator[None]:
        """A run of a lens: a call of the transformer by another thread fails, and so does the run.

        That thread may have set the scheduler that both use. Other modules serve it as they would without a lens.

        visited: the modules that the run reads, edits or skips.
        """
        self.owner, self._disturbed = threading.get_ident(), False
        self._visited = frozenset(visited)
        problem: Exception | None = None
        try:
            yield
        except Exception as raised:
            problem = raised
            if not self._disturbed:
                raise
        finally:
            self.owner = self._visited = None
        if self._disturbed:
            raise ExecutionError(
                "the pipeline was called by another thread in the middle of this run, which may have changed its "
                "scheduler. Nothing was kept of this run; call the pipeline afterwards, or through a lens, whose runs "
                "wait for each other."
            ) from problem

    def serves(self, place: str) -> bool:
        """Whether the thread of the run comes to a place; ExecutionError for another that calls the transformer."""
        if self.owner in (None, threading.get_ident()):
            return True
        if place == ENTRY:
            self._disturbed = True
            raise ExecutionError(
                "this transformer is in use by a run of a lens in another thread. Call the pipeline afterwards, or "
                "through a lens, whose runs wait for each other."
            )
        return False

    @contextmanager
    def wrapping(self, modules: Iterable[nn.Module]) -> Generator[None]:
        """Nnsight may wrap modules inside; afterwards they are as they were before."""
        modules = list(modules)
        kept = {module: vars(module).get("forward") for module in modules}
        for module in modules:
            if module in self._states and STATE not in vars(module):
                vars(module)[STATE] = self._states[module]
        try:
            yield
        finally:
            known, self._states = self._states, {}
            for module in modules:
                state = vars(module).get(STATE)
                if state is None:
                    continue
                self._states[module] = state
                if not _holds_controller(kept[module]):  # nobody else uses nnsight on it
                    del vars(module)[STATE]
                    _put_back(module, kept[module])
            self._controllers = {m: c for m, c in self._controllers.items() if known.get(m) is self._states.get(m)}

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Puts nnsight's forwards where modules look them up; afterwards modules are as they were before.

        In a trace that is no run of a lens any module may be asked for, so all have theirs.
        """
        taken: list[tuple[nn.Module, Any]] = []
        modules = self._states if self._visited is None else self._visited & self._states.keys()
        try:
            for module in modules:
                state = self._states[module]
                own = vars(module).get("forward")
                there = vars(module).setdefault(STATE, state)
                if there is not state:  # a model of nnsight's that somebody else made serves this one too
                    for reference, path, _ in state.routes:
                        if (interleaver := reference()) is not None:
                            there.register(interleaver, path)
                if not _holds_controller(own):
                    taken.append((module, own))
                    vars(module)["forward"] = self._controller(module, there, own)
            yield
        finally:
            for module, own in taken:
                vars(module).pop(STATE, None)
                if isinstance(vars(module).get("forward"), Controller):  # else somebody has replaced it inside
                    _put_back(module, own)

    def _controller(self, module: nn.Module, state: State, own: Any) -> Controller:
        """What runs a module's forward of today, its class's or its own."""
        controller = self._controllers.get(module)
        body = state.original if own is not None and self._own.get(module) is own else module_body(module)
        if controller is None or controller.state is not state or body is not state.original:
            if body is not state.original:
                state.body = state.original = body
                state.sourced, state.compiled = False, None
            controller = self._controllers[module] = Controller(module, state)
        if own is not None:
            self._own[module] = own
        else:
            self._own.pop(module, None)
        return controller


class Taking(Interleaver):
    """An interleaver of nnsight that is in the place of forwards as long as it runs."""

    def __init__(self, forwards: Forwards):
        super().__init__()
        self._forwards, self._open = forwards, ExitStack()

    def __enter__(self) -> Interleaver:
        with ExitStack() as stack:
            stack.enter_context(self._forwards.in_place())
            entered = super().__enter__()
            self._open = stack.pop_all()
        return entered

    def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> bool:
        self._open.close()
        return super().__exit__(exc_type, exc_value, traceback)

    def handle(self, provider: str, value: Any) -> Any:
        """What another thread calls meanwhile is not of this run."""
        owner = self._forwards.owner
        if owner is None or owner == threading.get_ident() or self._forwards.serves(provider):
            return super().handle(provider, value)
        return value

    def check_dangling_mediators(self) -> None:
        """A run that ended early is told by the lens itself, and without advice on other libraries."""
        with warnings.catch_warnings():
            if self._forwards.owner is not None:
                warnings.simplefilter("ignore", UserWarning)
            super().check_dangling_mediators()


def _put_back(module: nn.Module, own: Any) -> None:
    """Gives a module the forward it had: its own, or none beside its class's."""
    if own is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = own


def _holds_controller(forward: Any) -> bool:
    """Whether nnsight's place is taken already, or lies under a wrapper such as accelerate's."""
    while forward is not None and not isinstance(forward, Controller):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None
