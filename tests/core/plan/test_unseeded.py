"""Schedulers that draw from the random numbers of the process are told, and cannot be recorded."""

import diffusers
import pytest
import torch

from dit_lens import DiTLens, Zero
from dit_lens.core.plan.unseeded import draws_unseeded
from dit_lens.errors import OpError
from tests import pipelines
from tests.zoo.truth import ENTRIES

CALL = {**pipelines.CALL, "num_inference_steps": 2, "output_type": "latent"}
FLOW = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}


@pytest.fixture(scope="module")
def flux():
    return pipelines.flux()


@pytest.fixture(scope="module")
def dit():
    return ENTRIES["dit"].build()


def draws(pipe):
    """Whether the plain pipeline gives two images for one seed."""
    found = [pipe("red", generator=torch.Generator().manual_seed(0), **CALL).images for _ in range(2)]
    return not torch.equal(*found)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.FlowMatchLCMScheduler(),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
        diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_is_told_is_what_the_plain_pipeline_does(flux, scheduler):
    flux.scheduler = scheduler
    assert draws_unseeded(flux) == draws(flux)


def test_a_run_is_told_and_a_recording_refused(flux):
    flux.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    lens = DiTLens(flux, defaults=CALL)
    match = "FlowMatchEulerDiscreteScheduler draws noise at every step.*seed= does not fix the image"
    with pytest.warns(UserWarning, match=match):
        lens.run("red", seed=0)
    called = []
    handle = flux.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(OpError, match=match):
        lens.run("red", seed=0, record=True)
    flux.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    recorded = lens.run("red", seed=0, record=True)
    flux.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    called.clear()
    with pytest.raises(OpError, match=match):
        lens.run("red", Zero("blocks.0.img", steps=1), seed=0, prefix=recorded)
    handle.remove()
    assert not called


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.DDPMScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.KDPM2AncestralDiscreteScheduler,
        diffusers.LCMScheduler,
        diffusers.TCDScheduler,
        diffusers.SASolverScheduler,
    ],
)
def test_noise_that_the_generator_of_the_call_gives_is_seeded(kind):
    """PixArt hands its generator to the scheduler, and DiT does not."""
    pixart, dit = ENTRIES["pixart-alpha"].build(), ENTRIES["dit"].build()
    pixart.scheduler = dit.scheduler = kind()
    assert not draws_unseeded(pixart)
    assert draws_unseeded(dit)
