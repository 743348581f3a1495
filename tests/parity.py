"""The calls, instruments and studies whose answers on a server are compared with those here, bit for bit."""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from PIL import Image

import dit_lens as dl
from dit_lens import Apply, AttentionMask, Read, Scale, Swap, Zero
from dit_lens.instruments.gradients import attribution
from dit_lens.instruments.inversion import invert, noised_reference
from dit_lens.toys import qwen_image
from tests import pipelines, texts

STEPS = {"num_inference_steps": 2}
SCENES = ["a big red circle left on a plain blue background", "a big blue cross right on a plain red background"]
CALLS = {
    "flux": {"prompt": ["red cat", "blue dog"], **pipelines.TRUE_CFG},
    "sd3": {"prompt": ["red cat", "blue dog"], "negative_prompt": ["bad", ""], **texts.SUBJECTS["sd3"].call},
    "qwen": {"prompt": SCENES, **qwen_image.CALL},
}


def same(one, other):
    """Two runs are equal bit for bit: images, latents, reads, receipt, clock."""
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    assert (one.latents is None) == (other.latents is None)
    assert one.latents is None or torch.equal(one.latents, other.latents)
    for first, second in zip(one.readings, other.readings, strict=True):
        assert list(first) == list(second)
        assert all(torch.equal(first[site], second[site]) for site in first)
    assert one.receipt == other.receipt
    assert (one.clock, one.grid, one.spec) == (other.clock, other.grid, other.spec)


def double(tensor, hook):
    return tensor * 2 if hook.step else None


OPS = [
    Read("blocks.*.img", reduce="|mean|", branch="both"),
    Read(["velocity", "blocks.1.img.attn_out", "blocks.*.img.x0"]),
    Zero("blocks.0.img", channels=[3], tokens=[0, 7]),
    Swap("blocks.1.img", source="row:0", rows=1, channels=[1, 4], strength=0.5),
    Scale("blocks.1.img", factor=1.5, channels=[2]),
    Apply("blocks.2.img", fn=double),
    Read("blocks.2.img", channels=[1], name="after"),
]


def plain(value):
    """Values that are equal where what they stand for is equal bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dl.Run):
        parts = (value.images, value.latents, list(map(dict, value.readings)), value.clock, value.grid)
        return plain(parts), value.receipt, value.spec
    if isinstance(value, dl.studies.Result):
        return value.table.to_csv(), plain(dict(value.images)), plain(dict(value.masks)), value.notes, value.settings
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: plain(one) for name, one in named.items() if not callable(one)}  # such as how words are found
    return value.tobytes() if hasattr(value, "tobytes") else getattr(value, "__dict__", value)


def strength(latents):
    return latents.square().mean()


def scaled(tensor, gradient):
    return (tensor * gradient).abs().mean(1)


# What needs weights: fn(lens, prompts, image). Edits and functions of the user's act on the way as in a run.
INSTRUMENTS = {
    "read_x0": lambda lens, some, _: lens.read_x0(some, "blocks[1:3].img", steps=[0], seed=0),
    "read_pattern": lambda lens, some, _: lens.read_pattern(
        some, [0, 1], heads=[0, 1], steps=[0, 1], ops=[Apply("blocks.0.img", fn=double)], seed=0
    ),
    "gradients": lambda lens, some, _: lens.gradients(some, "blocks[1:3].img", metric=strength, steps=[1], seed=0),
    "gradients through a step": lambda lens, some, _: lens.gradients(
        some, "blocks.1.{img,txt}", metric=strength, through="step", reduce=scaled, seed=0
    ),
    "attribution": lambda lens, some, _: attribution(lens, *some, "blocks.1.img", steps=[0], seed=0),
    "encode": lambda lens, some, _: lens.run(ops=[Read("blocks.1.img")], **lens.encode(some), seed=0),
    "encode_image": lambda lens, _, image: lens.encode_image([image, image]),
    "forward": lambda lens, some, image: lens.forward(image, some[0], [Read("blocks.1.img")], sigma=0.3),
    "word_map": lambda lens, some, _: lens.word_map(some[0], some[0].split()[-1], blocks=[0, 1], seed=0),
    "word_map without a key": lambda lens, some, _: lens.word_map(
        some[0], some[0].split()[-1], blocks=1, ops=AttentionMask("blocks.1.img", keys="txt", key_tokens=[0]), seed=0
    ),
    "word_map by concepts": lambda lens, some, _: lens.word_map(
        some[0], some[0].split()[-1], method="concept", concepts=[some[1]], blocks=[1], seed=0
    ),
    "invert": lambda lens, some, image: invert(lens, image, some[0]),
    "noised_reference": lambda lens, some, image: noised_reference(lens, image, seed=3, prompts=some[0]),
    "relevance": lambda lens, some, _: lens.massive_channels(some, k=2, score="relevance", site="blocks.1.img", seed=0),
    "registers": lambda lens, some, _: lens.find_tokens(some[0], k=2, without=1, site="blocks[0:2].img", seed=0),
    "sinks": lambda lens, some, _: lens.find_tokens(some[0], "sinks", k=2, site="blocks[0:2].img", seed=0),
}


OWN = ("prompt", "seed", "negative_prompt", "output_type")


def prepare(pair, **defaults):
    """Both lenses with defaults in place of a call, its prompts, and an image of its size."""
    here, there, call = pair
    given = {name: value for name, value in call.items() if name not in OWN} | defaults
    lenses = [copy.copy(lens) for lens in (here, there)]
    for lens in lenses:
        lens.defaults = given
    h, w = (call[side] for side in ("height", "width"))
    pixels = np.linspace(0, 255, h * w * 3).astype(np.uint8).reshape(h, w, 3)
    return lenses, tuple(call["prompt"]), Image.fromarray(pixels)


ONE = {"site": "blocks.1.img", "seeds": [0]}
MOVED = {"k": 2, "draws": 1, "strengths": [1.0], "mask_from": None, **ONE}
STUDIES = {
    "stability": lambda lens, some, _: dl.studies.stability(lens, some, k=2, **ONE),
    "write_attribution": lambda lens, some, _: dl.studies.write_attribution(lens, some[:1], k=2, **ONE),
    "disruption": lambda lens, some, _: dl.studies.disruption(lens, some[:1], k=2, draws=1, **ONE),
    "basis": lambda lens, some, _: dl.studies.basis(
        lens, some[:1], k=2, energies=0.2, bases=["relevant"], draws=1, **ONE
    ),
    "blocks": lambda lens, some, _: dl.studies.blocks(lens, some[:1], ablation="mean", **ONE),
    "carrier_or_detail": lambda lens, some, _: dl.studies.carrier_or_detail(
        lens, some, k=2, draws=1, judge=judge, attributes=lambda prompt: {"length": str(len(prompt))}, **ONE
    ),
    "sweep": lambda lens, some, _: dl.studies.sweep("stability", lens, some, over={"k": [1, 2]}, **ONE),
    "organisation": lambda lens, some, _: dl.studies.organisation(
        lens, some[:1], k=2, draws=1, words=some[0].split()[-1], masks=half, **ONE
    ),
    "patching": lambda lens, some, _: dl.studies.patching(lens, [some], k=2, draws=1, **ONE),
    "steering": lambda lens, some, _: dl.studies.steering(
        lens, [some, some[::-1]], sites="blocks.1.img", strengths=1.0, draws=1, seeds=[0]
    ),
    "transfer": lambda lens, some, _: dl.studies.transfer(lens, [some], **MOVED),
    "transfer_image": lambda lens, some, image: dl.studies.transfer_image(lens, [(image, some[1])], **MOVED),
    "an inverted image": lambda lens, some, image: dl.studies.transfer_image(
        lens, [(image, some[1])], how="inverted", **MOVED
    ),
}


def judge(image, prompt):
    """Brightness stands for fidelity."""
    return {"fidelity": float(np.mean(image)) / 255, "readable": 1.0}


def half(image, prompt):
    inside = np.zeros(image.size[::-1], bool)
    inside[: len(inside) // 2] = True
    return inside
