"""The Qwen-Image toy before training: a genuine ``QwenImagePipeline`` with a small Qwen2.5-VL that sees no images."""

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
from dit_lens.toys.tokens import tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLE = "Qwen-Image"
WIDTH = 128
HEAD = 32
LAYERS = 7
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
TEXT_TOKENS = 24  # ten words of a caption, five tokens that close the chat, room for longer ones
TEMPLATE_TOKENS = 34  # the pipeline drops so many, so every word and comma of its template has to be one token
MARKS = {"pad_token": "<|endoftext|>", "unk_token": "<unk>", "eos_token": "<|im_end|>", "start": "<|im_start|>"}
TEMPLATE = (
    "system describe the image by detailing the color , shape , size , texture , quantity , text , spatial "
    "relationships of the objects and background : user assistant"
)
WORDS = tuple(dict.fromkeys(["\n", *TEMPLATE.split(), *VOCABULARY]))
FIRST_WORD = 0
SHIFT = 3.0
# Its autoencoder pads an image to a film of three frames, and so takes three times as long.
SHARES = {"text": 0.02, "autoencoder": 0.14, "transformer": 0.84}

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
    """An untrained Qwen-Image toy: 7 blocks of two streams, 16 x 16 image tokens of 64 x 64 pixels."""
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
                        "vocab_size": len(MARKS) + len(WORDS),
                        "hidden_size": TEXT_WIDTH,
                        "intermediate_size": 2 * TEXT_WIDTH,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "num_key_value_heads": 2,
                        "max_position_embeddings": TEMPLATE_TOKENS + TEXT_TOKENS,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                        "pad_token_id": list(MARKS).index("pad_token"),
                        "eos_token_id": list(MARKS).index("eos_token"),
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
            tokenizer=tokenizer(MARKS, WORDS, TEMPLATE_TOKENS + TEXT_TOKENS),
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
    """The text encoders, by the names they have in checkpoints."""
    return {"qwen": pipe.text_encoder}


def encode(pipe: QwenImagePipeline, captions: list[str]) -> dict[str, Tensor]:
    """The conditioning of a batch of captions, as the transformer's own keyword arguments."""
    embeds, mask = pipe.encode_prompt(captions, max_sequence_length=TEXT_TOKENS)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def features(text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Every word, and the caption's last one: a causal model has seen the whole caption only there."""
    words = text["encoder_hidden_states"]
    return words, words[:, FIRST_WORD + 9]


def posterior(pipe: QwenImagePipeline, images: Tensor) -> DiagonalGaussianDistribution:
    """What the autoencoder of films makes of images, films of one frame."""
    return DiagonalGaussianDistribution(pipe.vae.encode(images[:, :, None]).latent_dist.parameters[:, :, 0])


def decode(pipe: QwenImagePipeline, latents: Tensor) -> Tensor:
    """Images of samples of the posterior, not clipped as ``vae.decode`` does: what is clipped cannot be learned."""
    return pipe.vae.decoder(pipe.vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


def normalise(pipe: QwenImagePipeline, modes: Tensor) -> None:
    """Sets mean and spread of every channel."""
    spread, mean = torch.std_mean(modes, dim=(0, 2, 3))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=spread.tolist())


def to_latents(pipe: QwenImagePipeline, images: Tensor) -> Tensor:
    """The mode of the posterior [b, c, 2h, 2w], in the units the transformer sees."""
    mean, spread = (images.new_tensor(pipe.vae.config[f"latents_{of}"])[:, None, None] for of in ("mean", "std"))
    return (posterior(pipe, images).mode() - mean) / spread


def velocity(pipe: QwenImagePipeline, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The predicted velocity [b, c, 2h, 2w] of noisy latents at ``sigma`` [b] in [0, 1]."""
    b, c, h, w = latents.shape
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(latents, b, c, h, w),
        timestep=sigma,
        img_shapes=[[(1, h // 2, w // 2)]] * b,
        return_dict=False,
        **text,
    )[0]
    return pipe._unpack_latents(predicted, h, w, 1)[:, :, 0]
