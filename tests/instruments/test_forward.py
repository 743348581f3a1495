"""A forward pass at a noise level of one's own equals the transformer called by hand."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import dit_lens as dl
from dit_lens import Read, Zero
from dit_lens.errors import DitLensError, FamilyError, OpError, PromptError
from dit_lens.instruments.inversion import invert, noised_reference
from dit_lens.instruments.latents import as_latents_argument, encode_images
from tests.instruments.test_inversion import with_autoencoder

PROMPT = "a big red circle left on a plain blue background"
SITES = ["blocks.*.img", "velocity"]


@pytest.fixture(scope="module")
def flux():
    return dl.DiTLens.toy()


@pytest.fixture(scope="module")
def image(flux):
    return flux.run(PROMPT, seed=0, num_inference_steps=4).images[0]


def clean_latents(pipe, image):
    """As FluxImg2ImgPipeline encodes an image, but the mode instead of a draw."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.26, 0.9, 1.0, 0.01])
def test_it_is_the_transformer_called_by_hand(flux, image, sigma):
    pipe = flux.pipe
    latents = flux.encode_image(image)
    torch.testing.assert_close(latents, clean_latents(pipe, image), rtol=1e-4, atol=1e-5)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    x = (1 - sigma) * latents + sigma * noise
    embeds, pooled, text_ids = pipe.encode_prompt(PROMPT, None, max_sequence_length=16)
    seen = {}
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    hooks = [
        block.register_forward_hook(lambda _, __, output, i=i: seen.update({f"blocks.{i}.img": output[1]}))
        for i, block in enumerate(blocks)
    ]
    predicted = pipe.transformer(
        hidden_states=x,
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([1.0]) if pipe.transformer.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32),
        return_dict=False,
    )[0]
    for hook in hooks:
        hook.remove()
    run = flux.forward(image, PROMPT, [Read(SITES)], sigma=sigma, seed=5)
    assert run.sigmas == pytest.approx((sigma,))
    assert torch.equal(run["velocity"][0], predicted)
    for site, tensor in seen.items():
        assert torch.equal(run[site][0], tensor), site
    drawn = pipe.vae.decode(
        pipe._unpack_latents(x - sigma * predicted, 64, 64, pipe.vae_scale_factor) / pipe.vae.config.scaling_factor
        + pipe.vae.config.shift_factor
    ).sample
    wanted = pipe.image_processor.postprocess(drawn, output_type="np")[0] * 255
    assert np.abs(np.asarray(run.images[0]).astype(float) - wanted).max() < 1


def test_several_images_pass_together_and_edits_act(flux, image):
    other = Image.new("RGB", (64, 64), "green")
    reads = [Read("blocks.5.img")]
    both = flux.forward([image, other], PROMPT, reads, sigma=0.3, seed=2)["blocks.5.img"]
    alone = flux.forward(image, PROMPT, reads, sigma=0.3, seed=2)["blocks.5.img"]
    assert both.shape == (1, 2, 256, 128)
    torch.testing.assert_close(both[0, 0], alone[0, 0], rtol=1e-4, atol=1e-4)
    swapped = flux.forward([other, image], PROMPT, reads, sigma=0.3, seed=2)["blocks.5.img"]
    torch.testing.assert_close(swapped[0, 1], alone[0, 0], rtol=1e-4, atol=1e-4)  # whatever its place
    edited = flux.forward(image, PROMPT, [Zero("blocks.0.img", channels=[3]), *reads], sigma=0.3, seed=2)
    assert edited.receipt.entries[0].site == "blocks.0.img"
    assert not torch.equal(edited["blocks.5.img"], alone)


def test_nothing_stays_as_it_was_not(flux, image):
    scheduler = flux.pipe.scheduler
    before = flux.run(PROMPT, seed=0, num_inference_steps=2)
    with pytest.raises(DitLensError):
        flux.forward(image, PROMPT, [Read("blocks.99.img")], sigma=0.3)
    flux.forward(image, PROMPT, sigma=0.3)
    assert flux.pipe.scheduler is scheduler
    assert flux.run(PROMPT, seed=0, num_inference_steps=2).images[0].tobytes() == before.images[0].tobytes()


@pytest.mark.parametrize("name", ["flux", "flux2", "klein", "sd3", "zimage", "bria", "chroma", "hidream"])
def test_every_form_of_latents_is_passed_at_the_level_that_was_asked(name):
    """Tokens, images of them, lists: what the transformer is given, whatever the scheduler's shift."""
    lens, call = with_autoencoder(name)
    image = lens.run(**call, seed=0, num_inference_steps=2).images[0]
    seen = []
    hook = lens.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    prompt = call.pop("prompt", None)
    try:
        run = lens.forward(image, prompt, sigma=0.3, seed=7, **call)
    finally:
        hook.remove()
    clean, _ = encode_images(lens, [image], prompt if prompt is None else [prompt], call)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    given = as_latents_argument(lens, 0.7 * clean + 0.3 * noise, run.grid)
    first = seen[0] if isinstance(seen[0], torch.Tensor) else torch.stack(list(seen[0]))
    tokens = name in {"flux2", "klein"}  # which the pipeline flattens itself
    given = given.flatten(2).transpose(1, 2) if tokens else given
    torch.testing.assert_close(first[:1].reshape(given.shape), given, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1
    assert run.sigmas == pytest.approx((0.3,))


def test_a_negative_prompt_of_the_defaults_is_not_warned_of(image, capfd, caplog):
    """Qwen-Image's pipeline tells of one that has no effect without guidance; the toy's defaults hold one."""
    qwen = dl.DiTLens.toy("qwen-image")
    assert qwen.defaults["negative_prompt"] == ""
    run = qwen.forward(image, PROMPT, sigma=0.3)
    assert run.spec["call"]["true_cfg_scale"] == 1
    assert "negative_prompt is passed" not in capfd.readouterr().err + caplog.text


def test_there_is_a_prompt_for_all_or_each(flux, image, monkeypatch):
    two = flux.encode([PROMPT, PROMPT])
    assert len(flux.forward([image, image], None, sigma=0.3, **two).images) == 2
    monkeypatch.setattr(flux.engine, "generate", lambda *_: pytest.fail("it draws"))
    for work in (
        lambda images, prompts: flux.forward(images, prompts, sigma=0.3),
        flux.encode_image,
        lambda images, prompts: invert(flux, images, prompts),
        lambda images, prompts: noised_reference(flux, images, seed=0, prompts=prompts),
    ):
        with pytest.raises(PromptError, match=r"2 prompts for 1 image\. Give one prompt for all images"):
            work([image], [PROMPT, PROMPT])
        with pytest.raises(PromptError, match=r"1 prompt for 2 images\."):
            work([image, image], [PROMPT])
    with pytest.raises(PromptError, match=r"the call is of 2 images, and 3 are given"):
        flux.forward([image] * 3, None, sigma=0.3, **two)


def test_refusals(flux, image):
    for sigma in (0, -0.1, 1.5, 1e-300):
        with pytest.raises(OpError, match="is no noise level"):
            flux.forward(image, PROMPT, sigma=sigma)
    with pytest.raises(OpError, match="Resize it"):
        flux.forward(Image.new("RGB", (32, 32)), PROMPT, sigma=0.3)
    sana = dl.DiTLens.toy("sana")
    sana.pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(FamilyError, match="samples with DPMSolver"):
        sana.forward(image, PROMPT, sigma=0.3)
