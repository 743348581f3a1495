"""A worker: it runs the study's own code on a lens of its own, and at each cell waits for what it is to do."""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dit_lens.errors import ExecutionError
from dit_lens.studies.shared.cells import Cell, pack_cell, unpack_cell
from dit_lens.studies.shared.checkpoints import hide_progress_bar
from dit_lens.studies.shared.folders import check_same_model, describe_model, describe_settings
from dit_lens.studies.shared.orders import Failed, Give, Made, Make, Needs, Order, Ready, Reply
from dit_lens.studies.shared.registry import get_study
from dit_lens.studies.shared.shares import Share, StudyJob, share_studies
from dit_lens.studies.shared.slots import Slot

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens


class StudyWorker:
    """Carries out cells of studies, one order after the other. load: function that returns a lens."""

    def __init__(self, load: Callable[[], DiTLens]):
        self._load = load
        self._lens: DiTLens | None = None
        self._job: StudyJob | None = None
        self._pass: StudyPass | None = None

    def begin(self, job: StudyJob) -> Reply:
        """Takes up a study."""
        self.end()
        try:
            self._lens = self._load() if self._lens is None else self._lens
            here = describe_settings(describe_model(self._lens, job.arguments))
            check_same_model(job.model, here)
        except Exception as problem:  # noqa: BLE001 whatever it is, it ends the study where it was called
            return _report(problem)
        self._job = job
        return Ready()

    def answer(self, order: Order) -> Reply:
        """Does what an order says; for a cell that lies behind, the study's code is run anew."""
        if self._lens is None or self._job is None:
            raise ExecutionError("a worker was given an order before it had a study.")
        if isinstance(order, Make) and (self._pass is None or self._pass.position > order.number):
            self.end()
            self._pass = StudyPass(self._lens, self._job)
        if self._pass is None:
            raise ExecutionError("a worker was told to go on with a cell that it had not begun.")
        return self._pass.exchange(order)

    def end(self) -> None:
        """Leaves the study."""
        if self._pass is not None:
            self._pass.end()
        self._pass = None


class _EndedError(BaseException):
    """The pass is not needed any more."""


class StudyPass(Share):
    """One pass through a study's code, in a thread that stands still while there is no order.

    lens: the lens.
    job: the study.
    """

    def __init__(self, lens: DiTLens, job: StudyJob):
        self.position = 0  # the number of the next cell that the code asks for
        self._lens, self._job = lens, job
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._replies: SimpleQueue[Reply] = SimpleQueue()
        self._wanted = Make(-1, "")
        self._thread = threading.Thread(target=self._run, name=f"cells of {job.study}", daemon=True)
        self._thread.start()

    def exchange(self, order: Order) -> Reply:
        """Hands an order to the study's code, and waits for its reply."""
        self._orders.put(order)
        return self._replies.get()

    def end(self) -> None:
        """Leaves the study's code where it is."""
        self._orders.put(None)
        self._thread.join()

    def get(self, slot: Slot, advance: Callable[[], None]) -> Cell:  # noqa: ARG002 its bar is elsewhere
        """Makes a cell if it is the one that is wanted, and waits for the next; any other comes when it is needed."""
        self.position = slot.number + 1
        if slot.number != self._wanted.number:
            return slot.later(lambda: self._need(slot))
        if slot.key != self._wanted.key:
            raise ExecutionError(
                f"cell {slot.number} of {self._job.study} is {self._wanted.key!r} where the study was called, and "
                f"{slot.key!r} for a worker: they run different code, or the code draws random numbers that have no "
                "seed. Install the same dit_lens on all machines."
            )
        cell, reply = self._make(slot)
        self._wanted = self._ask_for_cell(reply)
        return cell

    def skips(self, number: int, count: int) -> bool:
        """Those before the wanted cell can be."""
        return self._wanted.number >= number + count

    def finish(self) -> None:
        """The code has asked for its last cell."""
        raise ExecutionError(
            f"{self._job.study} has {self.position} cells for a worker, and cell {self._wanted.number} was to be made: "
            "workers run other code than the process that called it. Install the same dit_lens on all machines."
        )

    def _run(self) -> None:
        arguments: dict[str, Any] = dict(self._job.arguments)
        try:
            self._wanted = self._ask_for_cell(None)
            with share_studies(lambda *_: self), hide_progress_bar():
                get_study(self._job.study).function(lens=self._lens, **arguments)
        except _EndedError:
            return
        except BaseException as problem:  # noqa: BLE001 whatever it is, it ends the study where it was called
            self._replies.put(_report(problem))

    def _ask(self, reply: Reply | None) -> Order:
        if reply is not None:
            self._replies.put(reply)
        order = self._orders.get()
        if order is None:
            raise _EndedError
        return order

    def _ask_for_cell(self, reply: Reply | None) -> Make:
        order = self._ask(reply)
        if not isinstance(order, Make):
            raise ExecutionError("a worker was told to go on with a cell that it had not begun.")
        return order

    def _need(self, slot: Slot) -> Cell:
        """A cell that another one needs: it is given, or made here as well."""
        order = self._ask(Needs(slot.number))
        if isinstance(order, Give) and order.files is not None:
            return unpack_cell(order.files, slot.study, slot.key)
        cell, reply = self._make(slot)
        self._ask(reply)
        return cell

    def _make(self, slot: Slot) -> tuple[Cell, Made]:
        """Makes a cell; with it comes what the user is to know."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            cell = slot.make()
        said = tuple(dict.fromkeys(str(one.message) for one in warned if one.category is UserWarning))
        return cell, Made(slot.number, pack_cell(slot.key, cell), said)


def _report(problem: BaseException) -> Failed:
    """An error as it can travel, with where it came from as a note."""
    import pickle

    where = "".join(traceback.format_exception(problem))
    try:
        pickle.dumps(problem)
        travelling = problem if isinstance(problem, Exception) else ExecutionError(f"a worker ended: {problem!r}")
    except Exception:  # noqa: BLE001 it may hold anything
        travelling = ExecutionError(f"{type(problem).__name__} in a worker: {problem}")
    travelling.add_note(f"In a worker:\n{where}")
    return Failed(travelling)
