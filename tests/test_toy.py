"""The toy in the package is the one its card describes: recorded figures, with room for another machine's rounding."""

import pytest
import torch

from dit_lens import DiTLens
from dit_lens.channels import top_median_ratio
from dit_lens.store import read_json
from dit_lens.toys import path
from dit_lens.toys.evaluate import BAR
from dit_lens.toys.scenes import describe, sample_scenes

SCENES = sample_scenes(8, seed=7, held_out=True)
CAPTIONS = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def card():
    return read_json(path("flux") / "dit_lens.json", "the toy's card")


def test_held_out_prompts_are_drawn_as_well_as_the_card_says(toy, card):
    images = toy.run(CAPTIONS, seed=0).images
    right = [scene.agreement(describe(image).scene) for scene, image in zip(SCENES, images, strict=True)]
    for name in BAR:
        assert sum(one[name] for one in right) >= 7, name
        assert card["quality"]["generated"][name][0] >= BAR[name]


def test_the_card_is_honest_about_what_is_missed(card):
    text = (path("flux") / "README.md").read_text()
    for name, bar in BAR.items():
        share = card["quality"]["generated"][name][0]
        assert (f"{bar:.2f}, reached" if share >= bar else f"missed by {bar - share:.3f}") in text
    assert card["quality"]["prompts"] == 200
    assert card["quality"]["steps"] <= 20
    assert card["training"]["stages"]["transformer"]["iterations"] == 8716


def test_massive_channels_as_recorded(toy):
    massive = toy.massive_channels(CAPTIONS, k=8, seed=0)
    recorded = {
        "blocks.0.img": (74, 12, 48, 2, 90, 81, 105, 63),
        "blocks.4.img": (74, 12, 55, 99, 71, 63, 114, 105),
        "blocks.7.img": (74, 89, 12, 13, 11, 37, 123, 99),
    }
    assert min(massive.jaccard(recorded).values()) >= 0.7
    ratios = {site: top_median_ratio(scores) for site, scores in massive.scores.items()}
    assert ratios["blocks.0.img"] == pytest.approx(21.87, rel=0.1)
    assert ratios["blocks.7.img"] == pytest.approx(48.77, rel=0.1)
    assert massive.energy_share()["blocks.7.img"] == pytest.approx(0.542, rel=0.05)


def test_it_is_a_pipeline_like_any_other():
    from diffusers import DiffusionPipeline, FluxPipeline

    pipe = DiffusionPipeline.from_pretrained(path("flux"))
    assert isinstance(pipe, FluxPipeline)
    assert {module.dtype for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {
        pipe.transformer.dtype
    }
    assert sum(file.stat().st_size for file in path("flux").rglob("*") if file.is_file()) < 16e6


def test_the_untrained_twin_differs_in_its_transformer_alone(toy):
    twin = DiTLens.toy(untrained=True)
    mine, its = (dict(lens.pipe.transformer.named_parameters()) for lens in (toy, twin))
    assert mine.keys() == its.keys()
    assert not any(torch.equal(mine[name], its[name]) for name in mine if name.endswith("attn.to_q.weight"))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        same = zip(getattr(toy.pipe, part).parameters(), getattr(twin.pipe, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    prompt = "a big red circle left on a plain blue background"
    found = twin.massive_channels(prompt, k=8, seed=0)  # the lens follows the exchanged module
    assert max(found.energy_share().values()) < min(toy.massive_channels(prompt, k=8, seed=0).energy_share().values())
