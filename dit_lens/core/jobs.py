"""Work that was sent to a server, and is collected later: from here, or from another process by its name."""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from dit_lens.arguments.checks import checked, checked_but
from dit_lens.arguments.saving import saved_by
from dit_lens.core.execution.remote import RemoteEngine, pipeline_without_weights
from dit_lens.core.request.spec import list_unkept, read_spec
from dit_lens.core.runs.files import read_versioned, report_damage, report_unwritten, write_json
from dit_lens.core.runs.provenance import holds_unsaved
from dit_lens.core.session import Session
from dit_lens.errors import DitLensError, ExecutionError, StoreError, nearest

if TYPE_CHECKING:
    from dit_lens.core.plan.program import Program, Store
    from dit_lens.core.runs.run import Run

FORMAT = 1
LOST = "LOST"


def jobs_folder() -> Path:
    """Where what is needed to collect jobs is kept on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_lens" / "jobs"


class Job:
    """A run that was sent to a server, and goes on there whatever happens here; ``lens.submit`` makes one.

    lens: on the server's model.
    batches: the server's names of its batches, in order.
    known: whether the server keeps and ends jobs by their names, as ``dit-lens serve`` does.
    asked: the arguments of the run.
    """

    save = saved_by("What is needed to collect it was kept when it was sent: Job.load(job.id).")

    def __init__(self, lens: Session, batches: tuple[str, ...], asked: Mapping[str, Any], *, known: bool):
        self.id = batches[0]
        self._lens, self._batches, self._known, self._asked = lens, batches, known, dict(asked)
        self._engine = cast("RemoteEngine", lens.engine)

    def __repr__(self) -> str:
        try:
            status = self.status
        except DitLensError as problem:
            status = str(problem)
        return f"Job {self.id!r} on {self._engine.host}: {status}"

    @property
    def status(self) -> str:
        """Where it is, as the server tells it: "QUEUED", "RUNNING", "COMPLETED", "ERROR" ...; "LOST" if it is gone.

        Of several batches the first that is not completed.
        """
        later = self._engine.later()
        for batch in self._batches:
            news = later.look(batch)
            if news is None:
                return LOST if self._known else "SENT"
            if news.status.value != "COMPLETED":
                return news.status.value
        return "COMPLETED"

    @checked_but("timeout")
    def result(self, timeout: float | None = None) -> Run:
        """Waits for the run, and returns it as ``lens.run`` would have; again, too, while the server keeps it.

        timeout: seconds to wait; as long as the lens waits for a run if None.

        Raises ExecutionError where the job failed there, is gone, or is not done in time, when it goes on.
        """
        from dit_lens.core.execution.connection import check_timeout

        later = self._engine.later()
        until = time.monotonic() + (self._engine.timeout if timeout is None else check_timeout(timeout))
        try:
            with _tell_failure(self._engine, self.id):
                saved = [later.wait(batch, self._known, until) for batch in self._batches]
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"stopped waiting for the job {self.id}, which goes on at {self._engine.host}. Collect it later, from "
                f"any process of this machine, with dit_lens.Job.load({self.id!r}).result(), or end it with .cancel()."
            ) from stop
        with suppress(ExecutionError):  # for the provenance alone
            self._engine.ask_about()
        twin = copy.copy(self._lens)
        twin.engine = cast("RemoteEngine", _Found(self._engine, saved))
        return twin.run(**self._asked)

    def cancel(self) -> bool:
        """Ends it: before it begins, or at its next step; the server forgets a result. False if it was gone.

        Raises ExecutionError on a server that takes no cancellation.
        """
        later = self._engine.later()
        ended = [later.cancel(batch) for batch in self._batches]
        return any(ended)

    @classmethod
    @checked
    def load(cls, name: str, *, token: str | None = None) -> Self:
        """A job that was sent from this machine, by its ``id``; the model's weights are not needed.

        name: its id.
        token: what lets in, as in :meth:`DiTLens.remote`; it was not kept.

        Raises StoreError where no such job was sent, or where it had tensors or functions, which are not kept.
        """
        kept = _recall(name)
        if holds_unsaved(kept["spec"]):
            raise StoreError(
                f"the job {name!r} was sent with values that JSON cannot keep, such as functions: "
                f"{', '.join(list_unkept(kept['spec']))}. The process that sent it can collect it, job.result(); from "
                "another one, send the work again."
            )
        ops, call = read_spec(kept["spec"])
        model = pipeline_without_weights(kept["model"], kept["revision"])
        lens = Session(cast("Any", model.pipeline), engine=RemoteEngine(model, kept["host"], token=token), defaults={})
        asked = {**call, "ops": ops, "batch_size": kept["batch_size"]}
        return cls(lens, tuple(kept["batches"]), asked, known=kept["known"])


def keep_job(
    lens: Session, batches: tuple[str, ...], asked: Mapping[str, Any], spec: Mapping[str, Any], *, known: bool
) -> Job:
    """The job of work that was just sent, and what :meth:`Job.load` reads, without the token, as a file.

    lens, batches, asked, known: as of :class:`Job`.
    spec: of the run.
    """
    engine = cast("RemoteEngine", lens.engine)
    file = jobs_folder() / f"{batches[0]}.json"
    kept = {
        "format": FORMAT,
        "batches": list(batches),
        "known": known,
        "host": engine.host,
        "model": str(engine.model.repo_id),
        "revision": engine.model.revision,
        "batch_size": asked.get("batch_size"),
        "sent": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "spec": dict(spec),
    }
    with report_unwritten(file):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(file, kept)
    return Job(lens, batches, asked, known=known)


def _recall(name: str) -> dict[str, Any]:
    """What was kept of a job; StoreError where nothing was, with the names there are."""
    file = jobs_folder() / f"{name}.json"
    if not re.fullmatch(r"[\w.-]{1,128}", name) or not file.is_file():
        last = sorted(jobs_folder().glob("*.json"), key=lambda path: -path.stat().st_mtime)[:5]
        known = nearest(name, [path.stem for path in last], "The last ones are") if last else " There are none."
        raise StoreError(f"no job {name!r} is kept in {jobs_folder()}: it was sent by somebody else, or never.{known}")
    with report_damage(file, "Send the work again."):
        return read_versioned(file, "job", FORMAT)


class _Found:
    """Stands where a lens has a RemoteEngine, and gives what its jobs saved in place of new runs.

    engine: of the lens.
    saved: what each batch saved, in order.
    """

    def __init__(self, engine: RemoteEngine, saved: Sequence[Any]):
        self._engine, self._saved = engine, iter(saved)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self,
        program: Program,
        payload: dict[str, Any],  # noqa: ARG002 as an Engine's
        call: dict[str, Any],  # noqa: ARG002
        reads: dict,
    ) -> tuple[Store, Any]:
        """As :meth:`RemoteEngine.generate`."""
        saved = next(self._saved)
        return self._engine.unpack(program, saved["store"], saved["results"], reads)


@contextmanager
def _tell_failure(engine: RemoteEngine, job: str) -> Generator[None]:
    """Tells the failure of a job inside as that of a run. Memory that ran out is an error: nothing is sent again."""
    try:
        with engine.translate_errors():
            yield
    except torch.OutOfMemoryError as full:
        raise ExecutionError(
            f"memory ran out in the job {job} ({full}). Nothing was kept of it. Submit it again with a smaller "
            "batch_size=, smaller images (height=, width=), or reads reduced where they are (reduce=)."
        ) from full
