"""Workers of a study in this process, one at a time: which of them replies next, and which dies, is drawn."""

from contextlib import contextmanager
from functools import partial

import numpy as np

from dit_lens.studies.shared.dealer import Dealer
from dit_lens.studies.shared.orders import Died, Make
from dit_lens.studies.shared.shares import Workers
from dit_lens.studies.shared.worker import StudyWorker


class HereWorkers(Workers):
    """Real workers, without another process.

    load: function that returns a lens.
    size: how many there are.
    dying: the share of cells at which a worker dies.
    """

    def __init__(self, load, size, dying=0.0, seed=0):
        self.load, self.size, self.dying = load, size, dying
        self.random = np.random.default_rng(seed)
        self.workers, self.orders, self.deaths, self.served = {}, {}, 0, []

    @contextmanager
    def open(self):
        yield partial(Dealer, self)
        self.workers.clear()

    def begin(self, worker, job):
        self.workers.setdefault(worker, StudyWorker(self.load))
        self.orders[worker] = ("begin", job)

    def send(self, worker, order):
        assert worker not in self.orders, "one order at a time"
        self.orders[worker] = ("answer", order)

    def receive(self, timeout):
        if not self.orders:
            assert timeout is not None, "nothing can come"
            return None
        if timeout == 0 and self.random.random() < 0.5:
            return None
        worker = int(self.random.choice(sorted(self.orders)))
        what, order = self.orders.pop(worker)
        if isinstance(order, Make) and self.random.random() < self.dying:
            self.deaths += 1
            del self.workers[worker]
            return worker, Died("SIGKILL")
        self.served.append((worker, order))
        return worker, getattr(self.workers[worker], what)(order)
