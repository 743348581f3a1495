"""The Sana toy before training: a real ``SanaPipeline`` with a small Gemma2 and linear attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import Gemma2Config, Gemma2Model

from dit_lens.toys.scenes import PIXELS, VOCABULARY
from dit_lens.toys.tokens import make_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLE = "Sana"
WIDTH = 128
HEAD = 32
LAYERS = 8
LATENT_CHANNELS = 16
NOISE = 0.05  # standard deviation of noise on the latents in training: its autoencoder has no posterior of its own
TEXT_WIDTH = 64
TEXT_TOKENS = 16  # <bos>, the ten words of a caption, and masked padding
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
FIRST_WORD = 1
SHIFT = 3.0

CALL = {
    "height": PIXELS,
    "width": PIXELS,
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "negative_prompt": "",
    "max_sequence_length": TEXT_TOKENS,
    "use_resolution_binning": False,
    "complex_human_instruction": None,
}
NOTES = """Its language model is a Gemma2 of two layers that knows the words of the grammar, so calls pass
`complex_human_instruction=None` (the toy's file holds it). Its autoencoder has no posterior: in training, noise of a
fixed size is added to the latents. Patches are given sine and cosine positions, as in Sana's 2K and 4K models, and
queries and keys are normalised, as in Sana 1.5."""


def build(seed: int = 0) -> SanaPipeline:
    """Builds an untrained Sana toy: 8 blocks with cross-attention, 16 x 16 image tokens of 64 x 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SanaPipeline(
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, final_sigmas_type="zero"
            ),
            vae=AutoencoderDC(
                latent_channels=LATENT_CHANNELS,
                attention_head_dim=16,
                encoder_block_out_channels=(16, 32, 64),
                decoder_block_out_channels=(16, 32, 64),
                encoder_layers_per_block=(1, 1, 1),
                decoder_layers_per_block=(1, 1, 1),
                encoder_qkv_multiscales=((), (), ()),
                decoder_qkv_multiscales=((), (), ()),
            ),
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=len(SPECIAL_TOKENS) + len(VOCABULARY),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=2 * TEXT_WIDTH,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=16,
                    query_pre_attn_scalar=16,
                    max_position_embeddings=TEXT_TOKENS,
                    attn_logit_softcapping=None,
                    pad_token_id=list(SPECIAL_TOKENS).index("pad_token"),
                    eos_token_id=list(SPECIAL_TOKENS).index("eos_token"),
                    bos_token_id=list(SPECIAL_TOKENS).index("bos_token"),
                )
            ),
            tokenizer=make_tokenizer(SPECIAL_TOKENS, VOCABULARY, TEXT_TOKENS, template="<bos> $A"),
            transformer=SanaTransformer2DModel(
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=LAYERS,
                attention_head_dim=HEAD,
                num_attention_heads=WIDTH // HEAD,
                cross_attention_head_dim=HEAD,
                num_cross_attention_heads=WIDTH // HEAD,
                cross_attention_dim=WIDTH,
                caption_channels=TEXT_WIDTH,
                sample_size=PIXELS // 4,
                # Adds position embeddings. Without them only the zero padding of convolutions shows positions.
                interpolation_scale=1.0,
                qk_norm="rms_norm_across_heads",
            ),
        )


def text_encoders(pipe: SanaPipeline) -> dict[str, nn.Module]:
    """Returns name in checkpoints -> text encoder."""
    return {"gemma": pipe.text_encoder}


def encode(pipe: SanaPipeline, captions: list[str]) -> dict[str, Tensor]:
    """Encodes a batch of captions as keyword arguments of the transformer."""
    embeds, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def features(text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the features of every word, and of the last one, where a causal model has seen the whole caption."""
    words = text["encoder_hidden_states"]
    return words, words[:, FIRST_WORD + 9]


def posterior(pipe: SanaPipeline, images: Tensor) -> DiagonalGaussianDistribution:
    """Returns a normal distribution around the latents of images, with the standard deviation ``NOISE``."""
    latents = pipe.vae.encode(images).latent
    return DiagonalGaussianDistribution(torch.cat([latents, torch.full_like(latents, 2 * math.log(NOISE))], 1))


def decode(pipe: SanaPipeline, latents: Tensor) -> Tensor:
    """Decodes samples of the posterior to images [b, 3, y, x] in [-1, 1]."""
    return pipe.vae.decode(latents).sample


def set_normalisation(pipe: SanaPipeline, modes: Tensor) -> None:
    """Sets the scale, the only constant of this pipeline, to the inverse root mean square."""
    pipe.vae.register_to_config(scaling_factor=float(modes.square().mean().rsqrt()))


def to_latents(pipe: SanaPipeline, images: Tensor) -> Tensor:
    """Returns the normalised latents, [b, c, h, w]."""
    return posterior(pipe, images).mode() * pipe.vae.config.scaling_factor


def velocity(pipe: SanaPipeline, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """Predicts the velocity [b, c, h, w]; see :meth:`dit_lens.toys.kinds.Kind.velocity`."""
    # Timesteps of Sana go from 0 to 1000.
    timestep = sigma * 1000 * pipe.transformer.config.timestep_scale
    return pipe.transformer(hidden_states=latents, timestep=timestep, return_dict=False, **text)[0]
