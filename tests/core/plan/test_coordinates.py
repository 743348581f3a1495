"""A source's rows, tokens and channels are matched by their numbers, in any order.

The oracle: what the run holds right after the edit, at the elements that were edited, is what the source run held at
the elements of the same numbers. Elements that were not named are as in the untouched run.
"""

import json

import pytest
import torch

from dit_lens import Add, Read, Resample, Scale, Swap, Zero
from dit_lens.errors import OpError
from dit_lens.ops import from_json, to_json

PROMPTS = ["red", "a blue one", "xyz"]
SEEDS = [3, 4, 5]
SITE = "blocks.2.img"
WHOLE = Read(SITE, branch="both", name="whole")
FULL = slice(None)


@pytest.fixture(scope="module")
def source(cfg_lens):
    """Everything at the site, from other noise."""
    return cfg_lens.run(PROMPTS, [WHOLE], seed=[13, 14, 15], output_type="latent")


@pytest.fixture(scope="module")
def untouched(cfg_lens):
    return cfg_lens.run(PROMPTS, [WHOLE], seed=SEEDS, output_type="latent")["whole"][SITE]


def after(cfg_lens, op):
    return cfg_lens.run(PROMPTS, [op, WHOLE], seed=SEEDS, output_type="latent")["whole"][SITE]


def first_step(value):
    """At step 0 nothing before the site differs between runs that differ by an edit there. [branch, row, n, d]."""
    return value[0].as_subclass(torch.Tensor)


@pytest.mark.parametrize("read_rows", [[1, 2], [0, 2], [2, 0, 1]])
@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 2], [1, 2], None])
def test_rows_are_matched_by_their_numbers(cfg_lens, source, untouched, read_rows, rows):
    part = cfg_lens.run(PROMPTS, [Read(SITE, rows=read_rows, branch="both")], seed=[13, 14, 15], output_type="latent")
    targets = [0, 1, 2] if rows is None else rows
    op = Swap(SITE, source=part, rows=rows)
    if not set(targets) <= set(read_rows):
        missing = next(row for row in targets if row not in read_rows)
        with pytest.raises(OpError, match=rf"row {missing} is to be replaced"):
            after(cfg_lens, op)
        return
    expected = first_step(untouched).clone()
    expected[:, targets] = first_step(source["whole"][SITE])[:, targets]
    assert torch.equal(first_step(after(cfg_lens, op)), expected)


@pytest.mark.parametrize("read_tokens", [[5], [7, 5], [90, 0, 3]])
@pytest.mark.parametrize("tokens", [[5], [5, 7], [0], None])
def test_tokens_are_matched_by_their_numbers(cfg_lens, source, untouched, read_tokens, tokens):
    part = cfg_lens.run(
        PROMPTS, [Read(SITE, tokens=read_tokens, branch="both")], seed=[13, 14, 15], output_type="latent"
    )
    op = Swap(SITE, source=part, tokens=tokens)
    if tokens is None or not set(tokens) <= set(read_tokens):
        with pytest.raises(OpError, match="without tokens"):
            after(cfg_lens, op)
        return
    expected = first_step(untouched).clone()
    expected[:, :, tokens] = first_step(source["whole"][SITE])[:, :, tokens]
    assert torch.equal(first_step(after(cfg_lens, op)), expected)


def test_a_read_goes_by_its_numbers_as_its_run_does(cfg_lens, source, untouched):
    """One row and one token of a read stand for themselves, not for all."""
    read = Read(SITE, rows=[1], tokens=[5], channels=[7, 2], branch="both")
    with cfg_lens.trace(PROMPTS, seed=[13, 14, 15], output_type="latent") as trace:
        handle = trace.read(read.site, rows=read.rows, tokens=read.tokens, channels=read.channels, branch=read.branch)
    expected = first_step(untouched).clone()
    expected[:, 1, 5, [2, 7]] = first_step(source["whole"][SITE])[:, 1, 5, [2, 7]]
    for given in (trace.run, trace.run.readings[0], handle):
        whole = Swap(SITE, source=given)
        with pytest.raises(OpError, match="without channels"):
            after(cfg_lens, whole)
        part = Swap(SITE, source=given, rows=1, tokens=[5], channels=[2, 7])
        assert torch.equal(first_step(after(cfg_lens, part)), expected)
    stored = from_json(json.loads(json.dumps(to_json(Swap(SITE, source=handle, rows=1, tokens=[5], channels=[2, 7])))))
    assert torch.equal(first_step(after(cfg_lens, stored)), expected)


@pytest.mark.parametrize("axis", ["channels", "tokens"])
def test_a_whole_axis_of_a_run_in_another_order_goes_by_numbers(cfg_lens, source, untouched, axis):
    whole = first_step(source["whole"][SITE])
    size = whole.shape[-1] if axis == "channels" else whole.shape[-2]
    op = Swap(SITE, source=source, branch="cond", **{axis: list(reversed(range(size)))})
    assert torch.equal(first_step(after(cfg_lens, op))[0], whole[0])
    assert torch.equal(first_step(after(cfg_lens, op))[1], first_step(untouched)[1])


def test_a_tensor_of_the_chosen_size_is_in_the_chosen_order(cfg_lens, untouched):
    value = torch.tensor([1.0, 2.0, 3.0])
    found = first_step(after(cfg_lens, Swap(SITE, source=value, channels=[9, 4, 6], branch="both")))
    assert [float(found[0, 0, 0, channel]) for channel in (9, 4, 6)] == [1.0, 2.0, 3.0]
    assert torch.equal(found[..., 10:], first_step(untouched)[..., 10:])


def test_resampling_takes_rows_that_were_read(cfg_lens, source):
    part = cfg_lens.run(PROMPTS, [Read(SITE, rows=[1, 2], branch="both")], seed=[13, 14, 15], output_type="latent")
    found, whole = first_step(after(cfg_lens, Resample(SITE, source=part))), first_step(source["whole"][SITE])
    for row, allowed in ((0, [1, 2]), (1, [2]), (2, [1])):
        assert any(torch.equal(found[:, row], whole[:, other]) for other in allowed)


def test_iterators_choose_the_same_at_every_site(cfg_lens):
    sites = ["blocks.1.img", "blocks.2.img", "blocks.3.img"]
    for op in (
        Zero(sites, channels=(i for i in (1, 2))),
        Zero(iter(sites), channels=[1, 2]),
        Zero(sites, channels=[1, 2], tokens=iter(range(4)), rows=iter([0])),
    ):
        entries = cfg_lens.run(PROMPTS, op, seed=SEEDS, output_type="latent").receipt.entries
        assert {entry.site for entry in entries} == set(sites)
        assert {entry.channels for entry in entries} == {(1, 2)}


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda: Zero(SITE, rows=[]), r"rows=\[\] selects no image"),
        (lambda: Zero(SITE, steps=True), "not a valid step"),
        (lambda: Scale(SITE, factor=float("nan")), "not a finite number"),
        (lambda: Scale(SITE, factor=float("inf")), "not a finite number"),
        (lambda: Scale(SITE, factor="2"), "not a finite number"),
        (lambda: Add(SITE, value=1j), "complex"),
        (lambda: Add(SITE, value="x"), "not a number or a tensor"),
        (lambda: Swap(SITE, source=torch.ones(32, dtype=torch.complex64)), "complex"),
        (lambda: Swap(SITE, source="row:0", rows=1, strength=float("nan")), r"outside \[0, 1\]"),
        (lambda: Swap(SITE, source="row:0", rows=1, strength="1"), r"outside \[0, 1\]"),
        (lambda: Swap(SITE, source="row:9", rows=1, strength=0), "row 9 does not exist"),
        (lambda: Swap(SITE, source=7, rows=1, strength=0), "not a valid source"),
        (lambda: Swap(SITE, source="row:0", rows=1, strength=0, channels=[99]), "channel 99 does not exist"),
        (lambda: Swap(SITE, source="row:0", rows=1, strength=0, branch="conditional"), "not a valid branch"),
    ],
)
def test_what_cannot_be_meant_is_told_before_a_run(cfg_lens, monkeypatch, op, message):
    monkeypatch.setattr(cfg_lens.engine, "generate", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(OpError, match=message):
        cfg_lens.run(PROMPTS, op(), seed=SEEDS)
