"""A study whose cells the server makes: in few jobs, which go on while nobody waits for them."""

import copy
import json
import sys
import time

import httpx
import nnsight
import numpy as np
import pytest

import dit_lens as dl
from dit_lens.errors import ExecutionError, OpError
from dit_lens.studies.shared import server_workers
from tests.server.conftest import TOKEN

KEY = {"ndif-api-key": TOKEN}
CALL = {"k": 3, "draws": 1, "seeds": [0], "num_inference_steps": 1, "batch_size": 1, "confounds": False}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The judge travels by its source."""
    nnsight.register(sys.modules[__name__])


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    return study(here, tmp_path_factory.mktemp("here") / "out")


@pytest.fixture
def sent(there, monkeypatch):
    """The names of the jobs that are sent."""
    names, submit = [], there.engine.submit_task
    twin = copy.copy(there)
    twin.engine = copy.copy(there.engine)
    twin.engine.submit_task = lambda *args: (names.append(submit(*args)), names[-1])[1]
    return twin, names


def bright(image, prompt):
    return {"fidelity": float(np.asarray(image).mean() / 255)}


def study(lens, out, **more):
    return dl.studies.disruption(lens, ["red", "blue"], judge=bright, out=out, **CALL, **more)


def counts(server):
    return httpx.get(f"{server.host}/status", headers=KEY, timeout=60).json()["jobs"]


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_cells_are_made_there(whole, sent, server, tmp_path):
    lens, names = sent
    kept = counts(server)["kept"]
    result = study(lens, tmp_path / "there", workers=dl.ServerWorkers(lens))
    assert result.table.equals(whole.table)
    assert {key: image.tobytes() for key, image in result.images.items()} == {
        key: image.tobytes() for key, image in whole.images.items()
    }
    cells = len(list((tmp_path / "there" / "cells").iterdir()))
    assert 1 <= len(names) <= 2 + cells // 4
    until(lambda: counts(server)["kept"] == kept)  # what was collected is not kept there
    assert not (tmp_path / "there" / "jobs.json").exists()


def test_what_was_made_while_nobody_waited_is_collected(whole, sent, server, tmp_path):
    lens, names = sent
    out, workers = tmp_path / "out", dl.ServerWorkers(lens)
    collect = lens.engine.collect_task

    def leave(name):
        raise KeyboardInterrupt

    lens.engine.collect_task = leave
    with (
        pytest.warns(UserWarning, match=r"jobs of this disruption go on at http://\S+\. Call it again to collect"),
        pytest.raises(KeyboardInterrupt),
    ):
        study(lens, out, workers=workers)
    assert TOKEN not in (out / "jobs.json").read_text()
    first, kept = list(names), json.loads((out / "jobs.json").read_text())["jobs"]
    until(lambda: counts(server)["waiting"] + counts(server)["running"] == 0)
    lens.engine.collect_task = collect
    assert study(lens, out, workers=workers).table.equals(whole.table)
    assert names[: len(first)] == first
    cells = [number for job in kept.values() for number in job["cells"]]
    assert len(names) - len(first) <= 2  # what was made meanwhile was not sent again
    assert len(set(cells)) == len(cells) > 0


def test_jobs_that_are_gone_are_sent_again(whole, sent, server, tmp_path):
    lens, names = sent
    out, workers = tmp_path / "out", dl.ServerWorkers(lens)

    def leave(name):
        raise KeyboardInterrupt

    collect, lens.engine.collect_task = lens.engine.collect_task, leave
    with pytest.warns(UserWarning, match="go on at"), pytest.raises(KeyboardInterrupt):
        study(lens, out, workers=workers)
    for name in names:
        lens.engine.later().cancel(name)  # ends it
    until(lambda: counts(server)["running"] == 0)
    for name in names:
        lens.engine.later().cancel(name)  # forgets it
    lens.engine.collect_task = collect
    assert study(lens, out, workers=workers).table.equals(whole.table)


def test_they_are_cancelled(sent, tmp_path):
    lens, names = sent
    out, workers = tmp_path / "out", dl.ServerWorkers(lens)

    def leave(name):
        raise KeyboardInterrupt

    lens.engine.collect_task = leave
    with pytest.warns(UserWarning, match="go on at"), pytest.raises(KeyboardInterrupt):
        study(lens, out, workers=workers)
    assert workers.cancel(out) == len(names) > 0
    assert workers.cancel(out) == 0


def test_what_cannot_be(here, there, tmp_path):
    with pytest.raises(ExecutionError, match=r"take a lens whose model is on a server.*DiTLens\.remote"):
        dl.ServerWorkers(here)
    with pytest.raises(OpError, match=r"Pass out=FOLDER"):
        study(there, None, workers=dl.ServerWorkers(there))

    def broken(image, prompt):
        raise ValueError("no such thing")

    with pytest.raises(ExecutionError, match=r"no such thing"):
        dl.studies.disruption(
            there, ["red"], judge=broken, out=tmp_path / "broken", workers=dl.ServerWorkers(there), **CALL
        )
    assert not (tmp_path / "broken" / "jobs.json").exists()
    assert server_workers.MOST_CELLS > 1
