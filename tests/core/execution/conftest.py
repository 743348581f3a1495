"""A model on a disk, and a process that serves it where dit_lens cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pipelines


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "flux"
    pipelines.flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def process(folder):
    """A server of the model, and of what else lies beside it."""
    command = [sys.executable, Path(__file__).parents[2] / "server.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder.parent, env=environment, text=True, **pipes) as running:
        yield running
        running.stdin.close()
    assert running.returncode == 0  # it knows nothing of dit_lens to the end
