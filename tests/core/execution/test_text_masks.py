"""Masks of the text as the pipeline gives them to its transformer: what contradicts the text is told."""

from __future__ import annotations

import pytest
import torch

from dit_lens.errors import PromptError
from tests import texts

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
