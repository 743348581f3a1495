"""The Qwen-Image toy before training: a real ``QwenImagePipeline`` with a small Qwen2.5-VL, used for text only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dit_lens.toys.scenes import PIXELS, VOCABULARY
from dit_lens.toys.tokens import make_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLE = "Qwen-Image"
WIDTH = 128
HEAD = 32
LAYERS = 7
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
TEXT_TOKENS = 24  # the ten words of a caption, five tokens at the end of the template, and a reserve
TEMPLATE_TOKENS = 34  # removed by the pipeline, so every word and comma of its template must be one token
SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "eos_token": "<|im_end|>",
    "start": "<|im_start|>",
}
TEMPLATE = (
    "system describe the image by detailing the color , shape , size , texture , quantity , text , spatial "
    "relationships of the objects and background : user assistant"
)
WORDS = tuple(dict.fromkeys(["\n", *TEMPLATE.split(), *VOCABULARY]))
FIRST_WORD = 0
SHIFT = 3.0
# Its autoencoder pads an image to a video of three frames, so it takes three times as long.

CALL = {
    "height": PIXELS,
    "width": PIXELS,
    "num_inference_steps": 12,
    "true_cfg_scale": 3.0,
    "negative_prompt": "",
    "max_sequence_length": TEXT_TOKENS,
}
NOTES = f"""Its language model is a Qwen2.5-VL of two layers that knows the words of the grammar and of the pipeline's
template, each as one token; its vision tower is the smallest there can be and untrained. The shift of the noise
schedule is fixed at {SHIFT:g}."""


def build(seed: int = 0) -> QwenImagePipeline:
    """Builds an untrained Qwen-Image toy: 7 blocks of two streams, 16 x 16 image tokens of 64 x 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKLQwenImage(
                base_dim=16,
                z_dim=LATENT_CHANNELS,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.0] * LATENT_CHANNELS,
                latents_std=[1.0] * LATENT_CHANNELS,
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config={
                        "vocab_size": len(SPECIAL_TOKENS) + len(WORDS),
                        "hidden_size": TEXT_WIDTH,
                        "intermediate_size": 2 * TEXT_WIDTH,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "num_key_value_heads": 2,
                        "max_position_embeddings": TEMPLATE_TOKENS + TEXT_TOKENS,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                        "pad_token_id": list(SPECIAL_TOKENS).index("pad_token"),
                        "eos_token_id": list(SPECIAL_TOKENS).index("eos_token"),
                        "bos_token_id": None,
                    },
                    vision_config={
                        "depth": 1,
                        "hidden_size": 16,
                        "intermediate_size": 16,
                        "num_heads": 1,
                        "out_hidden_size": TEXT_WIDTH,
                        "fullatt_block_indexes": [0],
                    },
                    tie_word_embeddings=True,
                )
            ),
            tokenizer=make_tokenizer(SPECIAL_TOKENS, WORDS, TEMPLATE_TOKENS + TEXT_TOKENS),
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=LAYERS,
                attention_head_dim=HEAD,
                num_attention_heads=WIDTH // HEAD,
                joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=(8, 12, 12),
            ),
        )


def text_encoders(pipe: QwenImagePipeline) -> dict[str, nn.Module]:
    """Returns name in checkpoints -> text encoder."""
    return {"qwen": pipe.text_encoder}


def encode(pipe: QwenImagePipeline, captions: list[str]) -> dict[str, Tensor]:
    """Encodes a batch of captions as keyword arguments of the transformer."""
    embeds, mask = pipe.encode_prompt(captions, max_sequence_length=TEXT_TOKENS)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def features(text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the features of every word, and of the last one, where a causal model has seen the whole caption."""
    words = text["encoder_hidden_states"]
    return words, words[:, FIRST_WORD + 9]


def posterior(pipe: QwenImagePipeline, images: Tensor) -> DiagonalGaussianDistribution:
    """Returns the posterior of the video autoencoder for images, which are videos of one frame."""
    return DiagonalGaussianDistribution(pipe.vae.encode(images[:, :, None]).latent_dist.parameters[:, :, 0])


def decode(pipe: QwenImagePipeline, latents: Tensor) -> Tensor:
    """Decodes samples of the posterior without the clipping of ``vae.decode``, through which no gradient flows."""
    return pipe.vae.decoder(pipe.vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


def set_normalisation(pipe: QwenImagePipeline, modes: Tensor) -> None:
    """Sets the mean and standard deviation of every channel."""
    std, mean = torch.std_mean(modes, dim=(0, 2, 3))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def to_latents(pipe: QwenImagePipeline, images: Tensor) -> Tensor:
    """Returns the normalised mode of the posterior, [b, c, 2h, 2w]."""
    mean, std = (images.new_tensor(pipe.vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    return (posterior(pipe, images).mode() - mean) / std


def velocity(pipe: QwenImagePipeline, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """Predicts the velocity [b, c, 2h, 2w]; see :meth:`dit_lens.toys.kinds.Kind.velocity`."""
    b, c, h, w = latents.shape
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(latents, b, c, h, w),
        timestep=sigma,
        img_shapes=[[(1, h // 2, w // 2)]] * b,
        return_dict=False,
        **text,
    )[0]
    return pipe._unpack_latents(predicted, h, w, 1)[:, :, 0]
