"""Workers of a Ray cluster: an actor each, with a lens of its own, on as many machines as there are."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import check_number
from dit_lens.errors import ExecutionError, OpError, warn
from dit_lens.studies.shared.dealer import Dealer
from dit_lens.studies.shared.orders import Died, Failed, Order, Reply
from dit_lens.studies.shared.shares import Opener, StudyJob, Workers
from dit_lens.studies.shared.worker import StudyWorker

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens

MOST_WORKERS = 100_000


class RayWorkers(Workers):
    """Actors of a Ray cluster that make the cells of a study: one lens and, where there are any, one GPU each.

        workers = dl.RayWorkers(partial(dl.DiTLens.from_pretrained, "black-forest-labs/FLUX.1-dev"), num=8)
        dl.studies.disruption(lens, prompts, out="results/disruption", workers=workers)

    The study is called as ever, has the same numbers, and goes on from the same folder. A worker that dies is replaced,
    and the cell that it was at is made by another. It takes the extra ``ray``: ``pip install "dit-lens[ray]"``.

    load: function without arguments that returns the lens; it runs in every worker, and must make the lens that the
      study is called with.
    num: how many workers.
    address: of the cluster, such as "auto" on one of its machines; None starts Ray on this machine, for this call.
    gpus: GPUs of each worker, which can be a part of one; by default 1 where the cluster has any, else 0.
    """

    @checked
    def __init__(self, load: Callable, num: int, address: str | None = None, gpus: float | None = None):
        check_number("num", num, 1, MOST_WORKERS)
        if gpus is not None:
            check_number("gpus", gpus, 0, MOST_WORKERS)
        self.load: Callable[[], DiTLens] = load
        self.num, self.address, self.gpus = num, address, gpus

    @contextmanager
    def open(self) -> Generator[Opener]:
        ray = _import_ray()
        with self._connect(ray):
            crew = RayCrew(ray, self.load, self.num, self._choose_gpus(ray.cluster_resources()))
            try:
                yield partial(Dealer, crew)
            finally:
                crew.close()

    @contextmanager
    def _connect(self, ray: Any) -> Generator[None]:
        """A cluster that the process is connected to stays; one that is started here ends with the study."""
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of what runs here
        options = {} if self.address else {"num_cpus": max(self.num, os.cpu_count() or 1), "include_dashboard": False}
        try:
            ray.init(self.address, log_to_driver=False, logging_level="ERROR", **options)
        except Exception as problem:  # which Ray itself raises where it starts too slowly
            where = f"be reached at address={self.address!r}" if self.address else "be started on this machine"
            raise ExecutionError(
                f"Ray cannot {where}: {problem} `ray start --head` starts a cluster, and address= names it; "
                "shard=(i, n) divides a study without Ray."
            ) from problem
        try:
            yield
        finally:
            ray.shutdown()

    def _choose_gpus(self, there: dict[str, float]) -> float:
        """GPUs of each worker. there: what the cluster has."""
        gpus = (1 if there.get("GPU") else 0) if self.gpus is None else self.gpus
        room = {kind: int(there.get(kind, 0) / each) for kind, each in (("CPU", 1), ("GPU", gpus)) if each}
        if (count := min(room.values())) < self.num:
            has = " and ".join(f"{there.get(kind, 0):g} {kind}s" for kind in room)
            warn(
                f"the Ray cluster has {has} now, which is enough for {count} of {self.num} workers: the others begin "
                "when it grows."
            )
        return gpus


class RayCrew:
    """The actors.

    ray: the module.
    load: makes a lens.
    size: how many there are.
    gpus: of each.
    worker: class of the actors, which is made with ``load``.
    """

    def __init__(self, ray: Any, load: Callable[[], Any], size: int, gpus: float, worker: type = StudyWorker):
        self.size, self._ray = size, ray
        self._load = self._store(load, "load=")
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus)(worker)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}  # reference of a reply -> worker
        self._jobs: dict[int, Any] = {}  # reference of a job -> by its identity, so that it is sent once

    def begin(self, worker: int, job: StudyJob) -> None:
        if id(job) not in self._jobs:
            self._jobs = {id(job): self._store(job, f"the arguments of {job.study}")}
        self._pending = {reply: other for reply, other in self._pending.items() if other != worker}
        if worker not in self._actors:
            self._actors[worker] = self._actor.remote(self._load)
        self._pending[self._actors[worker].begin.remote(self._jobs[id(job)])] = worker

    def send(self, worker: int, order: Order) -> None:
        self._pending[self._actors[worker].answer.remote(order)] = worker

    def receive(self, timeout: float | None) -> tuple[int, Reply] | None:
        if not self._pending and timeout is None:
            raise ExecutionError("no worker has anything to do, and cells are missing.")
        done = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout)[0] if self._pending else []
        if not done:
            return None
        worker = self._pending.pop(done[0])
        try:
            return worker, self._ray.get(done[0])
        except self._ray.exceptions.RayTaskError as problem:  # nothing died: this is a fault of our own
            return worker, Failed(problem)
        except self._ray.exceptions.RayError as problem:
            self._end(worker)
            return worker, Died(str(problem).strip().splitlines()[0])

    def close(self) -> None:
        """Ends all actors."""
        for worker in list(self._actors):
            self._end(worker)

    def _end(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))

    def _store(self, value: Any, name: str) -> Any:
        """What all workers get, sent once. name: what it is called."""
        try:
            return self._ray.put(value)
        except (TypeError, ValueError, AttributeError, RuntimeError) as problem:
            raise OpError(
                f"{name} cannot be sent to other processes: {problem}. Make judges, masks, metrics and load= functions "
                "of a module, which open what they need when they are called."
            ) from problem


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ExecutionError(
            'Ray is not installed here. Install it on every machine with `pip install "dit-lens[ray]"`, or divide the '
            "study with shard=(i, n), which takes nothing further."
        ) from None
