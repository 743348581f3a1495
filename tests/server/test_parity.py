"""What a lens on ``dit-lens serve`` gives is what a lens on the same pipeline here gives, bit for bit."""

import json
import sys
import time

import nnsight
import pytest
import torch
from nnsight import CONFIG

import dit_lens as dl
from dit_lens import Apply, DiTLens, Read, Scale, Swap, Zero, toys
from dit_lens.toys import qwen_image
from tests import pipelines, texts
from tests.server.conftest import TOKEN, connect

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The function of this file travels by its source: servers know neither it nor these tests."""
    nnsight.register(sys.modules[__name__])


SCENES = ["a big red circle left on a plain blue background", "a big blue cross right on a plain red background"]
CALLS = {
    "flux": {"prompt": ["red", "blue"], **pipelines.TRUE_CFG},
    "sd3": {"prompt": ["red", "blue"], "negative_prompt": ["bad", ""], **texts.SUBJECTS["sd3"].call},
    "qwen": {"prompt": SCENES, **qwen_image.CALL},
}


@pytest.fixture(scope="module", params=CALLS)
def pair(request, start, folder, server, tmp_path_factory):
    """A lens here, one there, and a call of two rows."""
    name = request.param
    if name == "flux":
        path, host = folder, server.host
    elif name == "sd3":
        path = tmp_path_factory.mktemp(name) / name
        texts.sd3().save_pretrained(path)
        host = start(path).host
    else:
        path, host = toys.path("qwen-image"), start("toy:qwen-image").host
    here = DiTLens.from_pretrained(path)
    here.defaults = {}
    here.pipe.set_progress_bar_config(disable=True)
    return here, connect(path, host, defaults={}), {**CALLS[name], **STEPS, "seed": 0}


def same(one, other):
    """Two runs are equal bit for bit: images, latents, reads, receipt, clock."""
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    assert (one.latents is None) == (other.latents is None)
    assert one.latents is None or torch.equal(one.latents, other.latents)
    for first, second in zip(one.readings, other.readings, strict=True):
        assert list(first) == list(second)
        assert all(torch.equal(first[site], second[site]) for site in first)
    assert one.receipt == other.receipt
    assert (one.clock, one.grid, one.spec) == (other.clock, other.grid, other.spec)


def double(tensor, hook):
    return tensor * 2 if hook.step else None


OPS = [
    Read("blocks.*.img", reduce="|mean|", branch="both"),
    Read(["velocity", "blocks.1.img.attn_out", "blocks.*.img.x0"]),
    Zero("blocks.0.img", channels=[3], tokens=[0, 7]),
    Swap("blocks.1.img", source="row:0", rows=1, channels=[1, 4], strength=0.5),
    Scale("blocks.1.img", factor=1.5, channels=[2]),
    Apply("blocks.2.img", fn=double),
    Read("blocks.2.img", channels=[1], name="after"),
]


def test_runs(pair):
    here, there, call = pair
    runs = [lens.run(ops=OPS, **call) for lens in (here, there)]
    same(*runs)
    assert runs[0].receipt.entries
    assert runs[1].provenance["device"] == f"nnsight server {there.engine.host}"
    other = {**call, "output_type": "pil" if "output_type" in call else "latent"}
    same(*(lens.run(ops=[Read("blocks.0.img")], **other, batch_size=1) for lens in (here, there)))


def test_recorded_runs(pair):
    here, there, call = pair

    def edited(lens):
        base = lens.run(**call, record=True)
        return lens.run(ops=Zero("blocks.2.img", channels=[1], steps=[1]), **call, prefix=base)

    same(*map(edited, (here, there)))


def test_other_methods(folder, server):
    """On one pipeline: they are made of runs."""
    here, there = DiTLens.from_pretrained(folder), connect(folder, server.host)
    here.defaults = there.defaults = {**pipelines.CALL, **STEPS}

    def traced(lens):
        with lens.trace("red", seed=0) as t:
            t.zero("blocks.1.img", channels=[2])
            t.read("blocks.1.img", reduce="rms")
        return t.run

    same(*map(traced, (here, there)))
    same(*(lens.run_with_cache("red", "blocks.1.img", seed=0)[1] for lens in (here, there)))
    same(*(lens.run_with_hooks("red", [("blocks.1.img", double)], seed=0) for lens in (here, there)))
    same(*(lens.run_spec(traced(here).spec) for lens in (here, there)))
    assert there.rerun(traced(here)).identical
    found = [lens.massive_channels(["red", "blue"], k=3, seed=0) for lens in (here, there)]
    assert dict(found[0]) == dict(found[1])
    masks = [lens.subject_mask("red", found[0], seed=0) for lens in (here, there)]
    assert (masks[0] == masks[1]).all()
    local, remote = (dl.studies.write_attribution(lens, ["red"], k=3) for lens in (here, there))
    assert local.summary.equals(remote.summary)


def test_stock_nnsight(folder, server, monkeypatch):
    """Nnsight's own client, with a trace of the user's own."""
    from nnsight.modeling.diffusion import DiffusionModel

    monkeypatch.setattr(CONFIG.API, "APIKEY", TOKEN)
    monkeypatch.setattr(DiffusionModel, "_remoteable_model_key", _key)
    stock = DiffusionModel(str(folder))
    with stock.generate("red", seed=3, **pipelines.CALL, remote=server.host) as tracer:
        print("from there")
        values = [].save()
        for _ in tracer.iter[:3]:
            values.append(stock.transformer.transformer_blocks[1].output[1])
        drawn = nnsight.save(tracer.result)
    run = DiTLens.from_pretrained(folder).run("red", Read("blocks.1.img"), seed=3, **pipelines.CALL)
    assert torch.equal(torch.stack(values), run["blocks.1.img"])
    assert drawn.images[0].tobytes() == run.images[0].tobytes()
    with stock.generate("red", seed=3, **pipelines.CALL, remote=server.host, blocking=False) as tracer:
        drawn = nnsight.save(tracer.result)
    while (result := tracer.backend()) is None:
        time.sleep(0.1)
    assert result["drawn"].images[0].tobytes() == run.images[0].tobytes()


def _key(model):
    """Nnsight asks the hub for it."""
    return json.dumps({"repo_id": model.repo_id, "revision": None})
