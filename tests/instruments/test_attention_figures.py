"""Figures of attention show what was read: numbers of heads by numpy, maps of words by the tokenizer."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dit_lens import DiTLens, plots
from dit_lens.errors import OpError, PromptError, SiteError
from dit_lens.plots.attention import average_neighbours
from tests import pipelines

PROMPTS = ["a cat", "red dog"]


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults={**pipelines.CALL, "num_inference_steps": 2})


@pytest.fixture(scope="module")
def found(lens):
    return lens.read_pattern(PROMPTS, [1, 3], heads=[1, 0], steps=[0, 1], seed=0)


def test_heads_are_measured_by_the_queries_of_the_image(found):
    text, entropy = found.measure("text"), found.measure("entropy")
    for block in (1, 3):
        kept = found[block].numpy()[..., pipelines.LENGTH :, :]  # FLUX has its text first
        np.testing.assert_allclose(text[block], kept[..., : pipelines.LENGTH].sum(-1).mean(-1), rtol=1e-4)
        wanted = stats.entropy(kept, axis=-1).mean(-1) / np.log(kept.shape[-1])
        np.testing.assert_allclose(entropy[block], wanted, rtol=1e-4)
    with pytest.raises(OpError, match="not a valid measure of a head"):
        found.measure("size")


def test_the_sheet_is_of_one_step_and_row(found):
    figure = found.sheet("entropy", step=0, row=1)
    wanted = [found.measure("entropy")[block][0, 1].tolist() for block in (1, 3)]
    assert figure.data[0].z.tolist() == wanted
    assert list(figure.data[0].y) == ["1", "3"]
    assert "heads 1, 0" in figure.layout.title.subtitle.text


def test_the_grid_shows_the_block_that_is_meant(found, monkeypatch):
    given = []
    monkeypatch.setattr(plots, "pattern_figure", lambda patterns, **how: given.append((patterns, how)))
    found.figure(-2, step=0, row=1)
    (patterns, how), *_ = given
    assert list(patterns) == ["head 1", "head 0"]
    assert np.array_equal(patterns["head 0"], found[3][0, 1, 1])
    assert "text before image" in how["subtitle"]
    with pytest.raises(OpError, match="Say which is meant"):
        found.figure()
    with pytest.raises(SiteError, match="block 2 was not read"):
        found.figure(2)
    with pytest.raises(OpError, match="step 5 was not read"):
        found.figure(1, step=5)


def test_maps_are_of_the_tokens_of_the_word(lens, found, monkeypatch):
    given = []
    monkeypatch.setattr(plots, "head_word_figure", lambda image, maps, **_: given.append((image, maps)))
    found.words(["dog", "red"], 3, row=1)
    (image, maps), *_ = given
    assert image.tobytes() == found.run.images[1].tobytes()
    letters = lens.pipe.tokenizer_2.convert_ids_to_tokens(lens.pipe.tokenizer_2(PROMPTS[1]).input_ids)
    first = "".join(letters).index("dog") if all(len(one) == 1 for one in letters[:7]) else letters.index("d", 4)
    kept = found[3][-1, 1].numpy()[:, pipelines.LENGTH :, first : first + 3].sum(-1)
    for i, head in enumerate(("head 1", "head 0")):
        np.testing.assert_allclose(maps[head]["dog"], kept[i].reshape(pipelines.GRID), rtol=1e-4)
    assert list(maps["head 0"]) == ["dog", "red"]
    with pytest.raises(PromptError, match="'bird' is no word of 'red dog'"):
        found.words("bird", 3, row=1)


def test_patterns_of_many_tokens_are_averaged():
    rng = np.random.default_rng(0)
    pattern = rng.dirichlet(np.ones(1000), size=600)
    small = average_neighbours(pattern, 6, 10)
    np.testing.assert_allclose(small, pattern.reshape(6, 100, 10, 100).mean((1, 3)))
    assert average_neighbours(pattern, 7, 256).mean() == pytest.approx(1e-3, rel=0.02)
    figure = plots.pattern_figure({"head 0": pattern})
    assert [label.text for label in figure.layout.annotations] == [f"head 0<br>up to {pattern.max():.2g}"]


def test_blocks_may_differ_in_their_heads():
    z = plots.head_figure({0: [0.1, 0.2, 0.3], 4: [0.5]}).data[0].z
    assert z[0].tolist() == [0.1, 0.2, 0.3]
    assert np.isnan(z[1]).tolist() == [False, True, True]
    with pytest.raises(OpError, match="no heads"):
        plots.head_figure({})
    with pytest.raises(OpError, match="the same words"):
        plots.head_word_figure(Image.new("RGB", (8, 8)), {"a": {"x": np.eye(2)}, "b": {"y": np.eye(2)}})
