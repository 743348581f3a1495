"""What is said where a server fails on the way, over real sockets; and a whole run over them."""

import functools
import json
import os
import signal
import time

import pytest
import torch

from dit_lens import DiTLens, Read, Swap
from dit_lens.core.execution.later import Later
from dit_lens.core.execution.remote import RemoteEngine, pipeline_without_weights
from dit_lens.errors import ExecutionError, OpError, StoreError, StudyInterrupted
from dit_lens.studies import disruption
from dit_lens.studies.shared.folders import claim_folder
from tests import pipelines
from tests.sockets import StandIn

CALL = {"seed": 0, "num_inference_steps": 2}


@pytest.fixture
def real(process, tmp_path):
    """What a server does with a job: runs it where dit_lens cannot be imported."""

    def job(session, envelope, blob):
        request, result = tmp_path / "request", tmp_path / "result"
        request.write_bytes(blob)
        session.tell("RUNNING", "Your job has started running.")
        print(json.dumps([envelope["model_key"], str(request), str(result)]), file=process.stdin, flush=True)
        if failure := json.loads(process.stdout.readline()):
            session.tell("ERROR", failure)
        else:
            session.tell("LOG", "printed there")
            session.tell("COMPLETED", data=result.read_bytes())

    return job


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.setattr("nnsight.ndif.pull_env", lambda: None)  # it would send this checkout, as not installed


models = functools.cache(pipeline_without_weights)


def lens_on(folder, host, timeout=600.0):
    model = models(folder)
    lens = DiTLens(model.pipeline, engine=RemoteEngine(model, host, timeout), defaults=pipelines.CALL)
    lens.pipe.set_progress_bar_config(disable=True)
    return lens


def test_a_run_over_sockets_is_the_run_here(folder, real):
    here = DiTLens.from_pretrained(folder)
    here.defaults = dict(pipelines.CALL)
    ops = [Swap("blocks.2.img", source="row:0", rows=1), Read("blocks.*.img", reduce="mean")]
    with StandIn(real) as server:
        for host in (server.host, f"{server.host}/", f" {server.host}//"):
            there = lens_on(folder, host)
            assert there.engine.host == server.host
        there = lens_on(folder, server.host, timeout=float("inf"))
        runs = [lens.run(["red", "blue"], ops, **CALL) for lens in (here, there)]
        assert runs[0].images[1].tobytes() == runs[1].images[1].tobytes()
        assert all(torch.equal(runs[0][site], runs[1][site]) for site in runs[0])
        assert len(server.jobs) == 1


def test_memory_that_runs_out_there_halves_the_batch(folder, real):
    failures = ["Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried it."]

    def job(session, envelope, blob):
        return session.tell("ERROR", failures.pop()) if failures else real(session, envelope, blob)

    with StandIn(job) as server:
        there = lens_on(folder, server.host)
        with pytest.warns(UserWarning, match="memory ran out with 2 prompts in a batch; 1 fitted") as told:
            run = there.run(["red", "blue"], **CALL)
        assert told[0].filename == __file__
        assert len(run.images) == 2
        assert len(server.jobs) == 3
        failures.append("CUDA out of memory. Tried to allocate 2 GiB")
        with pytest.raises(ExecutionError, match=r"ran out with one prompt.*on the nnsight server .*Tried to allocate"):
            there.run("red", **CALL)


def say(description):
    return lambda session, *_: session.tell("ERROR", description)


def half_a_message(session, *_):
    session.tell("RUNNING")
    session.frame(1, b'{"id": "job-1", "sta')


def half_a_result(session, *_):
    session.tell("COMPLETED", data=b"half")


def stopped(session, *_):
    session.tell("RUNNING")
    session.close()


def killed(session, *_):
    session.tell("RUNNING")
    time.sleep(0.1)
    session.drop()


def keep_elsewhere(session, *_):
    session.tell("COMPLETED", data="http://127.0.0.1:9/results/1.pt")


JOBS = {
    "stopped": (stopped, r"was lost after \d+ s, with the job job-1 RUNNING: .*may run on.*Nothing was kept"),
    "killed": (killed, r"was lost after \d+ s, with the job job-1 RUNNING: "),
    "half a message": (half_a_message, r"sent an answer that cannot be read, with the job job-1 RUNNING: "),
    "half a result": (half_a_result, r"sent an answer that cannot be read, with the job job-1 COMPLETED: "),
    "no object store": (keep_elsewhere, r"could not be fetched from 127\.0\.0\.1:9: .*object store.*reduce="),
    "nothing": (lambda session, *_: session.tell("COMPLETED"), r"finished the job and sent no result.*object store"),
    "unserved": (
        say("Could not deploy this model. It is gated."),
        r"answered: Could not deploy this model\. It is gated\. The server does not serve.*asked for: nnsight.*flux",
    ),
    "restarting": (
        say("Replica was evicted while processing your request."),
        r"answered: Replica was evicted.*being restarted.*again in a minute\. Nothing was kept",
    ),
    "their limit": (say("Your job exceeded the execution timeout of 60s."), r"execution timeout of 60s\. Make the run"),
    "their store": (
        say('Traceback\nEndpointConnectionError: Could not connect to the endpoint URL: "http://minio"'),
        r"minio.*object store, which it cannot reach\. Keep less",
    ),
}


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_that_ends_badly(folder, kind):
    job, said = JOBS[kind]
    with StandIn(job) as server, pytest.raises(ExecutionError, match=f"(?s)nnsight server {server.host}.*{said}"):
        lens_on(folder, server.host).run("red", **CALL)


REPLIES = {
    "500": ((500, b"oops"), r"refused the request \(HTTP status 500\): oops\. Nothing"),
    "503": ((503, b'{"detail": "No model yet."}'), r"refused the request \(HTTP status 503\): No model yet\. Nothing"),
    "half": ((200, b'{"id": "jo'), r"sent an answer that cannot be read, with the job being sent"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_request_that_is_not_taken(folder, kind):
    reply, said = REPLIES[kind]
    with StandIn(lambda *_: None, reply=reply) as server, pytest.raises(ExecutionError, match=said):
        lens_on(folder, server.host).run("red", **CALL)


def test_what_is_no_nnsight_server(folder):
    with StandIn(lambda *_: None, greeting=b"hello") as server:
        with pytest.raises(ExecutionError, match=r"did not answer as one\. Is it an nnsight server"):
            lens_on(folder, server.host).run("red", **CALL)
        with pytest.raises(ExecutionError, match=r"HTTP status 404.*Is it an nnsight server\?.*ends in '/request'"):
            lens_on(folder, f"{server.host}/request/").run("red", **CALL)
        with pytest.raises(ExecutionError, match="could not be reached"):
            lens_on(folder, server.host.replace("http", "https")).run("red", **CALL)


@pytest.mark.parametrize(
    "host", ["localhost:8001", "ws://localhost", "http://", "http://h:port", "http://h:99999", "", "h"]
)
def test_an_address_that_is_none(folder, host):
    with pytest.raises(ExecutionError, match=r"Invalid host URL.*http://localhost:8001"):
        DiTLens.remote(folder, host=host)


def test_an_end_to_waiting(folder):
    with StandIn(lambda session, *_: session.tell("RUNNING")) as server:
        began = time.monotonic()
        with pytest.raises(ExecutionError, match=r"no result within 0\.5 s, with the job job-1 RUNNING\. .*timeout="):
            lens_on(folder, server.host, timeout=0.5).run("red", **CALL)
        assert time.monotonic() - began < 10
    for wrong in (0, -1, float("nan"), "long", True):
        with pytest.raises(OpError, match="is not a number of seconds above 0"):
            DiTLens.remote(folder, host="http://localhost", timeout=wrong)


def test_ctrl_c_says_that_the_job_may_run_on(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may lack

    def job(session, *_):
        session.tell("RUNNING")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    with StandIn(job) as server:
        there = lens_on(folder, server.host)
        with pytest.raises(KeyboardInterrupt, match=r"stopped waiting for the job job-1 RUNNING.*may run on there"):
            there.run("red", **CALL)
        with pytest.raises(StudyInterrupted) as stop:
            disruption(there, "red", k=4, draws=1, num_inference_steps=2)
        assert "may run on there" in str(stop.value.__context__)


def test_a_study_belongs_to_one_model_of_one_server(folder, tmp_path, monkeypatch):
    """Where servers do not tell their weights, as those that have no dit_lens."""
    monkeypatch.setattr(Later, "ask_about", lambda _: None)

    def lens(name="flux", host="http://one.test"):
        (path := folder.with_name(name)).exists() or path.symlink_to(folder)
        return lens_on(path, host)

    settings = {"k": 4}
    claim_folder(tmp_path, "disruption", settings, lens())
    claim_folder(tmp_path, "disruption", settings, lens(host="http://one.test/"))
    with pytest.raises(StoreError, match=r"another model; server\.key: .*flux.* there, .*seed1.* now"):
        claim_folder(tmp_path, "disruption", settings, lens("flux-seed1"))
    with pytest.raises(
        StoreError, match=r'another model; server\.host: "http://one\.test" there, "http://two\.test" now'
    ):
        claim_folder(tmp_path, "disruption", settings, lens(host="http://two.test"))
    local = DiTLens.from_pretrained(folder)
    local.defaults = dict(pipelines.CALL)
    with pytest.raises(
        StoreError, match=r"on the server http://one\.test, and this lens is on this machine\. A server"
    ):
        claim_folder(tmp_path, "disruption", settings, local)
    claim_folder(tmp_path / "here", "disruption", settings, local)
    with pytest.raises(StoreError, match=r"on this machine, and this lens is on the server.*does not tell its weights"):
        claim_folder(tmp_path / "here", "disruption", settings, lens())


def test_a_run_that_ended_early_there(folder, real):
    """A pipeline that stops before the planned forward passes answers with less than a result."""

    def stop(pipe, step, timestep, values):
        pipe._interrupt = True  # noqa: SLF001 as pipelines document it
        return values

    with StandIn(real) as server, pytest.raises(ExecutionError, match=r"expects 2 forward passes.*made 1"):
        lens_on(folder, server.host).run("red", callback_on_step_end=stop, **CALL)
