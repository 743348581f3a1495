"""Masks of the text as the pipeline gives them to its transformer: what contradicts the text is told."""

from __future__ import annotations

import pytest
import torch

from dit_lens import Read, Swap, Zero
from dit_lens.errors import ExecutionError, OpError, PromptError
from tests import texts

SITE = "blocks.1.txt"
QWEN = texts.SUBJECTS["qwen"]
PAIR = ["a cat", "a very big cat by the sea at night"]


def seen_by_the_transformer(subject, prompts, **call):
    """The arguments of the first forward pass of the plain pipeline."""
    seen, pipe = [], subject.lens.pipe
    handle = pipe.transformer.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    try:
        pipe(prompt=prompts, **{**subject.call, **call})
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "mask"), [("qwen", "encoder_hidden_states_mask"), ("lumina2", "encoder_attention_mask")]
)
def test_a_pipeline_that_masks_images_by_another_prompt_is_told(name, mask):
    subject = texts.SUBJECTS[name]
    found = seen_by_the_transformer(subject, PAIR, num_images_per_prompt=2)
    embeds, (first, second, *_) = found["encoder_hidden_states"], found[mask].sum(1).tolist()
    assert torch.equal(embeds[0], embeds[1])  # the images of one prompt
    assert first != second
    with pytest.raises(PromptError, match=rf"{mask} lets {first} tokens of image 0 .* and {second} of image 1"):
        subject.lens.run(PAIR, seed=0, num_images_per_prompt=2, **subject.call)
    run = subject.lens.run(PAIR, seed=0, num_images_per_prompt=2, batch_size=1, **subject.call)
    alone = [subject.lens.run([prompt] * 2, seed=[0, 1], **subject.call).latents for prompt in PAIR]
    torch.testing.assert_close(run.latents, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert subject.lens.run(["a cat", "a dog"], seed=0, num_images_per_prompt=2, **subject.call)  # of equal length


@pytest.mark.parametrize(
    ("name", "last", "more"),
    [("qwen", "sea", "the cat sat" + " so" * 20 + " by the sea"), ("lumina2", "eos", "the cat sat")],
)
def test_masks_of_a_batch_that_never_runs_decide_nothing(name, last, more):
    """Images of a prompt, one prompt at a time: as with each prompt listed for each of its images."""
    subject, prompts = texts.SUBJECTS[name], ["a cat", more]
    call = {**subject.call, "seed": [3, 4, 5, 6]}
    ops = [
        Read(SITE, tokens="cat", reduce="mean", name="cat"),
        Read(SITE, tokens=last, reduce="mean", name="last", rows=[2, 3]),
        Swap(SITE, tokens="cat", source="row:2", rows=3),
        Read(SITE, tokens="prompt", name="after", rows=[3]),
    ]
    run = subject.lens.run(prompts, ops, num_images_per_prompt=2, batch_size=1, **call)
    first = subject.lens.run(prompts[:1] * 2, ops[0], **{**call, "seed": [3, 4]})
    moved = [Swap(SITE, tokens="cat", source="row:0", rows=1), Read(SITE, tokens="prompt", name="after", rows=[1])]
    listed = [ops[0], Read(SITE, tokens=last, reduce="mean", name="last"), *moved]
    second = subject.lens.run(prompts[1:] * 2, listed, **{**call, "seed": [5, 6]})
    assert torch.equal(run["cat"][SITE], torch.cat([first["cat"][SITE], second["cat"][SITE]], 1))
    assert all(torch.equal(run[key][SITE], second[key][SITE]) for key in ("last", "after"))
    assert torch.equal(run.latents, torch.cat([first.latents, second.latents]))
    pads = Read(SITE, tokens="pad", rows=[0], reduce="mean")
    with pytest.raises(OpError, match=r"the pipeline masks all \d+ tokens of tokens='pad' in row 0"):
        subject.lens.cost(prompts, pads, num_images_per_prompt=2, **call)


@pytest.mark.parametrize("reduce", ["mean", "max", "topk(2)", "histogram(0,1,4)"])
def test_a_reduction_of_masked_tokens_alone_is_told_before_the_run(reduce):
    lens, call = QWEN.lens, QWEN.call
    found = seen_by_the_transformer(QWEN, PAIR)["encoder_hidden_states_mask"]
    masked = int((found[0] == 0).sum())
    for op in (
        Read(SITE, tokens="pad", rows=[0], reduce=reduce),
        Read(SITE, tokens=slice(found.shape[1] - masked, found.shape[1]), reduce=reduce),
    ):
        with pytest.raises(OpError, match=rf"needs tokens that are data: the pipeline masks all {masked} tokens"):
            lens.cost(PAIR, op, **call)
    last = found.shape[1] - masked - 1
    run = lens.run(PAIR, Read(SITE, tokens=[last, last + 1], reduce="mean"), seed=0, **call)
    assert torch.equal(run[SITE][:, 0], lens.run(PAIR, Read(SITE, tokens=[last]), seed=0, **call)[SITE][:, 0, 0])


def test_padding_in_batches_that_have_none_is_told_before_the_run():
    for op in (Read(SITE, tokens="pad", rows=[0]), Zero(SITE, tokens="pad")):
        with pytest.raises(OpError, match=r"in its batch the row has 0, as padding follows the longest prompt"):
            QWEN.lens.run(PAIR, op, seed=0, batch_size=1, **QWEN.call)


@pytest.mark.parametrize(("name", "others", "same"), [("qwen", [200], [10, 150]), ("cogview4", [13], [])])
def test_numbers_of_tokens_mean_those_of_the_whole_run_in_batches(name, others, same):
    subject = texts.SUBJECTS[name]
    with pytest.raises(OpError, match=r"are counted in the \d+ text tokens of the whole run, and in its batch row 0"):
        subject.lens.run(PAIR, Zero(SITE, tokens=others), seed=0, batch_size=1, **subject.call)
    if same:
        run = subject.lens.run(PAIR, Read(SITE, tokens=same), seed=0, batch_size=1, **subject.call)
        whole = subject.lens.run(PAIR, Read(SITE), seed=0, batch_size=1, **subject.call)
        assert torch.equal(run[SITE], whole[SITE][:, :, same])
    equal = ["a cat", "a dog"]
    whole = subject.lens.run(equal, Read(SITE), seed=0, batch_size=1, **subject.call)
    found = subject.lens.run(equal, Read(SITE, tokens=[13]), seed=0, batch_size=1, **subject.call)
    assert torch.equal(found[SITE], whole[SITE][:, :, [13]])


def test_a_source_of_another_length_than_a_batch_is_told_before_the_run():
    source = QWEN.lens.run(PAIR, Read(SITE), seed=0, **QWEN.call)
    with pytest.raises(OpError, match=r"the source at blocks.1.txt has 213 tokens .* a batch of 1 prompts has 184"):
        QWEN.lens.run(PAIR, Swap(SITE, source=source), seed=0, batch_size=1, **QWEN.call)


@pytest.mark.parametrize("same", [True, False])
def test_a_text_that_a_callback_replaces_is_told_where_words_chose_tokens(same):
    lens = texts.SUBJECTS["sd3"].lens
    call = {**texts.SUBJECTS["sd3"].call, "num_inference_steps": 3}
    other = seen_by_the_transformer(texts.SUBJECTS["sd3"], "big cat")["encoder_hidden_states"]

    def switch(_, step, __, given):
        if step == 0:
            given["prompt_embeds"] = given["prompt_embeds"].clone() if same else other.to(given["prompt_embeds"])
        return given

    call |= {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    by_words, by_numbers = Zero(SITE, tokens="cat"), Zero(SITE, tokens=[3, 4, 5])
    assert lens.run("a cat", by_numbers, seed=0, **call).receipt
    assert lens.run("a cat", Zero(SITE, tokens="cat", steps=[0]), seed=0, **call).receipt  # before the switch
    if same:
        assert lens.run("a cat", by_words, seed=0, **call).receipt
    else:
        with pytest.raises(ExecutionError, match=r"text of the first step, but step 1 .* is given another one"):
            lens.run("a cat", by_words, seed=0, **call)
