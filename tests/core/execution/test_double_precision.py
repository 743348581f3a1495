"""A pipeline in float64 is edited as a plain hook edits it, and its receipts keep the precision."""

import pytest
import torch

import dit_lens as dl
from tests import pipelines

SITE, CHANNELS = "blocks.1.img", [3, 7]
CALL = {**pipelines.CALL, "num_inference_steps": 2, "output_type": "latent"}

EDITS = {
    "zero": (dl.Zero(SITE, channels=CHANNELS), torch.zeros_like),
    "scale": (dl.Scale(SITE, channels=CHANNELS, factor=2.5), lambda x: x * 2.5),
    "mean": (dl.TokenMean(SITE, channels=CHANNELS), lambda x: x.mean(1, keepdim=True).expand_as(x)),
    "apply": (dl.Apply(SITE, channels=CHANNELS, fn=lambda x, hook: x.sin()), torch.sin),
}


@pytest.fixture(scope="module")
def lens():
    return dl.DiTLens(pipelines.flux(dtype=torch.float64))


@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_plain_hooks(lens, name):
    op, change = EDITS[name]
    norms = []

    def hook(module, args, output):
        text, image = output
        image = image.clone()
        norms.append(float(image[..., CHANNELS].norm()))
        image[..., CHANNELS] = change(image[..., CHANNELS])
        return text, image

    handle = lens.pipe.transformer.transformer_blocks[1].register_forward_hook(hook)
    wanted = lens.pipe("red", generator=[torch.Generator().manual_seed(3)], **CALL).images
    handle.remove()
    run = lens.run("red", op, seed=3, **CALL)
    assert run.latents.dtype == torch.float64
    assert torch.equal(run.latents, wanted)
    assert run.receipt.entries[0].before == pytest.approx(norms, rel=1e-12)
