"""Carries out one request on the model: nnsight's own reading of it, run on this thread, and what it saved as a file.

One of the few files that know nnsight from inside: it does what nnsight's servers do around a block.
"""

from __future__ import annotations

import gc
import io
import linecache
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

from dit_lens.server.jobs import Job, JobStoppedError

if TYPE_CHECKING:
    from nnsight.modeling.diffusion import DiffusionModel

    from dit_lens.server.jobs import Jobs

MOST_LINES = 1000  # of what a job prints
LONGEST_LINE = 10_000
NO_ROOM = ("can't allocate memory", "not enough memory")  # what torch says of a CPU that has none left


class Work:
    """Runs jobs on one model, one at a time.

    model: nnsight's, with weights.
    timeout: seconds after which a job ends at its next step.
    """

    def __init__(self, model: DiffusionModel, timeout: float):
        self.model, self.timeout = model, timeout

    def __call__(self, job: Job, jobs: Jobs) -> None:
        """Writes what a job saved to its file. Every failure raises, in words for the client."""
        begun = time.monotonic()

        def note(status: Status, description: str) -> None:
            if time.monotonic() - begun > self.timeout:
                raise JobStoppedError(f"Your job exceeded the execution timeout of {self.timeout:g}s.")
            jobs.note(job, status, description)

        try:
            with _own_sources(), _shown_steps(self.model.pipeline, note), _told_prints(note):
                _write(self._run(job), job)
        except JobStoppedError:
            raise
        except (MemoryError, RuntimeError) as problem:  # torch.OutOfMemoryError is one of the latter
            if isinstance(problem, MemoryError) or any(words in str(problem) for words in NO_ROOM):
                raise torch.OutOfMemoryError(f"out of memory: {problem}") from problem
            raise
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, job: Job) -> dict[str, Any]:
        given = self.model._remoteable_persistent_objects()  # noqa: SLF001 as nnsight's servers do
        try:
            tracer = RequestModel.deserialize(job.request.read_bytes(), given, compress=job.compress)
        except MemoryError:
            raise
        except Exception as problem:
            raise ValueError(
                f"the request could not be read: {type(problem).__name__}: {problem}. It was written by {job.sender}; "
                f"here are nnsight {version('nnsight')} and Python {sys.version.split()[0]}."
            ) from problem
        inc()
        try:
            tracer.execute(tracer.info.code)
            saved = _saves()
            return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saved}
        finally:
            dec()


def _write(saved: dict[str, Any], job: Job) -> None:
    """Writes values as nnsight's client reads them. A compressed file has to tell its size at its beginning."""
    draft = job.result.with_suffix(".draft")
    try:
        torch.save(saved, draft)
        if not job.compress:
            draft.replace(job.result)
            return
        with draft.open("rb") as raw, job.result.open("wb") as packed:
            zstandard.ZstdCompressor(level=3).copy_stream(raw, packed, size=draft.stat().st_size)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _own_sources() -> Generator[None]:
    """Forgets the source that came with a job: nnsight finds blocks by file and line, and would mix it up."""
    caches: list[Any] = [linecache.cache, SOURCES, BLOCKS]
    kept = [(cache, dict(cache)) for cache in caches]
    try:
        yield
    finally:
        for cache, before in kept:
            cache.clear()
            cache.update(before)


class _Steps:
    """Stands for a pipeline's progress bar, which it moves after every denoising step."""

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, note: Callable[[Status, str], None]):
        self._iterable, self._note = iterable, note
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n = 0
        self.update(0)

    def update(self, steps: int = 1) -> None:
        self.n += steps
        self._note(Status.RUNNING, f"step {self.n}" + (f" of {self.total}" if self.total else ""))

    def __iter__(self) -> Iterator[Any]:
        for one in self._iterable or ():
            yield one
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        """Nothing is to be put away."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # what else a bar can do: set_description, close


@contextmanager
def _shown_steps(pipe: Any, note: Callable[[Status, str], None]) -> Generator[None]:
    """Tells of every step of the pipeline; a job that is not to go on ends there."""
    pipe.progress_bar = lambda iterable=None, total=None: _Steps(iterable, total, note)
    try:
        yield
    finally:
        del pipe.progress_bar


class _Printed(io.TextIOBase):
    """Sends every line that the thread of a job prints to its client, and what others print where it went before."""

    def __init__(self, note: Callable[[Status, str], None]):
        self._note, self._thread, self._before = note, threading.get_ident(), sys.stdout
        self._line, self._lines = "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread:
            return self._before.write(text)
        *lines, rest = (self._line + text).split("\n")
        self._line = rest[:LONGEST_LINE]
        for line in lines:
            self._lines += 1
            if self._lines <= MOST_LINES:
                self._note(Status.LOG, line[:LONGEST_LINE])
        return len(text)

    def flush(self) -> None:
        if threading.get_ident() != self._thread:
            self._before.flush()


@contextmanager
def _told_prints(note: Callable[[Status, str], None]) -> Generator[None]:
    with redirect_stdout(_Printed(note)):
        yield


def load(pipeline: str | Path, device: Any, dtype: torch.dtype) -> DiffusionModel:
    """Nnsight's model of a pipeline with its weights, as a server holds it; StoreError if there is no such pipeline.

    pipeline: a folder or a repository.
    """
    from nnsight.modeling.diffusion import DiffusionModel

    from dit_lens.core.runs.files import check_pipeline
    from dit_lens.errors import StoreError

    check_pipeline(Path(pipeline))
    try:
        model = DiffusionModel(str(pipeline), dispatch=True, dtype=dtype)
    except (OSError, ValueError) as problem:
        raise StoreError(f"{pipeline} could not be loaded as a diffusers pipeline: {problem}") from problem
    cast("Any", model.pipeline).to(device)
    return model
