"""Sets of channels: mappings of their sites, smaller sets, tables and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter

from dit_lens.analysis.channels import (
    ChannelSet,
    energy_share,
    jaccard,
    top_channels,
)
from dit_lens.errors import OpError, SiteError
from tests.channel_sets import given_set, sample_set

seeds = st.integers(0, 10**6)


def test_arguments_that_do_not_fit_together_raise():
    one = torch.ones(3)
    with pytest.raises(OpError, match=r"energy must name the same sites; these are only in one of them: b\."):
        top_channels({"a": one}, {"a": one, "b": one}, 1)
    with pytest.raises(OpError, match=r"a has 3 scores and 4 energies"):
        top_channels({"a": one}, {"a": torch.ones(4)}, 1)
    with pytest.raises(OpError, match=r"a has channels 0 to 2, each allowed once; got \[0, 3\]"):
        ChannelSet({"a": (0, 3)}, {"a": one}, {"a": one})
    with pytest.raises(OpError, match=r"got \[1, 1\]"):
        ChannelSet({"a": (1, 1)}, {"a": one}, {"a": one})
    with pytest.raises(OpError, match=r"'topp' is not a valid arm\. Nearest: 'top'"):
        ChannelSet({"a": (1,)}, {"a": one}, {"a": one}, arm="topp")
    with pytest.raises(OpError, match=r"energy of a has negative values"):
        ChannelSet({"a": (1,)}, {"a": one}, {"a": -one})
    with pytest.raises(OpError, match=r"scores of a must be one number per channel, \[d\], but have shape \[1, 3\]"):
        top_channels({"a": one[None]}, {"a": one}, 1)
    with pytest.raises(OpError, match=r"scores of a are not finite, first in channels \[1\]"):
        top_channels({"a": torch.tensor([1.0, float("nan")])}, {"a": torch.ones(2)}, 1)


def test_a_set_is_a_mapping_of_its_sites():
    chosen = sample_set(0)
    assert list(chosen) == ["blocks.0.img", "blocks.1.img", "blocks.2.img"]
    assert dict(chosen) == chosen.channels
    assert "blocks.0.img" in chosen
    assert "nowhere" not in chosen
    assert chosen.get("nowhere", ()) == ()
    assert chosen.get("blocks.1.img") == chosen["blocks.1.img"]
    with pytest.raises(SiteError, match=r"no site 'blocks\.0\.imgs'\. Nearest: 'blocks\.0\.img'\. Its sites: "):
        chosen["blocks.0.imgs"]
    assert (chosen.k, chosen.width) == (4, 40)


def test_a_set_keeps_its_own_copy_of_the_scores():
    scores = torch.tensor([3.0, 1.0])
    chosen = top_channels({"a": scores}, {"a": scores}, 1)
    scores.zero_()
    assert chosen.scores["a"].tolist() == [3.0, 1.0]


def test_a_set_without_channels_is_valid():
    empty = given_set((), (), width=4)
    assert empty.k == 0
    assert empty.energy_share() == {"s0": 0.0, "s1": 0.0}
    for control in (empty.bottom(), empty.random(0), empty.energy_matched(0)):
        assert dict(control) == {"s0": (), "s1": ()}
        assert control.matched
    assert len(empty.table) == 0
    assert "most frequent: none" in repr(empty)
    assert empty.restrict([]).union() == ()
    assert repr(empty.restrict([])).endswith("at 0 sites")


def test_take_equals_the_top_of_a_smaller_k():
    large = sample_set(1, k=7)
    for k in range(1, 8):
        assert large.take(k) == sample_set(1, k=k)
        assert large.bottom().take(k) == sample_set(1, k=k).bottom()
    with pytest.raises(OpError, match=r"take\(8\) was asked for, but blocks\.0\.img has 7 channels\. Take 1 to 7"):
        large.take(8)


def test_restrict():
    chosen = sample_set(2)
    part = chosen.restrict(["blocks.2.img", "blocks.0.img"])
    assert list(part) == ["blocks.2.img", "blocks.0.img"]
    assert set(part.scores) == set(part.energy) == set(part)
    with pytest.raises(SiteError, match=r"no site 'blocks\.9\.img'"):
        chosen.restrict("blocks.9.img")


def test_jaccard():
    assert jaccard([], []) == 1.0
    assert jaccard([1], []) == 0.0
    a, b = given_set((0, 1), (2, 3), width=5), given_set((1, 4), (2, 3), width=5)
    assert a.jaccard(b) == {"s0": 1 / 3, "s1": 1.0}
    assert a.jaccard({"s1": [2]}) == {"s1": 0.5}
    with pytest.raises(OpError, match=r"share no site\. This one has s0, s1\. The other has x\."):
        a.jaccard({"x": [2]})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_jaccard_index_is_that_of_membership_vectors(data):
    """Of the channels that an index into a vector means, from either end."""
    width = data.draw(st.integers(2, 12))
    ours, theirs = (
        data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=width, unique=True)) for _ in range(2)
    )
    one, other = np.zeros(width, bool), np.zeros(width, bool)
    one[ours] = True
    given = [c - width if data.draw(st.booleans()) else c for c in theirs]
    other[given] = True
    scores = {"s0": torch.ones(width)}
    found = ChannelSet({"s0": tuple(ours)}, scores, scores).jaccard({"s0": given})
    assert found["s0"] == pytest.approx((one & other).sum() / (one | other).sum())
    assert energy_share(torch.arange(1.0, width + 1), given) == pytest.approx(
        np.arange(1, width + 1)[other].sum() / np.arange(1, width + 1).sum()
    )


def test_channels_that_do_not_exist_have_no_overlap():
    scores = {"s0": torch.ones(4)}
    one = ChannelSet({"s0": (0, 1)}, scores, scores)
    for odd in (4, -5, 999):
        with pytest.raises(OpError, match=rf"s0 has channels 0 to 3; got \[.*{odd}.*\]"):
            one.jaccard({"s0": [0, odd]})
        with pytest.raises(OpError, match=rf"energy has channels 0 to 3; got \[{odd}\]"):
            energy_share(torch.ones(4), [odd])
    with pytest.raises(OpError, match="each allowed once"):
        energy_share(torch.ones(4), [1, 1])
    with pytest.raises(OpError, match="each allowed once"):
        energy_share(torch.ones(4), [3, -1])
    with pytest.raises(OpError, match="channel -1 counts from the end"):
        jaccard([0, 1], [-1])
    wide = {"s0": torch.ones(8)}
    with pytest.raises(OpError, match="s0 has 4 channels in this set and 8 in the other"):
        one.jaccard(ChannelSet({"s0": (0, 1)}, wide, wide))


def test_table():
    scores = torch.tensor([1.0, 8.0, 2.0, 4.0])
    top = top_channels({"a": scores}, {"a": scores}, 2)
    assert top.table.to_dict("list") == {
        "site": ["a", "a"],
        "rank": [1, 2],
        "channel": [1, 3],
        "score": [8.0, 4.0],
        "score/median": [8 / 3, 4 / 3],
        "energy share": [8 / 15, 4 / 15],
    }
    assert top.bottom().table["rank"].tolist() == [4, 3]


def test_display():
    ones = torch.ones(3)
    chosen = ChannelSet({"<a>": (0, 2), "b": (2,)}, {"<a>": ones, "b": ones}, {"<a>": ones, "b": ones}, note="x & y")
    assert repr(chosen).startswith("ChannelSet: top differing of 3 channels by |mean|, at 2 sites\n")
    assert "most frequent: 2 (2 of 2 sites), 0 (1)" in repr(chosen)
    shown, _ = DisplayFormatter().format(chosen)
    assert "&lt;a&gt;</td><td>0, 2</td><td>0.667" in shown["text/html"]
    assert "note: x &amp; y" in shown["text/html"]


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_json_round_trip_is_exact(seed):
    for chosen in (sample_set(seed), sample_set(seed).energy_matched(seed), sample_set(seed).bottom()):
        back = ChannelSet.from_json(json.loads(json.dumps(chosen.to_json())))
        assert back == chosen
        assert (back.score, back.arm, back.matched, back.note) == (
            chosen.score,
            chosen.arm,
            chosen.matched,
            chosen.note,
        )
        for site in chosen:
            assert torch.equal(back.scores[site], chosen.scores[site])
            assert torch.equal(back.energy[site], chosen.energy[site])


def test_json_of_another_format_raises():
    data = sample_set(0).to_json()
    del data["scores"]
    with pytest.raises(OpError, match=r"made of arm, channels, .*; missing or unknown here: colour, scores\."):
        ChannelSet.from_json(data | {"colour": "red"})


def test_two_sets_make_a_third_site_by_site():
    a, b = given_set((5, 1, 3), (2,), width=8), given_set((3, 7), (2, 0), (4,), width=8)
    assert dict(a | b) == {"s0": (5, 1, 3, 7), "s1": (2, 0), "s2": (4,)}
    assert dict(a & b) == {"s0": (3,), "s1": (2,)}
    assert dict(a - b) == {"s0": (5, 1), "s1": ()}
    assert dict(sample_set(0) - sample_set(0)) == dict.fromkeys(sample_set(0), ())
    assert (sample_set(0) | sample_set(1)).arm == "given"
    for make in (lambda: a | {"s0": [1]}, lambda: a & [1], lambda: a - None):
        with pytest.raises(OpError, match="goes together with a ChannelSet"):
            make()
    with pytest.raises(OpError, match="s0 has 8 channels in this set and 9 in the other"):
        a | given_set((1,), width=9)
