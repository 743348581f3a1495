"""What travels to a server is torch, nnsight and source text.

The same numbers come back from a process without dit_lens.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nnsight
import pytest
import torch
from nnsight.tracing.backend import Backend
from safetensors.torch import load_file

from dit_lens import Apply, DiTLens, Read, Swap, Zero
from dit_lens.engine import traced
from tests import pipelines


class SentError(Exception):
    """The request was written; there is no local result."""


class Request(Backend):
    """Serialises a trace as a remote backend would, and runs nothing."""

    def __init__(self, path):
        self.path = path

    def __call__(self, tracer):
        from nnsight.ndif import pull_env
        from nnsight.schema.request import RequestModel

        pull_env()
        self.path.write_bytes(RequestModel.serialize(tracer))
        raise SentError


def double(tensor, hook):
    return tensor * 2


def test_a_process_without_dit_lens_gives_the_same_numbers(tmp_path):
    folder = tmp_path / "pipeline"
    pipelines.flux().save_pretrained(folder)
    lens = DiTLens.from_pretrained(folder)
    lens.pipe.set_progress_bar_config(disable=True)
    lens.defaults = dict(pipelines.TRUE_CFG)
    ops = [
        Read("blocks.*.{img,txt}", reduce="|mean|"),
        Zero("blocks.1.img", channels=[3], tokens=[0, 7]),
        Swap("blocks.2.img", source="row:0", rows=1, strength=0.5),
        Swap("blocks.3.img", source=torch.ones(32), steps=[0]),
        Apply("blocks.3.img", fn=double),
        Read("blocks.3.img", channels=[1], name="after"),
        Read(["blocks.0.img.attn_out", "blocks.2.img.attn.q", "blocks.*.img.x0"]),
    ]
    local = lens.run(["red", "blue"], ops, seed=0, output_type="latent")
    prepared, _, plan = lens._plan(["red", "blue"], ops, seed=0, output_type="latent")

    nnsight.register("dit_lens.execute")
    nnsight.register("dit_lens.layout")
    nnsight.register("dit_lens.reduce")
    nnsight.register(sys.modules[__name__])  # the user's own function
    key = "nnsight.modeling.diffusion.DiffusionModel:" + json.dumps({"repo_id": str(folder), "revision": None})
    request = tmp_path / "request"
    with pytest.raises(SentError):
        traced(lens.engine.model, plan.program, plan.given, {**prepared.keywords(), "backend": Request(request)}, {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = [sys.executable, Path(__file__).with_name("server.py"), key, request, tmp_path / "result.safetensors"]
    subprocess.run(server, check=True, cwd=tmp_path, env=environment)

    remote = load_file(tmp_path / "result.safetensors")
    assert torch.equal(remote["latents"], local.latents)
    for reading, read in zip(local.readings, plan.reads, strict=True):
        for site, value in reading.tensors.items():
            for step in range(pipelines.STEPS):
                assert torch.equal(remote[repr((read.op, site, step, "cond", 0))], value[step]), site
