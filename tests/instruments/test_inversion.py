"""An image's way through a run: its latents, the noised reference, and the flow run backwards."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dit_lens import DiTLens, Read, Swap, studies
from dit_lens.analysis.metrics import rmse
from dit_lens.errors import CallError, FamilyError, OpError, PromptError
from dit_lens.instruments.inversion import invert, noised_reference
from dit_lens.instruments.latents import decode_latents, encode_images, read_latents
from dit_lens.studies.shared.judges import scene_judge
from dit_lens.toys import flux, flux2, qwen_image, sana
from dit_lens.toys.scenes import Scene, draw
from tests import pipelines, planted
from tests.zoo.flux import flux2_autoencoder
from tests.zoo.parts import autoencoder
from tests.zoo.truth import ENTRIES

CAPTION = "a big red circle left on a plain blue background"
CALLS = {flux: flux.CALL, flux2: flux2.CALL, qwen_image: qwen_image.CALL, sana: sana.CALL}


@pytest.fixture(scope="module")
def image():
    return draw(Scene.parse(CAPTION), 0).image


@pytest.fixture(scope="module")
def tiny():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))


@pytest.fixture(scope="module")
def noisy():
    """An image of noise, of the tiny pipeline's size."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def with_autoencoder(name):
    """A tiny pipeline that draws images, whose statistics are not those of a fresh autoencoder; and its call."""
    pipe = ENTRIES[name].build()
    if pipe.vae is None:
        pipe.register_modules(vae=flux2_autoencoder() if name == "ideogram4" else autoencoder())
    if hasattr(pipe.vae, "bn"):
        torch.manual_seed(0)
        pipe.vae.bn.running_mean.normal_()
        pipe.vae.bn.running_var.uniform_(1, 4)
    pipe.set_progress_bar_config(disable=True)
    call = ENTRIES[name].call(1)
    return DiTLens(pipe, defaults={}), {key: call[key] for key in call.keys() - {"output_type", "num_inference_steps"}}


def packed_by_hand(kind, pipe, latents):
    """The toys' own latents as tokens [b, n, d], packed as their pipelines do."""
    if kind is flux:
        return flux.pack(pipe, latents)
    if kind is qwen_image:
        return pipe._pack_latents(latents, *latents.shape)
    return latents.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__.split(".")[-1])
def test_latents_are_what_each_model_was_trained_on(kind, image):
    lens = DiTLens(kind.build(), defaults=CALLS[kind])
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    if kind is flux2:
        lens.pipe.vae.bn.running_mean.normal_()
        lens.pipe.vae.bn.running_var.uniform_(1, 4)
    with torch.no_grad():
        expected = packed_by_hand(kind, lens.pipe, kind.to_latents(lens.pipe, pixels))
    found, grid = encode_images(lens, [image], [CAPTION], {})
    assert torch.allclose(found, expected, atol=1e-4)
    assert grid[0] * grid[1] == found.shape[1]


@pytest.mark.parametrize(
    "name", ["flux", "flux2", "klein", "klein-kv", "sd3", "zimage", "chroma", "hidream", "ideogram4"]
)
def test_final_latents_are_drawn_as_the_pipeline_draws_them(name):
    lens, call = with_autoencoder(name)
    drawn = lens.run(**call, seed=0, num_inference_steps=2).images[0]
    run = lens.run(**call, seed=0, num_inference_steps=2, output_type="latent")
    assert rmse(decode_latents(lens, read_latents(lens, run.latents, run.grid), run.grid)[0], drawn) < 0.2
    assert np.asarray(drawn).std() > 10


@pytest.mark.parametrize(("name", "words"), [("qwen", "count their channels as z_dim"), ("klein", "each token")])
def test_an_autoencoder_of_another_model_is_refused(name, words):
    pipe = ENTRIES[name].build()
    pipe.register_modules(vae=autoencoder())
    lens = DiTLens(pipe, defaults={})
    with pytest.raises(FamilyError, match=rf"the autoencoder of .* must .*{words}.*AutoencoderKL of this pipeline"):
        decode_latents(lens, torch.zeros(1, 24, lens.anatomy.latent_width), (4, 6))


def test_latents_are_drawn_as_the_image(toy, image):
    latents, grid = encode_images(toy, [image], [CAPTION], {})
    assert rmse(decode_latents(toy, latents, grid)[0], image) < 10


def test_the_noised_reference_is_a_straight_line_from_the_noise_of_the_seed(tiny, noisy):
    clean, grid = encode_images(tiny, [noisy], ["red"], {})
    way = noised_reference(tiny, [noisy], seed=3, prompts="red")
    plain = tiny.run("red", Read(["x0", "velocity"]), seed=3)
    run = tiny.run("red", [Swap("velocity", source=way, branch="both"), Read(["x0", "velocity"])], seed=3)
    levels = torch.tensor(run.sigmas)[:, None, None, None]
    latents = run["x0"] + levels * run["velocity"]  # [s, b, n, d]: what enters the transformer
    noise = plain["x0"][0] + levels[0] * plain["velocity"][0]
    assert torch.allclose(latents, (1 - levels) * clean + levels * noise, atol=1e-4)
    assert rmse(run.images[0], decode_latents(tiny, clean, grid)[0]) < 0.5


def test_inversion_says_how_well_it_goes_back(tiny, noisy):
    found = invert(tiny, [noisy, noisy], "red")
    clean, grid = encode_images(tiny, [noisy], ["red"], {})
    again = tiny.run("red", latents=found.noise[:1], true_cfg_scale=1.0, output_type="latent", seed=0).latents
    error = float((again - clean).square().mean().sqrt() / clean.square().mean().sqrt())
    assert found.latent_error[0] == pytest.approx(error, rel=1e-3)
    assert error > 1e-4
    drawn = rmse(decode_latents(tiny, again, grid)[0], decode_latents(tiny, clean, grid)[0])
    assert found.image_error[1] == pytest.approx(drawn, abs=0.5)


def test_inversion_is_euler_from_clean_to_noise(tiny, noisy):
    """Each step, done by hand with the velocity it took; the way then leads back to the image exactly."""
    found = invert(tiny, [noisy], "red")
    clean, grid = encode_images(tiny, [noisy], ["red"], {})
    run = tiny.run("red", Swap("velocity", source=found.velocity, branch="both"), seed=0, latents=found.noise)
    levels = [*run.sigmas, 0.0]
    latents = clean
    for step in reversed(range(pipelines.STEPS)):
        latents = latents + (levels[step] - levels[step + 1]) * found.velocity[step]
    assert torch.allclose(latents, found.noise, atol=1e-4)
    assert rmse(run.images[0], decode_latents(tiny, clean, grid)[0]) < 0.5


def test_finer_steps_go_back_better(toy, image):
    coarse, fine = (invert(toy, [image], CAPTION, num_inference_steps=n).latent_error[0] for n in (4, 16))
    assert fine < 0.8 * coarse


def test_the_scheduler_comes_back(tiny, noisy, monkeypatch):
    before = tiny.pipe.scheduler
    invert(tiny, [noisy], "red")
    assert tiny.pipe.scheduler is before
    monkeypatch.setattr(type(tiny), "run", None)
    with pytest.raises(TypeError):
        invert(tiny, [noisy], "red")
    assert tiny.pipe.scheduler is before


@pytest.mark.parametrize("name", ["flux", "flux2", "klein", "sd3", "zimage", "bria", "chroma", "hidream"])
def test_images_are_inverted_in_every_form_of_latents(name):
    """Tokens, images of them, lists, and what comes out as the autoencoder takes it: finer steps err less."""
    lens, call = with_autoencoder(name)
    image = lens.run(**call, seed=0, num_inference_steps=4).images[0]
    found = [invert(lens, [image], None, **call, num_inference_steps=n) for n in (4, 16)]
    assert found[1].latent_error[0] < 0.5 * found[0].latent_error[0]
    clean, grid = encode_images(lens, [image], None, call)
    way = lens.run(
        ops=Swap("velocity", source=found[0].velocity, branch="both"),
        seed=0,
        **{**call, "latents": found[0].noise, "num_inference_steps": 4},
    )
    assert rmse(way.images[0], decode_latents(lens, clean, grid)[0]) < 0.5


def test_what_cannot_be_done_is_refused_before_anything_runs(tiny, noisy, image, monkeypatch):
    linear = DiTLens(sana.build(), defaults=CALLS[sana])
    others = {
        "kandinsky5": "does not pass latents= to its transformer as they are",
        "ernie": "does not pass latents= to its transformer as they are",
        "omnigen": "always guides",
        "ideogram4": "always guides",
    }
    others = {DiTLens(ENTRIES[name].build()): words for name, words in others.items()}
    monkeypatch.setattr(DiTLens, "run", None)
    for lens, words in others.items():
        with pytest.raises(FamilyError, match=words):
            invert(lens, [image], CAPTION)
    with pytest.raises(FamilyError, match="samples with DPMSolverMultistepScheduler"):
        invert(linear, [image], CAPTION)
    with pytest.raises(OpError, match=r"64 x 64 pixels, and the run draws 48 x 32"):
        noised_reference(tiny, [image], seed=0)
    with pytest.raises(OpError, match=r"images=\['noisy.png'\] cannot be used. Give an image"):
        noised_reference(tiny, ["noisy.png"], seed=0)
    with pytest.raises(OpError, match="Give at least one, and all of one size"):
        invert(tiny, [noisy, image])
    linear.pipe.scheduler.register_to_config(prediction_type="epsilon", use_flow_sigmas=False)
    with pytest.raises(OpError, match="known for flow matching only"):
        noised_reference(linear, [image], seed=0, prompts=CAPTION)
    pair = (noisy, "red")
    for choice, words in (
        ({"how": "invert"}, "'invert' is not a valid value of how. Nearest: 'inverted'"),
        ({"how": "inverted", "seeds": [0, 1]}, "seeds change nothing"),
        ({"k": 17}, "no control of equal size"),
        ({"captions": ["red", "blue"]}, "lists 2 texts for 1 images"),
    ):
        with pytest.raises(OpError, match=words):
            studies.transfer_image(tiny, [pair], **{"k": 3, **choice})
    with pytest.raises(OpError, match="no pairs"):
        studies.transfer_image(tiny, [])


def test_a_image_is_a_source_of_a_carrier_and_not_of_a_detail(toy):
    scenes = planted.SCENES[:2]
    source, target = (scene.caption for scene in scenes)
    pair = (draw(scenes[0], 0).image, target)
    choices = {"captions": [source], "k": 16, "strengths": [1.0], "draws": 1, "mask_from": None, "judge": scene_judge}
    moved = {}
    for kind in (planted.Carrier, planted.DetailOnly):
        lens = DiTLens(planted.pipeline(toy, kind), defaults=planted.CALL)
        result = studies.transfer_image(lens, [pair], **choices)
        moved[kind] = result.summary.set_index("arm").loc["top"]
        assert rmse(result.images["0/0/source"], pair[0]) < 10
    assert moved[planted.Carrier]["fidelity_source"] == 1
    assert moved[planted.Carrier]["to_source"] < 0.1 * moved[planted.Carrier]["to_target"]
    assert moved[planted.DetailOnly]["fidelity_target"] == 1
    assert moved[planted.DetailOnly]["to_target"] < 0.1 * moved[planted.DetailOnly]["to_source"]


def test_the_study_of_an_inverted_image_goes_on_and_loads(tiny, noisy, tmp_path, monkeypatch):
    choices = {"how": "inverted", "k": 3, "strengths": [1.0], "draws": 1, "mask_from": None, "num_inference_steps": 2}
    pairs = [(noisy, "red"), (noisy, "blue")]
    first = studies.transfer_image(tiny, pairs, **choices, batch_size=1, out=tmp_path / "out")
    assert "run forward again" in first.notes[-2]
    reconstructed = first.table[first.table["arm"] == "reconstruction"]
    assert (reconstructed["latent_error"] > 0).all()
    assert len(reconstructed) == 2
    assert "reconstruction" not in set(first.summary["arm"])
    shutil.copytree(tmp_path / "out", tmp_path / "early", ignore=shutil.ignore_patterns("00000[1-9]", "0000[1-9]?"))
    assert len(studies.Result.load(tmp_path / "early").table) == 1  # interrupted before anything was measured
    monkeypatch.setattr(DiTLens, "run", None)
    again = studies.transfer_image(tiny, pairs, **choices, batch_size=1, out=tmp_path / "out")
    assert again.notes == first.notes
    assert studies.Result.load(tmp_path / "out").notes == first.notes
    assert "an image" in first.figure().layout.title.text


def test_images_with_texts_of_their_own(tiny, noisy):
    """The noise of a seed does not depend on them."""
    way = noised_reference(tiny, [noisy, noisy], seed=0, prompts=["red", "x"], negative_prompt=["a", "b"])
    assert torch.equal(way, noised_reference(tiny, [noisy, noisy], seed=0, prompts=["red", "x"], negative_prompt="a"))


def test_rows_of_several_noises_each_have_their_own(tiny, noisy):
    latents = torch.randn(2, 96, 16, generator=torch.Generator().manual_seed(5))
    way = noised_reference(tiny, [noisy, noisy], seed=0, prompts=["red", "x"], latents=latents)
    alone = [
        noised_reference(tiny, [noisy], seed=0, prompts=prompt, latents=latents[i : i + 1])
        for i, prompt in enumerate(("red", "x"))
    ]
    assert torch.allclose(way, torch.cat(alone, 1), atol=1e-4)
    assert not torch.allclose(way[:, 0], way[:, 1], atol=0.1)


def test_what_they_set_or_cannot_count_by_is_refused(tiny, noisy):
    for function, how in ((invert, {}), (noised_reference, {"seed": 0})):
        with pytest.raises(PromptError, match="num_images_per_prompt=2 cannot be used here"):
            function(tiny, [noisy], num_images_per_prompt=2, **how)
        with pytest.raises(CallError, match="no argument 'prompt': it takes prompts="):
            function(tiny, [noisy], prompt="red", **how)
    with pytest.raises(CallError, match="no argument 'latents': it sets this itself"):
        invert(tiny, [noisy], latents=torch.zeros(1, 96, 16))
