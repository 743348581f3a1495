"""The rows of a forward pass are those of the plan, or nothing is said of them."""

import pytest
import torch

from dit_lens import DiTLens, Read, Zero
from dit_lens.errors import ExecutionError, FamilyError
from tests.zoo.truth import ENTRIES


@pytest.fixture(scope="module")
def sd3():
    entry = ENTRIES["sd3"]
    pipe = entry.build()
    pipe.set_progress_bar_config(disable=True)
    call = {**entry.call(1), "num_inference_steps": 3, "output_type": "latent"}
    return DiTLens(pipe), call


def end_guidance(pipe, step, timestep, kept):
    """The recipe of diffusers' documentation for a guidance that ends after some steps."""
    if step == 0:
        for name in kept:
            if name != "latents":
                kept[name] = kept[name].chunk(2)[-1]
        pipe._guidance_scale = 0.0  # noqa: SLF001 as the recipe does
    return kept


CALLBACK = {
    "callback_on_step_end": end_guidance,
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
}
SITES = ["blocks.1.img", "blocks.1.img.mod.attn.gate", "velocity", "x0", "blocks.0.img.x0", "blocks.0.txt.attn_out"]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
def test_guidance_that_ends_is_told(sd3, site, branch):
    lens, call = sd3
    with pytest.raises(
        ExecutionError, match=r"expects 2 rows in a forward pass of step 1 \(uncond and cond of 1 image"
    ):
        lens.run(ops=Read(site, branch=branch), seed=0, **call, **CALLBACK)


def test_steps_before_the_end_of_guidance_are_read(sd3):
    lens, call = sd3
    seen = []
    block = lens.pipe.transformer.transformer_blocks[1]
    handle = block.register_forward_hook(lambda _module, _args, output: seen.append(output[1]))
    plain = lens.pipe(generator=torch.Generator().manual_seed(0), **call, **CALLBACK).images
    handle.remove()
    assert [len(one) for one in seen] == [2, 1, 1]
    run = lens.run(ops=Read("blocks.1.img", branch="both", steps=0), seed=0, **call, **CALLBACK)
    assert torch.equal(run.latents, plain)
    assert torch.equal(run["blocks.1.img"].as_subclass(torch.Tensor)[0, :, 0], seen[0].flip(0))


@pytest.mark.parametrize("dim", [0, 1])
def test_forward_chunking_is_refused(sd3, dim):
    lens, call = sd3
    lens.pipe.transformer.enable_forward_chunking(1, dim=dim)
    try:
        for ops in (Read("blocks.0.img.mlp.pre"), Zero("blocks.0.img.mlp.post"), Read("blocks.0.img")):
            with pytest.raises(FamilyError, match=r"forward chunking is enabled.*disable_forward_chunking"):
                lens.run(ops=ops, seed=0, **call)
    finally:
        lens.pipe.transformer.disable_forward_chunking()
    assert lens.run(ops=Read("blocks.0.img.mlp.pre"), seed=0, **call).latents is not None


def test_one_row_stands_for_all_only_where_the_check_saw_it():
    entry = ENTRIES["prx-unguided"]
    lens = DiTLens(entry.build())
    call = {**entry.call(2), "output_type": "latent"}
    seen = []
    block = lens.pipe.transformer.blocks[1]
    handle = block.modulation.register_forward_hook(lambda _module, _args, output: seen.append(output))
    run = lens.run(ops=Read("blocks.1.img.mod.attn.shift", steps=0), seed=0, **call)
    handle.remove()
    shift = seen[0][0][0] if isinstance(seen[0][0], tuple) else seen[0][0]
    found = run["blocks.1.img.mod.attn.shift"].as_subclass(torch.Tensor)[0]
    assert shift.shape[0] == 1
    assert len(found) == 2
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0].flatten(), shift.flatten())
