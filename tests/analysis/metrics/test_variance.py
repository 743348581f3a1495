"""Shares of variance equal their definition, and decoding finds the labels that features were made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dit_lens.analysis.metrics.decoding import decode_labels
from dit_lens.analysis.metrics.variance import variance_shares
from dit_lens.errors import OpError

FLOATS = st.floats(-100, 100, width=32)


@given(arrays(np.float64, (3, 2, 4, 2), elements=FLOATS))
@settings(max_examples=50)
def test_two_factors_as_by_hand(x):
    x = x.reshape(3, 2, -1)
    total = ((x - x.mean((0, 1))) ** 2).sum()
    if total < 1e-6:
        return
    shares = variance_shares(x, ["a", "b"])
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["a"] == pytest.approx(2 * ((x.mean(1) - x.mean((0, 1))) ** 2).sum() / total, abs=1e-9)
    assert shares["b"] == pytest.approx(3 * ((x.mean(0) - x.mean((0, 1))) ** 2).sum() / total, abs=1e-9)


@given(arrays(np.float64, (2, 3, 2), elements=FLOATS), FLOATS)
@settings(max_examples=50)
def test_an_offset_and_an_order_of_factors_change_nothing(x, offset):
    one, other = variance_shares(x, "abc"), variance_shares(np.moveaxis(x, 2, 0) + offset, "cab")
    named = {frozenset(name.split(" x ")): share for name, share in other.items()}
    if sum(one.values()) and np.ptp(x) > 1e-3:
        assert all(named[frozenset(name.split(" x "))] == pytest.approx(s, abs=1e-6) for name, s in one.items())


def test_three_factors_are_told_apart():
    a, b, c = (np.array([-1.0, 1.0]).reshape(shape) for shape in ((2, 1, 1), (1, 2, 1), (1, 1, 2)))
    shares = variance_shares(a * b * c + 2 * a * c + 3 * b, ["a", "b", "c"])
    wanted = {"a x b x c": 1 / 14, "a x c": 4 / 14, "b": 9 / 14}
    assert {name: share for name, share in shares.items() if share > 1e-12} == pytest.approx(wanted)


def test_what_varies_over_tokens_alone_is_no_share():
    assert set(variance_shares(np.tile(np.arange(5.0), (2, 3, 1)), ["a", "b"]).values()) == {0.0}


def test_bad_input():
    with pytest.raises(OpError, match="one leading axis per factor"):
        variance_shares(np.zeros(3), ["a", "b"])
    with pytest.raises(OpError, match="finite"):
        variance_shares(np.array([1.0, np.nan]), ["a"])
    with pytest.raises(OpError, match=r"features \[m, d\]"):
        decode_labels(np.zeros((3, 2)), ["a"] * 3, [0, 1])


def test_no_prompt_is_in_both_training_and_test():
    """Features that identify the group, and nothing else, must not predict the label of a held-out group."""
    groups = np.repeat(np.arange(12), 4)
    labels = np.where(groups % 2, "red", "blue")
    features = np.eye(12)[groups] + 0.01 * np.random.default_rng(0).normal(size=(48, 12))
    assert decode_labels(features, labels, groups).skill < 0.4
    assert decode_labels(np.column_stack([features[:, -1:] * 0, groups % 2]), labels, groups).skill > 0.9


def test_classes_that_cannot_be_held_out_are_left_out():
    assert decode_labels(np.eye(4), ["a", "b", "c", "d"], [0, 1, 2, 3]) is None
    found = decode_labels(np.repeat([[0.0], [1.0], [5.0]], [4, 4, 1], 0), ["a"] * 4 + ["b"] * 4 + ["c"], range(9))
    assert (found.n, found.chance, found.skill) == (8, 0.5, 1.0)
