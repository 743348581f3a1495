"""Prompts encoded beforehand give the images of the prompts, without the text encoders."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
import transformers

from dit_lens import DiTLens, Read
from dit_lens.errors import ExecutionError, PromptError
from dit_lens.families import find_by_pipeline
from dit_lens.instruments.text_embeddings import encode_prompts, find_encoders, list_encoded, release
from tests import pipelines, zoo

PROMPTS = ["a red one", "blue"]
TOY = ["a big red circle left on a plain blue background", "a small green cross on a dotted white background"]


def same(one, other):
    drawn = all(a.tobytes() == b.tobytes() for a, b in zip(one.images, other.images, strict=True))
    return drawn and all(torch.equal(one[key], other[key]) for key in one.keys())  # noqa: SIM118 a Run is no mapping


def fresh(embedded=False):
    return DiTLens(pipelines.flux(embedded=embedded), defaults=pipelines.call_for(embedded))


def test_a_run_of_embeddings_is_the_run_of_the_strings(embedded):
    lens = fresh(embedded)
    strings = lens.run(PROMPTS, [Read("blocks.*.*")], seed=3)
    texts = lens.encode(PROMPTS, release=True)
    assert lens.pipe.text_encoder is None
    assert lens.pipe.text_encoder_2 is None
    assert same(lens.run(**texts, ops=[Read("blocks.*.*")], seed=3), strings)
    assert ("negative_prompt_embeds" in texts) is not embedded
    assert all(not hasattr(lens.nnsight, name) for name in ("text_encoder", "text_encoder_2"))


def test_every_call_that_takes_prompts_takes_embeddings_in_their_place():
    lens = fresh()
    site, call = "blocks.1.img", {"seed": 3, "num_inference_steps": 2}
    texts = lens.encode(PROMPTS)
    every = {
        "cache": lambda prompt, **more: lens.run_with_cache(prompt, site, **more)[1][site],
        "hooks": lambda prompt, **more: lens.run_with_hooks(prompt, [(site, lambda x, hook: 0 * x)], **more).latents,
        "massive": lambda prompt, **more: lens.massive_channels(prompt, k=3, site=site, **more).scores[site],
        "x0": lambda prompt, **more: np.asarray(lens.read_x0(prompt, site, **more).images["x0"][0][0]),
        "pattern": lambda prompt, **more: lens.read_pattern(prompt, 1, heads=[0], **more)[1],
        "gradients": lambda prompt, **more: lens.gradients(prompt, site, metric=torch.sum, **more)[site],
    }
    for name, take in every.items():
        more = call | ({"output_type": "latent"} if name == "hooks" else {})
        assert torch.equal(torch.as_tensor(take(None, **texts, **more)), torch.as_tensor(take(PROMPTS, **more))), name
    assert lens.cost(**texts, ops=Read(site), **call).bytes == lens.cost(PROMPTS, Read(site), **call).bytes


def test_other_texts_are_encoded_too():
    """A second prompt, and a negative one for every prompt."""
    lens = fresh()
    call = {"prompt_2": ["x", "y"], "negative_prompt": ["u", "v"], "negative_prompt_2": "w"}
    strings = lens.run(PROMPTS, seed=3, **call)
    assert same(lens.run(**lens.encode(PROMPTS, **call), seed=3), strings)
    assert not same(lens.run(PROMPTS, seed=3), strings)


def test_the_toy(toy):
    texts = toy.encode(TOY)
    run = toy.run(**texts, seed=0, num_inference_steps=3)
    assert same(run, toy.run(TOY, seed=0, num_inference_steps=3))
    assert run.spec["prompt"] is None
    with pytest.raises(PromptError, match="pink"):
        toy.encode("a pink circle")


def test_batches_of_embeddings():
    lens = fresh()
    texts = lens.encode([*PROMPTS, "c"])
    split = lens.run(**texts, seed=[1, 2, 3], batch_size=2)
    strings = lens.run([*PROMPTS, "c"], seed=[1, 2, 3], batch_size=2)
    assert same(split, strings)


def test_a_pipeline_of_encoders_alone():
    """What a small GPU does: encode without the transformer, then draw without the encoders."""
    whole = pipelines.flux()
    strings = DiTLens(whole, defaults=dict(pipelines.TRUE_CFG)).run(PROMPTS, seed=3)
    part = diffusers.FluxPipeline(**{**pipelines.flux().components, "transformer": None, "vae": None})
    texts = encode_prompts(part, PROMPTS, negative_prompt="bad", max_sequence_length=pipelines.LENGTH)
    rest = pipelines.flux()
    assert release(rest).parts == ("text_encoder", "text_encoder_2")
    assert same(DiTLens(rest, defaults=dict(pipelines.TRUE_CFG)).run(**texts, seed=3), strings)


def test_what_release_says():
    lens = fresh()
    size = sum(t.numel() * t.element_size() for part in find_encoders(lens.pipe).values() for t in part.parameters())
    released = lens.release_encoders()
    assert released.bytes["cpu"] >= size
    assert repr(released).startswith("released text_encoder, text_encoder_2: ")
    assert repr(released).endswith("kB on cpu")
    assert "nothing released" in repr(lens.release_encoders())
    with pytest.raises(PromptError, match="holds no text encoder any more"):
        lens.encode("red")


def test_encoders_return_to_where_they_were():
    lens = fresh()
    here = lens.encode(PROMPTS)
    there = lens.encode(PROMPTS, device="cpu")
    assert torch.equal(here["prompt_embeds"], there["prompt_embeds"])
    with pytest.raises(ExecutionError, match="has no memory"):
        lens.encode(PROMPTS, device="meta")
    assert {part.device.type for part in find_encoders(lens.pipe).values()} == {"cpu"}


def test_an_offloaded_pipeline_keeps_its_encoders():
    lens = fresh()
    lens.pipe._all_hooks = [object()]  # noqa: SLF001
    with pytest.raises(PromptError, match="offloaded"):
        lens.release_encoders()


def test_several_images_of_a_prompt_are_refused():
    with pytest.raises(PromptError, match="List a prompt once for every image"):
        fresh().encode("red", num_images_per_prompt=2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("QwenImageEditPipeline", "together with images"),
        ("HunyuanDiTPipeline", "does not return prompt_embeds_2"),
        ("ErnieImagePipeline", "does not return prompt_embeds"),
        ("Kandinsky5T2IPipeline", "does not return prompt_cu_seqlens"),
        ("BriaFiboPipeline", "takes no prompt_embeds"),
        ("LongCatImagePipeline", "values without names"),
        ("JoyImageEditPipeline", "also encodes by encode_prompt_multiple_images"),
        ("OmniGenPipeline", "has no encode_prompt"),
    ],
)
def test_pipelines_that_cannot_be_encoded_say_why(name, why):
    kind = getattr(diffusers, name)
    with pytest.raises(PromptError, match=rf"prompts of {name} cannot be encoded beforehand: .*{why}"):
        list_encoded(kind, find_by_pipeline(kind))


def test_guidance_by_rows_of_one_encoding():
    """Stable Diffusion 3 encodes prompt and negative prompt together, an empty one too."""
    from tests.zoo import dual

    def clip():
        config = transformers.CLIPTextConfig(
            vocab_size=104,
            hidden_size=4,
            intermediate_size=8,
            projection_dim=5,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=pipelines.LENGTH,
            eos_token_id=2,
        )
        return transformers.CLIPTextModelWithProjection(config).eval()

    torch.manual_seed(0)
    bare = dual.sd3()
    parts = {"text_encoder": clip(), "text_encoder_2": clip(), "tokenizer": pipelines.tokenizer("<s> $A </s>")}
    parts["tokenizer_2"] = parts["tokenizer"]
    pipe = diffusers.StableDiffusion3Pipeline(**{**bare.components, **parts})
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 7}
    lens = DiTLens(pipe, defaults=size)
    for call in ({}, {"negative_prompt": ["u", "v"]}, {"guidance_scale": 1.0}):
        strings = lens.run(PROMPTS, seed=3, **call)
        texts = lens.encode(PROMPTS, **call)
        again = lens.run(**texts, seed=3, **{k: v for k, v in call.items() if k == "guidance_scale"})
        assert torch.equal(again.latents, strings.latents)


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "sana", "qwen", "klein", "zimage"])
def test_names_of_other_families(name, monkeypatch):
    """What the zoo's pipelines take for embeddings is what encode_prompt is found to return."""
    from dit_lens.instruments import text_embeddings as encode

    entry = next(entry for entry in zoo.entries() if entry.name == name)
    pipe, call = entry.build(), entry.call(2)
    embeddings = {key for key, value in call.items() if "embeds" in key or "mask" in key}
    returned = list_encoded(type(pipe), find_by_pipeline(type(pipe)))

    def stub(self, prompt=None, **given):
        if prompt is None:
            return tuple(given.get(key, "ids") for key in returned)
        sign = "negative_" if set(prompt) <= {"", "bad"} else ""
        return tuple(call.get(sign + key, call.get(key, "ids")) for key in returned)

    stub.__signature__ = inspect.signature(type(pipe).encode_prompt)
    monkeypatch.setattr(encode, "list_encoded", lambda kind, family: returned)
    monkeypatch.setattr(encode, "find_encoders", lambda pipe: {"text_encoder": None})
    monkeypatch.setattr(type(pipe), "encode_prompt", stub)
    negative = (
        {} if "negative_prompt" not in inspect.signature(type(pipe).__call__).parameters else {"negative_prompt": "bad"}
    )
    texts = encode_prompts(pipe, ["a", "b"], **negative)
    assert {key for key, value in texts.items() if value is not None} == embeddings
    for key in embeddings:
        wanted, found = call[key], texts[key]
        pairs = zip(wanted, found, strict=True) if isinstance(wanted, list) else [(wanted, found)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_part_that_reads_prompts_and_is_gone_is_named(part):
    lens = fresh()
    texts, image = lens.encode("red"), lens.run("red", seed=3).images[0]
    setattr(lens.pipe, part, None)
    for draw in (lens.run, lens.encode):
        with pytest.raises(PromptError, match=rf"FluxPipeline cannot read a prompt: it has no {part} \(None\)"):
            draw("red")
    assert lens.run(**texts, seed=3).images[0].tobytes() == image.tobytes()
