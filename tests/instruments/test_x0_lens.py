"""The x0 lens against the images the pipelines draw themselves."""

import numpy as np
import pytest

from dit_lens import DiTLens, Read, Zero
from dit_lens.errors import FamilyError, OpError, SiteError
from tests import pipelines
from tests.zoo.truth import ENTRIES

PROMPT = "a big red circle left on a checkered blue background"


def array(image):
    return np.asarray(image, dtype=int)


def test_without_guidance_the_last_step_is_the_image(toy):
    run = toy.run(PROMPT, seed=0, true_cfg_scale=1.0)
    found = toy.read_x0(PROMPT, "blocks.-1.img", seed=0, true_cfg_scale=1.0, steps=[0, -1])
    assert list(found.images) == ["blocks.7.img.x0", "x0"]
    assert found.steps == (0, 11)
    for images in found.images.values():
        assert abs(array(images[-1][0]) - array(run.images[0])).max() <= 1
        assert abs(array(images[0][0]) - array(run.images[0])).max() > 10


@pytest.mark.parametrize("name", ["flux-embedded", "flux2", "klein-kv", "sd3", "sd35", "zimage"])
def test_every_kind_of_latents_is_decoded_as_its_pipeline_does(name):
    entry = ENTRIES[name]
    lens = DiTLens(entry.build(), defaults={})
    call = {**entry.call(2), "output_type": "pil"}
    call = {key: value for key, value in call.items() if not key.startswith("negative")}
    if "guidance_scale" in call:
        call["guidance_scale"] = 0.0 if name == "zimage" else 1.0
    steps = call.pop("num_inference_steps")
    run = lens.run(None, seed=0, num_inference_steps=steps, **call)
    found = lens.read_x0(None, "blocks.-1.img", steps=-1, seed=0, num_inference_steps=steps, **call)
    assert len(found.images["x0"][0]) == 2
    for drawn, own, last in zip(run.images, *(images[0] for images in found.images.values()), strict=True):
        assert abs(array(drawn) - array(own)).max() <= 1
        assert abs(array(drawn) - array(last)).max() <= 1


def test_an_edit_shows_in_the_blocks_after_it(cfg_lens):
    ops = [Read("blocks.*.img.x0")]
    plain, edited = cfg_lens.run("red", ops, seed=0), cfg_lens.run("red", [*ops, Zero("blocks.2.img")], seed=0)
    same = [bool((plain[site][0] == edited[site][0]).all()) for site in plain.keys()]  # noqa: SIM118
    assert same == [True, True, False, False, False]


def test_the_sheet_and_the_defaults(cfg_lens):
    found = cfg_lens.read_x0(["red", "blue"], seed=0, num_inference_steps=3)
    assert list(found.images) == [*(f"blocks.{i}.img.x0" for i in range(5)), "x0"]
    assert found.steps == (0, 1, 2)
    figure = found.figure(row=1)
    assert len(figure.data) == 18
    labels = [note.text for note in figure.layout.annotations]
    assert labels[:6] == ["block 0", "block 1", "block 2", "block 3", "block 4", "the model"]
    assert labels[-1] == "step 2<br>noise 0.33"


def test_refusals(cfg_lens):
    with pytest.raises(SiteError, match=r"holds no image tokens|no stream"):
        cfg_lens.read_x0("red", "blocks.0.txt")
    with pytest.raises(OpError, match="can only be read"):
        cfg_lens.run("red", Zero("blocks.0.img.x0"))
    pipe = pipelines.flux()
    lens = DiTLens(pipe, defaults=dict(pipelines.TRUE_CFG))
    lens.pipe.vae, vae = None, lens.pipe.vae
    with pytest.raises(FamilyError, match="without its autoencoder"):
        lens.read_x0("red", "blocks.0.img", output_type="latent")
    lens.pipe.vae = vae


def test_steps_are_those_that_run():
    """Not what num_inference_steps says: part of a run from an image, and a sampler that calls the model twice."""
    from diffusers import FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline
    from PIL import Image

    pipe = FluxImg2ImgPipeline(**pipelines.flux().components)
    pipe.set_progress_bar_config(disable=True)
    call = {"image": Image.new("RGB", (48, 32), "red"), "height": 32, "width": 48, "strength": 0.5}
    found = DiTLens(pipe).read_x0(
        "red", "blocks.0.img", seed=0, num_inference_steps=8, max_sequence_length=pipelines.LENGTH, **call
    )
    assert found.steps == (0, 1, 2, 3)
    entry = ENTRIES["sd3"]
    pipe = entry.build()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    call = {**entry.call(1), "output_type": "pil", "num_inference_steps": 4}
    assert DiTLens(pipe, defaults={}).read_x0(None, "blocks.0.img", seed=0, **call).steps == (0, 2, 4, 6)
