"""Subjects by their distance from the border, against loops and scikit-learn's view of two classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_lens.analysis.subjects import LEAST_SPREAD, distance_from_border, threshold
from dit_lens.errors import OpError


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("at", [(3, 3), (0, 0), (5, 2)])
def test_a_subject_is_found_wherever_it_is_and_whatever_its_sign(sign, at):
    rng = np.random.default_rng(0)
    truth = np.zeros((10, 10), dtype=bool)
    truth[at[0] : at[0] + 4, at[1] : at[1] + 4] = True
    x = rng.normal(size=(100, 6)) * 0.2 + np.outer(truth.ravel(), rng.normal(size=6)) * 4 * sign
    distance = distance_from_border(x, (10, 10))
    np.testing.assert_array_equal(distance > threshold(distance), truth)


def test_the_distance_is_that_of_a_loop():
    x, grid = np.random.default_rng(1).normal(size=(20, 3)), (4, 5)
    scaled = (x - x.min(0)) / (x.max(0) - x.min(0))
    border = [i for i in range(20) if i // 5 in (0, 3) or i % 5 in (0, 4)]
    for token in range(20):
        parts = []
        for channel in range(3):
            values = [scaled[i, channel] for i in border]
            parts.append((scaled[token, channel] - np.mean(values)) / (np.std(values) + LEAST_SPREAD))
        expected = np.sqrt(np.mean(np.square(parts)))
        assert distance_from_border(x, grid)[token // 5, token % 5] == pytest.approx(expected)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_the_threshold_parts_two_classes_that_differ_most(values):
    """The sum of squares within both classes is the least of all ways to part the sorted values."""
    found = threshold(values)
    ordered = np.sort(values)

    def within(parts):
        return sum(((part - part.mean()) ** 2).sum() for part in parts if len(part))

    least = min(within((ordered[:i], ordered[i:])) for i in range(1, len(ordered)))
    assert within((ordered[ordered <= found], ordered[ordered > found])) <= least + 1e-6 * (1 + np.ptp(ordered) ** 2)


def test_what_cannot_be_parted_is_told():
    for wrong in ([1.0], [1.0, np.nan], []):
        with pytest.raises(OpError, match="at least two finite numbers"):
            threshold(wrong)
    with pytest.raises(OpError, match=r"h \* w = 6 tokens; got \(2, 2\)"):
        distance_from_border(np.ones((6, 2)), (2, 2))
