"""The strongest images of features, against activations that are computed one by one."""

import pytest
import torch

from dit_lens import DiTLens, Read, dictionaries
from dit_lens.errors import OpError, PromptError
from tests import pipelines
from tests.dictionaries import saelens

PROMPTS = ["red", "blue", "a fox"]
SITE = "blocks.1.img"


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=pipelines.CALL)


def test_they_are_the_strongest(lens, tmp_path):
    encode, _ = saelens(tmp_path, pipelines.WIDTH)
    sae = dictionaries.load(tmp_path)
    never = dictionaries.Dictionary(sae.encoder, sae.encoder_bias.clone(), sae.decoder, sae.decoder_bias)
    never.encoder_bias[9] = -1e4
    found = lens.top_images(never, PROMPTS, SITE, features=[4, 9], k=2, seeds=[1, 2], batch_size=2)
    runs = {(p, s): lens.run(p, Read(SITE, steps=-1), seed=s) for p in PROMPTS for s in (1, 2)}
    heats = {key: encode(run[SITE][0, 0])[:, 4].reshape(pipelines.GRID) for key, run in runs.items()}
    strongest = sorted(heats, key=lambda key: -float(heats[key].max()))[:2]
    assert [(one.prompt, one.seed) for one in found[4]] == strongest
    for one, key in zip(found[4], strongest, strict=True):
        torch.testing.assert_close(torch.from_numpy(one.heat), heats[key], rtol=1e-3, atol=1e-4)
        assert one.value == pytest.approx(float(heats[key].max()), rel=1e-3)
        assert one.heat[one.place] == pytest.approx(one.value)
        assert one.step == pipelines.STEPS - 1
        assert one.active == pytest.approx(float((heats[key] > 0).float().mean()), abs=0.02)
    assert (found[9], found.images) == ([], 6)
    assert list(found.table["feature"]) == [4, 4]
    figure = found.figure()
    assert "n = 6 images" in figure.layout.title.subtitle.text
    assert len(figure.data) == 2
    with pytest.raises(OpError, match="none of these features was active"):
        found.figure([9])
    with pytest.raises(OpError, match="there is no feature 5 here"):
        found.figure(5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"prompts": []}, PromptError, "at least one prompt"),
        ({"seeds": []}, PromptError, "at least one seed"),
        ({"seeds": [1, 0, 1]}, PromptError, r"seeds=\[1, 0, 1\] names a seed twice, 1"),
        ({"prompts": ["red", "blue", "red"]}, PromptError, "names a prompt twice, 'red'"),
        ({"site": "blocks.1.txt"}, OpError, "one site of image tokens"),
        ({"site": "blocks.*.img"}, OpError, "one site of image tokens"),
        ({"features": 48}, OpError, "feature 48 does not exist"),
        ({"k": 0}, OpError, "k=0"),
    ],
)
def test_what_does_not_fit_is_told(lens, tmp_path, given, error, message):
    saelens(tmp_path, pipelines.WIDTH)
    right = {"prompts": PROMPTS, "site": SITE, "features": 4, "dictionary": dictionaries.load(tmp_path)}
    with pytest.raises(error, match=message):
        lens.top_images(**{**right, **given})
