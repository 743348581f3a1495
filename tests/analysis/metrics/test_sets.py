"""Distances of sets equal their formulas, on features and embeddings that are computed here."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from dit_lens.analysis import metrics
from dit_lens.errors import OpError, StoreError


class Corners(torch.nn.Module):
    """Three features: means of corners of an image, in grey levels."""

    num_features = 3

    def forward(self, images):
        assert images.dtype == torch.uint8
        images = images.float()
        return torch.stack([images[:, 0, :4, :4], images[:, 1, -4:, :4], images[:, 2, :4, -4:]], 1).mean((2, 3)) / 50


class Embedder:
    """Stands for CLIP: the mean colour."""

    def embed(self, image):
        return torch.from_numpy(np.asarray(image, np.float64).mean((0, 1)))


def pictures(seed, count, bright=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 150, (count, 1, 1, 3)) + rng.integers(0, 50, (count, 8, 10, 3)) + bright
    return [Image.fromarray(one) for one in pixels.astype(np.uint8)]


def features(images):
    return Corners()(torch.from_numpy(np.stack([np.array(one) for one in images])).movedim(-1, 1)).double().numpy()


def test_fid_is_the_distance_of_two_normal_distributions():
    a, b = pictures(0, 70), pictures(1, 50, bright=40)
    x, y = features(a), features(b)
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    found = metrics.set_distances(a, b, ["fid"], features=Corners())
    assert found == {"fid": pytest.approx(expected, rel=1e-3)}
    assert found["fid"] > 0.1


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel():
    a, b = pictures(0, 40), pictures(1, 40, bright=20)
    x, y = features(a), features(b)
    kernel = lambda one, other: (one @ other.T / 3 + 1) ** 3  # noqa: E731
    n = len(x)
    inside = sum((kernel(one, one).sum() - np.trace(kernel(one, one))) / (n * (n - 1)) for one in (x, y))
    expected = inside - 2 * kernel(x, y).mean()
    found = metrics.set_distances(a, b, ["kid"], features=Corners())["kid"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert abs(metrics.set_distances(a, pictures(2, 40), ["kid"], features=Corners())["kid"]) < found / 4


def test_kid_of_subsets_is_the_same_every_time_and_leaves_random_numbers_alone(monkeypatch):
    a, b = pictures(0, 12), pictures(1, 9)
    torch.manual_seed(3)
    state, seeded = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    found = [metrics.set_distances(a, b, ["kid"], features=Corners()) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


def test_cmmd_is_a_thousand_times_the_mmd_of_a_gaussian_kernel():
    a, b = pictures(0, 7), pictures(1, 5, bright=40)
    x, y = (np.stack([np.asarray(one, float).mean((0, 1)) for one in some]) for some in (a, b))
    x, y = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, y))
    kernel = lambda one, other: np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in other] for p in one])  # noqa: E731
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert metrics.set_distances(a, b, ["cmmd"], clip=Embedder()) == {"cmmd": pytest.approx(expected)}
    assert metrics.set_distances(a, a, ["cmmd"], clip=Embedder())["cmmd"] == pytest.approx(0, abs=1e-9)


def test_folders_are_sets_too(tmp_path):
    a, b = pictures(0, 6), pictures(1, 6)
    for name, some in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        for i, one in enumerate(some):
            one.save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    choice = {"features": Corners(), "clip": Embedder()}
    assert metrics.set_distances(tmp_path / "a", str(tmp_path / "b"), **choice) == metrics.set_distances(a, b, **choice)
    (tmp_path / "c").mkdir()
    with pytest.raises(StoreError, match=r"/c' has no images"):
        metrics.set_distances(tmp_path / "a", tmp_path / "c", ["fid"], features=Corners())


@pytest.mark.parametrize(
    ("a", "measures", "message"),
    [
        (pictures(0, 3), ["fdi"], "'fdi' is not a valid measure. Nearest: 'fid'"),
        (pictures(0, 1), ["fid"], "the set a is 1 image, and"),
        ([*pictures(0, 2), Image.new("RGB", (5, 5))], ["fid"], "these have 5 x 5, 10 x 8"),
        (pictures(0, 3), ["cmmd"], "Pass clip="),
    ],
)
def test_sets_that_cannot_be_compared_are_told(a, measures, message):
    with pytest.raises(OpError, match=message):
        metrics.set_distances(a, pictures(1, 3), measures, features=Corners())


def test_what_inception_needs_is_said(monkeypatch):
    a = pictures(0, 3)
    with pytest.raises(OpError, match=r"torch-fidelity.*weights-inception-2015-12-05-6cffb8a4\.pth"):
        metrics.set_distances(a, a, ["fid"])  # it is not installed here

    def offline(**options):
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", offline)
    with pytest.raises(StoreError, match=r"no network\. Put weights-inception.* into .*checkpoints"):
        metrics.set_distances(a, a, ["fid"])
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(OpError, match=r"kid is computed by torchmetrics.*dit-lens\[perceptual\]"):
        metrics.set_distances(a, a, ["kid"], features=Corners())
