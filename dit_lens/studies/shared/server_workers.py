"""A study whose cells are made by the server of its lens, in jobs that go on while nobody waits for them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.utils._pytree import tree_leaves

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.files import find_folder, read_versioned, report_damage, report_unwritten, write_json
from dit_lens.errors import DitLensError, ExecutionError, OpError, show, warn
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.server_cells import make_cells
from dit_lens.studies.shared.shares import Opener, Share, StudyJob, Workers
from dit_lens.studies.shared.slots import Slot

if TYPE_CHECKING:
    from dit_lens.core.execution.remote import RemoteEngine
    from dit_lens.lens import DiTLens

FILE, FORMAT = "jobs.json", 1  # in the folder of the study
MOST_CELLS = 16  # in one job, unless a group has more
MOST_JOBS = 64  # that wait at the server


class ServerWorkers(Workers):
    """The server of a lens makes the cells of a study itself, many of them in one job.

        lens = dl.DiTLens.remote("black-forest-labs/FLUX.1-dev", host="http://127.0.0.1:8001", token="...")
        dl.studies.disruption(lens, prompts, out="results/disruption", workers=dl.ServerWorkers(lens))

    The jobs go on while this machine sleeps or is shut down; the same call collects what was made meanwhile, and has
    the numbers that it would have without ``workers=``. The server must be one of ``dit-lens serve``, and judges, masks
    and metrics go there, by their source: they open what they need when they are called.

    lens: the lens that the study is called with.
    """

    @checked
    def __init__(self, lens: DiTLens):
        if lens.engine.server is None:
            raise ExecutionError(
                "ServerWorkers take a lens whose model is on a server, and the model of this one is on this machine. "
                "Leave workers= out, or make the lens with DiTLens.remote."
            )
        self._lens = lens

    @contextmanager
    def open(self) -> Generator[Opener]:
        self._lens.engine.check_weights("cells of a study need")
        yield lambda job, describe: ServerShare(self._lens, job, describe)

    @checked
    def cancel(self, out: str | Path) -> int:
        """Ends the jobs of the study in a folder that were not collected yet; returns how many there were.

        out: the folder of the study.
        """
        jobs = SentJobs(Path(out) / FILE, cast("RemoteEngine", self._lens.engine).host)
        later = cast("RemoteEngine", self._lens.engine).later()
        ended = sum(later.cancel(name) for name in list(jobs.cells))
        for name in list(jobs.cells):
            jobs.forget(name)
        return ended


class SentJobs:
    """The jobs that a server was sent for a study, as its folder keeps them.

    file: where.
    host: the server; jobs of others are not looked at.
    """

    def __init__(self, file: Path, host: str):
        self._file, self._host = file, host
        self._others: dict[str, Any] = {}
        self.cells: dict[str, dict[int, str]] = {}  # name of the job -> number of a cell -> its key
        if find_folder(file).exists():
            with report_damage(file, "Delete it: what was sent is made anew."):
                kept = read_versioned(file, "jobs of a study", FORMAT)["jobs"]
                for name, job in kept.items():
                    if job["host"] == host:
                        self.cells[name] = {int(number): key for number, key in job["cells"].items()}
                    else:
                        self._others[name] = job

    def note(self, name: str, cells: dict[int, str]) -> None:
        """Keeps what was sent."""
        self.cells[name] = cells
        self._write()

    def forget(self, name: str) -> None:
        """Leaves out what was collected or lost."""
        del self.cells[name]
        self._write()

    def _write(self) -> None:
        jobs = {name: {"host": self._host, "cells": cells} for name, cells in self.cells.items()}
        with report_unwritten(self._file):
            if jobs or self._others:
                write_json(self._file, {"format": FORMAT, "jobs": {**self._others, **jobs}})
            else:
                self._file.unlink(missing_ok=True)


class ServerShare(Share):
    """The share of a study whose cells a server makes.

    lens: on the server.
    job: the study.
    describe: returns the model of the lens.
    """

    def __init__(self, lens: DiTLens, job: StudyJob, describe: Callable[[], Mapping[str, Any]]):
        self._lens, self._engine = lens, cast("RemoteEngine", lens.engine)
        self._job = replace(job, model=describe())
        _check_plain(self._job.arguments)
        self._tasks: dict[int, tuple[Slot, Callable[[], None]]] = {}
        self._left: set[int] = set()  # numbers that are not made
        self._new: dict[str, list[int]] = {}  # by group: those that were not sent
        self._jobs: SentJobs | None = None

    def get(self, slot: Slot, advance: Callable[[], None]) -> Cell:
        """A cell that comes later."""
        if slot.folder is None:
            raise OpError(
                "workers=ServerWorkers(lens) keeps what was sent in the folder of the study. Pass out=FOLDER."
            )
        if self._jobs is None:
            self._jobs = SentJobs(slot.folder.parents[1] / FILE, self._engine.host)
        if slot.is_kept:
            advance()
            return slot.later(slot.read)
        slot.check_open()
        self._tasks[slot.number] = slot, advance
        self._left.add(slot.number)
        self._new.setdefault(slot.group, []).append(slot.number)
        return slot.later(lambda: self._wait(slot))

    def finish(self) -> None:
        """Waits for all cells."""
        self._collect_until(lambda: not self._left)

    def _wait(self, slot: Slot) -> Cell:
        self._collect_until(lambda: slot.number not in self._left)
        return slot.read()

    def _collect_until(self, done: Callable[[], bool]) -> None:
        if done() or self._jobs is None:
            return
        self._recognise(self._jobs)
        try:
            while not done():
                self._send(self._jobs)
                self._collect(self._jobs)
        except KeyboardInterrupt:
            warn(
                f"{len(self._jobs.cells)} jobs of this {self._job.study} go on at {self._engine.host}. Call it again "
                "to collect what they make, or end them: dl.ServerWorkers(lens).cancel(out)."
            )
            raise

    def _recognise(self, jobs: SentJobs) -> None:
        """Cells that are on their way need not be sent."""
        sent = {number: key for cells in jobs.cells.values() for number, key in cells.items()}
        for group, numbers in list(self._new.items()):
            self._new[group] = [one for one in numbers if sent.get(one) != self._tasks[one][0].key]
            if not self._new[group]:
                del self._new[group]

    def _send(self, jobs: SentJobs) -> None:
        """Sends what was not sent, several groups of cells in one job."""
        while self._new and len(jobs.cells) < MOST_JOBS:
            wanted: dict[int, str] = {}
            for group in list(self._new):
                if wanted and len(wanted) + len(self._new[group]) > MOST_CELLS:
                    break
                wanted |= {number: self._tasks[number][0].key for number in self._new.pop(group)}
            job = self._job
            given = (job.study, dict(job.arguments), dict(job.model), list(wanted.items()))
            jobs.note(self._engine.submit_task(make_cells.__name__, self._lens, given), wanted)

    def _collect(self, jobs: SentJobs) -> None:
        """Waits for the job that was sent first, and keeps its cells."""
        name, cells = next(iter(jobs.cells.items()))
        later = self._engine.later()
        if later.look(name) is None:  # it expired, or the server was started anew
            jobs.forget(name)
            for number in self._left & cells.keys():
                self._new.setdefault(self._tasks[number][0].group, []).append(number)
            return
        try:
            found = self._engine.collect_task(name)
        except DitLensError:
            news = later.look(name)
            if news is None or news.status.value == "ERROR":
                jobs.forget(name)  # the next call sends it again
            raise
        for number, (files, warnings) in found.items():
            for text in warnings:
                warn(text)
            if number in self._left:
                slot, advance = self._tasks[number]
                slot.take(files)
                self._left.discard(number)
                advance()
        jobs.forget(name)
        later.cancel(name)  # it is forgotten there


def _check_plain(arguments: Mapping[str, Any]) -> None:
    """OpError for an argument that means nothing on another machine."""
    for name, value in arguments.items():
        for leaf in tree_leaves(value):
            if type(leaf).__module__.partition(".")[0] == "dit_lens":
                raise OpError(
                    f"{name}={show(leaf)} does not go to a server, which is given plain data, images, arrays and "
                    "functions. Call the study without workers=."
                )
