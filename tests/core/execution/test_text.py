"""Words, classes and masks of the text stream against tokens that are counted here, and plain hooks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens import Read, Run, Scale, Swap, TokenMean, Zero
from dit_lens.errors import DitLensError, ExecutionError, OpError, PromptError
from tests import pipelines, texts

FEW = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OTHERS = ["a", "red", "cats", "concat", "category", "dog", "pad", "eos"]


def write(chance: random.Random, cats: int, letters: int = 30) -> tuple[str, list[range]]:
    """A prompt of at most some letters, and where the word "cat" is in it."""
    words = [chance.choice(OTHERS) for _ in range(chance.randint(1, 3))] + ["cat"] * cats
    chance.shuffle(words)
    text, spans = "", []
    for word in words:
        if text:
            text += chance.choice([" ", ", ", " - "])
        if len(text) + len(word) > letters:
            break
        if word == "cat":
            spans.append(range(len(text), len(text) + 3))
            word = chance.choice(["cat", "Cat", "CAT"])
        text += word
    return (text, spans) if spans or not cats else ("cat", [range(3)])


def places(subject, prompts, row, branch, spans):
    """The tokens of spans of letters, counted."""
    starts = subject.starts(prompts, row, branch)
    return sorted(
        start + i
        for start, limit in zip(starts, subject.limits, strict=True)
        for span in spans
        if span.stop <= limit
        for i in span
    )


def draw(subject, chance, rows=2):
    """Prompts with the word, and negative prompts of which some have it."""
    prompts, spans = zip(*(write(chance, chance.randint(1, 2)) for _ in range(rows)), strict=True)
    negatives, others = zip(*(write(chance, chance.randint(0, 1)) for _ in range(rows)), strict=True)
    return list(prompts), list(negatives), {"cond": spans, "uncond": others if subject.negative else [[]] * rows}


@pytest.mark.parametrize("name", texts.SUBJECTS)
@FEW
@given(chance=st.randoms(use_true_random=False))
def test_a_word_is_edited_where_it_is_in_each_row_and_branch(name, chance):
    subject = texts.SUBJECTS[name]
    prompts, negatives, spans = draw(subject, chance)
    of_branch = {"cond": prompts, "uncond": negatives if subject.negative else [""] * 2}
    expected = {
        (branch, row): places(subject, of_branch[branch], row, branch, spans[branch][row])
        for branch in {branch for pass_ in subject.branches for branch in pass_}
        for row in range(2)
    }

    def double(text, branch, _):
        text = text.clone()
        for row in range(2):
            text[row, expected[branch, row]] *= 2
        return text

    latents = subject.hook(1, double, prompts, negatives)
    call = {"negative_prompt": negatives} if subject.negative else {}
    first = subject.lens.sites()[0]
    block = next(int(site.split(".")[1]) for site in subject.lens.sites("blocks.*.txt") if site_is(subject, site))
    run = subject.lens.run(
        prompts, [Scale(f"blocks.{block}.txt", tokens="cat", factor=2.0)], seed=0, **subject.call, **call
    )
    assert first
    assert torch.equal(run.latents, latents)
    touched = {(entry.branch, entry.rows[0]): list(entry.tokens) for entry in run.receipt.entries}
    assert touched == {at: tokens for at, tokens in expected.items() if tokens}
    assert all(len(entry.rows) == 1 for entry in run.receipt.entries)


def site_is(subject, site):
    """Whether a site is the block that is hooked: number 1 of its stack."""
    return subject.lens.anatomy.locate(subject.lens.anatomy.site(site)).module == f"transformer.{subject.path}.1"
