"""Noise levels under schedulers that a pipeline did not come with: the scheduler's own, or the run is refused."""

import diffusers
import pytest
import torch
from diffusers import CosmosTextToWorldPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from dit_lens import DiTLens, Read, Zero, sigma
from dit_lens.errors import FamilyError, PromptError
from dit_lens.instruments.inversion import noised_reference
from tests import pipelines
from tests.zoo import truth, video
from tests.zoo.parts import absent

STEPS = 3


@pytest.fixture
def pixart():
    zoo = truth.zoo_of("pixart-sigma")
    before = zoo.lens.pipe.scheduler
    yield zoo
    zoo.lens.pipe.scheduler = before


INTERPOLATING = {
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},  # which tells whole times only
}


@pytest.mark.parametrize("name", INTERPOLATING)
def test_levels_between_timesteps_are_those_of_the_scheduler(pixart, name):
    pipe = pixart.lens.pipe
    pipe.scheduler = getattr(diffusers, name)(**INTERPOLATING[name])
    call = {**pixart.call, "seed": truth.SEED, "num_inference_steps": STEPS}
    levels = pixart.lens.outline(**call).sigmas
    run = pixart.lens.run(ops=Zero("blocks.0.img", channels=[0], steps=sigma(1.0, 0.5)), **call)
    noise = pipe.scheduler.sigmas[: len(run.sigmas)].double()
    own = (noise / (1 + noise**2).sqrt()).tolist()
    assert run.sigmas == pytest.approx(own, abs=2e-6)
    assert levels == tuple(run.sigmas)
    assert {entry.steps for entry in run.receipt.entries} == {tuple(i for i, level in enumerate(own) if level > 0.5)}


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"])
def test_levels_at_whole_timesteps_are_those_of_the_table(pixart, name):
    scheduler = pixart.lens.pipe.scheduler = getattr(diffusers, name)()
    run = pixart.lens.run(**{**pixart.call, "num_inference_steps": STEPS}, seed=truth.SEED)
    times = [int(time) for time in scheduler.timesteps]
    assert run.sigmas == [(1 - float(scheduler.alphas_cumprod[time])) ** 0.5 for time in times]


def test_clean_latents_under_edm_are_what_the_scheduler_denoises_to():
    parts = video.cosmos2()
    scheduler = EDMEulerScheduler(sigma_max=80, sigma_min=0.002, sigma_data=0.5, final_sigmas_type="sigma_min")
    common = {"scheduler": scheduler, "safety_checker": video.Harmless()}
    pipe = absent(CosmosTextToWorldPipeline, transformer=parts.transformer, **common)
    pipe.set_progress_bar_config(disable=True)
    texts = {name: torch.randn(1, 7, 12) for name in ("prompt_embeds", "negative_prompt_embeds")}
    size = {"height": 64, "width": 96, "num_frames": 1, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    call = {**texts, **size, "output_type": "latent"}
    denoised, step = [], scheduler.step

    def note(*args, **kwargs):
        found = step(*args, **kwargs)
        denoised.append(found[1])
        return found

    scheduler.step = note
    drawn = pipe(generator=[torch.Generator().manual_seed(3)], **call).frames
    del scheduler.step
    lens = DiTLens(pipe)
    run = lens.run(ops=[Read("x0"), Read("blocks.1.img", steps=sigma(1.0, 0.5), name="early")], seed=3, **call)
    assert torch.equal(run.latents, drawn)
    noise = scheduler.sigmas[:STEPS].double()
    assert run.sigmas == pytest.approx((noise / (noise**2 + 0.25).sqrt()).tolist(), abs=1e-6)
    assert lens.outline(seed=3, **call).sigmas == pytest.approx(run.sigmas, abs=1e-6)
    assert run["early"].steps == (0, 1)
    for x0, both in zip(run["x0"], denoised[::2], strict=True):  # every other call is given both branches
        conditional = both.chunk(2)[1] / scheduler.config.sigma_data
        wanted = conditional.squeeze(2).unfold(2, 1, 1).unfold(3, 1, 1).flatten(2, 3).squeeze(-1).squeeze(-1)
        assert x0.numel() == wanted.numel()
        assert float(x0.norm()) == pytest.approx(float(wanted.norm()), rel=1e-4)
        assert sorted(x0.flatten().tolist()) == pytest.approx(sorted(wanted.flatten().tolist()), abs=1e-4)


REFUSED = {
    "EDM": diffusers.EDMEulerScheduler,
    "IPNDM": diffusers.IPNDMScheduler,
    "inverted": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "continuous": lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_whose_times_nobody_knows_are_refused_before_a_run(name):
    pipe = pipelines.flux()
    lens, made = DiTLens(pipe, defaults=dict(pipelines.CALL)), []
    image = lens.run("red", seed=1).images[0]
    pipe.transformer.register_forward_pre_hook(lambda *_: made.append(None))
    pipe.scheduler = REFUSED[name]()
    kind = type(pipe.scheduler).__name__
    for call in (lambda: lens.run("red", seed=1), lambda: noised_reference(lens, [image], seed=0)):
        with pytest.raises(FamilyError, match=rf"FluxPipeline with .*{kind}: its family does not say what noise"):
            call()
    assert not made


def test_steps_that_a_scheduler_refuses_are_told(pixart):
    for scheduler, steps in (
        ("DDIMScheduler", 2000),
        ("DDPMScheduler", 2000),
        ("LCMScheduler", 100),
        ("PNDMScheduler", 3),
    ):
        pixart.lens.pipe.scheduler = getattr(diffusers, scheduler)()
        with pytest.raises(PromptError, match=f"{scheduler} cannot make {steps} steps: .*num_inference_steps="):
            pixart.lens.run(**{**pixart.call, "num_inference_steps": steps}, seed=0)
