"""Jobs on a real server: in order, step by step, cancelled, too long, too large, and collected by another process."""

import os
import re
import signal
import sys
import threading
import time

import httpx
import nnsight
import pytest
import torch

import dit_lens as dl
from dit_lens import Apply, DiTLens, Read, Swap
from dit_lens.core.execution import later
from dit_lens.errors import DitLensError, ExecutionError, OpError, PromptError, SiteError, StoreError
from tests import pipelines
from tests.server.conftest import TOKEN, connect, fork
from tests.sockets import StandIn

KEY = {"ndif-api-key": TOKEN}


@pytest.fixture(scope="module", autouse=True)
def registered():
    nnsight.register(sys.modules[__name__])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Jobs are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def here(folder):
    lens = DiTLens.from_pretrained(folder)
    lens.defaults = dict(pipelines.CALL)
    return lens


def slowly(seconds):
    """An op that takes so long at every step."""

    def wait(tensor, hook):
        import time as clock

        clock.sleep(seconds)

    return Apply("blocks.0.img", fn=wait)


LONG = {"seed": 0, "num_inference_steps": 40}  # longer than any test waits


def same(one, other):
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    for first, second in zip(one.readings, other.readings, strict=True):
        assert all(torch.equal(first[site], second[site]) for site in first)
    assert (one.receipt, one.clock, one.grid, one.spec) == (other.receipt, other.clock, other.grid, other.spec)


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# Sent now, collected later


def test_a_job_is_the_run(here, there):
    ops = [Read("blocks.*.img", reduce="mean"), Swap("blocks.1.img", source=torch.ones(32), channels=[2])]
    job = there.submit(["red", "blue"], ops, seed=0)
    assert job.status in ("RECEIVED", "QUEUED", "RUNNING", "COMPLETED")
    run = job.result()
    same(run, here.run(["red", "blue"], ops, seed=0))
    assert job.status == "COMPLETED"
    assert repr(job) == f"Job {job.id!r} on {there.engine.host}: COMPLETED"
    same(job.result(), run)
    assert job.cancel()
    assert (job.status, job.cancel()) == ("LOST", False)
    with pytest.raises(ExecutionError, match=f"knows no job {job.id}. It expired there.*Send it again"):
        job.result()


def test_a_job_in_batches(here, there):
    ops = [Read("blocks.*.img", reduce="mean"), slowly(0.01)]
    job = there.submit(["red", "blue", "green"], ops[:1], seed=[0, 1, 2], batch_size=2)
    same(job.result(), here.run(["red", "blue", "green"], ops[:1], seed=[0, 1, 2], batch_size=2))


def test_another_process_collects(here, there, starter, cache):
    ops = [Read("blocks.*.img", reduce="rms"), dl.Zero("blocks.1.img", channels=[3])]
    job = there.submit("red", ops, seed=4)
    (file,) = (cache / "dit_lens" / "jobs").iterdir()
    assert TOKEN not in file.read_text()
    same(dl.Job.load(job.id, token=TOKEN).result(), here.run("red", ops, seed=4))
    log = cache / "log"
    code = (
        f"import os; os.environ['XDG_CACHE_HOME'] = {str(cache)!r}; import dit_lens as dl; "
        f"print(dl.Job.load({job.id!r}, token={TOKEN!r}).result().images[0].tobytes().hex())"
    )
    fork(starter, {"code": code, "log": str(log)})
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    assert job.result().images[0].tobytes().hex() in log.read_text()
    with pytest.raises(
        StoreError, match=r"no job 'nothing' is kept in .*: it was sent by somebody else.*last ones are"
    ):
        dl.Job.load("nothing")
    with pytest.raises(StoreError, match=r"no job '\.\./x' is kept"):
        dl.Job.load("../x")
    for wrong in (7, None, "", "a\0b", "x" * 5000):
        with pytest.raises(DitLensError):
            dl.Job.load(wrong)
    for wrong in (0, -1, "long", float("nan")):
        with pytest.raises(OpError, match="is not a number of seconds above 0"):
            job.result(timeout=wrong)
    own = there.submit("red", slowly(0.0), seed=0)
    with pytest.raises(StoreError, match=r"values that JSON cannot keep.*ops\[0\].*The process that sent it"):
        dl.Job.load(own.id, token=TOKEN)


def test_all_or_none_is_sent(there, server):
    def count():
        return sum(httpx.get(f"{server.host}/status", headers=KEY, timeout=60).json()["jobs"].values())

    before = count()
    with pytest.raises(SiteError, match=r"blocks\.9"):
        there.submit_many([{"prompt": "red"}, {"prompt": "blue", "ops": [Read("blocks.9.img")]}])
    with pytest.raises(OpError, match="record= needs a run that is waited for"):
        there.submit_many([{"prompt": "red", "record": True}])
    for wrong, error in (
        ([7], OpError),
        (["red"], OpError),
        ([{"prompt": 7}], PromptError),
        ([{"prompt": "red", "ops": 7}], OpError),
        ([{"prompt": "red", "batch_size": 0}], PromptError),
        ([{"prompt": "red", "nothing": 1}], PromptError),
        (7, DitLensError),
    ):
        with pytest.raises(error):
            there.submit_many(wrong)
    assert count() == before
    jobs = there.submit_many([{"prompt": "red", "seed": 0}, {"prompt": "red", "seed": 1}])
    runs = [job.result() for job in jobs]
    assert [run.spec["seed"] for run in runs] == [[0], [1]]
    assert runs[0].images[0].tobytes() != runs[1].images[0].tobytes()


def test_a_lens_on_this_machine_does_not_submit(here):
    with pytest.raises(ExecutionError, match=r"model of this lens is on this machine.*lens\.run.*DiTLens\.remote"):
        here.submit("red", seed=0)


def test_jobs_wait_in_order_and_end_when_cancelled(there):
    """The one that runs ends at its next step, those that wait at once; the rest goes on."""
    first = there.submit("red", slowly(1.0), **LONG)
    second, third = there.submit_many([{"prompt": "red", "seed": 0}, {"prompt": "blue", "seed": 0}])
    until(lambda: first.status == "RUNNING")
    assert {second.status, third.status} == {"QUEUED"}
    news = httpx.get(f"{there.engine.host}/response/{third.id}", headers=KEY, timeout=60).json()
    assert news["description"] == "2 jobs before yours."
    with pytest.raises(
        ExecutionError, match=r"has not finished the job .* yet \((QUEUED|RUNNING)\)\. It goes on there"
    ):
        third.result(timeout=0.1)
    assert second.cancel()
    assert second.status == "ERROR"
    assert first.cancel()
    with pytest.raises(ExecutionError, match=r"answered: Cancelled by its sender. Nothing was kept"):
        first.result()
    with pytest.raises(ExecutionError, match=r"answered: Cancelled by its sender"):
        second.result()
    assert len(third.result().images) == 1


def test_a_failure_is_told(there):
    def broken(tensor, hook):
        raise ValueError("no such thing")

    job = there.submit("red", Apply("blocks.0.img", fn=broken), seed=0)
    with pytest.raises(ExecutionError, match=r"answered: ValueError: no such thing\. Nothing") as told:
        job.result()
    line = broken.__code__.co_firstlineno + 1
    where = r"It was raised by \S*broken, applied at blocks\.0\.img, step 0 \(cond\): ops\[0\], "
    where += rf"in line {line} of .*test_jobs\.py\.$"
    assert re.search(where, str(told.value))
    with pytest.raises(ExecutionError, match=where):
        there.run("red", Apply("blocks.0.img", fn=broken), seed=0)
    mine = Apply("blocks.0.img", fn=lambda tensor, hook: torch.ones(2) @ torch.ones(hook.step + 3))
    with pytest.raises(ExecutionError, match=r"raised by <lambda>, .*, in line \d+ of .*test_jobs\.py\.$"):
        there.run("red", mine, seed=0)


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(there):
    job = there.submit("red", slowly(0.3), seed=0, num_inference_steps=12)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    said = rf"goes on at {there.engine.host}.*dit_lens\.Job\.load\('{job.id}'\)\.result\(\), or end it with \.cancel"
    with pytest.raises(KeyboardInterrupt, match=said):
        job.result()
    assert len(job.result().images) == 1


def test_questions_are_asked_again_and_work_is_not_sent_again(there, server, monkeypatch):
    """A network that fails now and then costs time when asking; a request whose answer was lost is not repeated."""
    job = there.submit("red", seed=0)
    asked, real = [], httpx.request

    def failing(*args, **kwargs):
        asked.append(args)
        if len(asked) % 2:
            raise httpx.ReadError("the cable")
        return real(*args, **kwargs)

    monkeypatch.setattr(httpx, "request", failing)
    assert len(job.result().images) == 1
    monkeypatch.setattr(httpx, "request", real)
    sent = []

    def lose(*args, **kwargs):
        sent.append(args)
        raise httpx.ReadError("the cable")

    monkeypatch.setattr(httpx, "post", lose)
    with pytest.raises(ExecutionError, match=r"was lost after .*, with the job being sent: the cable"):
        there.submit("red", seed=0)
    assert len(sent) == 1
    monkeypatch.setattr(later, "PATIENCE", 0.2)
    monkeypatch.setattr(httpx, "request", lose)
    with pytest.raises(ExecutionError, match=r"could not be reached: the cable\. Is the address right"):
        _ = job.status


def test_what_is_wrong_before_anything_is_sent(folder, server):
    with pytest.raises(ExecutionError, match=r"refused the connection \(HTTP status 401\)\. Is the key right"):
        connect(folder, server.host, token="wrong").submit("red")
    with pytest.raises(ExecutionError, match=r"could not be reached.*Is the address right, and does it run"):
        connect(folder, "http://127.0.0.1:9").submit("red")
    other = folder.with_name("other")
    other.symlink_to(folder)
    for send in (DiTLens.submit, DiTLens.run):
        with pytest.raises(
            ExecutionError, match=r"HTTP status 404\): it asks for .*other, and this server serves .*flux"
        ):
            send(connect(other, server.host), "red", seed=0)
    assert len(connect(folder, f"{server.host}//").run("red", seed=0).images) == 1
    for token in ("", " ", "ü", "a\nb", 7):
        with pytest.raises(OpError, match="token= must be the word that the server gave"):
            DiTLens.remote(folder, host=server.host, token=token)


def test_a_server_of_another_kind(folder):
    """Nnsight's own servers know no cancellation, and of a job only a little after they took it."""
    with StandIn(lambda *_: None) as stand_in:
        job = connect(folder, stand_in.host).submit("red", seed=0)
        assert job.status == "SENT"
        with pytest.raises(ExecutionError, match=r"has not finished the job job-1 yet \(SENT\)\. It goes on there"):
            job.result(timeout=0.1)
        with pytest.raises(ExecutionError, match=r"takes no cancellation\. The job job-1 may run on there"):
            job.cancel()


# While a client waits


def test_steps_and_prints_are_told(there, folder, server, monkeypatch):
    told = []
    from dit_lens.core.execution.connection import Connection

    note = Connection.note
    monkeypatch.setattr(Connection, "note", lambda self, news: (told.append(news), note(self, news))[1])

    def say(tensor, hook):
        print("at step", hook.step)

    there.run("red", Apply("blocks.0.img", fn=say), seed=0)
    steps = [news.description for news in told if news.status.value == "RUNNING"]
    assert steps == ["", "step 0 of 2", "step 1 of 2", "step 2 of 2"]
    assert [news.description for news in told if news.status.value == "LOG"] == ["at step 0", "at step 1"]


def test_a_client_that_leaves_takes_its_job_with_it(there, server):
    """A closed laptop, or Ctrl-C: what waited is gone, and what ran ends at its next step."""

    def counts():
        return httpx.get(f"{server.host}/status", headers=KEY, timeout=60).json()["jobs"]

    def interrupt():
        until(lambda: counts()["running"] == 1)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped waiting for the job .*server cancels it, and it ends at its next"
    ):
        there.run("red", slowly(1.0), **LONG)
    until(lambda: counts()["running"] == 0, seconds=20)
    assert counts()["waiting"] == 0
    with pytest.raises(ExecutionError, match=r"no result within 3 s, with the job \S+ \w+\. The job ends there at"):
        connect(there.engine.model.repo_id, server.host, timeout=3.0).run("red", slowly(1.0), **LONG)
    until(lambda: counts()["running"] == 0, seconds=20)


def test_large_results_are_fetched_once(narrow, here, folder, monkeypatch):
    """And their address is good for that result only, and for whoever has it."""
    from dit_lens.core.execution.connection import Connection

    addresses, fetch = [], Connection.download_result
    monkeypatch.setattr(
        Connection, "download_result", lambda self, data: (addresses.append(data), fetch(self, data))[1]
    )
    lens = connect(folder, narrow.host)
    same(lens.run("red", Read("blocks.*.img"), seed=0), here.run("red", Read("blocks.*.img"), seed=0))
    kept = lens.submit("red", seed=0)
    kept.result()
    first, second = addresses
    assert first.startswith(f"{narrow.host}/result/")
    assert [httpx.get(address).status_code for address in addresses] == [404, 200]
    for wrong in ("signature=0", "signature="):
        assert httpx.get(second.replace("signature=", wrong)[: -len(wrong)]).status_code == 401
    assert httpx.get(second.replace("until=", "until=9")).status_code == 401
    assert httpx.get(first.split("?")[0] + "?" + second.split("?")[1]).status_code == 401


def test_memory_that_runs_out_halves(there):
    with pytest.warns(UserWarning, match="memory ran out with 4 prompts in a batch; 2 fitted"):
        run = there.run(["red"] * 4, Apply("blocks.0.img", fn=_full), seed=0)
    assert len(run.images) == 4
    job = there.submit(["red"] * 4, Apply("blocks.0.img", fn=_full), seed=0)
    with pytest.raises(ExecutionError, match=r"memory ran out in the job .*Submit it again with a smaller batch_size="):
        job.result()


def _full(tensor, hook):
    if tensor.shape[0] > 2:
        raise MemoryError("no room")


# A server that ends


def test_it_is_stopped(start, folder, tmp_path):
    """Those who wait are told; what was finished is there again with a server on the same folder, the rest is lost."""
    kept = tmp_path / "results"
    one = start(folder, results=str(kept))
    lens = connect(folder, one.host)
    done = lens.submit("red", seed=0)
    run = done.result()
    running = lens.submit("red", slowly(1.0), **LONG)
    waiting = lens.submit("blue", seed=0)
    until(lambda: running.status == "RUNNING")
    blocked = []

    def wait():
        try:
            lens.run("red", seed=0)
        except ExecutionError as problem:
            blocked.append(str(problem))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: httpx.get(f"{one.host}/status", headers=KEY, timeout=60).json()["jobs"]["waiting"] == 2)
    one.signal(signal.SIGTERM)
    thread.join(30)
    assert "answered: The server is being stopped, and the job with it. Nothing was kept" in blocked[0]
    assert one.gone()
    two = start(folder, results=str(kept), port=one.port)
    assert two.host == one.host
    same(done.result(), run)
    for job in (running, waiting):
        with pytest.raises(ExecutionError, match=r"server is being stopped|restarted before this job was done"):
            job.result()
    again = lens.submit("red", slowly(1.0), **LONG)
    until(lambda: again.status == "RUNNING")

    def kill():
        until(lambda: httpx.get(f"{two.host}/status", headers=KEY, timeout=60).json()["jobs"]["waiting"] == 1)
        two.signal(signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(
        ExecutionError, match=r"the connection .* was lost after .* s, with the job \S+ (RUNNING|QUEUED): "
    ):
        lens.run("red", seed=0)
    assert two.gone()
    start(folder, results=str(kept), port=one.port)
    with pytest.raises(
        ExecutionError, match=r"answered: The server was restarted before this job was done.*send it again"
    ):
        again.result()
    assert not [path for path in kept.iterdir() if path.suffix in (".request", ".draft")]


def test_time_and_expiry(start, folder):
    """A job has so many seconds, and a result so many hours."""
    short = start(folder, timeout=5.0, keep=8 / 3600)
    lens = connect(folder, short.host)
    with pytest.raises(ExecutionError, match=r"execution timeout of 5s\. Make the run smaller"):
        lens.run("red", slowly(1.0), **LONG)
    job = lens.submit("red", seed=0)
    job.result()
    time.sleep(8.1)
    assert job.status == "LOST"
