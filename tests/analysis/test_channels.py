"""Sets of channels, their controls, and the statistics that choose them."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from scipy.stats import median_abs_deviation

from dit_lens.analysis.channels import (
    MEDIAN,
    SCORES,
    ChannelSet,
    RunningStats,
    absolute_channels,
    definitions,
    energy_share,
    gini,
    jaccard,
    mad_channels,
    mad_outliers,
    share_channels,
    top_channels,
    top_median_ratio,
)
from dit_lens.analysis.channels.controls import count_hits, matched_map, random_map
from dit_lens.analysis.channels.statistics import chance_jaccard, overlaps
from dit_lens.core.request.reduce import reduce_tokens
from dit_lens.errors import OpError, SiteError

seeds = st.integers(0, 10**6)


def family(seed: int, sites: int = 3, width: int = 40, k: int = 4) -> ChannelSet:
    rng = np.random.default_rng(seed)
    scores = {f"blocks.{i}.img": torch.tensor(rng.lognormal(size=width), dtype=torch.float32) for i in range(sites)}
    return top_channels(scores, {site: s**2 for site, s in scores.items()}, k)


def of(*sets: tuple[int, ...], width: int) -> ChannelSet:
    """A set of given channels, whose scores and energy do not matter."""
    channels = {f"s{i}": chosen for i, chosen in enumerate(sets)}
    ones = {site: torch.ones(width) for site in channels}
    return ChannelSet(channels, ones, ones, arm="given")


# Choosing


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
    with pytest.raises(OpError, match=r"There is no arm 'topp'\. Nearest: 'top'"):
        ChannelSet({"a": (1,)}, {"a": one}, {"a": one}, arm="topp")
    with pytest.raises(OpError, match=r"energy of a has negative values"):
        ChannelSet({"a": (1,)}, {"a": one}, {"a": -one})
    with pytest.raises(OpError, match=r"scores of a must be one number per channel, \[d\], but have shape \[1, 3\]"):
        top_channels({"a": one[None]}, {"a": one}, 1)
    with pytest.raises(OpError, match=r"scores of a are not finite, first in channels \[1\]"):
        top_channels({"a": torch.tensor([1.0, float("nan")])}, {"a": torch.ones(2)}, 1)


def test_a_set_is_a_mapping_of_its_sites():
    chosen = family(0)
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
    empty = of((), (), width=4)
    assert empty.k == 0
    assert empty.energy_share() == {"s0": 0.0, "s1": 0.0}
    for control in (empty.bottom(), empty.random(0), empty.energy_matched(0)):
        assert dict(control) == {"s0": (), "s1": ()}
        assert control.matched
    assert len(empty.table) == 0
    assert "most frequent: none" in repr(empty)
    assert empty.restrict([]).union() == ()
    assert repr(empty.restrict([])).endswith("at 0 sites")


# The random arm


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 5), seeds)
def test_random_keeps_every_overlap_and_leaves_the_union(seed, sites, k, draw):
    top = family(seed, sites, 60, k)
    control = top.random(draw)
    assert control.matched
    assert not control.note
    assert not set(control.union()) & set(top.union())
    assert len(control.union()) == len(top.union())
    images: dict[int, int] = {}
    for site in top:
        for channel, image in zip(top[site], control[site], strict=True):
            assert images.setdefault(channel, image) == image
    for a, b in itertools.combinations(top, 2):
        assert jaccard(control[a], control[b]) == jaccard(top[a], top[b])
    assert control == top.random(draw)
    assert control.take(1)[site] == control[site][:1]


def test_random_draws_evenly_from_outside():
    top = of((0, 1), (1, 2), width=10)
    counts = np.bincount([c for draw in range(300) for c in top.random(draw).union()], minlength=10)
    assert (counts[:3] == 0).all()
    assert counts[3:].sum() == 900
    assert (abs(counts[3:] - 900 / 7) < 45).all()  # four standard deviations


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=3), seeds)
def test_random_has_the_fewest_hits_if_the_union_is_too_large(sets, draw):
    top = of(*(tuple(sorted(chosen)) for chosen in sets), width=5)
    if 2 * len(top.union()) <= 5:
        return
    fewest = min(
        sum(len({image[c] for c in chosen} & chosen) for chosen in sets) for image in itertools.permutations(range(5))
    )
    control = top.random(draw)
    assert sum(len(set(control[site]) & set(top[site])) for site in top) == fewest
    assert not control.matched
    assert f": {fewest} of {sum(map(len, sets))} control channels are in the set" in control.note
    assert len(control.union()) == len(top.union())


def test_random_prefers_other_channels_and_varies_with_the_seed_if_the_union_is_too_large():
    top = of((0, 1, 2), (3, 4, 5), width=8)
    draws = [top.random(seed) for seed in range(12)]
    assert all({6, 7} <= set(draw.union()) for draw in draws)
    assert len({draw["s0"] for draw in draws}) > 4


def test_random_works_up_to_half_the_width():
    control = of((0, 1), (1, 2), width=6).random(0)
    assert set(control.union()) == {3, 4, 5}
    assert control.matched


def test_random_uses_one_map_for_each_width():
    scores = {"a": torch.arange(8.0), "b": torch.arange(20.0), "c": torch.arange(8.0)}
    top = top_channels(scores, scores, 2)
    control = top.random(3)
    assert list(control) == ["a", "b", "c"]
    assert control["a"] == control["c"]
    assert control.matched
    assert top.width == {"a": 8, "b": 20, "c": 8}
    with pytest.raises(OpError, match="different width"):
        top.union()


# The energy-matched arm


@settings(max_examples=15, deadline=None)
@example(9440, 0)  # the set holds more than the six strongest channels outside
@given(seeds, seeds)
def test_energy_matched_is_outside_the_set_and_as_close_as_possible(seed, draw):
    rng = np.random.default_rng(seed)
    energy = torch.tensor(rng.lognormal(size=128), dtype=torch.float32)
    wanted = ChannelSet({"a": tuple(rng.permutation(128)[:6].tolist())}, {"a": energy}, {"a": energy}, arm="given")
    control = wanted.energy_matched(draw)
    assert len(set(control["a"])) == 6
    assert not set(control["a"]) & set(wanted["a"])
    held, outside = energy[list(wanted["a"])].sum(), np.delete(energy.numpy(), list(wanted["a"]))
    within_reach = min(held, np.sort(outside)[-6:].sum())
    assert energy[list(control["a"])].sum() == pytest.approx(within_reach, rel=0.02 if within_reach == held else 1e-6)
    assert control.matched == (within_reach >= 0.8 * held)
    assert control == wanted.energy_matched(draw)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_energy_matched_is_close_when_few_strong_channels_decide(share):
    rng, errors = np.random.default_rng(1), []
    for draw in range(40):
        outside = rng.lognormal(0, 1.5, size=120)
        outside[0] *= 100
        # A match exists: the energy of 12 channels drawn by strength, or of the dominant one and 11 others.
        wanted = outside[rng.choice(120, 12, replace=False, p=outside**share / (outside**share).sum())].sum()
        energy = torch.tensor([wanted] + [0.0] * 11 + outside.tolist())
        control = ChannelSet({"a": tuple(range(12))}, {"a": energy}, {"a": energy}, arm="given").energy_matched(draw)
        errors.append(abs(energy[list(control["a"])].sum().item() / wanted - 1))
    assert max(errors) < 0.015
    assert np.median(errors) < 2e-4


def test_energy_matched_varies_with_the_seed():
    energy = torch.tensor(np.random.default_rng(5).lognormal(0, 1.5, size=30), dtype=torch.float32)
    given_set = ChannelSet({"a": (1, 2, 3, 4)}, {"a": energy}, {"a": energy}, arm="given")
    draws = [given_set.energy_matched(seed) for seed in range(60)]
    assert len({draw["a"] for draw in draws}) >= 8
    # In a small pool the draws differ by about the 1 % within which maps count as equally good.
    shares = [draw.energy_share()["a"] for draw in draws]
    assert max(shares) - min(shares) < 0.03 * given_set.energy_share()["a"]


@pytest.mark.parametrize("energy", [[100.0, 60.0, 50.0, 1.0, 1.0, 55.0, 55.0], [5.0, 3.0, 9.0, 2.0, 8.0, 7.0, 7.0]])
def test_energy_matched_finds_what_enumeration_finds(energy):
    values = torch.tensor(energy)
    top = ChannelSet({"a": (5, 6)}, {"a": values}, {"a": values}, arm="given")
    best = min(abs(energy[i] + energy[j] - values[5:].sum().item()) for i, j in itertools.combinations(range(5), 2))
    assert abs(sum(energy[c] for c in top.energy_matched(0)["a"]) - values[5:].sum().item()) == pytest.approx(best)


def test_energy_matched_notes_where_its_energy_is_too_low():
    values = torch.tensor([100.0, 90.0, 20.0, 10.0, 1.0, 1.0])
    top = top_channels({"a": values, "b": torch.arange(6.0)}, {"a": values, "b": torch.ones(6)}, 2)
    control = top.energy_matched(0)
    assert set(control["a"]) == {2, 3}
    assert not control.matched
    assert "energy unmatched at 1 of 2 sites; a reaches 0.158 of its set's" in control.note
    assert "NOT matched" in repr(control)
    assert top.restrict("b").energy_matched(0).matched


def test_energy_matched_notes_where_its_energy_is_too_high():
    values = torch.tensor([1.0, 50.0, 60.0, 70.0])
    control = ChannelSet({"a": (0,)}, {"a": values}, {"a": values}, arm="given").energy_matched(0)
    assert control["a"] == (1,)
    assert not control.matched


def test_energy_matched_needs_enough_other_channels():
    top = of((0, 1, 2), width=4)
    with pytest.raises(OpError, match=r"s0 has 1 channels outside its set of 3.*Take k of at most 2"):
        top.energy_matched(0)
    with pytest.raises(OpError, match=r"Take first: top\.take\(k\)\.energy_matched\(seed\)"):
        of((0,), width=4).energy_matched(0).take(1)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 5), seeds)
def test_energy_matched_is_one_map_out_of_the_union(seed, sites, k, draw):
    top = family(seed, sites, 60, k)
    control = top.energy_matched(draw)
    assert not set(control.union()) & set(top.union())
    assert len(control.union()) == len(top.union())
    for a, b in itertools.combinations(top, 2):
        assert jaccard(control[a], control[b]) == jaccard(top[a], top[b])
    assert control == top.energy_matched(draw)


def error_of(sets, energy, images):
    found = [energy[s][[images[c] for c in chosen]].sum() for s, chosen in enumerate(sets)]
    return sum(abs(one / energy[s][list(sets[s])].sum() - 1) for s, one in enumerate(found))


# The sets of the last case hardly fit one map together, and there are only six channels to choose from.
@pytest.mark.parametrize(
    ("sets", "gap"), [([(0, 1), (1, 2)], 0.005), ([(0, 1, 2), (2,)], 0.005), ([(0,), (1,), (2,), (0, 1, 2)], 0.02)]
)
def test_energy_matched_maps_are_close_to_the_best_of_all_maps(sets, gap):
    gaps = []
    for seed in range(25):
        energy = np.random.default_rng(seed).lognormal(size=(len(sets), 9))
        best = min(error_of(sets, energy, dict(enumerate(images))) for images in itertools.permutations(range(3, 9), 3))
        found = matched_map(sets, energy, np.random.default_rng(seed))
        gaps.append((error_of(sets, energy, found) - best) / len(sets))
    assert np.median(gaps) < 1e-9
    assert np.mean(gaps) < gap


def test_energy_matched_takes_the_map_with_the_most_energy_if_all_have_too_little():
    sets, rng = [(0, 1), (1, 2)], np.random.default_rng(0)
    energy = np.concatenate([rng.uniform(50, 60, (2, 3)), rng.uniform(0, 9, (2, 6))], 1)
    best = min(error_of(sets, energy, dict(enumerate(images))) for images in itertools.permutations(range(3, 9), 3))
    assert error_of(sets, energy, matched_map(sets, energy, rng)) == pytest.approx(best)


def test_energy_matched_has_as_few_hits_as_random_if_the_union_is_too_large():
    top = of((0, 1), (2, 3), (4, 0), width=8)
    control = top.energy_matched(0)
    fewest = count_hits(list(top.values()), random_map(list(top.values()), 8, np.random.default_rng(0)))
    assert not control.matched
    assert f"5 of 8 channels, does not fit outside itself: {fewest} of 6 control channels" in control.note
    assert len(control.union()) == 5


def test_energy_matched_is_fast_at_the_size_of_flux():
    rng = np.random.default_rng(0)
    energy = rng.lognormal(0, 2, 3072) * rng.lognormal(0, 0.3, (57, 3072))
    sets = [tuple(np.argsort(-site)[:12].tolist()) for site in energy]
    start = time.process_time()
    matched_map(sets, energy, rng)
    assert time.process_time() - start < 5


# The rules


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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), seeds)
def test_overlaps_are_those_of_the_sets(k, seed):
    rng = np.random.default_rng(seed)
    sets = np.stack([rng.permutation(12)[:k] for _ in range(5)])
    found = overlaps(sets[:, None], sets[None])
    assert np.allclose(found, [[jaccard(a.tolist(), b.tolist()) for b in sets] for a in sets])


def test_chance_jaccard_is_that_of_random_sets():
    rng = np.random.default_rng(0)
    sets = np.argsort(rng.random((2, 4000, 20)), -1)[..., :6]
    assert overlaps(*sets).mean() == pytest.approx(chance_jaccard(6, 20), rel=0.03)


# Smaller sets, comparison, display


def test_take_equals_the_top_of_a_smaller_k():
    large = family(1, k=7)
    for k in range(1, 8):
        assert large.take(k) == family(1, k=k)
        assert large.bottom().take(k) == family(1, k=k).bottom()
    with pytest.raises(OpError, match=r"take\(8\) was asked for, but blocks\.0\.img has 7 channels\. Take 1 to 7"):
        large.take(8)


def test_restrict():
    chosen = family(2)
    part = chosen.restrict(["blocks.2.img", "blocks.0.img"])
    assert list(part) == ["blocks.2.img", "blocks.0.img"]
    assert set(part.scores) == set(part.energy) == set(part)
    with pytest.raises(SiteError, match=r"no site 'blocks\.9\.img'"):
        chosen.restrict("blocks.9.img")


def test_jaccard():
    assert jaccard([], []) == 1.0
    assert jaccard([1], []) == 0.0
    a, b = of((0, 1), (2, 3), width=5), of((1, 4), (2, 3), width=5)
    assert a.jaccard(b) == {"s0": 1 / 3, "s1": 1.0}
    assert a.jaccard({"s1": [2]}) == {"s1": 0.5}
    with pytest.raises(OpError, match=r"share no site\. This one has s0, s1\. The other has x\."):
        a.jaccard({"x": [2]})


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
    for chosen in (family(seed), family(seed).energy_matched(seed), family(seed).bottom()):
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
    data = family(0).to_json()
    del data["scores"]
    with pytest.raises(OpError, match=r"made of arm, channels, .*; missing or unknown here: colour, scores\."):
        ChannelSet.from_json(data | {"colour": "red"})


# Statistics


positive = st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(positive)
def test_statistics_equal_their_definitions(values):
    x = np.array(values)
    pairs = np.abs(x[:, None] - x).sum()
    assert gini(torch.tensor(values)) == pytest.approx(pairs / (2 * len(x) * x.sum()) if x.sum() else 0.0, abs=1e-6)
    if np.median(x) > 1e-30:
        assert top_median_ratio(torch.tensor(values)) == pytest.approx(x.max() / np.median(x), rel=1e-6)
    assert energy_share(torch.tensor(values), range(len(x) // 2)) == pytest.approx(
        x[: len(x) // 2].sum() / x.sum() if x.sum() else 0.0, abs=1e-6
    )
    expected = np.flatnonzero(x - np.median(x) > 3 * median_abs_deviation(x))
    assert sorted(mad_outliers(torch.tensor(values), 3)) == expected.tolist()


def test_statistics_at_the_edges():
    assert top_median_ratio(torch.tensor([0.0, 0.0, 2.0])) == float("inf")
    assert np.isnan(top_median_ratio(torch.zeros(3)))
    assert mad_outliers(torch.tensor([5.0, 0.0, 9.0, 0.0, 0.0, 0.0])) == (2, 0)
    assert mad_outliers(torch.tensor([-9000.0, 1.0, 2.0, 3.0])) == ()
    with pytest.raises(OpError, match="Take magnitudes or energies first"):
        gini(torch.tensor([-1.0, 2.0]))
    with pytest.raises(OpError, match=r"The energy has channels 0 to 1; got \[2\]"):
        energy_share(torch.ones(2), [2])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), seeds, st.sampled_from([1, 2**20]), st.integers(0, 4))
def test_running_statistics_equal_those_of_the_whole(sizes, seed, chunk, split):
    rng = np.random.default_rng(seed)
    # Far from zero with a small variance, for which E[x^2] - E[x]^2 loses all digits.
    batches = [rng.normal(1e6, 1e-2, size=(2, size, 3)) for size in sizes]
    whole = np.concatenate([batch.reshape(-1, 3) for batch in batches])
    stats, later = RunningStats(), RunningStats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningStats, "CHUNK", chunk)
        for i, batch in enumerate(batches):
            (stats if i < split else later).update(torch.tensor(batch))
        stats.merge(later)
    assert stats.count == len(whole)
    if not len(whole):
        with pytest.raises(OpError, match=r"seen no values\. Call update\(x\) first"):
            _ = stats.mean
        return
    np.testing.assert_allclose(stats.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, whole.var(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(stats.mean_square, (whole**2).mean(0), rtol=1e-12)
    np.testing.assert_array_equal(stats.min, whole.min(0))
    np.testing.assert_array_equal(stats.max, whole.max(0))


def test_running_statistics_accept_any_precision_and_one_width():
    stats = RunningStats()
    stats.update(torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16))
    assert stats.mean.dtype == torch.float64
    assert stats.mean.tolist() == [1.5, 2.0]
    assert repr(stats) == "RunningStats: 1 values of each of 2 channels"
    with pytest.raises(OpError, match=r"over 2 channels and the new values have 3\. Keep one RunningStats per site"):
        stats.update(torch.ones(4, 3))
    with pytest.raises(OpError, match="floating-point values"):
        stats.update(torch.ones(2, 2, dtype=torch.int64))


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
