"""The process that holds a study deals its cells to workers, and keeps what they make.

It runs the study's code as they do, and makes no cell. A cell that the code asks for can be dealt from then on; where
the code looks into one, the process waits, and deals meanwhile.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from dit_lens.errors import ExecutionError, warn
from dit_lens.studies.shared.cells import Cell, pack_cell, read_packed, unpack_cell
from dit_lens.studies.shared.orders import Crew, Died, Failed, Give, GoOn, Made, Make, Needs, Ready, Reply
from dit_lens.studies.shared.shares import Share, StudyJob
from dit_lens.studies.shared.slots import LaterCell, Slot

MOST_DEATHS = 5  # of workers at one cell, or of one worker before its first


class Task(NamedTuple):
    """A cell that is to be made. advance: called once it is. cell: what the study's code holds of it."""

    slot: Slot
    advance: Callable[[], None]
    cell: LaterCell


class Dealer(Share):
    """The share of a study whose cells are made by a crew.

    crew: the workers.
    job: the study.
    describe: returns the model of the study's lens.
    """

    def __init__(self, crew: Crew, job: StudyJob, describe: Callable[[], Mapping[str, Any]]):
        self._crew, self._job = crew, replace(job, model=describe())
        self._tasks: dict[int, Task] = {}
        self._left: set[int] = set()  # numbers that are not finished
        self._free: dict[str, deque[int]] = {}  # by group, in the order of the study
        self._holders: dict[str, int] = {}  # group -> the worker that makes its cells
        self._idle: set[int] = set()
        self._doing: dict[int, list[int]] = {worker: [] for worker in range(crew.size)}  # what it needs comes last
        self._last: dict[int, int] = dict.fromkeys(range(crew.size), -1)  # the number that it was given last
        self._waiting: dict[int, list[int]] = {}  # number -> the workers that cannot go on without it
        self._deaths: Counter[str] = Counter()
        for worker in range(crew.size):
            crew.begin(worker, self._job)

    def get(self, slot: Slot, advance: Callable[[], None]) -> Cell:
        """A cell that comes later; what is done meanwhile is kept."""
        cell = slot.later(lambda: self._wait(slot.number))
        self._tasks[slot.number] = Task(slot, advance, cell)
        if slot.is_kept:
            advance()
            return cell
        slot.check_open()
        self._left.add(slot.number)
        self._free.setdefault(slot.group, deque()).append(slot.number)
        self._deal()
        while self._receive(0):
            pass
        return cell

    def finish(self) -> None:
        """Waits for all cells."""
        while self._left:
            self._receive(None)

    def _wait(self, number: int) -> Cell:
        while number in self._left:
            self._receive(None)
        slot, _, cell = self._tasks[number]
        return cell if slot.folder is None else slot.read()

    def _receive(self, timeout: float | None) -> bool:
        """Takes the next reply; whether there was one."""
        found = self._crew.receive(timeout)
        if found is not None:
            self._handle(*found)
        return found is not None

    def _handle(self, worker: int, reply: Reply) -> None:
        if isinstance(reply, Made):
            self._take(worker, reply)
        elif isinstance(reply, Needs):
            self._answer(worker, reply.number)
        elif isinstance(reply, Failed):
            raise reply.problem
        elif isinstance(reply, Died):
            self._bury(worker, reply.why)
        elif isinstance(reply, Ready):
            self._idle.add(worker)
            self._deal()

    def _deal(self) -> None:
        """Gives every worker that has nothing to do its next cell."""
        for worker in sorted(self._idle):
            group = self._choose_group(worker)
            if group is None:
                continue
            self._holders = {one: holder for one, holder in self._holders.items() if holder != worker}
            self._holders[group] = worker
            number = self._free[group][0]
            self._take_out(number)
            self._idle.discard(worker)
            self._doing[worker].append(number)
            self._last[worker] = number
            self._crew.send(worker, Make(number, self._tasks[number].slot.key))

    def _choose_group(self, worker: int) -> str | None:
        """The group of a worker's next cell: its own, or else the first that nobody else is at.

        One further on in the study is better, as a worker comes to a cell behind it by running the code anew.
        """
        own = next((group for group in self._free if self._holders.get(group) == worker), None)
        if own is not None:
            return own
        open_to = [group for group in self._free if group not in self._holders]
        return next((one for one in open_to if self._free[one][0] > self._last[worker]), next(iter(open_to), None))

    def _take_out(self, number: int) -> None:
        """A cell that is not to be dealt again."""
        group = self._tasks[number].slot.group
        self._free[group].remove(number)
        if not self._free[group]:
            del self._free[group]

    def _take(self, worker: int, made: Made) -> None:
        """Keeps a cell, once its worker has something else to do."""
        self._doing[worker].remove(made.number)
        if self._doing[worker]:
            self._crew.send(worker, GoOn())
        else:
            self._idle.add(worker)
            self._deal()
        for text in made.warnings:
            warn(text)
        if made.number in self._left:
            task = self._tasks[made.number]
            task.slot.take(made.files)
            if task.slot.folder is None:
                task.cell.fill(unpack_cell(made.files, task.slot.study, task.slot.key))
            self._left.discard(made.number)
            task.advance()
        for other in self._waiting.pop(made.number, []):
            self._crew.send(other, Give(made.files))

    def _answer(self, worker: int, number: int) -> None:
        """What a worker that needs a cell does: takes it, waits for another worker, or makes it."""
        if number not in self._left:
            self._crew.send(worker, Give(self._pack(number)))
        elif any(number in doing for doing in self._doing.values()):
            self._waiting.setdefault(number, []).append(worker)
        else:
            self._take_out(number)
            self._doing[worker].append(number)
            self._crew.send(worker, Give(None))

    def _pack(self, number: int) -> Mapping[str, bytes]:
        """A finished cell, as it travels."""
        slot, _, cell = self._tasks[number]
        return pack_cell(slot.key, cell) if slot.folder is None else read_packed(slot.folder)

    def _bury(self, worker: int, why: str) -> None:
        """Gives what a worker was at back, and takes another one in its place."""
        lost, self._doing[worker] = self._doing[worker], []
        self._idle.discard(worker)
        self._holders = {group: holder for group, holder in self._holders.items() if holder != worker}
        self._waiting = {number: [one for one in some if one != worker] for number, some in self._waiting.items()}
        for name in [self._tasks[number].slot.key for number in lost] or [f"worker {worker}"]:
            self._deaths[name] += 1
            if self._deaths[name] == MOST_DEATHS:
                where = f"at the cell {name!r}" if lost else "before its first cell"
                raise ExecutionError(
                    f"{MOST_DEATHS} workers died {where} of {self._job.study}, the last one as: {why}. The finished "
                    "cells are kept in out=, if it was given. Look for what ends it, such as too little memory."
                )
        for number in lost:
            self._give_back(number)
        self._last[worker] = -1
        self._crew.begin(worker, self._job)
        self._deal()

    def _give_back(self, number: int) -> None:
        """A cell whose worker died goes to one that waits for it, or to the next that has nothing to do."""
        if waiting := self._waiting.pop(number, []):
            first, *others = waiting
            self._waiting[number] = others
            self._doing[first].append(number)
            self._crew.send(first, Give(None))
        else:
            group = self._tasks[number].slot.group
            self._free = {group: deque([number, *self._free.pop(group, ())]), **self._free}
