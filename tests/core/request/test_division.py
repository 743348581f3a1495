"""A run in batches gives, row for row and bit for bit, what the plain pipeline gives for each batch by itself."""

from __future__ import annotations

import copy
import inspect

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dit_lens import DiTLens, Read, Zero
from dit_lens.core.request.division import Division, PromptSpan
from dit_lens.errors import ExecutionError, PromptError
from dit_lens.families import Pipeline, Prompts
from tests import pipelines
from tests.zoo.truth import ENTRIES

SIZE = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
TEXT = {**SIZE, "max_sequence_length": pipelines.LENGTH}
PROMPTS = ["red", "a blue dog", "x"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count, size=(48, 32)):
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def of_flux(kind, **config):
    """A tiny pipeline of another class; config: of its transformer."""
    parts = dict(pipelines.flux().components)
    if config:
        torch.manual_seed(0)
        parts["transformer"] = diffusers.FluxTransformer2DModel(**{**parts["transformer"].config, **config}).eval()
    cls = getattr(diffusers, kind)
    pipe = cls(**{name: part for name, part in parts.items() if name in inspect.signature(cls).parameters})
    pipe.set_progress_bar_config(disable=True)
    return pipe


BUILDERS = {
    **{name: entry.build for name, entry in ENTRIES.items()},
    "flux": pipelines.flux,
    "img2img": lambda: of_flux("FluxImg2ImgPipeline"),
    "inpaint": lambda: of_flux("FluxInpaintPipeline"),
    "kontext": lambda: of_flux("FluxKontextPipeline"),
    "control": lambda: of_flux("FluxControlPipeline", in_channels=32, out_channels=16),
}
MADE = {}


def made(name):
    """A lens over a tiny pipeline, and the same pipeline untouched; made once."""
    if name not in MADE:
        MADE[name] = DiTLens(BUILDERS[name](), defaults={}), BUILDERS[name]()
    return MADE[name]


def drawn(pipe, call, seeds):
    output = pipe(**copy.deepcopy(call), generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def parts_of(call, kinds, prompts, count, each):
    """The arguments of some prompts, by hand. kinds: name -> "prompt", "row", "tiled", "layered" or "offsets"."""
    rows = [prompt * each + j for prompt in prompts for j in range(each)]
    found = dict(call)
    for name, kind in kinds.items():
        value = call[name]
        if kind == "layered":
            found[name] = torch.stack([value[:, i] for i in prompts], dim=1)
            continue
        if kind == "offsets":
            ends = [0]
            for i in prompts:
                ends.append(ends[-1] + int(value[i + 1] - value[i]))
            found[name] = torch.tensor(ends, dtype=value.dtype)
            continue
        which = {"prompt": prompts, "row": rows, "tiled": [row % len(value) for row in rows]}[kind]
        entries = [value[i] for i in which]
        if isinstance(value, np.ndarray):
            entries = np.stack(entries)
        found[name] = torch.stack(entries) if isinstance(value, torch.Tensor) else entries
    return found


def check_batches(name, call, kinds, *, count=3, each=1, sizes=(1, 2)):
    """Asserts that batches are divided as by hand. kinds: of the arguments that are divided; all others go whole."""
    lens, plain = made(name)
    seeds = list(range(10, 10 + count * each))
    call = call | ({"num_images_per_prompt": each} if each > 1 else {})
    for size in sizes:
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        wanted = [
            drawn(
                plain,
                parts_of(call, kinds, batch, count, each),
                [seeds[prompt * each + j] for prompt in batch for j in range(each)],
            )
            for batch in batches
        ]
        options = dict(call)
        run = lens.run(options.pop("prompt", None), seed=seeds, batch_size=size, **options)
        assert torch.equal(run.latents, torch.cat(wanted)), size


def test_texts():
    call = {
        **TEXT,
        "prompt": PROMPTS,
        "prompt_2": ["one", "two", "three"],
        "negative_prompt": ["bad", "worse", "worst"],
        "negative_prompt_2": ["p", "q", "r"],
        "true_cfg_scale": 2.5,
    }
    check_batches("flux", call, dict.fromkeys(("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"), "prompt"))


def test_a_negative_prompt_for_all_is_one_for_each():
    """Given it once, the pipeline of FLUX runs the other branch with one row of text, and rounds otherwise."""
    lens, plain = made("flux")
    call = {**TEXT, "prompt": PROMPTS, "true_cfg_scale": 2.5}
    run = lens.run(PROMPTS, seed=[1, 2, 3], negative_prompt="bad", **{**TEXT, "true_cfg_scale": 2.5})
    assert torch.equal(run.latents, drawn(plain, {**call, "negative_prompt": ["bad"] * 3}, [1, 2, 3]))
    assert torch.allclose(run.latents, drawn(plain, {**call, "negative_prompt": "bad"}, [1, 2, 3]), atol=1e-4)


def test_several_images_of_texts_and_latents_of_their_own():
    noise = normal(6, 96, 16)
    check_batches("flux", {**TEXT, "prompt": PROMPTS, "latents": noise}, {"prompt": "prompt", "latents": "row"}, each=2)


def test_embeddings():
    call = {
        **SIZE,
        "prompt_embeds": normal(3, 7, 16),
        "pooled_prompt_embeds": normal(3, 16, seed=1),
        "negative_prompt_embeds": normal(3, 7, 16, seed=2),
        "negative_pooled_prompt_embeds": normal(3, 16, seed=3),
        "true_cfg_scale": 2.5,
    }
    check_batches("flux", call, {name: "prompt" for name in call if "prompt" in name})


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("zimage", {}),
        ("hidream", {"prompt_embeds_llama3": "layered", "negative_prompt_embeds_llama3": "layered"}),
        ("kandinsky5", {"prompt_cu_seqlens": "offsets", "negative_prompt_cu_seqlens": "offsets"}),
        ("hunyuan_dit", {}),
    ],
)
def test_embeddings_of_other_forms(name, kinds):
    call = {**ENTRIES[name].call(3), "num_inference_steps": 2}
    entries = {one: "prompt" for one in call if "prompt_" in one and call[one] is not None}
    check_batches(name, call, entries | {one: kind for one, kind in kinds.items() if one in call}, sizes=(2,))


def test_offsets_begin_at_none():
    division = Division(Pipeline("", None), Prompts(offsets=("prompt_cu_seqlens",)))
    offsets = torch.tensor([0, 3, 5, 9])
    part = PromptSpan(range(1, 3), count=3, each=2)
    assert division.select("prompt_cu_seqlens", offsets, part).tolist() == [0, 2, 6]
    assert division.repeat("prompt_cu_seqlens", offsets, 2).tolist() == [0, 3, 6, 8, 10, 14, 18]


def test_classes():
    lens, plain = made("dit")
    call = {**ENTRIES["dit"].call(2), "class_labels": [7, 5, 3], "num_inference_steps": 2}
    run = lens.run(seed=[1, 2, 3], batch_size=2, **call)
    wanted = [
        *drawn(plain, {**call, "class_labels": [7, 5]}, [1, 2]),
        *drawn(plain, {**call, "class_labels": [3]}, [3]),
    ]
    assert [image.tobytes() for image in run.images] == [image.tobytes() for image in wanted]


STARTING = {**TEXT, "prompt": PROMPTS, "strength": 0.6, "num_inference_steps": 3}


def test_images_to_start_from():
    check_batches("img2img", {**STARTING, "image": pictures(3)}, {"prompt": "prompt", "image": "prompt"})
    check_batches("img2img", {**STARTING, "image": pictures(1)}, {"prompt": "prompt", "image": "tiled"}, sizes=(2,))


def whole_and_parts(name, call, image, each):
    """A run of all prompts, the plain pipeline with an image for each row, and runs of one prompt at a time."""
    lens, plain = made(name)
    rows = len(call["prompt"]) * each
    several = {"num_images_per_prompt": each}
    seeds = list(range(20, 20 + rows))
    options = {key: value for key, value in call.items() if key != "prompt"}
    run = lens.run(call["prompt"], seed=seeds, **options, **image, **several)
    apart = lens.run(call["prompt"], seed=seeds, batch_size=1, **options, **image, **several)
    listed = {
        key: [value[row % len(value)] if isinstance(value, list) else value for row in range(rows)]
        for key, value in image.items()
    }
    return run.latents, drawn(plain, {**call, **listed, **several}, seeds), apart.latents


@pytest.mark.parametrize(("images", "each"), [(0, 1), (0, 2), (1, 1), (2, 2)])
def test_a_row_starts_from_the_same_image_whatever_its_neighbours(images, each):
    image = pictures(images) if images else pictures(1)[0]
    whole, plain, apart = whole_and_parts("img2img", STARTING, {"image": image}, each)
    assert torch.equal(whole, plain)
    assert torch.allclose(whole, apart, atol=1e-4)


def test_a_row_is_inpainted_the_same_whatever_its_neighbours():
    mask = Image.fromarray((np.random.default_rng(0).random((32, 48)) > 0.5).astype(np.uint8) * 255)
    image = {"image": pictures(1)[0], "mask_image": mask}
    whole, plain, apart = whole_and_parts("inpaint", STARTING, image, 1)
    assert torch.equal(whole, plain)
    assert torch.allclose(whole, apart, atol=1e-4)


@pytest.mark.parametrize("form", ["pil", "array", "arrays", "tensor", "tensors"])
def test_an_integer_seed_starts_every_prompt_from_the_same_noise(form):
    lens, _ = made("img2img")
    array = np.random.default_rng(0).random((32, 48, 3)).astype(np.float32)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = {"pil": pictures(1)[0], "array": array, "arrays": array[None], "tensor": tensor, "tensors": tensor[None]}
    options = {name: value for name, value in STARTING.items() if name != "prompt"}
    run = lens.run(["a cat"] * 2, seed=3, image=forms[form], **options)
    alone = lens.run("a cat", seed=3, image=forms[form], **options)
    assert torch.allclose(run.latents[:1], alone.latents, atol=1e-4)
    assert torch.allclose(run.latents[:1], run.latents[1:], atol=1e-4)


def test_a_crop_that_rows_would_share_is_refused():
    options = {**STARTING, "output_type": "pil", "padding_mask_crop": 8, "image": pictures(1)[0]}
    options["mask_image"] = Image.new("L", (48, 32), 255)
    prompts = options.pop("prompt")
    with pytest.raises(PromptError, match=r"padding_mask_crop= takes one image= for all 3 images .* one image at a"):
        made("inpaint")[0].run(prompts, seed=0, **options)
    assert len(made("inpaint")[0].run(prompts[:1], seed=0, **options).images) == 1


@pytest.mark.parametrize("images", [1, 2, 6])
def test_images_of_several_drawings_are_taken_in_turn(images):
    """As the pipeline does: two images of four rows are those of rows 0 and 1, then of rows 2 and 3."""
    image = pictures(images)
    kinds = {"prompt": "prompt", "image": "tiled"}
    check_batches("img2img", {**STARTING, "image": image}, kinds, each=2, sizes=(1,))


def test_masks():
    masks = (np.random.default_rng(0).random((3, 32, 48)) > 0.5).astype(np.float32)
    call = {**STARTING, "image": pictures(3), "mask_image": masks}
    check_batches("inpaint", call, {"prompt": "prompt", "image": "prompt", "mask_image": "prompt"}, sizes=(2,))


KONTEXT = {**TEXT, "prompt": PROMPTS, "_auto_resize": False, "max_area": 32 * 48}


def test_images_that_are_referred_to():
    check_batches("kontext", {**KONTEXT, "image": pictures(3)}, {"prompt": "prompt", "image": "prompt"})
    image = pictures(1)[0]
    check_batches("kontext", {**KONTEXT, "image": image}, {"prompt": "prompt"}, sizes=(2,))
    check_batches("kontext", {**KONTEXT, "image": [image]}, {"prompt": "prompt"}, sizes=(2,))


@pytest.mark.parametrize("each", [1, 2])
def test_images_that_control(each):
    call = {**TEXT, "prompt": PROMPTS, "control_image": pictures(3)}
    check_batches("control", call, {"prompt": "prompt", "control_image": "prompt"}, each=each)


def test_references_that_every_row_is_given():
    call = {**ENTRIES["klein"].call(2), "num_inference_steps": 2, "image": pictures(2, (64, 64))}
    entries = {name: "prompt" for name in call if "prompt_" in name and call[name] is not None}
    check_batches("klein", call, entries, count=2, sizes=(1,))


def test_edits_and_reads_of_rows_are_those_of_one_batch():
    lens, _ = made("flux")
    ops = [Zero("blocks.1.img", rows=[0, 3, 5], channels=[1, 2]), Read("blocks.3.img", rows=[1, 3, 4])]
    call = {**TEXT, "num_images_per_prompt": 2}
    split = lens.run(PROMPTS, ops, seed=7, batch_size=1, **call)
    assert split.readings[0].rows == (1, 3, 4)
    for prompt in range(3):
        alone = lens.run(
            PROMPTS[prompt],
            [Zero("blocks.1.img", rows=rows, channels=[1, 2]) for rows in [{0: [0], 1: [1], 2: [1]}[prompt]]],
            seed=7,
            **call,
        )
        assert torch.equal(split.latents[prompt * 2 : prompt * 2 + 2], alone.latents)


# One prompt's embeddings for several images


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma", "cogview4", "hunyuan_dit", "lumina2", "wan", "zimage"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_embeddings_of_a_prompt_serve_all_its_images(name, prompts):
    """Many pipelines repeat no embeddings, or not all: the same as if each stood there once for every image."""
    lens, plain = made(name)
    entry = ENTRIES[name]
    if name == "flux":
        call = {**SIZE, "prompt_embeds": normal(prompts, 7, 16), "pooled_prompt_embeds": normal(prompts, 16)}
    else:
        call = {**entry.call(prompts), "num_inference_steps": 2}
    several = "num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"
    run = lens.run(seed=5, **call, **{several: 2})
    repeated = {
        key: [value[i // 2] for i in range(2 * prompts)] if isinstance(value, list) else value.repeat_interleave(2, 0)
        for key, value in call.items()
        if "prompt_" in key and value is not None
    }
    assert torch.equal(run.latents, drawn(plain, {**call, **repeated}, [5, 6] * prompts))


def test_text_of_embeddings_is_edited_in_one_image_of_several():
    lens, plain = made("flux")
    call = {**SIZE, "prompt_embeds": normal(1, 7, 16), "pooled_prompt_embeds": normal(1, 16)}
    site = "blocks.0.txt.resid_pre"
    run = lens.run(ops=[Zero(site, rows=[1], tokens=[2]), Read(site)], seed=5, num_images_per_prompt=2, **call)
    seen = []

    def edit(module, args, kwargs):
        text = kwargs["encoder_hidden_states"].clone()
        text[1, 2] = 0
        seen.append(text)
        return args, {**kwargs, "encoder_hidden_states": text}

    handle = plain.transformer.transformer_blocks[0].register_forward_pre_hook(edit, with_kwargs=True)
    twice = {name: value.repeat_interleave(2, 0) for name, value in call.items() if "embeds" in name}
    wanted = drawn(plain, {**call, **twice}, [5, 6])
    handle.remove()
    assert torch.equal(run.latents, wanted)
    assert torch.equal(run[site].as_subclass(torch.Tensor), torch.stack(seen))


def test_one_entry_stands_for_all_prompts():
    lens, plain = made("flux")
    call = {
        **SIZE,
        "prompt_embeds": normal(2, 7, 16),
        "pooled_prompt_embeds": normal(2, 16),
        "negative_prompt_embeds": normal(1, 7, 16, seed=4),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=5),
        "true_cfg_scale": 2.5,
    }
    whole = {name: value.repeat_interleave(2, 0) if "negative" in name else value for name, value in call.items()}
    for size in (None, 1):
        run = lens.run(seed=3, batch_size=size, **call)
        for row in range(2):
            rows = slice(row, row + 1) if size else slice(None)
            some = {name: value[rows] if "embeds" in name else value for name, value in whole.items()}
            wanted = drawn(plain, some, [3] if size else [3, 3])
            assert torch.equal(run.latents[rows], wanted)


# What nobody knows how to divide


UNKNOWN = {
    "joint_attention_kwargs": {"scale": 0.5, "ip_hidden_states": [torch.zeros(2, 4, 32)]},
    "ip_adapter_image_embeds": [torch.zeros(2, 1, 8)],
    "ip_adapter_image": pictures(2),
    "callback_on_step_end": lambda pipe, step, time, given: given,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nobody_knows_is_refused_before_the_run(name):
    lens, _ = made("flux")
    calls = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(
        PromptError, match=rf"{name}= .*so the prompts cannot go through in batches\. Leave batch_size="
    ):
        lens.run(PROMPTS[:2], seed=0, batch_size=1, **{**TEXT, name: UNKNOWN[name]})
    handle.remove()
    assert not calls


def test_numbers_and_words_for_attention_are_the_same_for_every_row():
    call = {**TEXT, "prompt": PROMPTS, "joint_attention_kwargs": {"scale": 0.5}}
    check_batches("flux", call, {"prompt": "prompt"}, sizes=(2,))


@pytest.mark.parametrize("count", [2, 4])
def test_images_that_fit_neither_prompts_nor_rows(count):
    with pytest.raises(
        PromptError, match=rf"image= holds a list of {count}, which does not fit 3 prompts and 3 images"
    ):
        made("kontext")[0].run(PROMPTS, seed=0, batch_size=1, **{**TEXT, "image": pictures(count)})


def with_memory_for(rows, name, failure=None):
    """A lens of its own over a tiny pipeline whose transformer takes no more rows."""
    pipe = BUILDERS[name]()

    def limit(module, args):
        if len(args[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if failure is not None:
            raise failure

    pipe.transformer.x_embedder.register_forward_pre_hook(limit)
    return DiTLens(pipe, defaults={})


@pytest.mark.parametrize("name", ["joint_attention_kwargs", "callback_on_step_end"])
def test_memory_that_runs_out_in_a_call_that_cannot_be_divided(name):
    lens = with_memory_for(1, "flux")
    with pytest.raises(
        ExecutionError, match=rf"memory ran out and the batch cannot be made smaller: {name}="
    ) as caught:
        lens.run(PROMPTS[:2], seed=0, **{**TEXT, name: UNKNOWN[name]})
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_memory_that_runs_out_with_a_list_of_images():
    lens = with_memory_for(1, "kontext")
    call = {**KONTEXT, "image": pictures(3)}
    with pytest.warns(UserWarning, match="1 fitted"):
        run = lens.run(seed=4, **call)
    plain = made("kontext")[1]
    wanted = [drawn(plain, {**call, "prompt": PROMPTS[i], "image": call["image"][i]}, [4]) for i in range(3)]
    assert torch.equal(run.latents, torch.cat(wanted))


def test_an_error_of_smaller_batches_does_not_hide_the_memory():
    lens = with_memory_for(1, "flux", RuntimeError("shapes do not match"))
    with pytest.raises(ExecutionError, match=r"smaller batch fails: .*shapes do not match.*height=") as caught:
        lens.run(PROMPTS[:2], seed=0, **TEXT)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_arguments_of_some_prompts_in_any_order():
    division = Division(Pipeline("", None, row_images=("image",)), Prompts(layered=("llama",), offsets=("cu_seqlens",)))
    rows, embeddings, layered = [2, 0, 0], normal(3, 4, 5), normal(2, 3, 4)
    images, latents = pictures(3), normal(3, 6, 2)
    call = {
        "negative_prompt": np.array(["a", "b", "c"]),
        "prompt_2": "one for all",
        "negative_prompt_embeds": embeddings,
        "pooled_prompt_embeds": embeddings[:1, :, 0],
        "llama": layered,
        "cu_seqlens": torch.tensor([0, 3, 5, 9], dtype=torch.int32),
        "image": images,
        "latents": latents,
        "sigmas": [1.0, 0.5, 0.2],
        "callback_on_step_end": print,
        "height": 32,
        "mask_image": None,
    }
    found = division.share(call, rows, 3)
    assert found["negative_prompt"] == ["c", "a", "a"]
    assert torch.equal(found["negative_prompt_embeds"], torch.stack([embeddings[i] for i in rows]))
    assert torch.equal(found["llama"], torch.stack([layered[:, i] for i in rows], 1))
    assert found["cu_seqlens"].tolist() == [0, 4, 7, 10]
    assert found["cu_seqlens"].dtype == torch.int32
    assert [id(one) for one in found["image"]] == [id(images[i]) for i in rows]
    assert torch.equal(found["latents"], torch.stack([latents[i] for i in rows]))
    whole = ("prompt_2", "pooled_prompt_embeds", "sigmas", "callback_on_step_end", "height", "mask_image")
    assert all(found[name] is call[name] for name in whole)
    assert division.share(call, range(3), 3) == call


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"negative_prompt": ["a", "b"]}, "negative_prompt= lists 2 texts for 3 prompts. Give one for all"),
        ({"negative_prompt_embeds": torch.zeros(2, 4, 5)}, "has 2 entries for 3 prompts"),
        ({"latents": torch.zeros(1, 4, 5)}, "latents= has 1 entries for 3 prompts. Give one for each"),
        ({"image": pictures(2)}, "does not fit 3 prompts"),
        ({"image_embeds": torch.zeros(3, 4)}, "nobody knows what belongs to which prompt"),
    ],
)
def test_entries_that_are_nobodys_are_refused(call, told):
    division = Division(Pipeline("", None, row_images=("image",)), Prompts())
    with pytest.raises(PromptError, match=told):
        division.share(call, [0, 1], 3)
