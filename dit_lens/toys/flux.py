"""The FLUX toy before training: a real ``FluxPipeline``, small enough for a CPU, with its own vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dit_lens.toys.scenes import PIXELS, VOCABULARY
from dit_lens.toys.tokens import make_tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from torch import Tensor, nn

TITLE = "FLUX"
NOTES = ""
WIDTH = 128
HEAD = 32
TEXT_WIDTH = 64
TEXT_TOKENS = 16  # the ten words of a caption, an end token and padding
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}
FIRST_WORD = 0
# sigma' = s sigma / (1 + (s - 1) sigma) puts more steps at high noise (Esser et al., arXiv 2403.03206, eq. 23).
SHIFT = 3.0

CALL = {
    "height": PIXELS,
    "width": PIXELS,
    "num_inference_steps": 12,
    "guidance_scale": 1.0,
    "true_cfg_scale": 3.0,
    "negative_prompt": "",
    "max_sequence_length": TEXT_TOKENS,
}


def build(seed: int = 0) -> FluxPipeline:
    """Builds an untrained FLUX toy: 3 double and 5 single blocks, 16 x 16 image tokens of 64 x 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKL(
                block_out_channels=(16, 32),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=PIXELS,
                mid_block_add_attention=False,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.0,
                scaling_factor=1.0,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(SPECIAL_TOKENS) + len(VOCABULARY),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=2 * TEXT_WIDTH,
                    projection_dim=TEXT_WIDTH,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=TEXT_TOKENS,
                    pad_token_id=list(SPECIAL_TOKENS).index("pad_token"),
                    bos_token_id=list(SPECIAL_TOKENS).index("bos_token"),
                    eos_token_id=list(SPECIAL_TOKENS).index("eos_token"),
                )
            ),
            tokenizer=make_tokenizer(SPECIAL_TOKENS, VOCABULARY, TEXT_TOKENS, template="<s> $A </s>"),
            text_encoder_2=T5EncoderModel(
                T5Config(
                    vocab_size=len(SPECIAL_TOKENS) + len(VOCABULARY),
                    d_model=TEXT_WIDTH,
                    d_kv=16,
                    d_ff=2 * TEXT_WIDTH,
                    num_layers=2,
                    num_heads=4,
                    dropout_rate=0.0,
                    pad_token_id=list(SPECIAL_TOKENS).index("pad_token"),
                    eos_token_id=list(SPECIAL_TOKENS).index("eos_token"),
                )
            ),
            tokenizer_2=make_tokenizer(SPECIAL_TOKENS, VOCABULARY, TEXT_TOKENS, template="$A </s>"),
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=3,
                num_single_layers=5,
                attention_head_dim=HEAD,
                num_attention_heads=WIDTH // HEAD,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=TEXT_WIDTH,
                guidance_embeds=False,
                axes_dims_rope=(8, 12, 12),
            ),
        )


def text_encoders(pipe: FluxPipeline) -> dict[str, nn.Module]:
    """Returns name in checkpoints -> text encoder."""
    return {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2}


def encode(pipe: FluxPipeline, captions: list[str]) -> dict[str, Tensor]:
    """Encodes a batch of captions as keyword arguments of the transformer."""
    embeds, pooled, text_ids = pipe.encode_prompt(captions, captions, max_sequence_length=TEXT_TOKENS)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": text_ids}


def features(text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns T5's features of every word, and CLIP's pooled features of the caption."""
    return text["encoder_hidden_states"], text["pooled_projections"]


def posterior(pipe: FluxPipeline, images: Tensor) -> DiagonalGaussianDistribution:
    """Returns the posterior of the autoencoder, from which latents are sampled."""
    return pipe.vae.encode(images).latent_dist


def decode(pipe: FluxPipeline, latents: Tensor) -> Tensor:
    """Decodes samples of the posterior to images [b, 3, y, x] in [-1, 1]."""
    return pipe.vae.decode(latents).sample


def set_normalisation(pipe: FluxPipeline, modes: Tensor) -> None:
    """Sets the shift and the scale, which all channels share."""
    pipe.vae.register_to_config(shift_factor=float(modes.mean()), scaling_factor=float(1 / modes.std()))


def to_latents(pipe: FluxPipeline, images: Tensor) -> Tensor:
    """Returns the normalised mode of the posterior, [b, c, 2h, 2w]."""
    return (posterior(pipe, images).mode() - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def pack(pipe: FluxPipeline, latents: Tensor) -> Tensor:
    """Converts latents [b, c, 2h, 2w] to the tokens of the transformer, [b, h*w, 4c]."""
    return pipe._pack_latents(latents, *latents.shape)


def velocity(pipe: FluxPipeline, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """Predicts the velocity [b, c, 2h, 2w]; see :meth:`dit_lens.toys.kinds.Kind.velocity`."""
    b, _, h, w = latents.shape
    ids = pipe._prepare_latent_image_ids(b, h // 2, w // 2, latents.device, latents.dtype)
    predicted = pipe.transformer(
        hidden_states=pack(pipe, latents), timestep=sigma, img_ids=ids, return_dict=False, **text
    )[0]
    return pipe._unpack_latents(predicted, h, w, 1)
