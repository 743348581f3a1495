"""SSIM equals its definition, CLIP scores equal those of the model, and a missing package raises with instructions."""

import string
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from dit_lens import DiTLens
from dit_lens.analysis import metrics
from dit_lens.errors import OpError, StoreError
from dit_lens.studies import disruption
from dit_lens.studies.shared.fingerprints import fingerprint_values
from tests import pipelines


def noise(seed, shape=(24, 20, 3)):
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def by_definition(x, y):
    """Wang et al. 2004, with K1 = 0.01, K2 = 0.03, and a Gaussian of 11 pixels."""

    def blurred(z):
        return gaussian_filter(z, 1.5, truncate=3.5, axes=(0, 1), mode="mirror")

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + 0.01**2) * (2 * both + 0.03**2)
    return (top / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))).mean()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([(24, 20, 3), (16, 30)]))
def test_ssim_is_its_definition(seed, share, shape):
    a, b = noise(seed, shape) / 255, noise(seed + 1, shape) / 255
    mixed = (1 - share) * a + share * b
    assert metrics.ssim(a, mixed) == pytest.approx(by_definition(a, mixed), abs=1e-6)
    assert metrics.ssim(a, a) == pytest.approx(1)


def test_ssim_takes_images_and_lists():
    a, b = noise(0), noise(1)
    expected = metrics.ssim(a, b)
    assert metrics.ssim(Image.fromarray(a), Image.fromarray(b)) == expected
    np.testing.assert_array_equal(metrics.ssim([a, a], [b, a]), [expected, metrics.ssim(a, a)])
    with pytest.raises(OpError, match="Resize or convert"):
        metrics.ssim(a, noise(1, (5, 4, 3)))


@pytest.mark.parametrize(("name", "package"), [("ssim", "torchmetrics"), ("lpips", "torchvision")])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, name, package):
    for module in [one for one in sys.modules if one.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"{name} is computed by {package}.*pip install 'dit-lens\[perceptual\]'"
    with pytest.raises(OpError, match=said):
        metrics.DISTANCES[name](noise(0), noise(1))
    with pytest.raises(OpError, match=said):
        metrics.distances(["rmse", name])


def test_distances_are_chosen_by_name_or_function():
    def mine(a, b):
        return np.float32(a.size[0])

    found = metrics.distances(["ssim", mine, "mean_abs"])
    assert list(found) == ["ssim", "mine", "mean_abs"]
    assert found["mean_abs"] is metrics.mean_abs
    assert list(metrics.distances("psnr")) == ["psnr"]
    assert list(metrics.distances(mine)) == ["mine"]
    with pytest.raises(OpError, match=r"'sim' is not a valid distance\. Nearest: 'ssim'"):
        metrics.distances(["sim"])
    with pytest.raises(OpError, match="must be a number, but it returned 'far'"):
        metrics.distances([lambda a, b: "far"])


# CLIP.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random CLIP with its processor, saved as its users save one."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = {mark: i for i, mark in enumerate(["<pad>", "<s>", "</s>", "<unk>", *string.printable])}
    text = {"vocab_size": len(letters), "max_position_embeddings": 12, "pad_token_id": 0, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**size, **text, bos_token_id=1).to_dict(),
        vision_config=CLIPVisionConfig(**size, image_size=32, patch_size=8).to_dict(),
        projection_dim=8,
    )
    words = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return metrics.clip_judge(folder)


@pytest.fixture(scope="module")
def model(folder):
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


@pytest.mark.parametrize("prompt", ["a cat", "a prompt that is longer than this model reads"])
def test_the_score_is_the_cosine_of_the_models_own_embeddings(clip, model, prompt):
    own, processor = model
    image = Image.fromarray(noise(0))
    inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True)
    with torch.no_grad():
        out = own(**inputs)
    assert clip(image, prompt) == {"clip": pytest.approx((out.image_embeds @ out.text_embeds.T).item(), abs=1e-6)}
    assert clip(image, "another") != clip(image, prompt)


def test_the_distance_is_between_embeddings_of_images(clip, model):
    own, processor = model
    a, b = (Image.fromarray(noise(seed)) for seed in (0, 1))
    with torch.no_grad():
        seen = own(**processor(text=["x"], images=[a, b], return_tensors="pt")).image_embeds
    assert clip.distance(a, b) == pytest.approx(1 - (seen[0] @ seen[1]).item(), abs=1e-6)
    assert clip.distance(a, b) > 1e-4
    assert clip.distance(a, a) == pytest.approx(0, abs=1e-6)
    assert list(metrics.distances([clip.distance])) == ["clip_distance"]


def test_a_study_is_judged_by_clip(clip, folder):
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))
    choice = {"judge": clip, "distances": ["ssim", clip.distance], "draws": 1, "confounds": False}
    result = disruption(lens, ["a cat", "red"], k=4, num_inference_steps=1, **choice)
    row = result.table.query("arm == 'top' and prompt == 'red'").iloc[0]
    before, after = result.images["1/0/0/untouched"], result.images["1/0/4/top"]
    assert row["clip"] == clip(after, "red")["clip"]
    assert row["ssim"] == metrics.ssim(before, after)
    assert row["clip_distance"] == clip.distance(before, after)
    assert {"clip", "ssim", "clip_distance", "clip_top_minus"} <= set(result.summary)
    assert result.settings["judge"] == f"Clip({folder})"
    values, unknown = fingerprint_values({"judge": clip, "distance": clip.distance})
    assert not unknown
    with torch.no_grad():
        next(clip.model.parameters()).view(-1)[0] += 1
    assert all(
        one != values[name] for name, one in fingerprint_values({"judge": clip, "distance": clip.distance})[0].items()
    )
    assert "CLIP score" in result.figure().to_json()


def test_what_is_not_a_clip_model_raises(model, tmp_path):
    with pytest.raises(StoreError, match="could not be loaded as a CLIP model with its processor"):
        metrics.clip_judge(tmp_path)
    with pytest.raises(OpError, match="needs its processor"):
        metrics.clip_judge(model[0])
    image = Image.fromarray(noise(0))
    assert metrics.clip_judge(*model)(image, "red") == metrics.clip_judge(*model)(image, "red")


@pytest.mark.parametrize("shape", [(4, 4, 3), (5, 32, 3), (32, 5), (3, 32, 48)], ids=str)
def test_images_that_are_too_small_are_told(shape):
    with pytest.raises(OpError, match=rf"6 x 6 pixels or more; these have {shape[0]} x {shape[1]}"):
        metrics.ssim(np.zeros(shape), np.zeros(shape))
    assert metrics.ssim(np.zeros((6, 6)), np.zeros((6, 6))) == 1
