"""Maps of words: the share of full patterns of attention, and what plain hooks on attention's outputs give."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dit_lens as dl
from dit_lens.errors import OpError, PromptError, SiteError
from dit_lens.toys.scenes import Scene, recognise_scene
from tests import texts

PROMPT = "a big red circle left on a plain blue background"
CALL = {"seed": 0, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def flux():
    return dl.DiTLens.toy()


@pytest.fixture(scope="module")
def sana():
    return dl.DiTLens.toy("sana")


@pytest.mark.parametrize("name", texts.SUBJECTS)
def test_a_map_is_the_share_of_the_full_patterns(name):
    """Joint attention in every order of streams; words by the letters that they have."""
    subject = texts.SUBJECTS[name]
    lens, prompts = subject.lens, ["red cat", "cat red"]
    call = {**subject.call, "seed": 3, "ops": ()}
    heads = [0, 1]
    found = lens.word_map(prompts, ["cat", "red"], heads=heads, **call)
    whole = lens.read_pattern(prompts, list(found.blocks), heads=heads, steps=None, **call)
    for i, block in enumerate(found.blocks):
        pattern = whole.between(block, "img", "txt").mean(2)  # [step, row, image token, text token]
        for word in ("cat", "red"):
            for row, prompt in enumerate(prompts):
                starts = subject.starts(prompts, row, "cond")
                tokens = sorted({at + prompt.index(word) + j for at in starts for j in range(3)})
                share = pattern[:, row][..., tokens].sum(-1)
                torch.testing.assert_close(found.tensors[word][i, :, row].flatten(1), share, rtol=1e-4, atol=1e-6)


def test_cross_attention_is_what_the_pipeline_calls(sana, monkeypatch):
    """Against the patterns of every call of attention in the plain pipeline, made by hand."""
    seen = []

    def keep(query, key, value, attn_mask=None, **options):
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        seen.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    found = sana.word_map(PROMPT, ["circle", "blue"], heads=1, **CALL)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
    sana.pipe(
        **sana.defaults | {"prompt": PROMPT, "num_inference_steps": 2}, generator=torch.Generator().manual_seed(0)
    )
    depth = sana.anatomy.depth
    patterns = [one for one in seen if one.shape[-2:] == (256, 16)]
    assert len(patterns) == 2 * depth
    cond = torch.stack(patterns).unflatten(0, (2, depth))[:, :, -1, 1]  # of both rows, the one with the prompt
    tokens = sana.outline(PROMPT, **CALL).text().strings()
    for word in ("circle", "blue"):
        share = cond[..., tokens.index(word)].transpose(0, 1)
        torch.testing.assert_close(found.tensors[word][:, :, 0].flatten(2), share, rtol=1e-4, atol=1e-6)


def probe_by_hooks(pipe, block, prompts, tokens, call):
    """ConceptAttention in a joint block by plain hooks: row 0 and its image, read by the text of the rows after it.

    tokens: of the word of row 0 and, after it, of those of the other rows.
    """
    kept, transformer = [], pipe.transformer

    def share_image(_, args, kwargs):
        kwargs["hidden_states"][1:] = kwargs["hidden_states"][0]
        return args, kwargs

    hooks = [
        one.register_forward_pre_hook(share_image, with_kwargs=True)
        for one in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    ]
    attention = transformer.transformer_blocks[block].attn
    hooks += [
        module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for module in (attention.to_out[0], attention.to_add_out)
    ]
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    try:
        drawn = pipe(prompt=prompts, generator=generators, output_type="latent", **call).images
    finally:
        for hook in hooks:
            hook.remove()
    steps = []
    for image, text in zip(kept[::2], kept[1::2], strict=True):
        words = torch.stack([text[row, some].mean(0) for row, some in enumerate(tokens)])
        steps.append((image[0] @ words.T).softmax(-1))
    return torch.stack(steps), drawn  # [step, image token, word]


def test_concepts_read_the_image_and_are_read_by_nothing(flux):
    call = {**flux.defaults, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    concepts = ["square", "blue background"]
    with flux.quiet():
        found = flux.word_map(
            PROMPT, "circle", method="concept", concepts=concepts, seed=0, output_type="latent", blocks=[1, 3], **call
        )
        batch = flux.run([PROMPT, *concepts], seed=0, output_type="latent", **call)
    tokens = flux.outline(PROMPT, **CALL).text().strings()
    words = [[tokens.index("circle")], [0], [0, 1]]
    for i, block in enumerate(found.blocks):
        if block < len(flux.pipe.transformer.transformer_blocks):
            wanted, drawn = probe_by_hooks(flux.pipe, block, [PROMPT, *concepts], words, call)
            assert torch.equal(drawn[0], batch.latents[0])
            for w, word in enumerate(["circle", *concepts]):
                torch.testing.assert_close(
                    found.tensors[word][i, :, 0].flatten(1), wanted[..., w], rtol=1e-4, atol=1e-5
                )
    assert torch.equal(found.run.latents[0], batch.latents[0])
    assert not torch.equal(found.run.latents[1], batch.latents[1])
    total = sum(found.tensors.values())
    torch.testing.assert_close(total, torch.ones_like(total))


def test_concepts_are_given_what_the_prompt_is_given(flux):
    """What is listed for one prompt is enough, whatever rows its concepts take."""
    drawn = flux.run(PROMPT, seed=5, num_inference_steps=2)
    call = {"negative_prompt": [""], "num_inference_steps": 2}
    found = flux.word_map(PROMPT, "circle", method="concept", concepts=["square", "green"], seed=[5], **call)
    assert found.run.images[0].tobytes() == drawn.images[0].tobytes()
    assert found.mask("circle", row=-1).sum() == found.mask("circle").sum()
    assert found.overlay("square", row=-1).layout.images == found.overlay("square").layout.images
    with pytest.raises(OpError, match="row 1 does not exist: there are 1 images"):
        found.mask("circle", row=1)
    with pytest.raises(PromptError, match="seed= lists 2 seeds for 1 images"):
        flux.word_map(PROMPT, "circle", method="concept", concepts=["square"], seed=[5, 6], **call)
    generators = [torch.Generator()]
    with pytest.raises(PromptError, match=r"generator= lists one for each image.*Pass seed="):
        flux.word_map(PROMPT, "circle", method="concept", concepts=["square"], generator=generators, **call)


def test_words_of_the_prompt_are_compared_without_a_further_row(flux):
    found = flux.word_map([PROMPT, PROMPT], ["red", "blue"], method="concept", heads=[0, 2], blocks=-1, **CALL)
    run = flux.run([PROMPT, PROMPT], [dl.Read("blocks.7.{img,txt}.attn.z")], **CALL)
    tokens = flux.outline(PROMPT, **CALL).text().strings()
    chosen = [channel for head in (0, 2) for channel in flux.heads("blocks.7.img.attn.z")[head]]
    image, text = (run[f"blocks.7.{stream}.attn.z"][..., chosen] for stream in ("img", "txt"))
    words = text[:, :, [tokens.index("red"), tokens.index("blue")]]
    share = (image @ words.transpose(-1, -2)).softmax(-1).unflatten(2, (16, 16))
    assert len(found.run.images) == 2
    torch.testing.assert_close(found["red"], share[..., 0].as_subclass(torch.Tensor), rtol=1e-4, atol=1e-5)


def test_the_image_is_that_of_a_run_and_no_hook_stays(flux):
    found = flux.word_map(PROMPT, "circle", **CALL)
    assert found.run.images[0].tobytes() == flux.run(PROMPT, **CALL).images[0].tobytes()
    assert found.words == ("circle",)
    assert found["circle"].shape == (2, 1, 16, 16)
    assert not any(module._forward_pre_hooks for module in flux.pipe.transformer.modules())  # noqa: SLF001
    edited = flux.word_map(PROMPT, "circle", ops=dl.Zero("blocks.0.img", channels=[3]), **CALL)
    assert not torch.equal(edited["circle"], found["circle"])


def test_a_subject_is_found_in_the_model_whose_text_enters_by_cross_attention(sana):
    scenes = [Scene.parse(PROMPT), Scene.parse("a big yellow square center on a plain purple background")]
    overlaps = []
    for scene in scenes:
        found = sana.word_map(scene.caption, scene.shape, seed=0)
        truth = recognise_scene(found.run.images[0]).mask
        mask = dl.clusters.upsample(found.mask(), truth.shape)
        overlaps.append(dl.clusters.iou(mask, truth))
        assert "IoU" in found.overlay(truth=truth).layout.title.subtitle.text
    assert min(overlaps) > 0.6
    labels = [label.text for label in found.figure().layout.annotations]
    assert labels[0] == "image"
    assert labels[1].startswith("square<br>")


def test_refusals(flux, sana):
    with pytest.raises(PromptError, match=r"'tree' is no word of .*concepts="):
        flux.word_map(PROMPT, "tree", **CALL)
    with pytest.raises(PromptError, match=r"row 1"):
        flux.word_map([PROMPT, PROMPT.replace("circle", "square")], "circle", **CALL)
    with pytest.raises(OpError, match="at least two"):
        flux.word_map(PROMPT, "circle", method="concept", **CALL)
    with pytest.raises(OpError, match="pass method='concept'"):
        flux.word_map(PROMPT, "circle", concepts=["square"], **CALL)
    with pytest.raises(OpError, match=r"'concpet' is not a valid method\..*'concept'"):
        flux.word_map(PROMPT, "circle", method="concpet", **CALL)
    with pytest.raises(PromptError, match="give one, as a string"):
        flux.word_map([PROMPT, PROMPT], "circle", method="concept", concepts=["square"], **CALL)
    with pytest.raises(OpError, match="word and a concept"):
        flux.word_map(PROMPT, "circle", method="concept", concepts=["circle"], **CALL)
    with pytest.raises(PromptError, match="batch_size"):
        flux.word_map(PROMPT, "circle", batch_size=1, **CALL)
    with pytest.raises(OpError, match="head 9 does not exist"):
        flux.word_map(PROMPT, "circle", heads=9, **CALL)
    with pytest.raises(SiteError, match="Take method='attention'"):
        sana.word_map(PROMPT, ["circle", "blue"], method="concept", **CALL)
    found = flux.word_map(PROMPT, ["circle", "red"], blocks=[0, 1], steps=1, **CALL)
    bare = flux.word_map(PROMPT, "circle", output_type="latent", **CALL)
    assert bare.mask().shape == (16, 16)
    with pytest.raises(OpError, match="kept latents and no image"):
        bare.figure()
    with pytest.raises(OpError, match="Say which is meant"):
        found.mask()
    for gone in (5, -1, -9):
        with pytest.raises(SiteError, match=f"block {gone} was not read; there are 0, 1"):
            found.mask("red", block=gone)
    np.testing.assert_array_equal(found.mask("red", block=-8), found.mask("red", block=0))
    np.testing.assert_array_equal(found.mask("red", row=-1), found.mask("red", row=0))
    assert "block 1" in found.overlay("red", block=-7).layout.title.text
    with pytest.raises(OpError, match=r"no map of 'rde'.*'red'"):
        found["rde"]
    with pytest.raises(OpError, match="row 1 does not exist"):
        found.mask("red", row=1)


@pytest.mark.parametrize("toy", ["flux", "sana"])
def test_a_map_under_a_knocked_out_word_is_the_rest_normalised_anew(toy, request):
    """In the first block at the first step, whose attention is given the same as without the op."""
    lens = request.getfixturevalue(toy)
    call = {"seed": 0, "num_inference_steps": 1, "blocks": 0}
    words = ["circle", "blue"]
    op = dl.AttentionMask("blocks.0.img", keys="txt", key_tokens="blue", heads=[-1])
    plain = lens.word_map(PROMPT, words, heads=-1, **call)
    cut = lens.word_map(PROMPT, words, heads=-1, ops=op, **call)
    assert plain["blue"].all()
    assert not cut["blue"].any()
    torch.testing.assert_close(cut["circle"], plain["circle"] / (1 - plain["blue"]), rtol=1e-4, atol=1e-6)
    other, same = (lens.word_map(PROMPT, words, heads=0, ops=ops, **call) for ops in (op, ()))
    torch.testing.assert_close(other["blue"], same["blue"])
    mean = lens.word_map(PROMPT, words, ops=op, **call)
    each = [lens.word_map(PROMPT, words, heads=head, ops=op, **call)["blue"] for head in range(4)]
    torch.testing.assert_close(mean["blue"], torch.stack(each).mean(0))
    nothing = [dl.AttentionMask("blocks.0.img", keys="txt")]
    nothing += [dl.AttentionMask("blocks.0.img", keys="img")] if toy == "flux" else []
    assert not lens.word_map(PROMPT, words, ops=nothing, **call)["circle"].any()


def test_heads_of_a_map_are_counted_from_the_end(flux):
    for method in ("attention", "concept"):
        call = {"method": method, "blocks": 5, "seed": 0, "num_inference_steps": 1}
        last, same = (flux.word_map(PROMPT, ["circle", "blue"], heads=head, **call) for head in (-1, 3))
        assert torch.equal(last["circle"], same["circle"])
        with pytest.raises(OpError, match="head -5 does not exist"):
            flux.word_map(PROMPT, ["circle", "blue"], heads=[0, -5], **call)
