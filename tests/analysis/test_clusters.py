"""Clusters, masks, and chance levels equal scikit-learn's, scipy's and their definitions."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom, permutation_test
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, jaccard_score
from sklearn.preprocessing import MinMaxScaler

from dit_lens.analysis.clusters import (
    chance_iou,
    cluster,
    foreground,
    iou,
    ious,
    normalise,
    permutation_p,
    segment,
    to_grid,
    upsample,
)
from dit_lens.errors import OpError

seeds = st.integers(0, 10**6)


def subject(seed: int = 0, sign: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [100, 4] of a 10 x 10 grid with a square subject inside, and its mask."""
    truth = np.zeros((10, 10), dtype=bool)
    truth[3:7, 2:6] = True
    noise = np.random.default_rng(seed).normal(0, 0.3, size=(100, 4))
    return sign * 5 * truth.reshape(100, 1) + noise, truth


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 5))
def test_minmax_equals_sklearn(seed, n, k):
    x = np.random.default_rng(seed).normal(3, 10, size=(n, k))
    x[:, 0] = 7
    expected = MinMaxScaler().fit_transform(x)
    np.testing.assert_allclose(normalise(x), expected, atol=1e-12)
    assert (normalise(x)[:, 0] == 0).all()


def test_robust_clips_outliers():
    x = np.linspace(0, 1, 1000)[:, None].repeat(2, 1)
    x[0, 0] = 1e6
    low, high = np.percentile(x, [1, 99], axis=0)
    expected = (np.clip(x, low, high) - low) / (high - low)
    np.testing.assert_allclose(normalise(x, "robust"), expected)
    assert normalise(x)[500, 0] < 1e-5
    assert normalise(x, "robust")[500, 0] == pytest.approx(0.5, abs=0.02)


@settings(max_examples=8, deadline=None)
@given(seeds, st.integers(2, 4), st.sampled_from(["minmax", "robust"]))
def test_cluster_is_kmeans_numbered_by_heat(seed, n_clusters, method):
    x = np.random.default_rng(seed).normal(size=(40, 3))
    labels = cluster(x, n_clusters, seed, method)
    values = normalise(x, method)
    assert adjusted_rand_score(labels, KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(values)) == 1
    heats = [values[labels == i].sum(1).mean() for i in range(n_clusters)]
    assert heats == sorted(heats)
    np.testing.assert_array_equal(labels, cluster(x, n_clusters, seed, method))


def test_segment_finds_a_subject():
    x, truth = subject()
    found = segment(x, (10, 10))
    assert iou(found.mask, truth) == 1.0
    assert found.mask.dtype == bool
    np.testing.assert_array_equal(found.labels, truth)
    assert found.sizes == (84, 16)
    assert not found.degenerate
    np.testing.assert_allclose(found.heat.ravel(), normalise(x).sum(1))
    assert repr(found) == "Segmentation: grid 10 x 10, foreground 16 of 100 tokens, clusters (84, 16)"


def test_a_negative_channel_inverts_heat_and_not_the_border():
    x, truth = subject(sign=-1)
    np.testing.assert_array_equal(segment(x, (10, 10), polarity="heat").mask, ~truth)
    np.testing.assert_array_equal(segment(x, (10, 10)).mask, truth)


def test_outlier_tokens_make_a_degenerate_mask():
    x = np.random.default_rng(0).normal(size=(400, 2))
    x[7] = 1e4
    found = segment(x, (20, 20))
    assert found.degenerate
    assert min(found.sizes) == 1
    assert repr(found).endswith("DEGENERATE: a cluster under 1 % of the tokens")
    assert not segment(x, (20, 20), method="robust").degenerate


def test_equal_tokens_are_degenerate_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = segment(np.ones((9, 2)), (3, 3))
    assert found.degenerate
    assert found.sizes == (0, 9)


def test_bfloat16_tensors_are_accepted():
    x, truth = subject()
    np.testing.assert_array_equal(segment(torch.tensor(x, dtype=torch.bfloat16), (10, 10)).mask, truth)


def test_foreground_of_three_clusters():
    labels = np.array([[5, 5, 5, 5], [5, 2, 9, 5], [5, 5, 9, 5]])
    heat = np.array([[0, 0, 0, 0], [0, 3, 1, 0], [0, 0, 1, 0]])
    np.testing.assert_array_equal(foreground(labels.ravel(), heat.ravel(), (3, 4), "heat"), labels == 2)
    np.testing.assert_array_equal(foreground(labels.ravel(), heat.ravel(), (3, 4)), labels != 5)


def test_border_counts_every_token_once_and_of_equal_clusters_the_colder_is_background():
    labels = np.array([[0, 1, 1], [0, 1, 1], [0, 0, 1]])  # four of each on the border
    warm = np.where(labels == 0, 2.0, 1.0)
    np.testing.assert_array_equal(foreground(labels.ravel(), warm.ravel(), (3, 3), "border"), labels == 0)
    np.testing.assert_array_equal(foreground(labels.ravel(), -warm.ravel(), (3, 3), "border"), labels == 1)


def test_heat_is_the_mean_and_not_the_sum():
    assert foreground([0, 0, 0, 1], [1, 1, 1, 2], (2, 2)).sum() == 1


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 30)] * 2), seeds)
def test_upsample_equals_torch(grid, size, seed):
    x = np.random.default_rng(seed).normal(size=grid)
    expected = torch.nn.functional.interpolate(torch.tensor(x)[None, None], size=size, mode="nearest-exact")
    np.testing.assert_array_equal(upsample(x, size), expected[0, 0])


def test_upsample_keeps_dtype_and_repeats():
    mask = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(upsample(mask, (6, 4)), mask.repeat(3, 0).repeat(2, 1))
    assert upsample(torch.tensor(mask), (4, 4)).dtype == bool


masks = st.lists(st.booleans(), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(masks, seeds)
def test_iou_equals_sklearn(mask, seed):
    a = np.array(mask)
    b = np.random.default_rng(seed).random(len(a)) > 0.5
    assert iou(a, a) == 1.0
    assert iou(a, b) == iou(b, a) == iou(torch.tensor(a), b)
    if (a | b).any():
        assert iou(a, b) == pytest.approx(jaccard_score(a, b))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_chance_equals_the_mean_over_all_masks(mask, data):
    truth = np.array(mask)
    size = data.draw(st.integers(0, len(truth)))
    scores = []
    for chosen in itertools.combinations(range(len(truth)), size):
        other = np.zeros(len(truth), dtype=bool)
        other[list(chosen)] = True
        scores.append(iou(truth, other))
    assert chance_iou(truth, size) == pytest.approx(np.mean(scores))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_chance_of_an_oracle_is_that_of_the_better_half(mask, data):
    truth = np.array(mask)
    size = data.draw(st.integers(0, len(truth)))
    scores = []
    for chosen in itertools.combinations(range(len(truth)), size):
        other = np.zeros(len(truth), dtype=bool)
        other[list(chosen)] = True
        scores.append(max(iou(truth, other), iou(truth, ~other)))
    assert chance_iou(truth, size, oracle=True) == pytest.approx(np.mean(scores))
    assert chance_iou(truth, size, oracle=True) >= chance_iou(truth, size) - 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20_000), st.data())
def test_chance_omits_only_overlaps_of_negligible_probability(total, data):
    true, size = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    if true + size == 0:
        return
    overlap = np.arange(min(true, size) + 1)
    expected = hypergeom.pmf(overlap, total, true, size) @ (overlap / (true + size - overlap))
    assert chance_iou(np.arange(total) < true, size) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.integers(1, 6)] * 2), st.tuples(*[st.integers(1, 20)] * 2), seeds)
def test_ious_are_those_of_every_pair(grid, size, seed):
    rng = np.random.default_rng(seed)
    found, truths = rng.random((4, *grid)) > 0.5, rng.random((3, *size)) > rng.random()
    expected = [[iou(upsample(mask, size), truth) for truth in truths] for mask in found]
    np.testing.assert_allclose(ious(found, truths), expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), seeds)
def test_permutation_p_equals_scipy(p, seed):
    scores = np.random.default_rng(seed).random((p, p))
    if p == 1:
        assert permutation_p(scores) == 1
        return
    found = permutation_test(
        (np.arange(p), np.arange(p)),
        lambda i, j: scores[np.asarray(i, int), np.asarray(j, int)].mean(),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    )
    assert permutation_p(scores) == pytest.approx(found.pvalue)


def test_permutation_p_is_small_only_if_masks_fit_their_own_prompt():
    assert permutation_p(np.eye(9), n=999) == pytest.approx(1 / 1000, abs=1e-3)
    assert permutation_p(np.ones((9, 9))) == 1
    apart = np.random.default_rng(0).random((50, 9, 9))
    assert np.mean([permutation_p(one, n=400) for one in apart]) == pytest.approx(0.5, abs=0.1)


def test_chance_on_an_image():
    truth = np.zeros((1024, 1024), dtype=bool)
    truth[:512] = True
    assert chance_iou(truth, 2**19) == pytest.approx(1 / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: normalise(np.ones((2, 2)), "min-max"),
            r"'min-max' is not a valid method\. Nearest: 'minmax'\. There are: minmax, robust",
        ),
        (lambda: normalise(np.ones(4)), r"Tokens must be \[n, k\] .* got shape \[4\]"),
        (lambda: normalise(np.ones((4, 0))), r"one token and channel; got shape \[4, 0\]"),
        (lambda: normalise([[1.0, np.inf]]), r"not finite, first in channels \[1\] of the 2"),
        (lambda: cluster(np.ones((3, 1)), 4), r"n_clusters=4 was asked for, but there are 3 tokens\. Choose 2 to 3"),
        (lambda: cluster(np.ones((3, 1)), 1), r"n_clusters=1"),
        (lambda: segment(np.ones((4, 1)), (2, 3)), r"must be \(h, w\) with h \* w = 4 tokens; got \(2, 3\)"),
        (
            lambda: segment(np.ones((4, 1)), (2, 2), polarity="heart"),
            r"'heart' is not a valid polarity\. Nearest: 'heat'",
        ),
        (lambda: foreground([0, 1], [1.0], (1, 2)), r"2 labels and 1 values of heat"),
        (lambda: upsample(np.ones(3), (2, 2)), r"a grid \[h, w\]"),
        (lambda: upsample(np.ones((3, 3)), (0, 2)), r"at least 1 x 1"),
        (
            lambda: iou(np.ones(2), np.ones(2, bool)),
            r"a must be a bool mask, but has dtype float64\. Compare it first: a > 0",
        ),
        (lambda: iou(np.ones(2, bool), np.ones(3, bool)), r"shapes \(2,\) and \(3,\)\. .*upsample\(mask, size\)"),
        (
            lambda: ious(np.ones((2, 2), bool), np.ones((1, 4, 4), bool)),
            r"takes masks \[m, h, w\] and truths \[t, H, W\]",
        ),
        (lambda: permutation_p(np.ones((2, 3))), r"Scores must be \[p, p\].* got shape \[2, 3\]"),
        (lambda: chance_iou(np.ones(3, bool), 4), r"of 4 pixels was asked for, but the truth has 3"),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(OpError, match=message):
        call()


def test_a_mask_in_pixels_on_the_grid():
    mask = np.zeros((32, 48), bool)
    mask[8:20, 6:30] = True
    small = to_grid(mask, (8, 12))
    assert small.shape == (8, 12)
    assert np.array_equal(np.argwhere(small).min(0), [2, 1])  # columns 6 and 7 are half of token 1
    assert np.array_equal(np.argwhere(small).max(0), [4, 7])
    assert np.array_equal(to_grid(upsample(small, (32, 48)), (8, 12)), small)
    assert not to_grid(np.zeros((5, 7), bool), (2, 3)).any()
