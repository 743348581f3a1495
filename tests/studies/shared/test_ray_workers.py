"""Studies on a Ray cluster of this machine: the numbers of one process, whoever is killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dit_lens as dl
from dit_lens import studies
from dit_lens.errors import OpError
from dit_lens.studies import Result
from tests.small_studies import CALLS, PROMPTS, assert_same, judge, make_lens

if importlib.util.find_spec("ray") is None and os.environ.get("DIT_LENS_RAY") != "required":
    pytest.skip("Ray is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).resolve().parents[3]
ARGS, HOW = CALLS["disruption"]


@pytest.fixture(scope="module")
def lens():
    return make_lens()


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()


@pytest.fixture
def workers(cluster):
    return dl.RayWorkers(make_lens, num=2)


def test_two_workers_make_the_study(lens, workers, tmp_path, capsys):
    expected = studies.disruption(lens, *ARGS, **HOW)
    capsys.readouterr()
    assert_same(studies.disruption(lens, *ARGS, **HOW, out=tmp_path / "s", workers=workers), expected)
    assert capsys.readouterr().err.count("\n") == 1  # one bar, and nothing of the workers
    assert_same(Result.load(tmp_path / "s"), expected)


def dying_judge(marker):
    """Kills the process in which it first looks at an image."""

    def look(image, prompt):
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return judge(image, prompt)
        return os.kill(os.getpid(), signal.SIGKILL)

    return look


def test_a_worker_that_is_killed_loses_its_cell_alone(lens, workers, tmp_path):
    (tmp_path / "there").touch()
    how = {"k": 4, "draws": 1, "confounds": False, "batch_size": 1, "num_inference_steps": 1}
    expected = studies.disruption(lens, PROMPTS[:2], judge=dying_judge(tmp_path / "there"), **how)
    got = studies.disruption(lens, PROMPTS[:2], judge=dying_judge(tmp_path / "killed"), workers=workers, **how)
    assert (tmp_path / "killed").exists()
    assert got.table.equals(expected.table)


def test_where_there_is_no_room_or_no_cluster_it_is_said(lens, cluster):
    with pytest.warns(UserWarning, match=r"has 2 CPUs now, which is enough for 2 of 3 workers"):
        studies.write_attribution(
            lens, PROMPTS[:1], k=4, num_inference_steps=1, workers=dl.RayWorkers(make_lens, num=3)
        )


def test_what_cannot_travel_is_told(lens, workers):
    lock = threading.Lock()
    with pytest.raises(OpError, match=r"the arguments of disruption cannot be sent to other processes: "):
        studies.disruption(lens, PROMPTS[:1], judge=lambda image, prompt: {"a": lock.locked()}, k=4, workers=workers)


DRIVER = """
import sys
import dit_lens as dl
from tests.small_studies import CALLS, make_lens

if __name__ == "__main__":
    args, how = CALLS["disruption"]
    dl.studies.disruption(make_lens(), *args, **how, out=sys.argv[1], workers=dl.RayWorkers(make_lens, num=1))
"""


def test_a_driver_that_is_killed_goes_on_where_it_was(lens, tmp_path):
    """Its workers end with it."""
    script, out = tmp_path / "driver.py", tmp_path / "study"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen([sys.executable, script, out], env=environment, cwd=ROOT, stderr=said)
        until = time.monotonic() + 300
        while len(list((out / "cells").glob("0*"))) < 3:
            assert driver.poll() is None, (tmp_path / "said").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    done = len(list((out / "cells").glob("0*")))
    assert 3 <= done < 12
    time.sleep(5)
    assert len(list((out / "cells").glob("0*"))) == done
    runs, run = [], lens.run
    lens.run = lambda *args, **call: runs.append(1) or run(*args, **call)
    try:
        result = studies.disruption(lens, *ARGS, **HOW, out=out)
    finally:
        lens.run = run
    assert_same(result, studies.disruption(lens, *ARGS, **HOW))
    assert len(runs) <= 12 - done + 2
