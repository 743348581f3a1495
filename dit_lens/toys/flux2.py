"""The FLUX.2 toy before training: a real ``Flux2KleinPipeline`` with a small Qwen3 and its chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from dit_lens.toys.scenes import PIXELS, VOCABULARY
from dit_lens.toys.tokens import make_tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from torch import Tensor, nn

TITLE = "FLUX.2 klein"
WIDTH = 128
HEAD = 32
LANGUAGE_WIDTH = 64
OUT_LAYERS = (1, 2, 3)  # klein concatenates three hidden layers of its language model; its own are 9, 18 and 27
TEXT_WIDTH = LANGUAGE_WIDTH * len(OUT_LAYERS)
TEXT_TOKENS = 24  # the ten words of a caption, eight tokens of the chat template, padding
SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "eos_token": "<|im_end|>",
    "start": "<|im_start|>",
}
WORDS = ("user", "assistant", "\n", *VOCABULARY)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_WORD = 3  # after <|im_start|>, "user" and a line break
SHIFT = 3.0

CALL = {
    "height": PIXELS,
    "width": PIXELS,
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_TOKENS,
    "text_encoder_out_layers": list(OUT_LAYERS),
}
NOTES = f"""Its language model is a Qwen3 of three layers that knows the words of the grammar and of its chat template.
Hidden layers {OUT_LAYERS} of it are joined, so calls pass `text_encoder_out_layers` (the toy's file holds it). The
shift of the noise schedule is fixed at {SHIFT:g}; klein's depends on the number of tokens and steps. It is not
distilled: guidance takes a second call with an empty prompt."""


def build(seed: int = 0) -> Flux2KleinPipeline:
    """Builds an untrained FLUX.2 toy: 3 double and 5 single blocks, 16 x 16 image tokens of 64 x 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKLFlux2(
                block_out_channels=(16, 32),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=PIXELS,
                mid_block_add_attention=False,
            ),
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
                    hidden_size=LANGUAGE_WIDTH,
                    intermediate_size=2 * LANGUAGE_WIDTH,
                    num_hidden_layers=max(OUT_LAYERS),
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=16,
                    max_position_embeddings=TEXT_TOKENS,
                    tie_word_embeddings=True,
                    pad_token_id=list(SPECIAL_TOKENS).index("pad_token"),
                    eos_token_id=list(SPECIAL_TOKENS).index("eos_token"),
                )
            ),
            tokenizer=make_tokenizer(SPECIAL_TOKENS, WORDS, TEXT_TOKENS, chat_template=CHAT),
            transformer=Flux2Transformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=3,
                num_single_layers=5,
                attention_head_dim=HEAD,
                num_attention_heads=WIDTH // HEAD,
                joint_attention_dim=TEXT_WIDTH,
                guidance_embeds=False,
                axes_dims_rope=(4, 12, 12, 4),
            ),
            is_distilled=False,
        )


def text_encoders(pipe: Flux2KleinPipeline) -> dict[str, nn.Module]:
    """Returns name in checkpoints -> text encoder."""
    return {"qwen": pipe.text_encoder}


def encode(pipe: Flux2KleinPipeline, captions: list[str]) -> dict[str, Tensor]:
    """Encodes a batch of captions as keyword arguments of the transformer."""
    embeds, text_ids = pipe.encode_prompt(captions, max_sequence_length=TEXT_TOKENS, text_encoder_out_layers=OUT_LAYERS)
    return {"encoder_hidden_states": embeds, "txt_ids": text_ids}


def features(text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the features of every word, and of the last one, where a causal model has seen the whole caption."""
    words = text["encoder_hidden_states"]
    return words, words[:, FIRST_WORD + 9]


def posterior(pipe: Flux2KleinPipeline, images: Tensor) -> DiagonalGaussianDistribution:
    """Returns the posterior of the autoencoder, from which latents are sampled."""
    return pipe.vae.encode(images).latent_dist


def decode(pipe: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    """Decodes samples of the posterior to images [b, 3, y, x] in [-1, 1]."""
    return pipe.vae.decode(latents).sample


def set_normalisation(pipe: Flux2KleinPipeline, modes: Tensor) -> None:
    """Sets the running statistics with which klein normalises every channel of a 2 x 2 patch."""
    variance, mean = torch.var_mean(pipe._patchify_latents(modes), dim=(0, 2, 3))
    pipe.vae.bn.running_mean.copy_(mean)
    pipe.vae.bn.running_var.copy_(variance - pipe.vae.config.batch_norm_eps)


def to_latents(pipe: Flux2KleinPipeline, images: Tensor) -> Tensor:
    """Returns the normalised mode of the posterior as 2 x 2 patches, [b, 4c, h, w]."""
    patches = pipe._patchify_latents(posterior(pipe, images).mode())
    mean, variance = (value[:, None, None] for value in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    return (patches - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()


def velocity(pipe: Flux2KleinPipeline, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """Predicts the velocity [b, 4c, h, w]; see :meth:`dit_lens.toys.kinds.Kind.velocity`."""
    ids = pipe._prepare_latent_ids(latents).to(latents.device)
    predicted = pipe.transformer(
        hidden_states=pipe._pack_latents(latents), timestep=sigma, img_ids=ids, return_dict=False, **text
    )[0]
    return predicted.transpose(1, 2).reshape(latents.shape)
