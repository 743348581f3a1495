"""Words and classes of tokens go to those of a source, wherever they stand in its text; against plain hooks."""

import json

import pytest
import torch

from dit_lens import Read, Resample, Swap
from dit_lens.errors import OpError
from dit_lens.ops import from_json, to_json
from tests import texts

SITE = "blocks.1.txt"
BAD = ["bad"] * 2
PROMPTS = ["red fox", "a big fox"]


def letters(subject, prompts, row, branch, words):
    """The tokens of some words, one token a letter, in every encoder of the text stream."""
    text = prompts[row]
    return [
        start + text.index(word) + i
        for start, limit in zip(subject.starts(prompts, row, branch), subject.limits, strict=True)
        for word in words
        for i in range(len(word))
        if text.index(word) + i < limit
    ]


def hooked_site(subject):
    """The site of the block that plain hooks write behind."""
    anatomy, module = subject.lens.anatomy, f"transformer.{subject.path}.1"
    return next(s for s in subject.lens.sites("blocks.*.txt") if anatomy.locate(anatomy.site(s)).module == module)


@pytest.mark.parametrize("name", ["sd3", "qwen", "zimage", "lumina2", "cogview4", "klein", "hunyuan_video"])
@pytest.mark.parametrize("words", [["fox"], ["fox", "big"]])
def test_a_swap_of_rows_goes_from_word_to_word(name, words):
    """Words in another order in the other row go to their own, not to the next."""
    subject = texts.SUBJECTS[name]
    prompts = ["big red fox", "a fox is so big"]
    negative = {"negative_prompt": "bad"} if subject.negative else {}

    def write(text, branch, _):
        if branch == "cond":
            text = text.clone()
            source, target = (letters(subject, prompts, row, branch, words) for row in (0, 1))
            text[1, target] = text[0, source]
            return text
        return None

    expected = subject.hook(1, write, prompts, BAD)
    asked = words[0] if len(words) == 1 else words
    op = Swap(hooked_site(subject), tokens=asked, source="row:0", rows=1)
    run = subject.lens.run(prompts, op, seed=0, **subject.call, **negative)
    assert torch.equal(run.latents, expected)
    (entry,) = run.receipt.entries
    assert sorted(entry.tokens) == sorted(letters(subject, prompts, 1, "cond", words))


@pytest.mark.parametrize(
    ("tokens", "prompts"),
    [("fox", ["a fox", "fox, fox"]), ("fox", ["a cat", "a fox"]), ("prompt", PROMPTS), ("pad", PROMPTS)],
)
def test_rows_with_other_numbers_of_tokens_are_told(tokens, prompts):
    subject = texts.SUBJECTS["sd3"]
    with pytest.raises(
        OpError, match=rf"tokens of '{tokens}' are \d+.* in row 1 of this run, and .* in row 0 of the so"
    ):
        subject.lens.cost(prompts, Swap(SITE, tokens=tokens, source="row:0", rows=1), **subject.call)


def test_the_ends_of_texts_of_other_lengths_correspond():
    subject = texts.SUBJECTS["sd3"]
    ends = [[start + len(one) for start in subject.starts(PROMPTS, row, "cond")] for row, one in enumerate(PROMPTS)]

    def write(text, branch, _):
        text = text.clone()
        if branch == "cond":
            text[1, ends[1]] = text[0, ends[0]]
        return text

    expected = subject.hook(1, write, PROMPTS, BAD)
    op = Swap(SITE, tokens="eos", source="row:0", rows=1, branch="cond")
    assert torch.equal(subject.lens.run(PROMPTS, op, seed=0, **subject.call, negative_prompt="bad").latents, expected)


def test_words_of_the_negative_prompts_correspond():
    subject = texts.SUBJECTS["qwen"]
    call = {**subject.call, "negative_prompt": ["a fox", "no big fox"]}
    op = Swap(SITE, tokens="fox", source="row:0", rows=1, branch="uncond")

    def write(text, branch, _):
        text = text.clone()
        if branch == "uncond":
            source, target = (letters(subject, call["negative_prompt"], row, branch, ["fox"]) for row in (0, 1))
            text[1, target] = text[0, source]
        return text

    expected = subject.hook(1, write, PROMPTS, call["negative_prompt"])
    assert torch.equal(subject.lens.run(PROMPTS, op, seed=0, **call).latents, expected)
    call["negative_prompt"] = ["a cat", "no big fox"]
    with pytest.raises(OpError, match=r"none in row 0 of the source \(uncond\)"):
        subject.lens.run(PROMPTS, op, seed=0, **call)


@pytest.mark.parametrize("form", ["run", "read", "handle", "json"])
@pytest.mark.parametrize("name", ["qwen", "cogview4"])
def test_words_are_found_in_the_text_of_a_source_run(name, form):
    """Its prompts are others, of other lengths, and its rows are counted as it counts them."""
    subject = texts.SUBJECTS[name]
    others, call = ["see the fox run", "one more text", "fox"], {**subject.call, "negative_prompt": "bad"}
    lens = subject.lens
    with lens.trace(others, seed=0, **call) as trace:
        handle = trace.read(SITE)
    source = {"run": trace.run, "read": trace.run.readings[0], "handle": handle, "json": trace.run.readings[0]}[form]
    texts_there = seen_of(subject, others)
    for rows, row in (([1], None), ([0], 0)):
        first = None if row is None else lens.run(others, Read(SITE, rows=[0]), seed=0, **call)
        given = source if first is None else first if form == "run" else first.readings[0]
        op = Swap(SITE, tokens="fox", source=given, rows=rows)
        op = from_json(json.loads(json.dumps(to_json(op)))) if form == "json" else op
        if row is None:  # row 1 of the source has no such word
            with pytest.raises(OpError, match=r"in row 1 of this run, and none in row 1 of the source \(cond\)"):
                lens.run(PROMPTS, op, seed=0, **call)
            continue
        run = lens.run(PROMPTS, [op, Read(SITE)], seed=0, **call)
        target, there = letters(subject, PROMPTS, 0, "cond", ["fox"]), letters(subject, others, 0, "cond", ["fox"])
        assert torch.equal(run[SITE][:, 0, target].as_subclass(torch.Tensor), texts_there[:, 0, there])


def seen_of(subject, prompts):
    """The conditional text of block 1 at every step of the plain pipeline: [step, row, token, channel]."""
    found = []
    subject.hook(
        1, lambda text, branch, _: found.append(text.clone()) if branch == "cond" else None, prompts, ["bad"] * 3
    )
    return torch.stack(found)


def test_resampled_words_are_those_of_the_chosen_row():
    subject = texts.SUBJECTS["qwen"]
    others = ["the fox", "fox here"]
    source = subject.lens.run(others, Read(SITE), seed=0, **subject.call)
    run = subject.lens.run(PROMPTS, [Resample(SITE, tokens="fox", source=source), Read(SITE)], seed=0, **subject.call)
    for row, other in ((0, 1), (1, 0)):
        target = letters(subject, PROMPTS, row, "cond", ["fox"])
        there = letters(subject, others, other, "cond", ["fox"])
        assert torch.equal(run[SITE][:, row, target], source[SITE][:, other, there])


def test_a_source_whose_text_nobody_knows_is_told():
    subject = texts.SUBJECTS["qwen"]
    record = to_json(Swap(SITE, tokens="fox", source=subject.lens.run(PROMPTS, Read(SITE), **subject.call).readings[0]))
    record["source"].pop("call")
    with pytest.raises(OpError, match=r"where the words of tokens= stand in the source cannot be told: it was stored"):
        subject.lens.cost(PROMPTS, from_json(record), **subject.call)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_words_correspond_in_batches(batch_size):
    """Padding in front follows the longest prompt of a batch."""
    subject, prompts = texts.SUBJECTS["cogview4"], [*PROMPTS, "one very long prompt, of more than sixteen letters"]
    op = Swap(SITE, tokens="fox", source="row:0", rows=1)
    run = subject.lens.run(prompts, [op, Read(SITE)], seed=0, batch_size=batch_size, **subject.call)
    source, target = (letters(subject, prompts, row, "cond", ["fox"]) for row in (0, 1))
    assert torch.equal(run[SITE][:, 1, target], run[SITE][:, 0, source])
