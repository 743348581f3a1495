"""What a lens on an NDIF server gives is what a lens on the same pipeline here gives, bit for bit, on both its paths.

A trusted request is carried out in the process of the model. Any other is carried out in a sandbox: a process of its
own, which asks the model's for every value.
"""

import json
import os
import sys

import nnsight
import pytest
import torch
from nnsight.schema.request import RequestModel

from dit_lens import Apply, DiTLens, Read, Zero
from tests import parity
from tests.parity import CALLS, OPS, STEPS, same

PIPELINES = [name for name in CALLS if f"DIT_LENS_NDIF_{name.upper()}" in os.environ]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Functions of the cases travel by their source."""
    nnsight.register(parity)
    nnsight.register(sys.modules[__name__])


@pytest.fixture(scope="module", params=PIPELINES)
def pair(request):
    """A lens here, one there, and a call of two rows."""
    name = request.param
    path = os.environ[f"DIT_LENS_NDIF_{name.upper()}"]
    here = DiTLens.from_pretrained(path)
    here.defaults = {}
    here.pipe.set_progress_bar_config(disable=True)
    there = DiTLens.remote(path, host=os.environ["DIT_LENS_NDIF"], timeout=900.0)
    there.defaults = {}
    there.pipe.set_progress_bar_config(disable=True)
    return here, there, {**CALLS[name], **STEPS, "seed": 0}


@pytest.fixture
def sandbox(monkeypatch):
    """A server without accounts trusts whoever does not ask for its sandbox."""
    metadata = RequestModel.metadata
    monkeypatch.setattr(
        RequestModel, "metadata", lambda request: json.dumps({**json.loads(metadata(request)), "trusted": False})
    )


def tell_process(tensor, hook):
    return torch.full_like(tensor, os.getpid())


def test_the_two_paths_are_two(pair, request):
    """Trusted requests share a process. One for the sandbox has its own."""
    _, there, call = pair

    def find_process():
        run = there.run(ops=[Apply("blocks.0.img", fn=tell_process), Read("blocks.0.img")], **call)
        return int(run["blocks.0.img"].unique())

    trusted = {find_process(), find_process()}
    request.getfixturevalue("sandbox")
    assert len(trusted) == 1
    assert find_process() not in trusted


def edit_recorded(lens, call):
    base = lens.run(**call, record=True)
    return lens.run(ops=Zero("blocks.2.img", channels=[1], steps=[1]), **call, prefix=base)


@pytest.mark.parametrize("path", ["trusted", "sandbox"])
def test_runs(pair, path, request):
    here, there, call = pair
    if path == "sandbox":
        request.getfixturevalue(path)
    runs = [lens.run(ops=OPS, **call) for lens in (here, there)]
    same(*runs)
    assert runs[0].receipt.entries
    same(*(edit_recorded(lens, call) for lens in (here, there)))
