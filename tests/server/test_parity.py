"""What a lens on ``dit-lens serve`` gives is what a lens on the same pipeline here gives, bit for bit."""

import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import nnsight
import numpy as np
import pytest
import torch
from nnsight import CONFIG
from PIL import Image

import dit_lens as dl
from dit_lens import Apply, AttentionMask, DiTLens, Read, Scale, Swap, Zero, toys
from dit_lens.core.execution.at_weights import TASKS
from dit_lens.errors import DitLensError, ExecutionError
from dit_lens.instruments.gradients import attribution
from dit_lens.instruments.inversion import invert, noised_reference
from dit_lens.server.tasks import carry_out
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
    "flux": {"prompt": ["red cat", "blue dog"], **pipelines.TRUE_CFG},
    "sd3": {"prompt": ["red cat", "blue dog"], "negative_prompt": ["bad", ""], **texts.SUBJECTS["sd3"].call},
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


def plain(value):
    """Values that are equal where what they stand for is equal bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dl.Run):
        parts = (value.images, value.latents, list(map(dict, value.readings)), value.clock, value.grid)
        return plain(parts), value.receipt, value.spec
    if isinstance(value, dl.studies.Result):
        return value.table.to_csv(), plain(dict(value.images)), plain(dict(value.masks)), value.notes, value.settings
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value.tobytes() if hasattr(value, "tobytes") else getattr(value, "__dict__", value)


def strength(latents):
    return latents.square().mean()


def scaled(tensor, gradient):
    return (tensor * gradient).abs().mean(1)


# What needs weights: fn(lens, prompts, image). Edits and functions of the user's act on the way as in a run.
INSTRUMENTS = {
    "read_x0": lambda lens, some, _: lens.read_x0(some, "blocks[1:3].img", steps=[0], seed=0),
    "read_pattern": lambda lens, some, _: lens.read_pattern(
        some, [0, 1], heads=[0, 1], steps=[0, 1], ops=[Apply("blocks.0.img", fn=double)], seed=0
    ),
    "gradients": lambda lens, some, _: lens.gradients(some, "blocks[1:3].img", metric=strength, steps=[1], seed=0),
    "gradients through a step": lambda lens, some, _: lens.gradients(
        some, "blocks.1.{img,txt}", metric=strength, through="step", reduce=scaled, seed=0
    ),
    "attribution": lambda lens, some, _: attribution(lens, *some, "blocks.1.img", steps=[0], seed=0),
    "encode": lambda lens, some, _: lens.run(ops=[Read("blocks.1.img")], **lens.encode(some), seed=0),
    "encode_image": lambda lens, _, image: lens.encode_image([image, image]),
    "forward": lambda lens, some, image: lens.forward(image, some[0], [Read("blocks.1.img")], sigma=0.3),
    "word_map": lambda lens, some, _: lens.word_map(some[0], some[0].split()[-1], blocks=[0, 1], seed=0),
    "word_map without a key": lambda lens, some, _: lens.word_map(
        some[0], some[0].split()[-1], blocks=1, ops=AttentionMask("blocks.1.img", keys="txt", key_tokens=[0]), seed=0
    ),
    "word_map by concepts": lambda lens, some, _: lens.word_map(
        some[0], some[0].split()[-1], method="concept", concepts=[some[1]], blocks=[1], seed=0
    ),
    "invert": lambda lens, some, image: invert(lens, image, some[0]),
    "noised_reference": lambda lens, some, image: noised_reference(lens, image, seed=3, prompts=some[0]),
    "relevance": lambda lens, some, _: lens.massive_channels(some, k=2, score="relevance", site="blocks.1.img", seed=0),
    "registers": lambda lens, some, _: lens.find_tokens(some[0], k=2, without=1, site="blocks[0:2].img", seed=0),
    "sinks": lambda lens, some, _: lens.find_tokens(some[0], "sinks", k=2, site="blocks[0:2].img", seed=0),
}


def prepare(pair, **defaults):
    """Both lenses with defaults in place of a call, its prompts, and an image of its size."""
    here, there, call = pair
    given = {name: value for name, value in call.items() if name not in OWN} | defaults
    lenses = [copy.copy(lens) for lens in (here, there)]
    for lens in lenses:
        lens.defaults = given
    h, w = (call[side] for side in ("height", "width"))
    pixels = np.linspace(0, 255, h * w * 3).astype(np.uint8).reshape(h, w, 3)
    return lenses, tuple(call["prompt"]), Image.fromarray(pixels)


OWN = ("prompt", "seed", "negative_prompt", "output_type")


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_what_needs_weights(pair, instrument):
    lenses, prompts, image = prepare(pair)
    here, there = (plain(INSTRUMENTS[instrument](lens, list(prompts), image)) for lens in lenses)
    assert here == there


ONE = {"site": "blocks.1.img", "seeds": [0]}
MOVED = {"k": 2, "draws": 1, "strengths": [1.0], "mask_from": None, **ONE}
STUDIES = {
    "stability": lambda lens, some, _: dl.studies.stability(lens, some, k=2, **ONE),
    "write_attribution": lambda lens, some, _: dl.studies.write_attribution(lens, some[:1], k=2, **ONE),
    "disruption": lambda lens, some, _: dl.studies.disruption(lens, some[:1], k=2, draws=1, **ONE),
    "basis": lambda lens, some, _: dl.studies.basis(
        lens, some[:1], k=2, energies=0.2, bases=["relevant"], draws=1, **ONE
    ),
    "blocks": lambda lens, some, _: dl.studies.blocks(lens, some[:1], ablation="mean", **ONE),
    "organisation": lambda lens, some, _: dl.studies.organisation(
        lens, some[:1], k=2, draws=1, words=some[0].split()[-1], masks=half, **ONE
    ),
    "patching": lambda lens, some, _: dl.studies.patching(lens, [some], k=2, draws=1, **ONE),
    "transfer": lambda lens, some, _: dl.studies.transfer(lens, [some], **MOVED),
    "transfer_image": lambda lens, some, image: dl.studies.transfer_image(lens, [(image, some[1])], **MOVED),
    "an inverted image": lambda lens, some, image: dl.studies.transfer_image(
        lens, [(image, some[1])], how="inverted", **MOVED
    ),
}


def half(image, prompt):
    inside = np.zeros(image.size[::-1], bool)
    inside[: len(inside) // 2] = True
    return inside


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
