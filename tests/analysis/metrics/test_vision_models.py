"""Judges and masks by models of transformers: tiny random ones of the same classes, loaded as real ones are."""

import json
import string

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dit_lens.analysis import metrics
from dit_lens.commands.study_inputs import find_judge, find_masks
from dit_lens.errors import OpError, StoreError

TEMPLATE = "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"  # noqa: E501


def picture(seed, size=(40, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# Does an image show its prompt?


def words(*extra):
    """A tokenizer of one token a letter, and of some words."""
    marks = ["<pad>", "<unk>", "<image>", *extra, *string.printable]
    letters = Tokenizer(models.WordLevel({mark: i for i, mark in enumerate(marks)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.add_tokens(list(extra))
    return made


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=32, patch_size=16),
        text_config=LlamaConfig(**size, vocab_size=140, num_key_value_heads=2),
        image_token_index=2,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images,
        words("Yes", "yes", "No", "no"),
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    path = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_the_fidelity_is_of_yes_against_no_in_the_models_own_answer(llava):
    judge, image = metrics.vqa_judge(llava), picture(0)
    model, processor = AutoModelForImageTextToText.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    text = 'USER: <image>Does this figure show "a red cat"? Please answer yes or no. ASSISTANT:'
    with torch.no_grad():
        chances = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1].softmax(-1)
    known = processor.tokenizer.get_vocab()
    yes, no = (sum(float(chances[known[word]]) for word in pair) for pair in (("yes", "Yes"), ("no", "No")))
    found = judge(image, "a red cat")
    assert found == {"fidelity": pytest.approx(yes / (yes + no)), "vqascore": pytest.approx(yes)}
    assert found != judge(image, "a dog")
    assert found != judge(picture(1), "a red cat")
    assert find_judge(f"vqa:{llava}", "cpu")(image, "a red cat") == found


def test_it_asks_in_half_precision(llava):
    judge = metrics.vqa_judge(llava)
    whole = judge(picture(0), "a cat")["fidelity"]
    judge.model.to(torch.bfloat16)
    assert judge(picture(0), "a cat")["fidelity"] == pytest.approx(whole, abs=0.02)


def test_a_model_that_cannot_be_asked_is_refused(llava, tmp_path):
    judge = metrics.vqa_judge(llava)
    with pytest.raises(OpError, match="needs its processor"):
        metrics.vqa_judge(judge.model)
    with pytest.raises(StoreError, match="could not be loaded as an image-text-to-text model with its processor"):
        metrics.vqa_judge(tmp_path)
    processor = AutoProcessor.from_pretrained(llava)
    processor.tokenizer = words("Yes")
    with pytest.raises(OpError, match="no token for 'yes' or for 'no'"):
        metrics.vqa_judge(judge.model, processor)
    processor.chat_template = None
    with pytest.raises(OpError, match="has no chat template"):
        metrics.vqa_judge(judge.model, processor)


# How alike are two images?


def test_the_distance_of_dino_is_between_class_tokens(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    images = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images.save_pretrained(tmp_path)
    distance, (a, b) = metrics.dino_distance(tmp_path), (picture(0), picture(1))
    with torch.no_grad():
        seen = model(**images(images=[a, b], return_tensors="pt")).last_hidden_state[:, 0]
    expected = 1 - (seen[0] @ seen[1] / seen[0].norm() / seen[1].norm()).item()
    assert distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert distance(a, b) > 1e-4
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert list(metrics.distances([distance])) == ["dino_distance"]
    with pytest.raises(StoreError, match="could not be loaded as a DINO model"):
        metrics.dino_distance(tmp_path / "nowhere")


# Where is the subject?

CONFIG = """
from transformers import PretrainedConfig

class BiRefNetConfig(PretrainedConfig):
    model_type = "SegformerForSemanticSegmentation"
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from .BiRefNet_config import BiRefNetConfig

class BiRefNet(PreTrainedModel):
    config_class = BiRefNetConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Conv2d(3, 1, 1)
        self.post_init()

    def forward(self, x):
        fine = self.layer(x)
        return [torch.nn.functional.avg_pool2d(fine, 4), fine]
"""
SIDE = 32


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Where code of models is copied to; Python remembers the first such place."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def birefnet(tmp_path, modules, monkeypatch):
    """A folder as BiRefNet is published: weights, and the code of its class; looks at images of 32 pixels."""
    from safetensors.torch import save_file

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("dit_lens.analysis.metrics.vision.SIDE", SIDE)
    folder = tmp_path / tmp_path.name  # by whose name its code is remembered
    folder.mkdir()
    places = {"AutoConfig": "BiRefNet_config.BiRefNetConfig", "AutoModelForImageSegmentation": "birefnet.BiRefNet"}
    (folder / "config.json").write_text(json.dumps({"architectures": ["BiRefNet"], "auto_map": places}))
    (folder / "BiRefNet_config.py").write_text(CONFIG)
    (folder / "birefnet.py").write_text(MODEL)
    weights = {"layer.weight": torch.tensor([5.0, 0.0, 0.0]).reshape(1, 3, 1, 1), "layer.bias": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_masks_of_birefnet_are_its_last_map_at_the_size_of_the_image(birefnet):
    """This one takes for the subject what is redder than the mean of ImageNet."""
    masks = metrics.birefnet_masks(birefnet, trust_remote_code=True)
    image = Image.new("RGB", (96, 64), (0, 200, 200))
    image.paste((255, 0, 0), (48, 0, 96, 32))
    mask = masks(image, "a red square")
    expected = np.zeros((64, 96), bool)
    expected[:32, 48:] = True
    assert mask.shape == (64, 96)
    assert (mask == expected).mean() > 0.98  # but for the seam of two scalings
    assert find_masks(f"birefnet:{birefnet}", ["x"], "cpu", trust_remote_code=True)(image, "").tolist() == mask.tolist()


def test_code_that_comes_with_weights_runs_only_where_it_is_trusted(birefnet):
    with pytest.raises(OpError, match=r"comes with code of its own.*pass trust_remote_code=True"):
        metrics.birefnet_masks(birefnet)
    (birefnet / "birefnet.py").write_text("import timm_that_is_not_there\n" + MODEL)
    with pytest.raises(StoreError, match=r"could not be loaded as BiRefNet: .*timm_that_is_not_there"):
        metrics.birefnet_masks(birefnet, trust_remote_code=True)


@pytest.mark.parametrize(("line", "problem"), [("pass", "AttributeError"), ("self.layer.bias.item()", "RuntimeError")])
def test_code_of_another_release_is_told(birefnet, line, problem):
    """transformers 5 makes models without memory first, and asks them for what older code has not."""
    (birefnet / "birefnet.py").write_text(MODEL.replace("self.post_init()", line))
    with pytest.raises(StoreError, match=rf"loaded as BiRefNet: {problem}: .* of one release of transformers"):
        metrics.birefnet_masks(birefnet, trust_remote_code=True)
