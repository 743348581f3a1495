"""Exported activations are those of plain reads, whole, shuffled, and the same when they are made in two goes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_lens import DiTLens, Read
from dit_lens.errors import OpError, PromptError, StoreError
from dit_lens.instruments import activation_store
from tests import pipelines

CALL = {**pipelines.CALL, "output_type": "latent", "num_inference_steps": 3}
PROMPTS = ["red", "blue", "a fox"]
SITES = ["blocks.1.img", "blocks.3.txt"]
ASKED = {
    "tokens": 5,
    "steps": [0, 2],
    "seeds": [3, 4],
    "shard": 20,
    "batch_size": 2,
    **pipelines.CALL,
    "num_inference_steps": 3,
}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


@pytest.fixture(scope="module")
def out(lens, tmp_path_factory):
    return lens.export(SITES, PROMPTS, tmp_path_factory.mktemp("export") / "out", **ASKED)


def shards(out, site):
    return [load_file(file) for file in sorted((out / site).iterdir())]


def test_every_activation_is_that_of_a_plain_read_where_it_says(lens, out):
    found = {site: shards(out, site) for site in SITES}
    truth = {}
    for seed in (3, 4):
        for prompt, text in enumerate(PROMPTS):
            truth[prompt, seed] = lens.run(text, [Read(site) for site in SITES], seed=seed, **CALL)
    for site, files in found.items():
        assert len(files) == 3  # 6 images of 5 tokens at 2 steps, 20 tokens each
        for shard in files:
            labels = zip(*(shard[key].tolist() for key in ("prompt", "seed", "step", "token", "sigma")), strict=True)
            for x, (prompt, seed, step, token, sigma) in zip(shard["activations"], labels, strict=True):
                run = truth[prompt, seed]
                torch.testing.assert_close(x, run[site][step, 0, token], rtol=1e-4, atol=1e-5)
                assert sigma == pytest.approx(run.sigmas[step])
        columns = [torch.cat([shard[key] for shard in files]).tolist() for key in ("prompt", "seed", "step", "token")]
        places = list(zip(*columns, strict=True))
        assert len(set(places)) == len(places) == 6 * 2 * 5  # none twice
        assert {place[2] for place in places} == {0, 2}
        assert places != sorted(places)
    by_step = {step: {p[3] for p in places if p[2] == step} for step in (0, 2)}
    assert by_step[0] != by_step[2]


def test_an_interrupted_export_goes_on_and_ends_the_same(lens, out, tmp_path, monkeypatch):
    written, write = [], activation_store.write_bytes

    def stop(file, content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file)
        return write(file, content)

    monkeypatch.setattr(activation_store, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        lens.export(SITES, PROMPTS, tmp_path / "out", **ASKED)
    monkeypatch.setattr(activation_store, "write_bytes", write)
    (tmp_path / "out" / SITES[0] / "notes.txt").write_text("mine")
    lens.export(SITES, PROMPTS, tmp_path / "out", **ASKED)
    (tmp_path / "out" / SITES[0] / "notes.txt").unlink()
    for site in SITES:
        for one, other in zip(shards(out, site), shards(tmp_path / "out", site), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(StoreError, match=r"holds another export: its tokens differ"):
        lens.export(SITES, PROMPTS, tmp_path / "out", **{**ASKED, "tokens": 4})
    about = json.loads((out / "activations.json").read_text())
    assert about["sites"] == dict.fromkeys(SITES, pipelines.WIDTH)
    assert about["shards"] == 3
    assert about["model"]["family"] == "FLUX.1"


def test_more_tokens_than_there_are_are_all_of_them_and_recorded_so(lens, tmp_path):
    image = pipelines.GRID[0] * pipelines.GRID[1]
    asked = {**ASKED, "tokens": 99_999, "seeds": 3, "shard": 4 * image}
    out = lens.export(SITES[:1], PROMPTS, tmp_path / "out", **asked)
    assert json.loads((out / "activations.json").read_text())["tokens"] == {SITES[0]: image}
    assert [len(shard["activations"]) for shard in shards(out, SITES[0])] == [4 * image, 2 * image]  # 2 images, and 1


def shorten(file):
    file.write_bytes(file.read_bytes()[:100])


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"0")


def scramble(file):
    file.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, file.stat().st_size, np.uint8)))


def drop_tokens(file):
    save_file({name: value[:-1].clone() for name, value in load_file(file).items()}, file)


def drop_labels(file):
    save_file({name: value for name, value in load_file(file).items() if name != "step"}, file)


def narrow(file):
    content = load_file(file)
    save_file({**content, "activations": content["activations"][:, 1:].clone()}, file)


@pytest.mark.parametrize("damage", [shorten, lengthen, scramble, drop_tokens, drop_labels, narrow])
def test_a_damaged_shard_is_named_and_made_again(lens, out, tmp_path, damage, monkeypatch):
    copy = shutil.copytree(out, tmp_path / "out")
    file = copy / SITES[0] / "00001.safetensors"
    whole = file.read_bytes()
    damage(file)
    with monkeypatch.context() as patch:
        patch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it draws"))
        with pytest.raises(StoreError, match=r"00001\.safetensors.*Delete this file, and the same call makes it again"):
            lens.export(SITES, PROMPTS, copy, **ASKED)
    file.unlink()
    lens.export(SITES, PROMPTS, copy, **ASKED)
    assert file.read_bytes() == whole


def test_what_the_pipeline_masks_is_left_out():
    """A site of text with fewer data than are asked for gives what there is."""
    value = torch.arange(24.0).reshape(1, 2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])

    class Made:
        sigmas = (1.0,)

        def reading(self, _):
            return type("R", (), {"tensors": {"a.txt": value}, "masks": {"a.txt": mask}})

    sampling = activation_store.Sampling(sites=["a.txt"], tokens=3, steps=[0], outline=None)
    rng = np.random.default_rng(0)
    found = activation_store.take_tokens(Made(), "a.txt", None, [(7, 0), (8, 0)], sampling, rng)
    assert sorted(zip(found["prompt"].tolist(), found["token"].tolist(), strict=True)) == [
        *((7, token) for token in range(2)),
        *((8, token) for token in range(3)),
    ]


@pytest.mark.parametrize(
    ("sites", "prompts", "options", "error", "message"),
    [
        (SITES, [], {}, PromptError, "at least one prompt"),
        (SITES, PROMPTS, {"seeds": []}, PromptError, "at least one seed"),
        (SITES, PROMPTS, {"seeds": [3, 3]}, PromptError, r"seeds=\[3, 3\] names a seed twice, 3"),
        (SITES, ["red", "red"], {}, PromptError, "names a prompt twice, 'red'"),
        ("blocks.2.img.mod.gate", PROMPTS, {}, OpError, "one vector for each image"),
        (SITES, PROMPTS, {"tokens": 0}, OpError, "tokens=0 is to be 1 or more"),
        (SITES, PROMPTS, {"steps": [9]}, OpError, "step 9 does not exist"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_drawn(lens, tmp_path, sites, prompts, options, error, message):
    with pytest.raises(error, match=message):
        lens.export(sites, prompts, tmp_path / "out", **{**ASKED, **options})
    assert not (tmp_path / "out").exists()
