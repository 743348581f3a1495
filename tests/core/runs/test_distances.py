"""Reads of two runs are compared by the numbers of what they hold, never by position."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import dit_lens as dl
from dit_lens.core.runs.distances import read_distances
from dit_lens.core.runs.reading import Reading
from tests import pipelines

SITE, STEPS, ROWS, TOKENS, CHANNELS = "blocks.3.img", 3, 2, 6, 5
BRANCHES = ("cond", "uncond")


def some_of(random, count):
    """Some numbers in any order; perhaps all."""
    return tuple(int(one) for one in random.permutation(count)[: random.integers(1, count + 1)])


def read_some(random, truth):
    """A read of a part of the truth, [step, branch, row, token, channel]."""
    steps, rows = some_of(random, STEPS), some_of(random, ROWS)
    tokens, channels = (None if random.integers(2) else some_of(random, size) for size in (TOKENS, CHANNELS))
    both = bool(random.integers(2))
    branches = BRANCHES if both else (BRANCHES[int(random.integers(2))],)
    places = np.ix_(
        steps,
        [BRANCHES.index(branch) for branch in branches],
        rows,
        range(TOKENS) if tokens is None else tokens,
        range(CHANNELS) if channels is None else channels,
    )
    value = torch.tensor(truth[places])
    return Reading(
        name="",
        tensors={SITE: value if both else value[:, 0]},
        steps=steps,
        total_steps=STEPS,
        branches=branches,
        both=both,
        rows=rows,
        tokens=tokens,
        channels={SITE: channels},
        reduce=None,
        shape_of_grid=(2, 3),
    )


def numbers_of(read):
    """Every number that a read holds, by where it is of."""
    value = read.tensors[SITE] if read.both else read.tensors[SITE][:, None]
    axes = [
        read.steps,
        read.branches,
        read.rows,
        range(TOKENS) if read.tokens is None else read.tokens,
        range(CHANNELS) if read.channels[SITE] is None else read.channels[SITE],
    ]
    return dict(zip(itertools.product(*axes), value.flatten().tolist(), strict=True))


def test_random_selections_in_random_orders_are_compared_number_by_number():
    compared = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        truth, other = random.normal(size=(2, STEPS, 2, ROWS, TOKENS, CHANNELS))
        a, b = read_some(random, truth), read_some(random, other)
        ours, theirs = numbers_of(a), numbers_of(b)
        shared = ours.keys() & theirs.keys()
        found, odd = read_distances([a], [b])
        if shared:
            one, two = (np.array([held[key] for key in shared]) for held in (ours, theirs))
            compared += 1
            assert found[SITE] == pytest.approx(np.linalg.norm(one - two) / np.linalg.norm(one), rel=1e-9)
        else:
            assert not found
            assert "in common" in odd[SITE]
        assert (SITE in odd) == (ours.keys() != theirs.keys())
        of_one_truth, _ = read_distances([a], [read_some(np.random.default_rng(seed + 1000), truth)])
        assert set(of_one_truth.values()) <= {0.0}
    assert compared > 60


def test_what_cannot_be_compared_is_named():
    random = np.random.default_rng(0)
    value = torch.tensor(random.normal(size=(2, 1, 6, 5)))
    read = Reading(
        name="a",
        tensors={SITE: value},
        steps=(0, 1),
        total_steps=2,
        branches=("cond",),
        both=False,
        rows=(0,),
        tokens=None,
        channels={SITE: None},
        reduce=None,
        shape_of_grid=(2, 3),
    )
    reduced = replace(read, tensors={SITE: value.mean(2)}, reduce="mean")
    key = f"a/{SITE}"
    cases = [
        (read, replace(read, branches=("uncond",)), "branches cond and uncond have none in common"),
        (read, replace(read, total_steps=4), "2 steps and 4, which are at other noise levels"),
        (read, replace(read, shape_of_grid=(3, 2)), "token grids (2, 3) and (3, 2)"),
        (read, reduced, "reduce=None and with reduce='mean'"),
        (replace(reduced, tokens=(1, 2)), replace(reduced, tokens=(1, 3)), "reduced over other tokens"),
    ]
    for one, other, told in cases:
        found, odd = read_distances([one], [other])
        assert found == {}
        assert told in odd[key]
    assert read_distances([read], []) == ({}, {key: "only the first run has read it"})
    flipped = replace(reduced, tokens=(2, 1))
    assert read_distances([replace(reduced, tokens=(1, 2))], [flipped]) == ({key: 0.0}, {})


def test_masked_tokens_are_no_data_and_words_go_by_their_numbers():
    value = torch.arange(8.0).reshape(1, 1, 4, 2) + 1
    site = "blocks.3.txt"
    read = Reading("", {site: value}, (0,), 1, ("cond",), False, (0,), None, {site: None}, None, None)
    masked = replace(read, masks={site: torch.tensor([[True, True, False, True]])})
    changed = value.clone()
    changed[:, :, 2] = 9  # at the token that is no data
    found, odd = read_distances([masked], [replace(masked, tensors={site: changed}, masks={})])
    assert found == {site: 0.0}
    assert "tokens 0, 1, 3 and 0 to 3 share only 0, 1, 3" in odd[site]
    by_word = replace(read, tensors={site: value[:, :, [3, 1]]}, tokens={"cond": ((3, 1),)})
    assert read_distances([read], [by_word])[0] == {site: 0.0}


def test_reads_count_where_images_are_equal(cfg_lens):
    call = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "seed": 1}
    a, b, c = (
        cfg_lens.run("red", [dl.Read("blocks.1.img", channels=channels, steps=[0])], **call)
        for channels in ([1, 2], [2, 1], [4])
    )
    found = dl.compare(a, b)
    assert found.identical
    assert found.reads == {"blocks.1.img": 0.0}
    found = dl.compare(a, c)
    assert found.identical
    assert "blocks.1.img is not compared: channels 1, 2 and 4 have none in common" in repr(found)
    b.readings[0].tensors["blocks.1.img"] += 1
    found = dl.compare(a, b)
    assert not found.identical
    assert "identical images, reads apart at 1 of 1 (most at blocks.1.img" in repr(found)
