"""Intervals of a mean over prompts and seeds cover the truth as often as the documentation says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control, t, ttest_1samp

import dit_lens
from dit_lens.analysis import metrics
from dit_lens.analysis.metrics import Interval, mean_ci, paired_difference_ci
from dit_lens.analysis.metrics.crossed import crossed_bounds
from dit_lens.analysis.metrics.intervals import holm, mean_p
from tests.analysis.metrics.coverage import CASES, PROMPTS, simulate

DOCS = Path(dit_lens.__file__).parents[1] / "docs" / "concepts" / "statistics.md"
RUNS = 1500

# What does not reach 93 %, as the page says: (case, seeds, prompts) -> per cent.
BELOW = {
    "seeds differ twice as much": 92,
    "skewed (exponential)": 89,
    "very skewed (lognormal)": 84,
}


def read_table() -> dict[tuple[str, int, int], tuple[float, float]]:
    """The table of the page: per cent of intervals that cover, and of runs that have one."""
    found = {}
    for line in DOCS.read_text("utf-8").splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in CASES:
            for p, cell in zip(PROMPTS, cells[1:], strict=True):
                cover, have = re.fullmatch(r"([\d.]+)(?: \((\d+)\))?", cell).groups()
                found[name, int(cells[0]), p] = float(cover), float(have or 100)
    return found


def test_coverage_is_what_the_page_says():
    told = read_table()
    for name, s, p, cover, have in simulate(RUNS, seed=1):
        stated, share = told.pop((name, s, p))
        assert 100 * have == pytest.approx(share, abs=5)
        runs = RUNS * have
        if runs >= 100:
            deviation = 100 * math.sqrt(max(stated * (100 - stated), 100) / 1e4 / runs)
            assert 100 * cover == pytest.approx(stated, abs=4.5 * deviation), (name, s, p)
    assert not told


def test_the_page_names_what_covers_less_than_93():
    for (name, seeds, p), (cover, _) in read_table().items():
        few = p <= 15 or name.startswith("seeds")
        assert cover >= (BELOW.get(name, 93) if few else 93), (name, seeds, p)


# Against other ways to calculate


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([0.8, 0.95, 0.99]))
def test_symmetric_values_of_one_seed_have_the_interval_of_student(n, seed, level):
    half = np.random.default_rng(seed).normal(size=n)
    values = 3 + np.concatenate([half, -half])
    expected = ttest_1samp(values, 0).confidence_interval(level)
    found = mean_ci(values[:, None], level=level)
    if not math.isnan(found.low):
        assert (found.low, found.high) == pytest.approx(tuple(expected))
        assert mean_p(values[:, None]) == pytest.approx(max(ttest_1samp(values, 0).pvalue, 1e-6), rel=1e-3)


def by_mean_squares(x: np.ndarray) -> tuple[float, float]:
    """The half-width of a full table of symmetric values, from its analysis of variance."""
    p, s = x.shape
    rows, columns, mean = x.mean(1), x.mean(0), x.mean()
    of_prompts = s * sum((row - mean) ** 2 for row in rows) / (p - 1)
    of_seeds = p * sum((column - mean) ** 2 for column in columns) / (s - 1)
    rest = sum((x[i, j] - rows[i] - columns[j] + mean) ** 2 for i in range(p) for j in range(s)) / ((p - 1) * (s - 1))
    of_p, of_s = t.ppf(0.975, p - 1) ** 2, t.ppf(0.975, s - 1) ** 2
    if of_seeds > rest >= of_prompts:
        return math.sqrt(of_s * of_seeds / (p * s))
    return math.sqrt((of_p * of_prompts + of_s * max(of_seeds - rest, 0)) / (p * s))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 3.0]))
def test_a_full_table_equals_its_mean_squares(p, s, seed, size):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(p, s)) + size * rng.normal(size=(p, 1))
    values = np.concatenate([half, -half]) + size * rng.normal(size=s)
    mean, low, high = mean_ci(values)
    if not math.isnan(low):
        assert (mean - low, high - mean) == pytest.approx((by_mean_squares(values),) * 2)


def test_a_skewed_mean_has_the_longer_side_where_its_tail_is():
    mean, low, high = mean_ci(np.random.default_rng(0).exponential(size=(20, 1)))
    assert high - mean > 1.2 * (mean - low)


def test_of_yes_and_no_limits_give_the_interval_of_clopper_and_pearson():
    for n, yes in [(20, 0), (64, 2), (12, 12)]:
        values = np.arange(n) < yes
        found = mean_ci(values[:, None].astype(float), limits=(0, 1))
        exact = binomtest(yes, n).proportion_ci(method="exact")
        assert found[1:] == pytest.approx((exact.low, exact.high), abs=0.01)
        assert all(map(math.isnan, mean_ci(values[:, None].astype(float))[1:]))


# What counts


def test_the_order_of_values_and_the_names_of_prompts_decide_nothing():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 3)) + rng.normal(size=(7, 1))
    prompt, seed = (x.ravel() for x in np.indices(values.shape))
    order = rng.permutation(values.size)
    named = np.array([f"prompt {10 - i}" for i in prompt])
    found = mean_ci(values.ravel()[order], named[order], seed[order])
    assert found == pytest.approx(mean_ci(values))


def test_draws_of_one_prompt_and_seed_are_averaged():
    values = np.random.default_rng(0).normal(size=(6, 2, 5))
    prompt, seed, _ = (x.ravel() for x in np.indices(values.shape))
    assert mean_ci(values.ravel(), prompt, seed) == pytest.approx(mean_ci(values.mean(2)))
    assert mean_ci(values.ravel(), prompt) == pytest.approx(mean_ci(values.mean((1, 2))[:, None]))


def test_more_seeds_of_the_same_prompts_do_not_make_more_prompts():
    prompts = np.random.default_rng(0).normal(size=(10, 1))
    assert mean_ci(prompts.repeat(100, 1)) == pytest.approx(mean_ci(prompts))


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 1)) + 0.1 * rng.normal(size=(30, 2))
    apart = values + np.array([-1.0, 1.0])
    assert np.diff(mean_ci(apart)[1:]) > 10 * np.diff(mean_ci(values)[1:])
    assert mean_ci(apart.ravel(), np.arange(30).repeat(2)).mean == pytest.approx(mean_ci(apart).mean)


@pytest.mark.parametrize("p", [8, 32])
@pytest.mark.parametrize("effects", [(1, 0, 0.5), (0, 0, 1), (1, 0.3, 0.5)])
def test_a_fifth_of_the_cells_may_be_missing(p, effects):
    rng = np.random.default_rng(p)
    shapes = (RUNS, p, 1), (RUNS, 1, 4), (RUNS, p, 4)
    values = sum(size * rng.normal(size=shape) for size, shape in zip(effects, shapes, strict=True))
    missing = rng.random(values.shape) < 0.2
    missing[:, :, 0] &= ~missing.all(2)
    _, low, high = crossed_bounds(np.where(missing, np.nan, values))
    assert 0.935 <= ((low <= 0) & (high >= 0)).mean() <= 0.985


def test_what_does_not_determine_an_interval_has_none():
    equal, rare = np.full((9, 2), 0.7), np.zeros((64, 1))
    rare[:2] = -0.5
    for values in ([[2.0]], equal, rare, [[0.1 + 0.2], [0.3]]):
        mean, low, high = mean_ci(values)
        assert mean == pytest.approx(np.mean(values))
        assert math.isnan(low)
        assert math.isnan(high)
        assert math.isnan(mean_p(values))
    rare[2] = -0.5
    assert mean_ci(rare).low < np.mean(rare) < mean_ci(rare).high
    assert mean_ci([[1.0, 2.0, 3.0]]).low < 2 < mean_ci([[1.0, 2.0, 3.0]]).high  # of one prompt, over seeds
    assert mean_ci([1.0, 2.0, 3.0], ["a", "a", "a"]) == mean_ci([[1.0, 2.0, 3.0]])


def test_pairing_removes_what_arms_share():
    rng = np.random.default_rng(0)
    shared, effect = rng.normal(0, 10, size=(12, 4)), rng.normal(1, 0.1, size=(12, 4))
    mean, low, high = paired_difference_ci(shared + effect, torch.tensor(shared))
    assert 0.85 < low < mean < high < 1.15


def test_level_and_p_belong_together():
    values = np.random.default_rng(0).exponential(size=(8, 3)) - 0.5
    wide, narrow = mean_ci(values, level=0.99), mean_ci(values, level=0.5)
    assert wide.low < narrow.low < wide.mean < narrow.high < wide.high
    p = mean_p(values)
    assert mean_ci(values, level=1 - 1.01 * p).low > 0 > mean_ci(values, level=1 - 0.99 * p).low


def test_limits_bound_an_interval():
    assert mean_ci([[0.0], [0.9]], limits=(0, 1)) == Interval(0.45, 0.0, 1.0)
    assert mean_p(np.ones((16, 1)), limits=(-1, 1)) < 0.001
    assert math.isnan(mean_p(np.ones((1, 1)), limits=(-1, 1)))


def test_holm_is_the_step_down_of_bonferroni():
    p = np.random.default_rng(0).random(6) / 10
    found = holm(p)
    for level in np.linspace(0.001, 0.7, 50):
        rejected: set[int] = set()
        for step, i in enumerate(np.argsort(p)):
            if p[i] > level / (6 - step):
                break
            rejected.add(int(i))
        assert rejected == {i for i, value in enumerate(found) if value <= level}
    assert (np.array(found) >= false_discovery_control(p)).all()
    assert holm([0.02, math.nan])[0] == 0.04


def test_the_name_and_the_keywords_of_the_bootstrap_still_work():
    values, prompts = [0.1, 0.2, 0.4, 0.3, 0.9], ["a", "a", "b", "b", "c"]
    with pytest.warns(FutureWarning, match="mean_ci") as told:
        found = metrics.bootstrap_ci(values, groups=prompts, seed=3, n=10)
    assert found == mean_ci(values, prompts)
    assert {"groups=", "seed=", "n=", "bootstrap_ci"} <= {
        word for one in told for word in str(one.message).replace("dit_lens.analysis.metrics.", "").split()
    }
