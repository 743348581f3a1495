"""Both clusters are those of scikit-learn, token by token, or scikit-learn is asked."""

import warnings

import numpy as np
import pytest

from dit_lens.analysis import two_means as module
from dit_lens.analysis.clusters import cluster, normalise
from dit_lens.analysis.two_means import two_means

SIDE = 20


def subjects(rng, channels):
    """A smooth subject in noise, as maps of massive channels are."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    centre, spread = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.3)
    subject = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / spread**2).reshape(-1, 1)
    return subject * rng.normal(size=channels) + 0.2 * rng.normal(size=(SIDE * SIDE, channels))


KINDS = {
    "subjects": lambda rng, n, k: subjects(rng, k),
    "noise": lambda rng, n, k: rng.normal(size=(n, k)),
    "whole numbers": lambda rng, n, k: rng.integers(0, 3, (n, k)),
    "one digit": lambda rng, n, k: rng.normal(size=(n, k)).round(1),
    "repeated tokens": lambda rng, n, k: np.repeat(rng.normal(size=(n // 4 + 1, k)), 4, 0),
    "outliers": lambda rng, n, k: rng.standard_cauchy((n, k)),
    "half precision": lambda rng, n, k: subjects(rng, k).astype(np.float16),
    "a mirror": lambda rng, n, k: np.concatenate([m := rng.normal(size=(n, k)), -m]),
}


def expected(values, seed):
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KMeans(2, n_init=10, random_state=seed).fit_predict(values)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_those_of_scikit_learn(kind):
    rng = np.random.default_rng(sorted(KINDS).index(kind))
    sure = 0
    for _ in range(8):
        values = normalise(KINDS[kind](rng, int(rng.integers(2, 150)), int(rng.integers(1, 14))))
        seed = int(rng.integers(2**32))
        found = two_means(values, seed)
        theirs = expected(values, seed)
        if found is not None:
            sure += 1
            assert np.array_equal(found, theirs)
        in_order = cluster(values, seed=seed)
        assert np.array_equal(in_order, theirs) or np.array_equal(in_order, 1 - theirs)
    assert sure >= {"subjects": 8, "half precision": 8, "noise": 5}.get(kind, 0)


def test_what_rounding_may_decide_is_not_sure(monkeypatch):
    """A token in the middle of two: scikit-learn's rounding puts it somewhere."""
    values = np.array([[0.0], [0.5], [1.0]])
    assert two_means(values, 0) is None
    assert two_means(np.zeros((5, 3)), 0) is None
    rng = np.random.default_rng(29)
    mirror = normalise(KINDS["a mirror"](rng, int(rng.integers(3, 40)), int(rng.integers(1, 6))))
    assert two_means(mirror, 29) is None
    monkeypatch.setattr(module, "UNSURE", 0.0)
    assert not np.array_equal(two_means(mirror, 29), expected(mirror, 29))
