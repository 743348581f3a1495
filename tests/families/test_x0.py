"""x0 of blocks and of the model, for every family."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from dit_lens import DiTLens, Read
from dit_lens.errors import OpError, SiteError
from tests.zoo.truth import ENTRIES, Zoo, zoo_of


def test_a_row_without_a_readout_has_no_x0_of_a_block(monkeypatch):
    row = replace(zoo_of("sd3").lens.family, readout=None)
    monkeypatch.setattr("dit_lens.families.registry.REGISTERED", [row])
    lens = DiTLens(ENTRIES["sd3"].build(), defaults={})
    with pytest.raises(SiteError, match="does not say how tokens are read out"):
        lens.run(ops=[Read("blocks.-1.img.x0")], seed=0, **ENTRIES["sd3"].call(1))


def test_x0_needs_a_prediction_it_can_be_computed_from():
    zoo = Zoo(ENTRIES["pixart-alpha"])
    zoo.lens.pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(OpError, match=r"x0 cannot be computed.*Read velocity instead"):
        zoo.run([Read("x0")])


@pytest.mark.parametrize(
    ("name", "off"), [("sana-sprint", {}), ("cosmos2", {"guidance_scale": 1.0, "negative_prompt_embeds": None})]
)
def test_x0_of_rescaled_latents_is_the_schedulers_own(name, off):
    """Their pipelines scale what the transformer sees, and turn its answer into what the scheduler wants."""
    zoo = Zoo(ENTRIES[name])
    zoo.call = {**zoo.call, **off}
    run = zoo.run([Read("x0")])
    scheduler, taken = zoo.pipe.scheduler, []
    step = scheduler.step

    @functools.wraps(step)
    def stepping(output, timestep, sample, **rest):
        stepped = step(output, timestep, sample, **rest)
        if name == "cosmos2":
            taken.append(sample - scheduler.sigmas[len(taken)] * output)
        else:
            taken.append(stepped[1] / scheduler.config.sigma_data)
        return stepped

    scheduler.step = stepping
    zoo.plain_of(zoo.call)
    for found, wanted in zip(run["x0"].as_subclass(torch.Tensor), taken, strict=True):
        image = wanted.float().squeeze(2) if wanted.ndim == 5 else wanted.float()
        patches = torch.nn.functional.pixel_unshuffle(image, image.shape[-1] // run.grid[-1])
        torch.testing.assert_close(found, patches.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_last_block_reads_out_the_models_own_x0(name):
    """And on a flow without guidance the last step's x0 is what the pipeline returns."""
    zoo = zoo_of(name)
    (last,) = zoo.lens.sites("blocks.-1.img.x0")
    run = zoo.run([Read([last, "x0"])])
    torch.testing.assert_close(
        run[last].as_subclass(torch.Tensor), run["x0"].as_subclass(torch.Tensor), rtol=1e-3, atol=1e-4
    )
    second_model = name == "ideogram4"  # it guides
    if (
        zoo.branches == ["cond"]
        and not second_model
        and run.latents is not None
        and run.latents.shape == run["x0"][-1].shape
    ):
        torch.testing.assert_close(run["x0"][-1].as_subclass(torch.Tensor), run.latents, rtol=1e-3, atol=1e-3)
