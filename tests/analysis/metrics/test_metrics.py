"""Distances equal their definitions, and intervals have the coverage that they state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import mean_absolute_error, mean_squared_error

from dit_lens.analysis.metrics import bootstrap_ci, mean_abs, paired_difference_ci, psnr, rmse, wilson
from dit_lens.errors import OpError

seeds = st.integers(0, 10**6)


def images(seed: int, count: int = 2) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, size=(count, 5, 4, 3), dtype=np.uint8))


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_distances_equal_sklearn(seed):
    a, b = images(seed)
    x, y = a.ravel() / 255, b.ravel() / 255
    assert rmse(a, b) == pytest.approx(255 * math.sqrt(mean_squared_error(x, y)))
    assert mean_abs(a, b) == pytest.approx(255 * mean_absolute_error(x, y))
    assert psnr(a, b) == pytest.approx(10 * math.log10(1 / mean_squared_error(x, y)))


@pytest.mark.parametrize("distance", [rmse, psnr, mean_abs])
def test_every_form_of_an_image_gives_the_same_distance(distance):
    a, b = images(1)
    expected = distance(a, b)
    assert isinstance(expected, float)
    assert distance(Image.fromarray(a), Image.fromarray(b)) == expected
    assert distance(torch.tensor(a), Image.fromarray(b)) == expected
    assert distance(a / 255, b) == pytest.approx(expected)
    assert distance(torch.tensor(a / 255, dtype=torch.bfloat16), b) == pytest.approx(expected, rel=0.01)
    first, second = images(2, 3), images(3, 3)
    each = [distance(x, y) for x, y in zip(first, second, strict=True)]
    assert distance(first, second).tolist() == distance(np.stack(first), np.stack(second)).tolist() == each
    assert distance([], []).shape == (0,)


def test_equal_images():
    a, _ = images(0)
    assert (rmse(a, a), mean_abs(a, a), psnr(a, a)) == (0.0, 0.0, math.inf)


def test_a_palette_is_compared_by_colour():
    a, _ = images(0)
    image = Image.fromarray(a)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert rmse(palette, palette.convert("RGB")) == 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), r"shapes \[2, 2\] and \[2, 3\]\. Resize or convert one first"),
        (np.zeros((2, 2)), [np.zeros((2, 2))], r"cannot be compared with a list"),
        ([np.zeros((2, 2))], [np.zeros((2, 2))] * 2, r"1 images cannot be compared with 2"),
        (np.full((2, 2), 255.0), np.zeros((2, 2)), r"must be in \[0, 1\]; this one is in \[255, 255\]\. Divide by 255"),
        (np.full((2, 2), -0.1), np.zeros((2, 2)), r"\(x \+ 1\) / 2"),
        (np.full((2, 2), np.nan), np.zeros((2, 2)), r"a NaN means that the run overflowed"),
        (np.zeros((2, 2), int), np.zeros((2, 2)), r"uint8 in \[0, 255\] or floating point in \[0, 1\]; got int64"),
        (np.zeros(4), np.zeros(4), r"two or three dimensions; got shape \[4\]"),
    ],
)
def test_images_that_cannot_be_compared(a, b, message):
    with pytest.raises(OpError, match=message):
        rmse(a, b)


# Intervals


def by_loops(values: list[list[float]], n: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    means = []
    for _ in range(n):
        drawn = [values[i] for i in rng.integers(len(values), size=len(values))]
        means.append(np.mean([np.mean(rng.choice(row, size=len(row))) for row in drawn]))
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4, 4), (1, 7, 2, 5, 3)])
def test_bootstrap_equals_the_loops(lengths):
    rng = np.random.default_rng(0)
    values = [(rng.normal(i, 1, size=length)).tolist() for i, length in enumerate(lengths)]
    flat, groups = np.concatenate(values), np.repeat([f"prompt {i}" for i in range(5)], lengths)
    shuffled = rng.permutation(len(flat))
    found = bootstrap_ci(flat[shuffled], groups[shuffled], n=6000)
    assert found.mean == pytest.approx(np.mean([np.mean(row) for row in values]))
    np.testing.assert_allclose(found[1:], by_loops(values, 3000), atol=0.12)
    if len(set(lengths)) == 1:
        assert bootstrap_ci(flat, groups) == bootstrap_ci(values)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), seeds)
def test_padding_is_never_sampled(lengths, seed):
    groups = np.repeat(np.arange(len(lengths)), lengths)
    assert bootstrap_ci(np.full(len(groups), 5.0), groups, seed, n=50) == (5.0, 5.0, 5.0)
    values = np.random.default_rng(seed).uniform(2, 3, len(groups))
    _, low, high = bootstrap_ci(values, groups, seed, n=50)
    assert values.min() <= low <= high <= values.max()


def test_prompts_are_the_unit():
    # Ten prompts far apart, a hundred seeds each that agree: a pooled bootstrap would claim ten times the certainty.
    prompts = np.random.default_rng(0).normal(size=(10, 1))
    _, low, high = bootstrap_ci(prompts.repeat(100, 1))
    _, low_one, high_one = bootstrap_ci(prompts)
    assert high - low == pytest.approx(high_one - low_one, rel=0.05)
    assert high - low > 0.8


def test_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        values = rng.normal(size=(30, 1)) + rng.normal(size=(30, 4))
        _, low, high = bootstrap_ci(values, seed=i, n=300)
        hits += low <= 0 <= high
    assert 178 <= hits <= 200  # 95 % less the known shortfall of percentile intervals


def test_level_and_seed():
    values = np.random.default_rng(0).normal(size=(8, 3))
    wide, narrow = bootstrap_ci(values, level=0.99), bootstrap_ci(values, level=0.5)
    assert wide.low < narrow.low < wide.mean < narrow.high < wide.high
    assert bootstrap_ci(values, seed=1) == bootstrap_ci(values, seed=1) != bootstrap_ci(values, seed=2)


def test_one_value_has_no_interval():
    for found in (bootstrap_ci([[2.0]]), bootstrap_ci([2.0], ["a"]), paired_difference_ci([[3.0]], [[1.0]])):
        assert found.mean == 2.0
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert bootstrap_ci([[1.0, 2.0, 3.0]]).low < 2 < bootstrap_ci([[1.0, 2.0, 3.0]]).high


def test_pairing_removes_what_arms_share():
    rng = np.random.default_rng(0)
    shared, effect = rng.normal(0, 10, size=(12, 4)), rng.normal(1, 0.1, size=(12, 4))
    mean, low, high = paired_difference_ci(shared + effect, torch.tensor(shared))
    assert 0.9 < low < mean < high < 1.1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n, data, level):
    successes = data.draw(st.integers(0, n))
    expected = binomtest(successes, n).proportion_ci(level, method="wilson")
    found = wilson(successes, n, level)
    assert found.mean == successes / n
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bootstrap_ci([[1.0, np.nan]]),
            r"1 of 2 values are NaN or infinite, the first at \[0, 1\]\. Leave them",
        ),
        (lambda: paired_difference_ci([[np.inf]], [[np.inf]]), r"use rmse instead of psnr"),
        (lambda: bootstrap_ci([1.0, 2.0]), r"\[prompts, seeds\]; got shape \[2\]\. .* values\[:, None\].* groups"),
        (
            lambda: bootstrap_ci([[1.0, 2.0]], [0, 1]),
            r"With groups, values and groups must both be \[m\]; got shapes \[1, 2\] and \[2\]",
        ),
        (lambda: bootstrap_ci([1.0, 2.0], [0]), r"\[2\] and \[1\]"),
        (lambda: bootstrap_ci(np.ones((0, 3))), r"no values to average"),
        (lambda: bootstrap_ci([[1.0, 2.0]], level=95), r"level=95 is not a valid coverage"),
        (lambda: bootstrap_ci([[1.0, 2.0]], n=0), r"n=0 resamples"),
        (lambda: paired_difference_ci([[1.0]], [[1.0, 2.0]]), r"equal shapes; got \(1, 1\) and \(1, 2\)"),
        (lambda: wilson(3, 2), r"3 successes in 2 trials"),
        (lambda: wilson(0, 0), r"0 successes in 0 trials"),
        (lambda: wilson(1, 2, level=1), r"level=1 is not a valid coverage"),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(OpError, match=message):
        call()
