"""The toys in the package are those of their model cards: recorded numbers, with a tolerance for other machines."""

from dataclasses import dataclass

import pytest
import torch

from dit_lens import DiTLens
from dit_lens.analysis.channels import top_median_ratio
from dit_lens.commands.evaluate_toy import BAR
from dit_lens.core.runs.files import read_json
from dit_lens.studies.shared.arms import average_scores, make_score_reads, select_common_channels
from dit_lens.toys import WEIGHTS, path
from dit_lens.toys.scenes import recognise_scene, sample_scenes

SCENES = sample_scenes(8, seed=7, held_out=True)
CAPTIONS = [scene.caption for scene in SCENES]


@dataclass(frozen=True)
class Recorded:
    """Measured for a toy with the captions above, seed 0, 4 steps and k = 8.

    pipeline: name of the pipeline class.
    iterations: iterations of the transformer's training.
    channels: site -> massive channels.
    ratios: site -> highest score divided by the median.
    shares: site -> share of the energy.
    """

    pipeline: str
    iterations: int
    channels: dict[str, tuple[int, ...]]
    ratios: dict[str, float]
    shares: dict[str, float]


RECORDED = {
    "flux": Recorded(
        pipeline="FluxPipeline",
        iterations=8716,
        channels={
            "blocks.0.img": (74, 12, 48, 2, 90, 81, 105, 63),
            "blocks.4.img": (74, 12, 55, 99, 71, 63, 2, 7),
            "blocks.7.img": (74, 89, 12, 13, 11, 37, 99, 123),
        },
        ratios={"blocks.0.img": 21.97, "blocks.7.img": 49.08},
        shares={"blocks.7.img": 0.544},
    ),
    "flux2": Recorded(
        pipeline="Flux2KleinPipeline",
        iterations=4996,
        channels={
            "blocks.0.img": (62, 97, 87, 24, 19, 17, 96, 98),
            "blocks.4.img": (62, 112, 87, 43, 97, 19, 53, 98),
            "blocks.7.img": (62, 6, 112, 31, 87, 26, 118, 51),
        },
        ratios={"blocks.2.img": 52.36, "blocks.7.img": 30.83},
        shares={"blocks.2.img": 0.667, "blocks.7.img": 0.512},
    ),
    "sana": Recorded(
        pipeline="SanaPipeline",
        iterations=5136,
        channels={
            "blocks.0.img": (70, 15, 30, 62, 49, 124, 60, 117),
            "blocks.4.img": (70, 30, 15, 33, 49, 125, 111, 62),
            "blocks.7.img": (70, 125, 20, 120, 0, 76, 27, 1),
        },
        ratios={"blocks.2.img": 10.99, "blocks.7.img": 28.81},
        shares={"blocks.2.img": 0.271, "blocks.7.img": 0.558},
    ),
    "qwen-image": Recorded(
        pipeline="QwenImagePipeline",
        iterations=4704,
        channels={
            "blocks.0.img": (109, 105, 36, 75, 48, 87, 65, 91),
            "blocks.4.img": (10, 109, 75, 31, 117, 105, 70, 36),
            "blocks.6.img": (75, 10, 70, 31, 109, 26, 105, 98),
        },
        ratios={"blocks.2.img": 15.54, "blocks.6.img": 17.43},
        shares={"blocks.2.img": 0.419, "blocks.6.img": 0.447},
    ),
}


@pytest.fixture(scope="module", params=RECORDED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def lens(name, toy):
    if name == "flux":
        return toy
    found = DiTLens.toy(name)
    found.pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def drawn(lens):
    """The captions, drawn while the scores of channels are read."""
    return lens.run(CAPTIONS, make_score_reads("blocks.*.img", "|mean|"), seed=0, num_inference_steps=4)


@pytest.fixture(scope="module")
def card(name):
    return read_json(path(name) / "dit_lens.json", "the toy's card")


def test_every_toy_in_the_package_is_recorded():
    assert sorted(RECORDED) == sorted(folder.name for folder in WEIGHTS.iterdir())


def test_held_out_prompts_are_drawn_as_well_as_the_card_says(drawn, card):
    right = [scene.agreement(recognise_scene(image).scene) for scene, image in zip(SCENES, drawn.images, strict=True)]
    for attribute in BAR:
        assert sum(one[attribute] for one in right) >= 7, attribute
        assert card["quality"]["generated"][attribute][0] >= BAR[attribute]


def test_the_card_states_which_bars_are_missed(name, card):
    text = (path(name) / "README.md").read_text()
    for attribute, bar in BAR.items():
        share = card["quality"]["generated"][attribute][0]
        assert (f"{bar:.2f}, reached" if share >= bar else f"missed by {bar - share:.3f}") in text
    assert card["quality"]["prompts"] == 200
    assert card["quality"]["steps"] <= 20
    assert card["training"]["stages"]["transformer"]["iterations"] == RECORDED[name].iterations


def test_massive_channels_are_as_recorded(drawn, name):
    massive, recorded = select_common_channels([average_scores(drawn)], 8, "|mean|"), RECORDED[name]
    assert min(massive.jaccard(recorded.channels).values()) >= 0.7
    ratios = {site: top_median_ratio(scores) for site, scores in massive.scores.items()}
    assert {site: ratios[site] for site in recorded.ratios} == pytest.approx(recorded.ratios, rel=0.1)
    shares = massive.energy_share()
    assert {site: shares[site] for site in recorded.shares} == pytest.approx(recorded.shares, rel=0.05)


def test_it_is_a_pipeline_like_any_other(name):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path(name))
    assert type(pipe).__name__ == RECORDED[name].pipeline
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in parts} == {pipe.transformer.dtype}
    assert sum(file.stat().st_size for file in path(name).rglob("*") if file.is_file()) < 12e6


def test_the_untrained_twin_differs_in_its_transformer_alone(lens, name):
    twin = DiTLens.toy(name, untrained=True)
    mine, its = (dict(one.pipe.transformer.named_parameters()) for one in (lens, twin))
    assert mine.keys() == its.keys()
    assert not any(torch.equal(mine[name], its[name]) for name in mine if name.endswith("to_q.weight"))
    for part in {"vae", "text_encoder", "text_encoder_2"} & set(lens.pipe.components):
        same = zip(getattr(lens.pipe, part).parameters(), getattr(twin.pipe, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    prompt = "a big red circle left on a plain blue background"
    found, ours = (
        one.massive_channels(prompt, k=8, seed=0, num_inference_steps=2)
        for one in (twin, lens)  # the lens follows the exchanged module
    )
    assert max(found.energy_share().values()) < min(ours.energy_share().values())
