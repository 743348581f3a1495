"""The rules that choose channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens.analysis.channels import (
    MEDIAN,
    SCORES,
    ChannelSet,
    absolute_channels,
    definitions,
    energy_share,
    gini,
    jaccard,
    mad_channels,
    share_channels,
    top_channels,
)
from dit_lens.core.request.reduce import reduce_tokens
from dit_lens.errors import OpError

seeds = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_top_and_bottom_are_the_ends_of_the_order(seed, width, k):
    scores = torch.randint(0, 5, (width,), generator=torch.Generator().manual_seed(seed)).float()  # with ties
    k = min(k, width)
    top = top_channels({"a": scores}, {"a": scores}, k)
    assert list(top["a"]) == np.argsort(-scores.numpy(), kind="stable")[:k].tolist()
    bottom = top.bottom()
    assert list(bottom["a"]) == np.argsort(scores.numpy(), kind="stable")[:k].tolist()
    assert bottom.arm == "bottom"
    assert bottom.matched == (not set(bottom["a"]) & set(top["a"])) == (not bottom.note)


@pytest.mark.parametrize("k", [0, -1, 6, 2.0, True])
def test_k_that_does_not_fit_raises(k):
    with pytest.raises(OpError, match=r"channels were asked for, but blocks\.1\.img has 5\. Choose .* from 1 to 5"):
        top_channels({"blocks.1.img": torch.ones(5)}, {}, k)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.01, 1.0))
def test_a_share_of_energy_takes_the_fewest_channels_that_reach_it(seed, share):
    scores = torch.tensor(np.random.default_rng(seed).lognormal(size=20), dtype=torch.float32)
    energy = scores.square()
    chosen = share_channels({"a": scores}, {"a": energy}, share)["a"]
    assert list(chosen) == np.argsort(-scores.numpy(), kind="stable")[: len(chosen)].tolist()
    assert energy_share(energy, chosen) >= share - 1e-12
    assert energy_share(energy, chosen[:-1]) < share


def test_without_energy_a_share_selects_no_channel():
    zeros = {"a": torch.zeros(3)}
    assert share_channels(zeros, zeros)["a"] == ()
    with pytest.raises(OpError, match=r"share=1\.5 must be in \(0, 1\]"):
        share_channels(zeros, zeros, 1.5)
    with pytest.raises(OpError, match=r"a has no energy"):
        share_channels(zeros, {})


def test_the_absolute_rule_needs_both_thresholds():
    peaks = {"a": torch.tensor([150.0, 99.0, 400.0, 1.0, 101.0])}
    low, high = {"a": torch.full((5,), 0.1)}, {"a": torch.full((5,), 0.2)}
    assert absolute_channels(peaks, low, peaks)["a"] == (2, 0, 4)
    assert absolute_channels(peaks, high, peaks)["a"] == (2,)
    assert absolute_channels(peaks, low, peaks, least=200)["a"] == (2,)


def test_sets_of_a_rule_may_differ_in_size_and_have_controls():
    even, spiky = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 1e6])
    scores = {"a": even, "b": spiky}
    found = mad_channels(scores, scores)
    assert dict(found) == {"a": (), "b": (4,)}
    assert found.k == {"a": 0, "b": 1}
    for control in (found.bottom(), found.random(0), found.energy_matched(0)):
        assert [len(chosen) for chosen in control.values()] == [0, 1]


def test_definitions_are_those_of_the_rules():
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    x[:, 3], x[:, 8] = 400, 2000 * torch.randn(50).sign()  # the one keeps its sign, the other averages out
    scores = {name: reduce_tokens(x[None], name)[0] for name in (*SCORES, MEDIAN)}
    table = definitions(scores, k=2).set_index(["score", "rule"])
    assert table.loc[("mean|x|", "top 2"), "jaccard"] == jaccard(
        scores["|mean|"].topk(2).indices.tolist(), scores["mean|x|"].topk(2).indices.tolist()
    )
    assert table.loc[("max", "|x| > 100 and 1,000 medians"), "k"] == int(
        ((scores["max"] > 100) & (scores["max"] >= 1000 * scores[MEDIAN].median())).sum()
    )
    assert table.loc[("rms", "50 % of energy"), "k"] == 1
    assert table.loc[("rms", "top 2"), "energy share"] > 0.999
    assert table.loc[("rms", "top 2"), "gini"] == pytest.approx(gini(scores["rms"]))
    assert table.loc[("rms", "top 2"), "k/d"] == 2 / 30
    with pytest.raises(OpError, match=r"'rms', which is not among \|mean\|"):
        definitions({"|mean|": scores["|mean|"]})


def test_a_lens_chooses_by_other_rules_too(cfg_lens):
    """By share of the energy and by deviations: equal to the functions for the same scores and energy."""
    top = cfg_lens.massive_channels("red", k=4, seed=0)
    half = cfg_lens.massive_channels("red", share=0.5, seed=0)
    assert half == share_channels(top.scores, top.energy, 0.5)
    assert min(half.energy_share().values()) >= 0.5
    assert "the fewest that hold 50 % of the energy" in repr(half)
    far = cfg_lens.massive_channels("red", mad=3.0, seed=0)
    assert far == mad_channels(top.scores, top.energy, 3.0)
    assert ChannelSet.from_json(far.to_json()) == far
