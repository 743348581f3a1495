"""Distances equal their definitions, and what makes no sense is told."""

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

from dit_lens.analysis.metrics import mean_abs, mean_ci, paired_difference_ci, psnr, rmse, wilson
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
            lambda: mean_ci([[1.0, np.nan]]),
            r"1 of 2 values are NaN or infinite, the first at \[0, 1\]\. Leave them",
        ),
        (lambda: paired_difference_ci([[np.inf]], [[np.inf]]), r"use rmse instead of psnr"),
        (
            lambda: mean_ci([1.0, 2.0]),
            r"\[prompts, seeds\]; got shape \[2\]\. .* values\[:, None\].* prompts= and seeds=",
        ),
        (
            lambda: mean_ci([[1.0, 2.0]], [0, 1]),
            r"With prompts, values and prompts must both be \[m\]; got shapes \[1, 2\] and \[2\]",
        ),
        (lambda: mean_ci([1.0, 2.0], [0]), r"\[2\] and \[1\]"),
        (lambda: mean_ci(np.ones((0, 3))), r"no values to average"),
        (lambda: mean_ci([[1.0, 2.0]], level=95), r"level=95 is not a valid coverage"),
        (lambda: mean_ci([1.0, 2.0], ["a", "b"], [0]), r"values and seeds must both be \[m\].*Name the seed of every"),
        (lambda: mean_ci([[1.0, 2.0]], seeds=[0, 1]), r"Give prompts= too"),
        (lambda: mean_ci([1.0, 2.0], np.array(["a", 1], dtype=object)), r"prompts cannot be told apart"),
        (lambda: mean_ci([[1.0, 2.0]], limits=(1, 1)), r"have no value between them"),
        (lambda: mean_ci([[1.0, 2.0]], limits=(0, 1)), r"reach from 1 to 2, beyond the limits 0 and 1"),
        (lambda: paired_difference_ci([[1.0]], [[1.0, 2.0]]), r"equal shapes; got \(1, 1\) and \(1, 2\)"),
        (lambda: wilson(3, 2), r"3 successes in 2 trials"),
        (lambda: wilson(0, 0), r"0 successes in 0 trials"),
        (lambda: wilson(1, 2, level=1), r"level=1 is not a valid coverage"),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(OpError, match=message):
        call()
