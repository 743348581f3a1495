"""What a server was asked to do: jobs that wait in order, run one at a time, and are kept until they expire.

Every job has two files in the folder: its state, as JSON, and what it found. A server that is started again on the same
folder knows what was finished, and says of the rest that it was lost.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nnsight.schema.response import ResponseModel, Status

from dit_lens.core.runs.files import write_text

ENDED = (Status.COMPLETED, Status.ERROR)
STATE, REQUEST, RESULT = ".json", ".request", ".result"


class QueueFullError(Exception):
    """As many jobs wait as a server takes."""


class JobStoppedError(Exception):
    """A job that is not to go on, and why."""


@dataclass
class Job:
    """One request.

    id: a word nobody can guess.
    request: the file of what was sent.
    compress: whether it is compressed, and the result is to be.
    session: the client that waits for it; None: nobody does, and the result is kept.
    origin: the address at which the client sees the server.
    sender: versions of the client, for errors.
    """

    id: str
    request: Path
    compress: bool
    session: str | None
    origin: str
    sender: str
    state: ResponseModel
    stop: str = ""  # why it is not to go on
    changed: float = field(default_factory=time.time)

    @property
    def result(self) -> Path:
        return self.request.with_suffix(RESULT)

    @property
    def ended(self) -> bool:
        return self.state.status in ENDED


class Jobs:
    """The jobs of a server. All methods may be called from any thread.

    folder: for their files.
    work: carries out a job and writes its result; what it raises is told as the job's error.
    tell: function (job, news), which must not wait.
    keep: seconds for which what has ended is kept.
    most: how many may wait.
    """

    def __init__(
        self,
        folder: Path,
        work: Callable[[Job], None],
        tell: Callable[[Job, ResponseModel], None],
        *,
        keep: float,
        most: int = 256,
    ):
        self.folder, self.keep = folder, keep
        self._work, self._tell, self._most = work, tell, most
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changing = threading.Condition(threading.RLock())
        self._closed = ""
        self._recall()
        self._thread = threading.Thread(target=self._run, name="dit-lens jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def new_file(self) -> Path:
        """Where the request of a new job is to be written; its stem is the job's id."""
        return self.folder / f"{secrets.token_urlsafe(24)}{REQUEST}"

    def submit(self, request: Path, *, compress: bool, session: str | None, origin: str, sender: str) -> ResponseModel:
        """Puts a job at the end of the queue; raises QueueFullError where there is no room."""
        with self._changing:
            if self._closed or len(self._waiting) >= self._most:
                raise QueueFullError(self._closed or f"{self._most} jobs wait already, which is as many as it takes")
            received = ResponseModel(
                id=request.stem,
                status=Status.RECEIVED,
                description="Your job has been received.",
                meta={"ends": True},  # it is ended when its client is gone, and by its name
            )
            job = Job(request.stem, request, compress, session, origin, sender, received)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._write(job)
            self._tell_places()
            self._changing.notify()
        return received

    def find(self, name: str) -> Job | None:
        """The job of an id, if it is there and has not expired."""
        with self._changing:
            self._forget()
            return self._jobs.get(name)

    def cancel(self, name: str, why: str) -> bool:
        """Ends a job that waits, and has one that runs end at its next step. Returns whether there was one to end."""
        with self._changing:
            job = self._jobs.get(name)
            if job is None or job.ended:
                return False
            job.stop = why
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, Status.ERROR, why)
                self._tell_places()
            return True

    def leave(self, session: str) -> None:
        """Ends what a client waited for that is gone."""
        for job in [job for job in list(self._jobs.values()) if job.session == session and not job.ended]:
            self.cancel(job.id, "Cancelled: the client that waited for it is gone.")

    def drop(self, job: Job) -> None:
        """Forgets a job whose result was fetched by the client that waited for it."""
        with self._changing:
            self._remove(job)

    def note(self, job: Job, status: Status, description: str) -> None:
        """Tells news of a job that runs. Raises JobStoppedError if it is not to go on."""
        if job.stop:
            raise JobStoppedError(job.stop)
        news = ResponseModel(id=job.id, status=status, description=description)
        if status != Status.LOG:
            job.state = news
        self._tell(job, news)

    def close(self, why: str, patience: float = 10.0) -> None:
        """Ends all jobs, and waits for the one that runs to come to its next step."""
        with self._changing:
            self._closed = why
            for job in list(self._jobs.values()):
                if job is not self._running:
                    self.cancel(job.id, why)
                else:
                    job.stop = why
                    self._tell(job, ResponseModel(id=job.id, status=Status.ERROR, description=why))
            self._changing.notify()
        if self._thread.is_alive():
            self._thread.join(patience)

    @property
    def counts(self) -> dict[str, int]:
        """How many wait, run, and are kept."""
        with self._changing:
            waiting, running = len(self._waiting), int(self._running is not None)
            return {"waiting": waiting, "running": running, "kept": len(self._jobs) - waiting - running}

    def _run(self) -> None:
        while True:
            with self._changing:
                while not self._waiting and not self._closed:
                    self._changing.wait(60)
                    self._forget()
                if self._closed:
                    return
                self._running = job = self._waiting.popleft()
                self._tell_places()
            self._carry_out(job)
            with self._changing:
                self._running = None

    def _carry_out(self, job: Job) -> None:
        import traceback

        try:
            self.note(job, Status.RUNNING, "")
            self._write(job)
            self._work(job)
        except JobStoppedError as stop:
            self._end(job, Status.ERROR, str(stop))
        except BaseException:  # noqa: BLE001 whatever it is, SystemExit of a user's function too, the client is told
            self._end(job, Status.ERROR, traceback.format_exc())
        else:
            self._end(job, Status.COMPLETED, "Your job has been completed.")

    def _end(self, job: Job, status: Status, description: str) -> None:
        with self._changing:
            job.state = ResponseModel(id=job.id, status=status, description=description)
            job.request.unlink(missing_ok=True)
            if status == Status.ERROR:
                job.result.unlink(missing_ok=True)
            job.changed = time.time()
            self._write(job)
        self._tell(job, job.state)

    def _tell_places(self) -> None:
        for place, job in enumerate(self._waiting):
            before = place + (self._running is not None)
            description = "Yours is next." if not before else f"{before} job{'s' * (before > 1)} before yours."
            news = ResponseModel(id=job.id, status=Status.QUEUED, description=description)
            if job.state.status != Status.QUEUED or job.state.description != description:
                job.state = news
                self._tell(job, news)

    def _write(self, job: Job) -> None:
        """Keeps the state of a job that nobody waits for; a client that does would not ask for it again."""
        if job.session is None:
            write_text(job.request.with_suffix(STATE), job.state.model_dump_json())

    def _forget(self) -> None:
        oldest = time.time() - self.keep
        for job in [job for job in self._jobs.values() if job.ended and job.changed < oldest]:
            self._remove(job)

    def _remove(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        for suffix in (STATE, REQUEST, RESULT):
            job.request.with_suffix(suffix).unlink(missing_ok=True)

    def _recall(self) -> None:
        """What a server knew that was here before; what it had not finished was lost with it."""
        for path in self.folder.glob(f"*{STATE}"):
            try:
                state = ResponseModel.model_validate_json(path.read_text())
            except ValueError:  # it was killed as it wrote
                state = ResponseModel(id=path.stem, status=Status.RECEIVED)
            job = Job(path.stem, path.with_suffix(REQUEST), False, None, "", "", state, changed=path.stat().st_mtime)
            self._jobs[job.id] = job
            if not job.ended:
                self._end(job, Status.ERROR, LOST)
        for path in (*self.folder.glob(f"*{REQUEST}"), *self.folder.glob(f"*{RESULT}")):
            if path.stem not in self._jobs:
                path.unlink(missing_ok=True)


LOST = (
    "The server was restarted before this job was done. Nothing of it is left, and nothing of it runs: send it again."
)
