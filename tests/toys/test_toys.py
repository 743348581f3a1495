"""Every kind of toy before training: its conventions agree with its pipeline's, and it is saved, loaded and drawn."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, SanaPipeline
from safetensors.torch import load_file

from dit_lens import toys
from dit_lens.core.runs.files import write_json
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.toys import stages
from dit_lens.toys.kinds import KINDS, kind
from dit_lens.toys.scenes import VALUES, VOCABULARY, Scene, sample_scenes
from dit_lens.toys.stages import AutoencoderStage, TextStage, TransformerStage, draw_batch, normalise_latents
from dit_lens.toys.train import Settings, export, train

PIPELINES = {
    "flux": FluxPipeline,
    "flux2": Flux2KleinPipeline,
    "qwen-image": QwenImagePipeline,
    "sana": SanaPipeline,
}
SEEDS = Path(__file__).parents[1] / "fixtures" / "toy_seeds.safetensors"
SCENES = sample_scenes(4, seed=3)
CAPTIONS = [scene.caption for scene in SCENES]
GUIDANCE = {
    "flux": "true_cfg_scale",
    "flux2": "guidance_scale",
    "qwen-image": "true_cfg_scale",
    "sana": "guidance_scale",
}


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def toy(name):
    return kind(name)


@pytest.fixture(scope="module")
def pipe(toy):
    """Untrained, its latents normalised; no test changes it."""
    pipe = toy.build(0)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae):
        part.eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "NORMALISED", 64)
        normalise_latents(toy, pipe)
    return pipe


@pytest.fixture(scope="module")
def saved(toy, pipe, name, tmp_path_factory):
    """The folder of a finished pipeline."""
    out = tmp_path_factory.mktemp(name)
    export(pipe, out, Settings(toy=name), {})
    return out / "pipeline"


def first_batch(toy, pipe):
    with torch.no_grad():
        return toy.encode(pipe, CAPTIONS), toy.to_latents(pipe, draw_batch(SCENES, 0, "cpu"))


def test_it_is_the_real_pipeline_and_the_seed_decides_its_weights(toy, pipe, name):
    assert type(pipe) is PIPELINES[name]
    again, other = toy.build(0).transformer.state_dict(), toy.build(1).transformer.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in pipe.transformer.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in again.items())


def test_every_word_is_known_and_stands_where_it_is_said_to(toy, pipe):
    """Changing one word changes its own features, and in a causal model none before."""
    scene = Scene("big", "red", "circle", "left", "plain", "blue")
    with torch.no_grad():
        words, caption = toy.features(toy.encode(pipe, [scene.caption]))
    assert words.shape[-1] == caption.shape[-1] == toy.TEXT_WIDTH
    causal = "clip" not in toy.text_encoders(pipe)
    for attribute, place in zip(VALUES, (1, 2, 3, 4, 7, 8), strict=True):
        others = [value for value in VALUES[attribute] if value != getattr(scene, attribute)]
        changed = [Scene(**{**vars(scene), attribute: value}).caption for value in others]
        with torch.no_grad():
            found, whole = toy.features(toy.encode(pipe, changed))
        differs = ((found - words).abs().amax(-1) > 1e-5).float()  # [caption, word]
        assert bool(differs[:, toy.FIRST_WORD + place].all())
        assert not (causal and differs[:, : toy.FIRST_WORD + place].any())
        assert bool(((whole - caption).abs().amax(-1) > 1e-5).all())
        assert len({tuple(row.tolist()) for row in found[:, toy.FIRST_WORD + place]}) == len(others)


def test_an_empty_caption_among_others_is_encoded_as_it_is_alone(toy, pipe):
    """Dropped captions stand beside others in training; for guidance the pipeline encodes them alone."""
    alone, among = toy.encode(pipe, [""]), toy.encode(pipe, [CAPTIONS[0], ""])
    valid = alone["encoder_hidden_states"].shape[1]
    torch.testing.assert_close(
        among["encoder_hidden_states"][1:, :valid], alone["encoder_hidden_states"], atol=1e-5, rtol=1e-4
    )
    if among["encoder_hidden_states"].shape[1] > valid:
        assert among["encoder_hidden_states_mask"].sum(1).tolist()[1] == valid


def test_the_transformer_sees_latents_of_mean_0_and_variance_1(toy, pipe):
    with torch.no_grad():
        latents = toy.to_latents(pipe, draw_batch(sample_scenes(64, seed=9), 0, "cpu"))
    assert latents[0].numel() == 4096
    assert latents.square().mean() == pytest.approx(1, abs=0.1)


def test_training_and_pipeline_mean_the_same_time_and_the_same_latents(toy, pipe, monkeypatch):
    """A transformer that knows the answer draws it: time, sign, packing and scale agree between the two."""
    seen = {}

    def answers(hidden_states, timestep=None, **others):
        seen.update(hidden_states=hidden_states, timestep=timestep)
        if "clean" not in seen:
            return (torch.zeros_like(hidden_states),)
        sigma = (timestep / seen["one"]).reshape(-1, *[1] * (hidden_states.ndim - 1))
        clean = seen["clean"].repeat(len(hidden_states) // len(seen["clean"]), *[1] * (hidden_states.ndim - 1))
        return ((hidden_states - clean) / sigma,)

    monkeypatch.setattr(pipe.transformer, "forward", answers)
    text, clean = first_batch(toy, pipe)
    toy.velocity(pipe, clean, torch.ones(4), text)
    seen |= {"clean": seen["hidden_states"], "one": seen["timestep"][0]}
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.4, 0.6, 0.8])
    velocity = toy.velocity(pipe, torch.lerp(clean, noise, sigma[:, None, None, None]), sigma, text)
    torch.testing.assert_close(velocity, noise - clean, atol=1e-4, rtol=1e-3)

    call = {key: [""] * 4 if key == "negative_prompt" else value for key, value in toy.CALL.items()}
    drawn = pipe(prompt=CAPTIONS, output_type="pt", **call).images
    with torch.no_grad():
        expected = toy.decode(pipe, toy.posterior(pipe, draw_batch(SCENES, 0, "cpu")).mode()).clamp(-1, 1)
    torch.testing.assert_close(drawn, (expected + 1) / 2, atol=5e-3, rtol=0)


def test_it_is_saved_loaded_and_draws_the_same(pipe, saved, toy, name):
    lens = DiTLens.from_pretrained(saved)
    lens.pipe.set_progress_bar_config(disable=True)
    assert type(lens.pipe) is PIPELINES[name]
    assert lens.vocabulary == list(VOCABULARY)
    assert sum(file.stat().st_size for file in saved.rglob("*") if file.is_file()) < 12e6
    drawn = lens.run(CAPTIONS[:2], seed=[0, 1], num_inference_steps=2).images
    call = {key: [""] * 2 if key == "negative_prompt" else value for key, value in toy.CALL.items()}
    noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipe(prompt=CAPTIONS[:2], generator=noise, **{**call, "num_inference_steps": 2}).images
    levels = [np.stack([np.asarray(image, dtype=float) for image in images]) for images in (drawn, expected)]
    assert levels[0].shape == (2, 64, 64, 3)
    np.testing.assert_allclose(*levels, atol=3)  # positions were halved and doubled with the weights of one of them
    assert levels[0].std() > 3


def test_words_and_guidance_reach_the_transformer(pipe, toy, name, monkeypatch):
    """Guidance makes a second prediction of the empty prompt, as rows or as a call, and the caption changes both."""
    rows = []
    forward = pipe.transformer.forward

    def spy(hidden_states, **others):
        rows.append(others["encoder_hidden_states"][:, : toy.FIRST_WORD + 5].clone())
        return forward(hidden_states, **others)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    call = {key: [""] * 2 if key == "negative_prompt" else value for key, value in toy.CALL.items()}
    for scale, expected in ((3.0, 4), (1.0, 2)):
        rows.clear()
        pipe(prompt=CAPTIONS[:2], output_type="latent", **{**call, "num_inference_steps": 2, GUIDANCE[name]: scale})
        one_step = torch.cat(rows[: len(rows) // 2])
        assert len(one_step) == expected
        assert len({tuple(row.flatten().tolist()) for row in one_step}) == (3 if scale > 1 else 2)


@pytest.mark.parametrize("stage_class", [TextStage, AutoencoderStage, TransformerStage])
def test_a_few_iterations_reduce_the_loss(toy, stage_class):
    torch.manual_seed(0)
    pipe = toy.build(0)
    stage = stage_class(toy, pipe)
    optimizer = torch.optim.AdamW(stage.net.parameters(), 2e-3)
    losses = []
    for _ in range(9):
        loss = stage.loss(SCENES[:2], 0, torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.93 * losses[0]


def test_a_toy_without_weights_says_which_there_are(tmp_path, monkeypatch):
    for folder in ("weights/flux", "beside/flux-seed1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model_index.json").write_text("{}")
    monkeypatch.setattr(toys, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(toys, "BESIDE", tmp_path / "beside")
    assert toys.path("flux-seed1") == tmp_path / "beside" / "flux-seed1"
    with pytest.raises(StoreError, match=r"'sana' has not been trained yet.*train-toy sana.*flux, flux-seed1"):
        DiTLens.toy("sana")
    there = re.escape(str(tmp_path / "beside" / "flux-seed2"))
    command = (
        f"there is no {there}. Train it with dit-lens train-toy flux --seed 2 --out DIR, and move DIR/pipeline there"
    )
    with pytest.raises(StoreError, match=f"'flux-seed2' has not been trained yet: {command}"):
        DiTLens.toy("flux-seed2")
    for name in ("fluks", "fluks-seed1", "flux-seedy", "flux-"):
        with pytest.raises(StoreError, match=f"no toy called '{name}'"):
            DiTLens.toy(name)


def test_a_seed_that_lies_beside_the_package_is_loaded(saved, name, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / f"{name}-seed7")
    monkeypatch.setattr(toys, "BESIDE", tmp_path)
    lens = DiTLens.toy(f"{name}-seed7")
    assert type(lens.pipe) is PIPELINES[name]
    begun, own = DiTLens.toy(f"{name}-seed7", untrained=True).pipe.transformer, kind(name).build(7).transformer
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in begun.state_dict().items())


def test_the_twin_of_a_seed_begins_as_that_seed_did():
    ours, first = (toys.untrained(name).x_embedder.weight for name in ("flux-seed1", "flux"))
    assert torch.equal(ours, kind("flux").build(1).transformer.x_embedder.weight)
    assert not torch.equal(ours, first)


def test_the_seeds_of_a_toy_were_trained_apart_each_from_its_own_beginning():
    """Of the seeds, whose weights are not kept, some matrices are."""
    names = ("flux", "flux-seed1", "flux-seed2")
    starts = [toys.untrained(name).state_dict() for name in names]
    matrices = defaultdict(dict, flux=DiTLens.toy("flux").pipe.transformer.state_dict())
    for key, weight in load_file(SEEDS).items():
        name, _, matrix = key.partition("/")
        matrices[name][matrix] = weight
    for name in names:
        kept = [_cosine(matrices[name], start) for start in starts]
        assert names[int(np.argmax(kept))] == name
        assert 0.02 < max(kept) < 0.98  # trained, and yet not beyond recognition
        assert sorted(kept)[1] < 0.02


def _cosine(ours, theirs):
    """Between all matrices of two models that both have; gains, which begin at one in every model, are left out."""
    names = [name for name, weight in ours.items() if weight.dim() > 1]
    one, other = (torch.cat([weights[name].float().flatten() for name in names]) for weights in (ours, theirs))
    return torch.cosine_similarity(one, other, dim=0).item()


def test_toys_load_without_a_word(tmp_path):
    """No bars, no advice: what a first cell of a notebook shows is the lens. Verbosity is as before afterwards."""
    code = """
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers
from dit_lens import DiTLens
before = [library.get_verbosity() for library in (of_diffusers, of_transformers)]
DiTLens.toy("flux2", untrained=True)
assert [library.get_verbosity() for library in (of_diffusers, of_transformers)] == before
assert of_diffusers.is_progress_bar_enabled() and of_transformers.is_progress_bar_enabled()
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    of_torchao = [line for line in said.stderr.splitlines() if "torchao" in line or "pytree" in line]
    assert [line for line in said.stderr.splitlines() if line not in of_torchao] == []


def test_checkpoints_of_another_toy_are_refused(tmp_path):
    (tmp_path / "checkpoint-text").mkdir()
    write_json(tmp_path / "checkpoint-text" / "progress.json", {"progress": {}, "settings": {"seed": 0}})
    with pytest.raises(StoreError, match="checkpoint of the toy 'flux', not of 'sana'"):
        train(tmp_path, Settings(toy="sana"), resume=True)
