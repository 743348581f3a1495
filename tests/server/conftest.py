"""Servers of tiny pipelines, as whole processes on real sockets."""

import contextlib
import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_lens import DiTLens
from dit_lens.core.execution.remote import RemoteEngine, pipeline_without_weights
from tests import pipelines

pytest.importorskip("starlette")
TOKEN = "a-token-of-the-tests"


class Server:
    """A server that runs, or ran.

    process: its number.
    log: file of what it said.
    """

    def __init__(self, process, log):
        self.process, self.log = process, log
        self.host = self.wait(r"serving \S+ at (\S+)")

    def wait(self, pattern, seconds=120):
        """What it says, once it says it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, said := self.said)):
            assert time.monotonic() < end, said
            assert "dit-lens: " not in said, said
            time.sleep(0.02)
        return found[found.re.groups and 1]

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    @property
    def port(self):
        return int(self.host.rpartition(":")[2])

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)

    def gone(self, seconds=30):
        """Whether it ends in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="session")
def starter():
    """The process that forks servers."""
    command = [sys.executable, Path(__file__).parents[1] / "serving.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as running:
        assert running.stdout.readline() == "ready\n"
        yield running
        running.stdin.close()


def fork(starter, order):
    """The process that carries out an order."""
    print(json.dumps(order), file=starter.stdin, flush=True)
    return int(starter.stdout.readline())


@pytest.fixture(scope="session")
def start(starter, tmp_path_factory):
    """Starts a server of a pipeline's folder; it is killed after the tests."""
    made = []

    def start(pipeline, **options):
        log = tmp_path_factory.mktemp("server") / "log"
        order = {"pipeline": str(pipeline), "options": {"token": TOKEN, **options}, "log": str(log)}
        made.append(fork(starter, order))
        return Server(made[-1], log)

    yield start
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "flux"
    pipelines.flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(start, folder):
    return start(folder, timeout=120.0)


@pytest.fixture(scope="session")
def narrow(start, folder):
    """A server that takes small requests, and sends no result with its news."""
    return start(folder, largest=2.0, inline=0.0)


@functools.cache
def lens_without_server(folder):
    """Its structure is looked at once."""
    model = pipeline_without_weights(folder)
    return model, DiTLens(model.pipeline, engine=RemoteEngine(model, "http://nowhere.invalid"))


def connect(folder, host, timeout=60.0, token=TOKEN, defaults=pipelines.CALL):
    """A lens on a server."""
    model, lens = lens_without_server(folder)
    lens = copy.copy(lens)
    lens.engine, lens.defaults = RemoteEngine(model, host, timeout, token), dict(defaults)
    lens.pipe.set_progress_bar_config(disable=True)
    return lens


@pytest.fixture(scope="module")
def here(folder):
    """A lens on the model that the server has."""
    lens = DiTLens.from_pretrained(folder)
    lens.pipe.set_progress_bar_config(disable=True)
    lens.defaults = dict(pipelines.CALL)
    return lens


@pytest.fixture(scope="session")
def there(folder, server):
    return connect(folder, server.host)
