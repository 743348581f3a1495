"""Statistics over channels equal their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from dit_lens.analysis.channels import (
    RunningStats,
    energy_share,
    gini,
    jaccard,
    mad_outliers,
    top_median_ratio,
)
from dit_lens.analysis.channels.statistics import chance_jaccard, overlaps
from dit_lens.errors import OpError

seeds = st.integers(0, 10**6)


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
