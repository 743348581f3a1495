"""Words, classes and masks of the text stream against tokens that are counted here, and plain hooks."""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import QwenImagePipeline
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dit_lens as dl
from dit_lens import Read, Run, Scale, Swap, TokenMean, Zero
from dit_lens.errors import ExecutionError, OpError, PromptError
from tests import pipelines, texts
from tests.interpreter import reduced

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
        text += chance.choice(["cat", "Cat", "CAT"]) if word == "cat" else word
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
    op = Scale(block_site(subject), tokens="cat", factor=2.0)
    run = subject.lens.run(prompts, [op], seed=0, **subject.call, **call)
    assert torch.equal(run.latents, latents)
    touched = {(entry.branch, entry.rows[0]): list(entry.tokens) for entry in run.receipt.entries}
    assert touched == {at: tokens for at, tokens in expected.items() if tokens}
    assert all(len(entry.rows) == 1 for entry in run.receipt.entries)


# What is masked is no data.

PAIR = ["a cat", "a very red cat and dogs, and again a cat"]
LENGTHS = {  # how many text tokens take part in attention, as the pipeline's source says
    "qwen": lambda text: len(texts.TEMPLATE.format(text)) - 34,
    "zimage": lambda text: -(-(len(text) + 2) // 32) * 32,
    "lumina2": lambda text: len("say <Prompt Start> ") + len(text) + 1,
    "hunyuan_video": lambda text: len(f"say {text}!") - 2,
}
REDUCTIONS = ["mean", "|mean|", "mean|x|", "rms", "max", "p99.9", "quantile(0.1,0.9)", "histogram(-3,3,5)", "topk(3)"]


def block_site(subject):
    """The text site of block 1 of the stack that is hooked."""
    anatomy, hooked = subject.lens.anatomy, f"transformer.{subject.path}.1"
    return next(s for s in subject.lens.sites("blocks.*.txt") if anatomy.locate(anatomy.site(s)).module == hooked)


def seen_by_hooks(subject, prompts, negatives):
    """Text of block 1 in each forward pass of the plain pipeline: [(branch, tensor)]."""
    found = []
    subject.hook(1, lambda text, branch, _: found.append((branch, text.clone())), prompts, negatives)
    return found


@pytest.mark.parametrize("name", LENGTHS)
def test_masked_tokens_are_no_data(name):
    subject = texts.SUBJECTS[name]
    lengths = [LENGTHS[name](text) for text in PAIR]
    site = block_site(subject)
    call = {"negative_prompt": "bad"} if subject.negative else {}
    reads = [Read(site, reduce=reduce, name=reduce) for reduce in REDUCTIONS]
    run = subject.lens.run(PAIR, [Read(site), *reads], seed=0, **subject.call, **call)
    plain = torch.stack([x for branch, x in seen_by_hooks(subject, PAIR, ["bad"] * 2) if branch == "cond"])
    reading = run.reading(site)
    expected = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    assert torch.equal(reading.mask[:, : max(lengths)], expected)
    assert not reading.mask[:, max(lengths) :].any()
    for row, length in enumerate(lengths):
        assert torch.equal(run[site][:, row, :length], plain[:, row, :length])
        for reduce in REDUCTIONS:
            own = reduced(plain[:, row, :length], reduce)
            torch.testing.assert_close(run[reduce].tensor[:, row], own, atol=1e-6, rtol=1e-5)
    assert all(one.mask is None for one in run.readings[1:])


@pytest.mark.parametrize("name", ["qwen", "zimage", "hunyuan_video"])  # Lumina's rows have no tokens to disturb
def test_what_is_in_masked_tokens_changes_no_image(name):
    """So that the rows of the table say of masks what the models do."""
    subject = texts.SUBJECTS[name]
    lengths = [LENGTHS[name](text) for text in PAIR]

    def disturb(text, branch, _):
        text = text.clone()
        for row, length in enumerate(lengths if branch == "cond" else ()):
            text[row, length:] += torch.randn(text[row, length:].shape, generator=torch.Generator().manual_seed(1))
        return text

    latents = subject.hook(1, lambda *_: None, PAIR, ["bad"] * 2)
    torch.testing.assert_close(subject.hook(1, disturb, PAIR, ["bad"] * 2), latents, atol=1e-5, rtol=1e-5)


def test_prompts_of_other_lengths_in_batches_make_one_reading_with_a_mask(tmp_path):
    subject = texts.SUBJECTS["qwen"]
    op = Read("blocks.1.txt", branch="both")
    call = {**subject.call, "negative_prompt": ["bad", "a long and very bad one"]}
    run = subject.lens.run(PAIR, op, seed=0, batch_size=1, **call)
    run.save(tmp_path / "run")
    for one in (run, Run.load(tmp_path / "run")):
        reading = one.reading("blocks.1.txt")
        assert reading.mask.shape == reading.tensor.shape[1:4] == (2, 2, max(map(LENGTHS["qwen"], PAIR)))
        for row, prompt in enumerate(PAIR):
            negative = call["negative_prompt"][row]
            alone = subject.lens.run(prompt, op, seed=0, **{**call, "negative_prompt": negative}).reading(
                "blocks.1.txt"
            )
            for branch, text in enumerate((prompt, negative)):
                length = LENGTHS["qwen"](text)
                assert reading.mask[branch, row].tolist() == [True] * length + [False] * (
                    reading.mask.shape[2] - length
                )
                assert torch.equal(reading.tensor[:, branch, row, :length], alone.tensor[:, branch, 0, :length])
                assert not reading.tensor[:, branch, row, length:].any()


def test_massive_channels_of_text_leave_padding_out():
    subject = texts.SUBJECTS["qwen"]
    call = {**subject.call, "true_cfg_scale": 1.0}
    both = subject.lens.massive_channels(PAIR, k=4, site="blocks.*.txt", seed=0, **call)
    each = [subject.lens.run(one, Read("blocks.*.txt", reduce="|mean|", name="s"), seed=0, **call)["s"] for one in PAIR]
    for site in both:
        scores = torch.stack([one[site].mean((0, 1)) for one in each]).mean(0)
        assert set(both[site]) == set(scores.topk(4).indices.tolist())


def test_the_mean_that_token_mean_keeps_is_that_of_data():
    subject = texts.SUBJECTS["qwen"]
    lengths = [LENGTHS["qwen"](text) for text in PAIR]
    call = {**subject.call, "true_cfg_scale": 1.0}
    run = subject.lens.run(PAIR, [TokenMean("blocks.1.txt")], seed=0, **call)

    def keep(text, _, __):
        means = [text[row : row + 1, :length].mean(1, keepdim=True) for row, length in enumerate(lengths)]
        return torch.cat(means).expand_as(text)

    one_pass = texts.Subject(
        subject.build, call, subject.path, subject.slot, subject.starts, (1,), (("cond",),), negative=False
    )
    assert torch.equal(run.latents, one_pass.hook(1, keep, PAIR, ["", ""]))


def test_padding_that_takes_part_is_data():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    run = lens.run(["red", "a red fox"], [Read("blocks.1.txt"), Read("blocks.1.txt", reduce="mean", name="m")], seed=0)
    assert run.reading("blocks.1.txt").mask is None
    torch.testing.assert_close(run["m"].tensor, run["blocks.1.txt"].mean(2))


# What a token is.


def test_classes_of_tokens_on_flux():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    prompt = "a pad!"
    ops = [
        Read("blocks.1.txt", tokens=tokens, name=str(tokens))
        for tokens in ("pad", "eos", "prompt", ["pad"], ["a", "pad"])
    ]
    run = lens.run(prompt, ops, seed=0)
    expected = {
        "pad": range(7, pipelines.LENGTH),
        "eos": [6],
        "prompt": range(6),
        "['pad']": range(2, 5),
        "['a', 'pad']": [0, 2, 3, 4],
    }
    assert {name: run[name].tokens for name in expected} == {name: tuple(some) for name, some in expected.items()}
    with pytest.raises(
        OpError, match=r"no tokens of this class in cond. This call has prompt, eos, pad.*\['template'\]"
    ):
        lens.run(prompt, Read("blocks.1.txt", tokens="template"), seed=0)
    with pytest.raises(OpError, match="which only the txt stream has"):
        lens.run(prompt, Read("blocks.1.img", tokens="pad"), seed=0)


def test_every_token_is_of_a_class():
    for name, subject in texts.SUBJECTS.items():
        text = subject.lens.outline(PAIR, **subject.call).text()
        for at, tokens in text.rows.items():
            classes = [text.find(*at, kind) for kind in ("prompt", "template", "eos", "pad")]
            found = sorted(token for some in classes for token in some)
            assert set(found) == set(range(len(tokens)))
            assert name == "sd3" or len(found) == len(tokens)


def test_classes_of_tokens_beside_a_template():
    subject = texts.SUBJECTS["qwen"]
    text = subject.lens.outline(PAIR, **subject.call, negative_prompt="x").text()
    start = texts.TEMPLATE.index("{}") - 34
    length = LENGTHS["qwen"](PAIR[0])
    assert text.find("cond", 0, "prompt") == list(range(start, start + len(PAIR[0])))
    assert text.find("cond", 0, "pad") == list(range(length, LENGTHS["qwen"](PAIR[1])))
    assert text.find("uncond", 1, "prompt") == [start]
    template = [*range(start), *range(start + len(PAIR[0]), length)]
    assert text.find("cond", 0, "template") == template


def test_the_text_of_a_template_is_not_the_prompts():
    """Every word of Qwen-Image's template is also tried as the prompt: "user", "text", "image" ..."""
    subject = texts.SUBJECTS["qwen"]
    start = texts.TEMPLATE.index("{}") - 34
    for word in ("user", "image", "text", "a", "assistant", "the image"):
        run = subject.lens.run(
            word, Read("blocks.0.txt", tokens=word, name="w"), seed=0, **{**subject.call, "true_cfg_scale": 1.0}
        )
        assert run["w"].tokens == tuple(range(start, start + len(word)))


def test_a_template_that_cannot_be_told_from_the_prompt(monkeypatch):
    """Then nobody knows which tokens are the prompt's, so that words and classes are refused."""
    encode = QwenImagePipeline.encode_prompt

    def only_words(self, prompt=None, **given):
        if prompt is not None and not prompt[0].isascii():
            raise ValueError("these are not words")
        return encode(self, prompt=prompt, **given)

    monkeypatch.setattr(QwenImagePipeline, "encode_prompt", only_words)
    subject = texts.SUBJECTS["qwen"]
    with pytest.raises(PromptError, match=r"could not be told from the template around it\. Use token"):
        subject.lens.run(PAIR, Read("blocks.0.txt", tokens="prompt"), seed=0, **subject.call)


def test_a_second_prompt_of_flux_is_what_its_text_stream_holds():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    run = lens.run("a cat", Read("blocks.1.txt", tokens="dog", name="dog"), prompt_2="a big dog", seed=0)
    assert run["dog"].tokens == (6, 7, 8)
    with pytest.raises(OpError, match="'cat' is not in 'a big dog'"):
        lens.run("a cat", Read("blocks.1.txt", tokens="cat"), prompt_2="a big dog", seed=0)


def test_a_word_that_is_cut_off():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    for prompt in ("x" * 21 + " cat", "x" * 40 + " cat"):
        with pytest.raises(OpError, match=r"'cat' of 'x+ cat' was truncated: the text stream has 24 tokens"):
            lens.run(prompt, Read("blocks.1.txt", tokens="cat"), seed=0)
    run = lens.run("cat" + " x" * 20 + " cat", Read("blocks.1.txt", tokens="cat", name="w"), seed=0)
    assert run["w"].tokens == (0, 1, 2)


def test_a_word_that_only_the_prompt_has_leaves_the_negative_prompt_alone():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.TRUE_CFG)
    both = lens.run(["a cat", "cat"], [Zero("blocks.1.txt", tokens="cat")], seed=0)
    one = lens.run(["a cat", "cat"], [Zero("blocks.1.txt", tokens="cat", branch="cond")], seed=0)
    assert [entry.branch for entry in both.receipt.entries] == ["cond", "cond"]
    assert [entry.tokens for entry in both.receipt.entries] == [(2, 3, 4), (0, 1, 2)]
    assert "cond" in repr(both.receipt)
    assert all(
        torch.equal(torch.tensor(list(a.getdata())), torch.tensor(list(b.getdata())))
        for a, b in zip(both.images, one.images, strict=True)
    )
    with pytest.raises(OpError, match=r"'cat' is not in 'bad' \(row 0, uncond\)"):
        lens.run("a cat", Zero("blocks.1.txt", tokens="cat", branch="uncond"), seed=0)
    with pytest.raises(OpError, match=r"'cat' is not in 'bad' \(row 0, uncond\)"):
        lens.run("a cat", Read("blocks.1.txt", tokens="cat", branch="both"), seed=0)
    with pytest.raises(OpError, match="'dog' is not in 'a cat' nor in 'bad'"):
        lens.run("a cat", Zero("blocks.1.txt", tokens="dog"), seed=0)


def test_a_read_of_words_that_differ_in_length_carries_a_mask():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    prompts = ["a cat", "cat, cat"]
    run = lens.run(prompts, [Read("blocks.1.txt"), Read("blocks.1.txt", tokens="cat", name="w")], seed=0)
    reading = run["w"]
    assert reading.tokens == {"cond": ((2, 3, 4), (0, 1, 2, 5, 6, 7))}
    assert reading.mask.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert torch.equal(reading.tensor[:, 1], run["blocks.1.txt"][:, 1, [0, 1, 2, 5, 6, 7]])
    assert torch.equal(reading.tensor[:, 0, :3], run["blocks.1.txt"][:, 0, 2:5])


def test_a_swap_from_a_read_of_words_goes_by_their_numbers():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    prompts = ["a cat", "cat, cat"]
    source = lens.run(prompts, Read("blocks.1.txt", tokens="cat"), seed=1)
    same = [Swap("blocks.1.txt", source=source, tokens="cat"), Read("blocks.1.txt")]
    swapped = lens.run(prompts, same, seed=0)["blocks.1.txt"]
    before = lens.run(prompts, Read("blocks.1.txt"), seed=0)["blocks.1.txt"]
    words = lens.run(prompts, Read("blocks.1.txt"), seed=1)["blocks.1.txt"]
    for row, tokens in enumerate(([2, 3, 4], [0, 1, 2, 5, 6, 7])):
        expected = before[0, row].clone()
        expected[tokens] = words[0, row, tokens]
        assert torch.equal(swapped[0, row], expected)
    with pytest.raises(OpError, match="at other tokens in other rows"):
        lens.run(prompts, Swap("blocks.1.txt", source=source, tokens=[9]), seed=0)


@pytest.mark.parametrize("name", ["cogview4", "zimage", "qwen"])
def test_words_in_batches_that_pad_otherwise(name):
    subject = texts.SUBJECTS[name]
    op = [
        Zero("blocks.1.txt", tokens="cat"),
        Zero("blocks.2.txt", tokens="prompt"),
        Read("blocks.1.txt", tokens="cat", name="w"),
    ]
    call = {**subject.call, "negative_prompt": "a cat"}
    run = subject.lens.run(PAIR, op, seed=0, batch_size=1, **call)
    alone = [subject.lens.run(prompt, op, seed=0, **call) for prompt in PAIR]
    assert torch.equal(run.latents, torch.cat([one.latents for one in alone]))
    for row, one in enumerate(alone):
        assert run["w"].tokens["cond"][row] == one["w"].tokens
        entries = [(e.op, e.site, e.branch, e.tokens) for e in run.receipt.entries if e.rows == (row,)]
        assert sorted(entries) == sorted((e.op, e.site, e.branch, e.tokens) for e in one.receipt.entries)


def test_a_tokenisation_that_is_not_that_of_the_run_is_told():
    """The transformer is given other text than its tokenizer says: compared during the run."""

    class Longer(QwenImagePipeline):
        def encode_prompt(self, *args, **kwargs):
            embeds, mask = super().encode_prompt(*args, **kwargs)
            looked_up = embeds.max() > 1e5  # no hidden state is as large
            return (embeds, mask) if looked_up else (torch.nn.functional.pad(embeds, (0, 0, 2, 0)), mask)

    pipe = texts.qwen()
    pipe.__class__ = Longer
    lens = dl.DiTLens(pipe, defaults={})
    with pytest.raises(ExecutionError, match=r"own tokenisation gives \d+ text tokens, .* has \d+"):
        lens.run("a cat", Read("blocks.1.txt", tokens="cat"), seed=0, **texts.STEPS)


def test_what_cannot_be_followed_is_told():
    lens = dl.DiTLens(texts.qwen(), defaults={})
    lens.pipe.tokenizer = None
    with pytest.raises(PromptError, match=r"could not be followed.*Use token indices"):
        lens.to_str_tokens("a cat")


def test_tokens_of_text_that_enters_by_cross_attention():
    """They are those that cross-attention reads, and those that words mean."""
    lens, prompt = dl.DiTLens.toy("sana"), "a big red circle left on a plain blue background"
    tokens = lens.to_str_tokens(prompt)
    kept = lens.pipe.tokenizer(prompt)["input_ids"]
    assert [token for token in tokens if token != "<pad>"] == lens.pipe.tokenizer.convert_ids_to_tokens(kept)
    run = lens.run(prompt, Read("blocks.0.txt.cross.k"), seed=0, num_inference_steps=1)
    assert len(tokens) == run["blocks.0.txt.cross.k"].shape[2]
    where = tokens.index("red")
    edits = [dl.AttentionMask("blocks.*.img", keys="txt", key_tokens=chosen) for chosen in ("red", [where])]
    images = [lens.run(prompt, edit, seed=0, num_inference_steps=1).images[0] for edit in edits]
    assert images[0].tobytes() == images[1].tobytes()


def test_looking_the_text_up_changes_nothing():
    lens = dl.DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    pipe = lens.pipe
    before, state = dict(vars(pipe)), torch.get_rng_state()
    scheduler = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    lens.outline("a cat", seed=0).text()
    assert all(vars(pipe)[name] is value for name, value in before.items())
    assert vars(pipe).keys() == before.keys()
    assert {name: repr(value) for name, value in vars(pipe.scheduler).items()} == scheduler
    assert torch.equal(torch.get_rng_state(), state)
