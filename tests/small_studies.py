"""Every study at its smallest, on a tiny pipeline: several cells each, some of which need others."""

import functools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dit_lens import DiTLens, studies
from tests import pipelines

PROMPTS = ["a cat", "two dogs", "red", "blue"]
PAIRS = [("a cat", "two dogs"), ("red", "blue")]
SITE = "blocks[1:3].img"
STEPS = {"num_inference_steps": 2}


def judge(image, prompt):
    """Brightness stands for fidelity."""
    return {"fidelity": float(np.mean(image)) / 255, "readable": 1.0}


def left_half(image, prompt):
    mask = np.zeros((image.height, image.width), bool)
    mask[:, : image.width // 2] = True
    return mask


def _picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CARRIER = {"judge": judge, "attributes": lambda prompt: {"length": str(len(prompt))}}
SMALL = {"k": 4, "draws": 1, "site": SITE, "num_inference_steps": 1}
CALLS = {
    "disruption": ((PROMPTS[:3],), {**SMALL, "ablation": "mean", "batch_size": 2, "steps": -1}),
    "blocks": ((PROMPTS[:3],), {"parts": "mlp", "site": SITE, "ablation": "mean", "batch_size": 2, **STEPS}),
    "steering": ((PAIRS,), {"sites": SITE, "strengths": 2.0, "draws": 1, "batch_size": 1, **STEPS}),
    "transfer": ((PAIRS,), {**SMALL, "batch_size": 1, "strengths": 1.0, "mask_from": None}),
    "carrier_or_detail": ((PROMPTS,), {**SMALL, **CARRIER, "batch_size": 2}),
    "organisation": ((PROMPTS[:3],), {**SMALL, "batch_size": 1, "masks": left_half, "words": [], "steps": -1}),
    "patching": ((PAIRS[:1],), {"site": SITE, "batch_size": 2, "attribute": ["step"], **STEPS}),
    "basis": ((PROMPTS[:2],), {"k": [2], "draws": 1, "bases": ["random"], "site": SITE, "seeds": [0, 1], **STEPS}),
    "stability": ((PROMPTS,), {"k": 4, "site": SITE, "batch_size": 1, "seeds": [0, 1], **STEPS}),
    "write_attribution": ((PROMPTS[:3],), {"k": 4, "batch_size": 1, **STEPS}),
    "transfer_image": (
        ([(_picture(0), "red"), (_picture(1), "blue")],),
        {**SMALL, "batch_size": 1, "strengths": 1.0},
    ),
}


def make_lens():
    """A lens on the same tiny pipeline, whoever calls."""
    return DiTLens(pipelines.flux(), defaults={**pipelines.CALL, **STEPS})


@functools.cache
def draw_whole(name):
    """The result of a study as it is in one piece; whoever asks in one process has the same."""
    args, how = CALLS[name]
    return getattr(studies, name)(make_lens(), *args, **how)


def named(quick):
    """The names of all studies: those that are not quick are slow, and each has a process of its own."""
    return [
        name
        if name in quick
        else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.xdist_group(f"whole-{name}")])
        for name in CALLS
    ]


def assert_same(one, other):
    """Two results, number for number and pixel for pixel."""
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    pd.testing.assert_frame_equal(one.summary, other.summary, check_exact=True)
    images = [{name: image.tobytes() for name, image in result.images.items()} for result in (one, other)]
    assert images[0] == images[1]
    assert one.masks.keys() == other.masks.keys()
    assert all(np.array_equal(mask, other.masks[name]) for name, mask in one.masks.items())
    assert (one.settings, one.notes) == (other.settings, other.notes)
