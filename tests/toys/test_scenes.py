"""Drawn images are recognised as what was drawn; other images are unreadable."""

import numpy as np
import pytest
from PIL import Image

from dit_lens.analysis.clusters import iou
from dit_lens.errors import PromptError
from dit_lens.toys import scenes as module
from dit_lens.toys.scenes import ATTRIBUTES, PIXELS, VALUES, Scene, draw, every_scene, recognise_scene, sample_scenes


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(24, seed=3) + sample_scenes(8, seed=3, held_out=True)


def test_drawings_are_recognised_with_their_mask(scenes):
    for seed, scene in enumerate(scenes):
        drawing = draw(scene, seed)
        found = recognise_scene(drawing.image)
        assert found.scene == scene
        assert found.confidence > 0.85
        assert iou(found.mask, drawing.mask) > 0.8


def test_a_subject_at_another_place_gives_the_mask_of_that_place():
    drawing = draw(Scene("small", "red", "square", "left", "plain", "blue"), seed=1)
    moved = Image.fromarray(np.roll(np.asarray(drawing.image), 5, axis=0))
    assert iou(recognise_scene(moved).mask, np.roll(drawing.mask, 5, axis=0)) > 0.8


def test_a_seed_always_moves_the_subject_in_the_same_way():
    scene = Scene("big", "white", "cross", "top", "dotted", "green")
    one, again, other = (draw(scene, seed) for seed in (4, 4, 5))
    assert one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()
    assert 0 < iou(one.mask, other.mask) < 1


def test_edges_are_anti_aliased():
    pixels = np.asarray(draw(Scene("big", "white", "circle", "center", "plain", "red"), 0).image).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10


@pytest.mark.parametrize("kind", ["noise", "gray", "gradient", "checks"])
def test_other_images_are_unreadable(kind):
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, PIXELS).astype(np.uint8)
    pixels = {
        "noise": rng.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8),
        "gray": np.full((PIXELS, PIXELS, 3), 128, np.uint8),
        "gradient": np.broadcast_to(np.stack([ramp, ramp[::-1], ramp], -1), (PIXELS, PIXELS, 3)).copy(),
        "checks": (np.indices((PIXELS, PIXELS)).sum(0) // 3 % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1),
    }[kind]
    found = recognise_scene(Image.fromarray(pixels))
    assert found.scene is None
    assert not found.mask.any()
    assert str(found).startswith("unreadable")


def test_captions_and_the_grammar():
    found = list(every_scene())
    assert len(found) == len({scene.caption for scene in found}) == 2 * 8 * 4 * 5 * 4 * 7
    assert all(Scene.parse(scene.caption) == scene for scene in found[::97])
    assert [len(VALUES[name]) for name in ATTRIBUTES] == [2, 8, 4, 5, 4, 8]


def test_held_out_combinations_are_never_sampled_for_training():
    trained = {(s.colour, s.shape, s.texture, s.position) for s in sample_scenes(5000, seed=0)}
    kept = {(s.colour, s.shape, s.texture, s.position) for s in sample_scenes(500, seed=0, held_out=True)}
    assert not trained & kept
    assert 0.05 < len(kept) / 640 < 0.15


def test_distinct_scenes_are_those_of_before_without_what_was_drawn_twice():
    for seed in (0, 100):
        drawn = sample_scenes(400, seed, held_out=True)
        found = sample_scenes(120, seed, held_out=True, distinct=True)
        assert found == list(dict.fromkeys(drawn))[:120]
        assert len(set(found)) == 120
        assert sample_scenes(30, seed, held_out=True, distinct=True) == found[:30]
    every = [scene for scene in every_scene() if scene.held_out]
    assert set(sample_scenes(len(every), 0, held_out=True, distinct=True)) == set(every)
    with pytest.raises(PromptError, match=r"held out of training\. Ask for fewer"):
        sample_scenes(len(every) + 1, 0, held_out=True, distinct=True)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a big rad circle left on a plain blue background", r"'rad' is not a valid colour.*Nearest: 'red'"),
        ("a big red circle", r"not a sentence of the grammar.*An example: 'a big red circle left on a checkered blue"),
        ("", "not a sentence"),
    ],
)
def test_captions_that_are_not_in_the_grammar_raise(caption, message):
    with pytest.raises(PromptError, match=message):
        Scene.parse(caption)


def test_old_names_work_and_warn():
    with pytest.warns(FutureWarning, match=r"describe is called dit_lens\.toys\.scenes\.recognise_scene now"):
        assert module.describe is recognise_scene
    with pytest.raises(AttributeError, match="no attribute 'undescribe'"):
        _ = module.undescribe


def test_agreement():
    scene = Scene("big", "red", "circle", "left", "plain", "blue")
    other = Scene("big", "red", "circle", "right", "plain", "green")
    assert [name for name, same in scene.agreement(other).items() if not same] == ["position", "background"]
    assert not any(scene.agreement(None).values())
