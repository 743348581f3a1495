"""Tiny random pipelines of models with one tensor for both streams."""

import zlib
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import (
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

from tests.pipelines import tokenizer
from tests.zoo import Entry
from tests.zoo.parts import (
    FEATURES,
    GRID,
    HEADS,
    JOINT,
    PROMPTS,
    SIZE,
    SPLIT,
    TOKENS,
    absent,
    autoencoder,
    flow,
    masks,
    no_text_call,
    pair,
    tiny,
    true_cfg_call,
)

SENTENCES = ["a house by the sea at night", "three birds on one wire at noon"]


@tiny
def ernie():
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        text_in_dim=FEATURES,
        rope_axes_dim=(4, 6, 6),
    )
    return absent(ErnieImagePipeline, transformer=transformer, scheduler=flow())


def ernie_call(rows):
    call = no_text_call(rows)
    return {key: list(value) if torch.is_tensor(value) else value for key, value in call.items()}


@tiny
def krea2():
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=FEATURES,
        num_text_layers=4,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=20,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=2,
        axes_dims_rope=(4, 6, 6),
    )
    return absent(Krea2Pipeline, transformer=transformer, scheduler=flow())


def krea2_call(rows):
    full = {key: value.bool() for key, value in masks("prompt_embeds_mask", rows).items()}
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, TOKENS, 4, FEATURES), **full}


class Words:
    """A tokenizer of the last TOKENS words of a text."""

    model_max_length = TOKENS

    def __call__(self, text: str) -> SimpleNamespace:
        words = text.split()[-TOKENS:]
        return SimpleNamespace(input_ids=[3 + zlib.crc32(word.encode()) % 60 for word in words])


@tiny
def omnigen():
    """Without torchvision the pipeline can be built only with a stand-in for its image transforms."""
    transformer = OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        num_layers=3,
        pad_token_id=0,
        vocab_size=64,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": [1.0] * 10, "long_factor": [1.0] * 10},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    scheduler = flow(invert_sigmas=True, num_train_timesteps=1)
    with (
        mock.patch.object(processor_omnigen, "transforms", create=True),
        mock.patch.object(
            pipeline_omnigen, "OmniGenMultiModalProcessor", processor_omnigen.OmniGenMultiModalProcessor, create=True
        ),
    ):
        parts = {"scheduler": scheduler, "tokenizer": Words(), "vae": autoencoder()}
        return absent(OmniGenPipeline, transformer=transformer, **parts)


def omnigen_call(rows):
    return {**SIZE, "guidance_scale": 3.0, "prompt": SENTENCES[:rows]}


@tiny
def bria_fibo2():
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=FEATURES,
        injection_layer_ids=(0, 2),
        perceiver_num_layers=2,
        min_num_gist_tokens=6,
        max_num_gist_tokens=16,
        gist_step=2,
        gist_min_text_len=8,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 8, 8),
    )
    return absent(BriaFibo2Pipeline, transformer=transformer, scheduler=flow())


def bria_fibo2_call(rows):
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, 3, TOKENS, FEATURES)}


class Letters(torch.nn.Embedding):
    """A text encoder that knows letters only."""

    device = torch.device("cpu")


@tiny
def ideogram4():
    """A second transformer without text makes the unconditional call."""
    settings = {
        "in_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "adaln_dim": 8,
        "llm_features_dim": FEATURES,
        "mrope_section": (4, 2, 2),
    }
    letters = tokenizer("$A")
    letters.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    pipe = absent(
        Ideogram4Pipeline,
        transformer=Ideogram4Transformer2DModel(**settings),
        unconditional_transformer=Ideogram4Transformer2DModel(**settings),
        scheduler=flow(),
        text_encoder=Letters(104, FEATURES),
        tokenizer=letters,
    )
    pipe._get_text_encoder_hidden_states = lambda encoder, tokens, *_: [encoder(tokens)]  # noqa: SLF001
    return pipe


def ideogram4_call(rows):
    call = {"guidance_scale": 3.0, "guidance_schedule": None, "max_sequence_length": TOKENS}
    return {**SIZE, **call, "prompt": PROMPTS[:rows]}


class Processor:
    """As much of a processor as the constructor asks for."""

    tokenizer = SimpleNamespace(encode=lambda text: [1])

    def apply_chat_template(self, messages, **options):
        return [[1, 2, 3]]


@tiny
def qwen21():
    transformer = QwenImage21Transformer2DModel(
        **HEADS, in_channels=16, out_channels=16, num_layers=3, context_in_dim=FEATURES, axes_dims_rope=(4, 6, 6)
    )
    pipe = absent(QwenImage21Pipeline, transformer=transformer, scheduler=flow(), processor=Processor())
    pipe.latent_channels = 16
    return pipe


ENTRIES = (
    Entry("ernie", "ErnieImageTransformer2DModel", ernie, ernie_call, GRID, JOINT, TOKENS, 3),
    Entry("krea2", "Krea2Transformer2DModel", krea2, krea2_call, GRID, SPLIT, TOKENS, 3),
    Entry("omnigen", "OmniGenTransformer2DModel", omnigen, omnigen_call, GRID, (("cond", "uncond"),), TOKENS + 1, 3),
    Entry("bria_fibo2", "BriaFibo2Transformer2DModel", bria_fibo2, bria_fibo2_call, GRID, SPLIT, 6, 5),
    Entry("ideogram4", "Ideogram4Transformer2DModel", ideogram4, ideogram4_call, GRID, (("cond",),), TOKENS, 3),
    Entry("qwen21", "QwenImage21Transformer2DModel", qwen21, true_cfg_call, GRID, SPLIT, TOKENS, 3),
)
