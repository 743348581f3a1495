"""Steps, rows, tokens and channels keep the order in which they are named: as plain indexing of the whole would."""

import random

import pytest
import torch

from dit_lens import Add, Apply, MeanAblate, Read, Swap, Zero
from dit_lens.core.runs.run import Run
from dit_lens.errors import OpError

PROMPTS = ["red", "a blue one", "xyz"]
SITE = "blocks.2.img"
STEPS, ROWS, TOKENS, WIDTH = 3, 3, 96, 32
CALL = {"seed": [3, 4, 5], "output_type": "latent", "num_inference_steps": STEPS}
WHOLE = Read(SITE, name="whole")


def plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def some(rng, size, count):
    return rng.sample(range(size), count)


@pytest.fixture(scope="module")
def whole(cfg_lens):
    return plain(cfg_lens.run(PROMPTS, WHOLE, **CALL)["whole"][SITE])


def test_sizes(whole):
    assert list(whole.shape) == [STEPS, ROWS, TOKENS, WIDTH]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_reads(cfg_lens, batch_size):
    rng = random.Random(batch_size or 0)
    reads = [
        Read(
            SITE,
            steps=some(rng, STEPS, rng.choice([2, 3])),
            rows=some(rng, ROWS, rng.choice([2, 3])),
            tokens=some(rng, TOKENS, 5),
            channels=some(rng, WIDTH, 4),
            branch=rng.choice(["cond", "both"]),
            name=f"{i}",
        )
        for i in range(5)
    ]
    run = cfg_lens.run(PROMPTS, [Read(SITE, branch="both", name="whole"), *reads], batch_size=batch_size, **CALL)
    whole = plain(run["whole"][SITE])
    for read in reads:
        reading = run[read.name]
        assert (reading.steps, reading.rows) == (tuple(read.steps), tuple(read.rows))
        assert (reading.tokens, reading.channels[SITE]) == (tuple(read.tokens), tuple(read.channels))
        wanted = whole[read.steps][:, :, read.rows][..., read.tokens, :][..., read.channels]
        assert torch.equal(plain(reading[SITE]), wanted if read.branch == "both" else wanted[:, 0])


def test_reads_of_words_and_their_masks(cfg_lens, tmp_path):
    prompts = ["a red cat", "the cat", "one more big cat"]
    site = "blocks.1.txt"
    reads = [
        Read(site, tokens="cat", name="word"),
        Read(site, tokens="cat", rows=[2, 0, 1], steps=[1, 0], name="word, turned"),
        Read(site, name="text"),
        Read(site, rows=[1, 2], name="text, in order"),
        Read(site, rows=[2, 1], name="text, turned"),
    ]
    for batch_size in (None, 2):
        run = cfg_lens.run(prompts, reads, batch_size=batch_size, **CALL)
        assert torch.equal(plain(run["word, turned"][site]), plain(run["word"][site])[[1, 0]][:, [2, 0, 1]])
        tokens, turned = run["word"].tokens, run["word, turned"].tokens
        assert turned == {branch: tuple(rows[i] for i in (2, 0, 1)) for branch, rows in tokens.items()}
        assert torch.equal(plain(run["text, turned"][site]), plain(run["text"][site])[:, [2, 1]])
        for reading, rows in ((run["text, turned"], [2, 1]), (run["text, in order"], [1, 2])):
            mask = run["text"].mask
            assert reading.mask is None if mask is None else torch.equal(reading.mask, mask[rows])
        run.save(tmp_path / f"{batch_size}")
        loaded = Run.load(tmp_path / f"{batch_size}")
        assert loaded["word, turned"].rows == (2, 0, 1)
        assert torch.equal(plain(loaded["word, turned"][site]), plain(run["word, turned"][site]))


@pytest.mark.parametrize("steps", [[2, 0], [0, 1, 2], [-1, 0], slice(None, 0, -1)])
def test_vectors_of_steps(cfg_lens, whole, steps):
    """As many as were chosen go by their order; one for each step of the run goes by its number."""
    chosen = list(range(STEPS))[steps] if isinstance(steps, slice) else [step % STEPS for step in steps]
    value = torch.arange(1.0, len(chosen) + 1)[:, None]
    seen = {}

    def see(tensor, hook):
        seen.setdefault(hook.step, []).append(tensor)

    ops = [Apply(SITE, fn=see, branch="cond"), Add(SITE, value=value, steps=steps), Apply(SITE, fn=see, branch="cond")]
    cfg_lens.run(PROMPTS, ops, **CALL)
    for step, (before, after) in seen.items():
        place = step if len(chosen) == STEPS else chosen.index(step) if step in chosen else None
        assert torch.equal(after, before if place is None else before + value[place])


def turned(size):
    return list(reversed(range(size)))


EITHER = {
    "channels of a vector to add": lambda: Add(SITE, channels=turned(WIDTH), value=torch.randn(WIDTH)),
    "channels of a vector": lambda: Swap(SITE, channels=turned(WIDTH), source=torch.randn(WIDTH)),
    "channels by site": lambda: Swap(SITE, channels=turned(WIDTH), source={SITE: torch.randn(STEPS, 1, 1, WIDTH)}),
    "channels of a mean": lambda: MeanAblate(SITE, channels=turned(WIDTH), mean={SITE: torch.randn(WIDTH)}),
    "tokens": lambda: Swap(SITE, tokens=turned(TOKENS), source=torch.randn(TOKENS, WIDTH)),
    "rows": lambda: Swap(SITE, rows=[2, 0, 1], source=torch.randn(ROWS, TOKENS, WIDTH)),
    "steps": lambda: Swap(SITE, steps=slice(None, None, -1), source=torch.randn(STEPS, 1, 1, WIDTH)),
    "steps of a vector to add": lambda: Add(SITE, steps=[1, 0, 2], value=torch.randn(STEPS, WIDTH)),
    "steps of numbers to add": lambda: Add(SITE, steps=[1, 0, 2], value=torch.randn(STEPS, 1)),
}


@pytest.mark.parametrize("name", EITHER)
def test_values_for_all_in_another_order_than_their_numbers_are_told(cfg_lens, name):
    what = name.split()[0]
    with pytest.raises(OpError, match=rf"{what}= names all \d+ in another order .* or leave {what}= out"):
        cfg_lens.cost(PROMPTS, EITHER[name](), **CALL)


def test_one_value_for_all_has_no_order(cfg_lens):
    ops = [
        Add(SITE, channels=turned(WIDTH), steps=turned(STEPS), value=1.5),
        Swap(SITE, rows=turned(ROWS), tokens=turned(TOKENS), source=torch.randn(WIDTH)),
        MeanAblate(SITE, rows=turned(ROWS), mean={SITE: torch.randn(STEPS, WIDTH)}),
    ]
    assert cfg_lens.cost(PROMPTS, ops, **CALL)


@pytest.mark.parametrize(("rows", "steps"), [([2, 0], [2, 0]), ([1, 0], [1]), ([0, 2], [0, 1])])
def test_a_tensor_of_the_chosen_entries_is_in_the_chosen_order(cfg_lens, rows, steps):
    tokens, channels = [7, 90, 3], [9, 4]
    source = torch.randn(len(steps), len(rows), len(tokens), len(channels))
    op = Swap(SITE, source=source, rows=rows, steps=steps, tokens=tokens, channels=channels, branch="cond")
    for batch_size in (None, 2, 1):
        found = plain(cfg_lens.run(PROMPTS, [op, WHOLE], batch_size=batch_size, **CALL)["whole"][SITE])
        assert torch.equal(found[steps][:, rows][:, :, tokens][..., channels], source)


@pytest.mark.parametrize("given", ["tensor", "read"])
def test_sources_of_steps(cfg_lens, whole, given):
    other = cfg_lens.run(PROMPTS, [WHOLE, Read(SITE, steps=[2, 0], name="turned")], **{**CALL, "seed": [7, 8, 9]})
    source = other["turned"] if given == "read" else plain(other["whole"][SITE])[[2, 0]]
    # a tensor goes by the order that is named, a read by the numbers it knows
    found = cfg_lens.run(PROMPTS, [Swap(SITE, source=source, steps=[2, 0], branch="cond"), WHOLE], **CALL)["whole"]
    assert torch.equal(plain(found[SITE])[[2, 0]], plain(other["whole"][SITE])[[2, 0]])
    found = cfg_lens.run(PROMPTS, [Swap(SITE, source=other["turned"], steps=[0, 2]), WHOLE], **CALL)["whole"]
    assert torch.equal(plain(found[SITE])[[0, 2]], plain(other["whole"][SITE])[[0, 2]])


def test_a_function_sees_what_is_named_in_its_order(cfg_lens):
    rng = random.Random(3)
    rows, tokens, channels = some(rng, ROWS, 2), some(rng, TOKENS, 6), some(rng, WIDTH, 3)
    if rows == sorted(rows):
        rows.reverse()
    seen = []
    ops = [
        Apply(SITE, fn=lambda tensor, hook: seen.append(tensor), steps=[0], branch="cond"),
        Apply(
            SITE,
            fn=lambda tensor, hook: seen.append(tensor),
            steps=[0],
            rows=rows,
            tokens=tokens,
            channels=channels,
            branch="cond",
        ),
    ]
    entry = cfg_lens.run(PROMPTS, ops, **CALL).receipt.entries[1]
    assert torch.equal(seen[1], seen[0][rows][:, tokens][..., channels])
    assert entry.rows == tuple(rows)


def test_what_has_no_order_ascends(cfg_lens):
    run = cfg_lens.run(PROMPTS, Read(SITE, steps={2, 0}, rows={2, 1}, tokens={8, 1}, channels={17, 3}), **CALL)
    (reading,) = run.readings
    assert (reading.steps, reading.rows, reading.tokens) == ((0, 2), (1, 2), (1, 8))
    assert reading.channels[SITE] == (3, 17)


def test_an_edit_is_the_same_in_any_order_of_rows(cfg_lens):
    one, other = (cfg_lens.run(PROMPTS, Zero(SITE, rows=rows, steps=[1]), **CALL) for rows in ([0, 2], [2, 0]))
    assert torch.equal(one.latents, other.latents)
    assert one.receipt == other.receipt
