"""Schedulers that draw from the random numbers of the process are told, and cannot be recorded."""

import diffusers
import pytest
import torch
from PIL import Image

from dit_lens import Apply, DiTLens, Zero
from dit_lens.core.plan.unseeded import draws_unseeded
from dit_lens.errors import OpError
from tests import pipelines
from tests.zoo import truth
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


# What else draws is seen by the run


@pytest.fixture(scope="module")
def controlled():
    """A pipeline that encodes its control image without the generator of the call."""
    pipe = ENTRIES["sd3"].build()
    torch.manual_seed(5)
    config = {**pipe.transformer.config, "num_layers": 1, "extra_conditioning_channels": 0}
    controlnet = diffusers.SD3ControlNetModel.from_config(config)
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made = diffusers.StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=controlnet.eval())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def call():
    image = Image.linear_gradient("L").convert("RGB").resize((64, 48))
    return {**ENTRIES["sd3"].call(1), "control_image": image, "num_inference_steps": 2}


TOOK = "StableDiffusion3ControlNetPipeline took random numbers of the process in this run"


def test_a_pipeline_that_draws_is_told_and_not_recorded(controlled, call):
    plain = [controlled(**call, generator=torch.Generator().manual_seed(0)).images for _ in range(2)]
    assert not torch.equal(*plain)
    lens = DiTLens(controlled)
    with pytest.warns(UserWarning, match=TOOK):
        lens.run(seed=0, **call)
    with pytest.raises(OpError, match=f"{TOOK}.*record= and prefix= cannot repeat that"):
        lens.run(seed=0, record=True, **call)


def test_functions_of_a_user_may_draw(flux, recwarn):
    flux.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    lens = DiTLens(flux, defaults=CALL)
    lens.run("red", Apply("blocks.0.img", fn=lambda tensor, hook: tensor + torch.randn_like(tensor)), seed=0)
    assert not [one for one in recwarn if "random numbers" in str(one.message)]
    flux.transformer.transformer_blocks[0].register_forward_hook(lambda *_: torch.rand(1) and None)
    with pytest.warns(UserWarning, match="FluxPipeline took random numbers of the process"):
        lens.run("red", seed=0)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_no_pipeline_is_told_wrongly(name, recwarn):
    """Whatever the random numbers of the process, a seed of the call gives one image; and nothing is told."""
    zoo = truth.zoo_of(name)
    plain = zoo.plain().drawn
    torch.rand(3)
    assert torch.equal(zoo.drawn(zoo.run([])), plain)
    assert not [one for one in recwarn if "random numbers" in str(one.message)]
