"""Control sets: random ones, and ones of matched energy."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dit_lens.analysis.channels import (
    ChannelSet,
    jaccard,
    top_channels,
)
from dit_lens.analysis.channels.controls import count_hits, matched_map, random_map
from dit_lens.errors import OpError
from tests.channel_sets import given_set, sample_set

seeds = st.integers(0, 10**6)


# The random arm


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 5), seeds)
def test_random_keeps_every_overlap_and_leaves_the_union(seed, sites, k, draw):
    top = sample_set(seed, sites, 60, k)
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
    top = given_set((0, 1), (1, 2), width=10)
    counts = np.bincount([c for draw in range(300) for c in top.random(draw).union()], minlength=10)
    assert (counts[:3] == 0).all()
    assert counts[3:].sum() == 900
    assert (abs(counts[3:] - 900 / 7) < 45).all()  # four standard deviations


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=3), seeds)
def test_random_has_the_fewest_hits_if_the_union_is_too_large(sets, draw):
    top = given_set(*(tuple(sorted(chosen)) for chosen in sets), width=5)
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
    top = given_set((0, 1, 2), (3, 4, 5), width=8)
    draws = [top.random(seed) for seed in range(12)]
    assert all({6, 7} <= set(draw.union()) for draw in draws)
    assert len({draw["s0"] for draw in draws}) > 4


def test_random_works_up_to_half_the_width():
    control = given_set((0, 1), (1, 2), width=6).random(0)
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
    outright = ChannelSet({"a": (1, 2, 3, 4)}, {"a": energy}, {"a": energy}, arm="given")
    draws = [outright.energy_matched(seed) for seed in range(60)]
    assert len({draw["a"] for draw in draws}) >= 8
    # In a small pool the draws differ by about the 1 % within which maps count as equally good.
    shares = [draw.energy_share()["a"] for draw in draws]
    assert max(shares) - min(shares) < 0.03 * outright.energy_share()["a"]


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
    top = given_set((0, 1, 2), width=4)
    with pytest.raises(OpError, match=r"s0 has 1 channels outside its set of 3.*Take k of at most 2"):
        top.energy_matched(0)
    with pytest.raises(OpError, match=r"Take first: top\.take\(k\)\.energy_matched\(seed\)"):
        given_set((0,), width=4).energy_matched(0).take(1)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(1, 5), seeds)
def test_energy_matched_is_one_map_out_of_the_union(seed, sites, k, draw):
    top = sample_set(seed, sites, 60, k)
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
    top = given_set((0, 1), (2, 3), (4, 0), width=8)
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
