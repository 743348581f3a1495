"""Sources of text: rows by their numbers, and nothing written that is no data, against plain hooks."""

from __future__ import annotations

import random

import pytest
import torch

from dit_lens import Read, Swap
from dit_lens.errors import OpError
from tests import texts

SITE = "blocks.1.txt"
PAIR = ["a cat", "a very big cat by the sea at night"]
QWEN = texts.SUBJECTS["qwen"]
START = texts.TEMPLATE.index("{}") - 34  # of the prompt among the text tokens
NEGATIVE = {"negative_prompt": "bad"}


def count(text):
    """Text tokens of Qwen that are data."""
    return len(texts.TEMPLATE.format(text)) - 34


def plain_text(subject, prompts, seed):
    """Text of block 1 in each forward pass of the plain pipeline: [(branch, tensor)]."""
    found, arguments = [], subject.arguments
    subject.arguments = lambda *given: arguments(*given, seed=seed)
    try:
        subject.hook(1, lambda text, branch, _: found.append((branch, text.clone())), prompts, ["bad"] * len(prompts))
    finally:
        del subject.arguments
    return found


def test_what_batches_did_not_have_is_never_written():
    """Read one by one, written to both: each row gets its own tokens, and its padding stays as it is."""
    chance = random.Random(3)
    prompts = ["".join(chance.choices("abcd ", k=k)).strip() + " end" for k in (chance.randint(3, 9), 30)]
    source = QWEN.lens.run(prompts, Read(SITE), seed=1, batch_size=1, **QWEN.call, **NEGATIVE)
    alone = [[x for branch, x in plain_text(QWEN, [one], 1) if branch == "cond"] for one in prompts]

    def write(text, branch, number):
        text = text.clone()
        for row, one in enumerate(alone if branch == "cond" else ()):
            text[row, : count(prompts[row])] = one[number // 2][0]
        return text

    expected = QWEN.hook(1, write, prompts, ["bad"] * 2)
    run = QWEN.lens.run(prompts, [Swap(SITE, source=source), Read(SITE)], seed=0, **QWEN.call, **NEGATIVE)
    assert torch.equal(run.latents, expected)
    before = QWEN.lens.run(prompts, Read(SITE), seed=0, **QWEN.call, **NEGATIVE)[SITE]
    padding = slice(count(prompts[0]), None)
    assert torch.equal(run[SITE][0, 0, padding], before[0, 0, padding])  # the first step, where nothing differs yet
    assert before[0, 0, padding].any()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_source_without_data_where_there_is_some_is_told_before_the_run(batch_size):
    source = QWEN.lens.run(PAIR, Read(SITE), seed=0, batch_size=batch_size, **QWEN.call)
    counts = rf"row 0 of this run has {count(PAIR[1])} tokens .* row 0 of the source has {count(PAIR[0])} of them"
    with pytest.raises(OpError, match=counts):
        QWEN.lens.run([PAIR[1]] * 2, Swap(SITE, source=source, rows=[0]), seed=0, **QWEN.call)
    QWEN.lens.cost([PAIR[1]] * 2, Swap(SITE, source=source, rows=[1]), **QWEN.call)
    with pytest.raises(OpError, match=counts.replace("row 0 of this", "row 1 of this")):
        QWEN.lens.run(PAIR, Swap(SITE, source="row:0", rows=[1]), seed=0, **QWEN.call)


def test_a_source_of_words_goes_by_the_numbers_of_its_rows():
    call = {**QWEN.call, **NEGATIVE}
    words, whole = (
        QWEN.lens.run(["a cat", "b cat"], Read(SITE, tokens=tokens), seed=[1, 2], **call) for tokens in ("cat", None)
    )
    found = [
        QWEN.lens.run(["c cat", "d cat"], Swap(SITE, source=source, tokens="cat", rows=[1]), seed=0, **call).latents
        for source in (words, whole)
    ]
    seen = iter([x for branch, x in plain_text(QWEN, ["a cat", "b cat"], 2) if branch == "cond"])

    def write(text, branch, _):
        text = text.clone()
        if branch == "cond":
            text[1, START + 2 : START + 5] = next(seen)[1, START + 2 : START + 5]
        return text

    expected = QWEN.hook(1, write, ["c cat", "d cat"], ["bad"] * 2)
    assert all(torch.equal(latents, expected) for latents in found)


def test_a_row_whose_words_are_elsewhere_is_told():
    source = QWEN.lens.run(PAIR, Read(SITE, tokens="cat"), seed=0, **QWEN.call)
    for prompts, row in ((["a cat"] * 2, 1), (PAIR[::-1], 0)):
        with pytest.raises(OpError, match=rf"row {row} of this run has 3 .* row {row} of the source has 0 of them"):
            QWEN.lens.run(prompts, Swap(SITE, source=source, tokens="cat"), seed=0, **QWEN.call)
    one = QWEN.lens.run(PAIR, Read(SITE, tokens="cat", rows=[0]), seed=0, **QWEN.call)  # stands for all
    assert QWEN.lens.run(["a cat"] * 2, Swap(SITE, source=one, tokens="cat"), seed=0, **QWEN.call).receipt


def test_a_branch_whose_words_are_elsewhere_is_told():
    call = {**QWEN.call, "negative_prompt": "no big cat"}
    source = QWEN.lens.run("a cat", Read(SITE, tokens="cat", branch="both"), seed=0, **call)
    swap = Swap(SITE, source=source, tokens="cat")
    assert {entry.branch for entry in QWEN.lens.run("a cat", swap, seed=0, **call).receipt.entries} == {
        "cond",
        "uncond",
    }
    with pytest.raises(OpError, match=r"has 0 of them \(uncond\)"):
        QWEN.lens.run("a cat", swap, seed=0, **{**call, "negative_prompt": "a cat"})


def test_batches_that_pad_in_front_are_put_together_as_the_whole_run_has_them():
    subject = texts.SUBJECTS["cogview4"]
    run = subject.lens.run(PAIR, Read(SITE), seed=0, batch_size=1, **subject.call, **NEGATIVE)
    alone = [next(x for branch, x in plain_text(subject, [one], 0) if branch == "cond")[0] for one in PAIR]
    assert len(alone[0]) < len(alone[1]) == run[SITE].shape[2]
    for row, own in enumerate(alone):
        assert torch.equal(run[SITE][0, row, -len(own) :], own)
        assert run.reading(SITE).mask[row].tolist() == [False] * (len(alone[1]) - len(own)) + [True] * len(own)
    first = texts.left_padded(PAIR, 0) + 2
    swapped = subject.lens.run(
        PAIR, [Swap(SITE, source=run, tokens="cat"), Read(SITE)], seed=0, **subject.call, **NEGATIVE
    )
    at = texts.left_padded(PAIR[:1], 0) + 2
    assert torch.equal(swapped[SITE][0, 0, first : first + 3], alone[0][at : at + 3])
    with pytest.raises(OpError, match=f"has {len(alone[1])} tokens .* has {len(alone[0])} of them"):
        subject.lens.run(PAIR, Swap(SITE, source=run), seed=0, **subject.call, **NEGATIVE)
