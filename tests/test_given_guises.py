"""Images, words and numbers in every form in which they are at hand: each gives what the plain form gives."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit_lens import DiTLens, Read, plots, studies
from dit_lens.arguments.images import to_image
from dit_lens.errors import DitLensError
from dit_lens.instruments.inversion import invert, noised_reference
from tests import pipelines

CALL = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def image(pixels):
    return Image.fromarray(pixels)


def save(image, folder):
    image.save(folder / "image.png")
    return folder / "image.png"


GUISES = {
    "PIL": lambda image, _: image,
    "list": lambda image, _: [image],
    "generator": lambda image, _: (one for one in [image]),
    "numpy": lambda image, _: [np.asarray(image)],
    "one array": lambda image, _: np.asarray(image),
    "a batch, as output_type='np'": lambda image, _: np.asarray(image, np.float32)[None] / 255,
    "a batch, as output_type='pt'": lambda image, _: torch.tensor(np.asarray(image) / 255).permute(2, 0, 1)[None],
    "bfloat16": lambda image, _: (
        torch.tensor(np.asarray(image) / 255).permute(2, 0, 1).to(torch.float32).requires_grad_()
    ),
    "a path": save,
    "paths as text": lambda image, folder: [str(save(image, folder))],
}


@pytest.mark.parametrize("guise", GUISES)
def test_an_image_in_any_form(lens, image, tmp_path, guise):
    given = GUISES[guise](image, tmp_path)
    wanted = noised_reference(lens, [image], seed=1, **CALL)
    assert torch.equal(noised_reference(lens, given, seed=1, **CALL), wanted)


@pytest.mark.parametrize("guise", ["PIL", "numpy", "a path"])
def test_an_image_to_invert(lens, image, tmp_path, guise):
    assert torch.equal(invert(lens, GUISES[guise](image, tmp_path), **CALL).noise, invert(lens, [image], **CALL).noise)


def test_images_of_a_study_and_of_figures(lens, pixels, image, tmp_path):
    few = {"k": 2, "draws": 0, "strengths": [1.0], "mask_from": None, "site": "blocks.3.img", "num_inference_steps": 1}
    wanted = studies.transfer_image(lens, [(image, "red")], **few)
    for given in (pixels, save(image, tmp_path)):
        found = studies.transfer_image(lens, [(given, "red")], **few)
        assert found.table.equals(wanted.table)
        assert found.settings == wanted.settings
    mask = np.eye(4, 6, dtype=bool)
    for draw in (
        lambda one: plots.strip([one, one], ["a", "b"]),
        lambda one: plots.sheet([[one]], ["a"], ["b"]),
        lambda one: plots.cluster_overlay(one, mask, truth=np.ones((32, 48), bool)),
        lambda one: plots.overlay_grid(one, {"blocks.0.img": mask}),
    ):
        found = [draw(one).to_dict() for one in (image, pixels, torch.tensor(pixels).permute(2, 0, 1))]
        assert str(found[1]["data"]) == str(found[0]["data"]) == str(found[2]["data"])


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.array([[0.0, 1.0]]), [[0, 255]]),
        (np.array([[[0], [200]]], np.uint8), [[0, 200]]),
        (torch.tensor([[[0.0, 0.5]]]), [[0, 128]]),
        (np.zeros((2, 5, 4), np.uint8), np.zeros((2, 5, 4))),
        (np.array([[1, 2]]), None),  # of int64: no levels of a pixel
        (np.array([[0.0, 1.5]]), None),
        (np.array([[0.0, np.nan]]), None),
        (np.zeros((2, 2, 2)), None),
        (np.zeros((0, 3)), None),
        (torch.zeros(3, 2, 2, device="meta"), None),
        ("no such file.png", None),
        ("\0", None),
        (__file__, None),
        (3, None),
    ],
)
def test_what_is_an_image(value, wanted):
    found = to_image(value)
    assert found is None if wanted is None else (np.asarray(found) == np.asarray(wanted)).all()


def test_what_is_no_image_is_told(lens):
    for odd in ("no such file.png", np.full((32, 48, 3), 300), [object()]):
        with pytest.raises(DitLensError, match=r"images=.* cannot be used\. Give an image: of PIL, a path of one"):
            noised_reference(lens, odd, seed=0, **CALL)


WORDS = [np.array(["cat"]), {"cat"}, frozenset({"cat"}), np.array("cat"), {"cat": 1}.keys(), (one for one in ["cat"])]


@pytest.mark.parametrize("tokens", WORDS, ids=lambda value: type(value).__name__)
def test_words_in_any_list(lens, tokens):
    op = Read("blocks.0.txt", tokens=tokens)
    wanted = lens.run("a cat", Read("blocks.0.txt", tokens=["cat"]), seed=0, **CALL).readings[0]
    found = lens.run("a cat", op, seed=0, **CALL)
    assert found.readings[0].tokens == wanted.tokens
    assert torch.equal(found.readings[0].tensor, wanted.tensor)
    assert torch.equal(lens.run_spec(found.spec).readings[0].tensor, wanted.tensor)


def test_several_words_of_a_set_are_all_meant(lens):
    one = lens.run("a cat, two dogs", Read("blocks.0.txt", tokens={"dogs", "cat"}), seed=0, **CALL).readings[0]
    other = lens.run("a cat, two dogs", Read("blocks.0.txt", tokens=["cat", "dogs"]), seed=0, **CALL).readings[0]
    assert torch.equal(one.tensor, other.tensor)


def test_truth_values_and_mappings(lens):
    recorded = lens.run("red", seed=0, record=np.True_, **CALL)
    again = lens.run("red", Read("blocks.0.img"), seed=0, prefix=recorded, **CALL)
    assert again.images[0].tobytes() == recorded.images[0].tobytes()
    massive = lens.massive_channels("red", 3, seed=0, **CALL)
    wanted = lens.subject_mask("red", massive, seed=0, **CALL)
    assert (lens.subject_mask("red", dict(massive), seed=0, **CALL) == wanted).all()
    assert (lens.subject_mask("red", {s: np.array(c) for s, c in massive.items()}, seed=0, **CALL) == wanted).all()
