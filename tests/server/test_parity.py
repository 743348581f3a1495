"""What a lens on ``dit-lens serve`` gives is what a lens on the same pipeline here gives, bit for bit."""

import json
import time

import nnsight
import pytest
import torch
from nnsight import CONFIG
from PIL import Image

import dit_lens as dl
from dit_lens import DiTLens, Read, Zero, toys
from dit_lens.core.execution.at_weights import TASKS
from dit_lens.errors import DitLensError, ExecutionError
from dit_lens.server.tasks import carry_out
from tests import parity, pipelines, texts
from tests.parity import CALLS, INSTRUMENTS, OPS, STEPS, STUDIES, double, plain, prepare, same
from tests.server.conftest import TOKEN, connect


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Functions of the cases travel by their source: servers know neither them nor these tests."""
    nnsight.register(parity)


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


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_what_needs_weights(pair, instrument):
    lenses, prompts, image = prepare(pair)
    here, there = (plain(INSTRUMENTS[instrument](lens, list(prompts), image)) for lens in lenses)
    assert here == there


# Of each pipeline one that reads attention; what studies are made of is compared on all of them above.
PIPELINES = {"organisation": CALLS, "patching": ("flux", "sd3"), "an inverted image": ("sd3",)}


@pytest.mark.parametrize(
    ("pair", "study"),
    [(name, study) for name in CALLS for study in STUDIES if name in PIPELINES.get(study, ("flux",))],
    indirect=["pair"],
)
def test_studies(pair, study):
    lenses, prompts, image = prepare(pair, num_inference_steps=1)
    here, there = (plain(STUDIES[study](lens, prompts, image)) for lens in lenses)
    assert here == there


def test_stock_nnsight(folder, server, monkeypatch):
    """Nnsight's own client, with a trace of the user's own."""
    from nnsight.modeling.diffusion import DiffusionModel

    monkeypatch.setattr(CONFIG.API, "APIKEY", TOKEN)
    monkeypatch.setattr(DiffusionModel, "_remoteable_model_key", _key)
    stock = DiffusionModel(str(folder))
    with stock.generate("red", seed=3, **pipelines.CALL, remote=server.host) as tracer:
        print("from there")
        values = [].save()
        for _ in tracer.iter[: pipelines.STEPS]:
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


def test_mistakes_that_are_found_there_are_told_as_here(folder, server):
    here, there = DiTLens.from_pretrained(folder), connect(folder, server.host)
    here.defaults = there.defaults = {**pipelines.CALL, **STEPS}
    for work in (
        lambda lens: lens.encode("red", num_images_per_prompt=2),
        lambda lens: lens.encode("red", device="nowhere"),
        lambda lens: lens.gradients("red", "blocks.1.img", metric=torch.square, seed=0),
        lambda lens: lens.gradients("red", "blocks.1.img", metric=torch.Tensor.detach, seed=0),
        lambda lens: lens.read_pattern("red", 0, heads=99, seed=0),
        lambda lens: lens.encode_image(Image.new("RGB", (8, 8))),
        lambda lens: lens.forward(Image.new("RGB", (48, 32)), sigma=2.0),
    ):
        told = []
        for lens in (here, there):
            with pytest.raises(DitLensError) as problem:
                work(lens)
            told.append((problem.type, str(problem.value)))
        assert told[0] == told[1]
    with pytest.raises(ExecutionError, match=r"there is no task 'system'\. There are: make_run"):
        carry_out(here.nnsight, "system", {})
    with pytest.raises(ExecutionError, match="there is no probe 'Path'"):
        TASKS["make_run"](here, ("Path", {}), {}, {}, {})


def test_another_release(folder, server, monkeypatch):
    """Runs bring what they need; names mean the same in the same release only."""
    there = connect(folder, server.host)
    monkeypatch.setattr("dit_lens.core.execution.remote.describe_release", lambda: {"dit_lens": "9.9", "code": "0"})
    told = r"on a server that has another dit_lens \(http://\S+: .*; here: 9\.9 \(0\)\)\. Install one release on both"
    with pytest.raises(ExecutionError, match=told):
        there.read_pattern("red", 0, heads=0)
    same(*(lens.run("red", Read("blocks.1.img"), seed=0) for lens in (there, connect(folder, server.host))))
    there.engine.ask_about()
    monkeypatch.setattr(there.engine, "_about", {**there.engine.ask_about(), "code": "0"})
    with pytest.raises(ExecutionError, match=r"was started anew, with another release of dit_lens or none\. Run it"):
        there.run("red", seed=0)
