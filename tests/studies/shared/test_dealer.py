"""Cells that are dealt to workers: the study is as it would be here, whoever dies, and each cell is kept once."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import dit_lens as dl
from dit_lens import DiTLens, studies
from dit_lens.errors import CallError, ExecutionError, OpError, StudyInterrupted
from dit_lens.studies import Result
from dit_lens.studies.shared import slots
from dit_lens.studies.shared.cells import read_packed
from dit_lens.studies.shared.dealer import MOST_DEATHS, Dealer
from dit_lens.studies.shared.orders import Died, Give, Made, Make, Needs, Ready
from dit_lens.studies.shared.shares import StudyJob
from dit_lens.studies.shared.slots import Slot
from dit_lens.studies.shared.worker import StudyWorker
from tests import pipelines
from tests.crews import HereWorkers
from tests.small_studies import CALLS, PROMPTS, assert_same, draw_whole, judge, make_lens, named

TRACE = {"k": 4, "batch_size": 1, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def lens():
    return make_lens()


@pytest.fixture(scope="module")
def trace(lens):
    return studies.write_attribution(lens, PROMPTS, **TRACE)


@pytest.mark.parametrize("name", named(quick=["disruption"]))
def test_workers_that_die_leave_the_study_as_it_is(lens, tmp_path, name):
    """With a folder and without; half of the cells are there before."""
    (args, how), study = CALLS[name], getattr(studies, name)
    expected = draw_whole(name)
    study(lens, *args, **how, out=tmp_path / "s", shard=(0, 2)) if name != "stability" else None
    workers = HereWorkers(make_lens, 3, dying=0.1, seed=len(name))
    assert_same(study(lens, *args, **how, out=tmp_path / "s", workers=workers), expected)
    assert_same(Result.load(tmp_path / "s"), expected)
    if name == "disruption":
        assert_same(study(lens, *args, **how, workers=HereWorkers(make_lens, 2)), expected)


def test_a_sweep_is_dealt_study_by_study(lens):
    call, how = ("write_attribution", lens, PROMPTS[:2]), {**TRACE, "over": {"k": [2, 4]}}
    del how["k"]
    assert_same(studies.sweep(*call, **how, workers=HereWorkers(make_lens, 2)), studies.sweep(*call, **how))


def test_one_bar_counts_the_cells(lens, trace, capsys):
    capsys.readouterr()
    studies.write_attribution(lens, PROMPTS, **TRACE, workers=HereWorkers(make_lens, 2))
    said = capsys.readouterr().err
    assert "4/4" in said
    assert said.count("\n") == 1


def test_ctrl_c_leaves_what_was_finished(lens, trace, tmp_path):
    workers = HereWorkers(make_lens, 2)
    receive = workers.receive

    def interrupted(timeout):
        if sum(isinstance(order, Make) for _, order in workers.served) == 3:
            raise KeyboardInterrupt
        return receive(timeout)

    workers.receive = interrupted
    with pytest.raises(StudyInterrupted, match=r"after \d of 4 cells") as stop:
        studies.write_attribution(lens, PROMPTS, **TRACE, out=tmp_path, workers=workers)
    assert stop.value.folder == tmp_path
    again = HereWorkers(make_lens, 2)
    assert_same(studies.write_attribution(lens, PROMPTS, **TRACE, out=tmp_path, workers=again), trace)
    assert sum(isinstance(order, Make) for _, order in again.served) == 1


def warn_of_red(image, prompt):
    import warnings

    if prompt == "red":
        warnings.warn("red is hard", stacklevel=1)
    return judge(image, prompt)


def fail_at_red(image, prompt):
    if prompt == "red":
        raise ZeroDivisionError(prompt)
    return judge(image, prompt)


def test_what_a_worker_says_is_said_where_the_study_was_called(lens):
    how = {**TRACE, "draws": 1, "confounds": False, "workers": HereWorkers(make_lens, 2)}
    with pytest.warns(UserWarning, match="red is hard"):
        studies.disruption(lens, ["red"], judge=warn_of_red, **how)
    with pytest.raises(ZeroDivisionError, match="red") as raised:
        studies.disruption(lens, ["blue", "red"], judge=fail_at_red, **how)
    assert "fail_at_red" in "".join(raised.value.__notes__)


def test_a_worker_on_another_model_is_refused(lens):
    def load():
        return DiTLens(pipelines.flux(seed=1), defaults=dict(lens.defaults))

    with pytest.raises(ExecutionError, match=r"another model than the study's: model\.weights: .* Let load= make"):
        studies.write_attribution(lens, PROMPTS, **TRACE, workers=HereWorkers(load, 1))
    other = DiTLens(lens.pipe, defaults={**lens.defaults, "num_inference_steps": 7})
    with pytest.raises(ExecutionError, match=r"model\.defaults\."):
        studies.stability(lens, PROMPTS, k=4, workers=HereWorkers(lambda: other, 1))


def test_a_cell_that_ends_every_worker_ends_the_study(lens):
    with pytest.raises(ExecutionError, match=rf"{MOST_DEATHS} workers died at the cell '0/\d' of write_attribution"):
        studies.write_attribution(lens, PROMPTS, **TRACE, workers=HereWorkers(make_lens, 2, dying=1.0))


def test_arguments_that_are_no_workers(lens):
    with pytest.raises(OpError, match=r"workers=8 cannot be used\. Give a Workers or None"):
        studies.write_attribution(lens, PROMPTS, **TRACE, workers=8)
    with pytest.raises(OpError, match="Give one of them"):
        studies.write_attribution(lens, PROMPTS, **TRACE, shard=(0, 2), workers=HereWorkers(make_lens, 2))
    with pytest.raises(CallError):
        dl.RayWorkers(num=2)
    with pytest.raises(OpError, match="num=0 is out of range"):
        dl.RayWorkers(make_lens, num=0)


def test_without_ray_it_is_said_what_to_install(lens, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ExecutionError, match=r"Ray is not installed here.*dit-lens\[ray\].*shard=\(i, n\)"):
        studies.write_attribution(lens, PROMPTS, **TRACE, workers=dl.RayWorkers(make_lens, num=2))


def test_a_worker_passes_over_the_batches_of_others(lens, tmp_path):
    """For a cell of the last batch it needs the untouched cell of that batch, and of no other."""
    how = {"k": 4, "draws": 1, "confounds": False, "batch_size": 1, "num_inference_steps": 1}
    studies.disruption(lens, PROMPTS[:3], **how, out=tmp_path)
    job = StudyJob(
        study="disruption",
        arguments={"prompts": PROMPTS[:3], **how},
        model=json.loads((tmp_path / "study.json").read_text())["model"],
    )
    last = max(path.name for path in (tmp_path / "cells").glob("0*"))
    key = json.loads((tmp_path / "cells" / last / "cell.json").read_text())["key"]
    worker = StudyWorker(lambda: lens)
    assert worker.begin(job) == Ready()
    assert worker.answer(Make(int(last), key)) == Needs(2)
    made = worker.answer(Give(read_packed(tmp_path / "cells" / "000002")))
    assert made.number == int(last)
    assert made.files == read_packed(tmp_path / "cells" / last)
    assert worker.answer(Make(3, "another key")) == Needs(0)  # behind: the study's code runs anew
    failed = worker.answer(Give(read_packed(tmp_path / "cells" / "000000")))
    assert "cell 3 of disruption is 'another key' where the study was called, and '0/0/0/no-op/0'" in str(
        failed.problem
    )


class SleepingCrew:
    """Workers whose cells take a time of their own and nothing else; the clock is one of numbers."""

    def __init__(self, size, dying, needs, seed):
        self.size, self.dying, self.needs = size, dying, needs
        self.random = np.random.default_rng(seed)
        self.clock, self.replies, self.making, self.deaths = 0.0, [], {}, 0

    def begin(self, worker, job):
        self._reply(worker, 1.0, Ready())

    def send(self, worker, order):
        if isinstance(order, Make):
            self.making[worker] = [order.number]
        needed = self.needs(self.making[worker][-1]) if isinstance(order, Make) else None
        if needed is not None:
            self.making[worker].append(needed)
            self._reply(worker, 0.1, Needs(needed))
        elif isinstance(order, Give) and order.files is not None:
            self.making[worker].pop()
            self._finish(worker)
        else:
            self._finish(worker)

    def _finish(self, worker):
        if self.random.random() < self.dying:
            self.deaths += 1
            self.making[worker] = []
            self._reply(worker, self.random.random(), Died("SIGKILL"))
        else:
            number = self.making[worker].pop()
            self._reply(worker, self.random.random(), Made(number, {}))

    def _reply(self, worker, seconds, reply):
        assert all(other != worker for _, other, _ in self.replies), "one order at a time"
        self.replies.append((self.clock + seconds, worker, reply))
        self.replies.sort(key=lambda one: one[:2])

    def receive(self, timeout):
        if timeout == 0:
            return None
        self.clock, worker, reply = self.replies.pop(0)
        return worker, reply


@pytest.mark.parametrize("groups", [1, 3])
def test_a_thousand_cells_and_workers_that_die(tmp_path, monkeypatch, groups):
    """Every cell is kept once, also where some need others; all workers have something to do."""
    kept, advanced = Counter(), []
    monkeypatch.setattr(slots, "write_packed", lambda folder, files: kept.update([Path(folder).name]))
    crew = SleepingCrew(16, 0.05, lambda number: number - 7 if number % 5 == 0 and number > 7 else None, groups)
    dealer = Dealer(crew, StudyJob(study="disruption", arguments={}), dict)
    began = time.process_time()
    for number in range(1000):
        slot = Slot(
            study="disruption",
            number=number,
            key=str(number),
            group=str(number // groups),
            folder=tmp_path / f"{number:06d}",
            closed=None,
            create=lambda: pytest.fail("it was made here"),
        )
        monkeypatch.setattr(Slot, "is_kept", property(lambda slot: kept[slot.folder.name] > 0))
        monkeypatch.setattr("dit_lens.studies.shared.dealer.read_packed", lambda folder: {})
        dealer.get(slot, lambda: advanced.append(1))
    dealer.finish()
    assert len(kept) == 1000
    assert set(kept.values()) == {1}
    assert len(advanced) == 1000
    assert crew.deaths > 30
    assert crew.clock < 1.5 * (1000 + 200) * 0.5 / 16 * 1.1
    assert time.process_time() - began < 10
