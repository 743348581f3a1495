"""FLUX transformers of random weights, which cost what trained ones cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel


@dataclass(frozen=True)
class Size:
    """A size of FLUX.

    double, single: number of blocks of either kind.
    heads: attention heads, each 128 wide unless head says otherwise.
    head: width of a head.
    side: pixels of a side of the picture; a token is 16 of them.
    words: text tokens.
    joint: width of the text embeddings.
    """

    double: int
    single: int
    heads: int
    side: int
    words: int
    head: int = 128
    joint: int = 256

    @property
    def width(self) -> int:
        """Channels of the hidden state."""
        return self.heads * self.head

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.double + self.single


SIZES = {
    "tiny": Size(1, 2, 2, side=64, words=8, head=32, joint=32),
    "toy": Size(3, 5, 2, side=128, words=32, head=64, joint=64),
    "wide": Size(4, 8, 4, side=256, words=64),
    "flux": Size(19, 38, 24, side=1024, words=512, joint=4096),
}


@contextmanager
def building(device: str, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are made where they will work, in their precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def make_transformer(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """A transformer of random weights, made where it will work."""
    with building(device, dtype):
        made = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            guidance_embeds=True,
            num_layers=size.double,
            num_single_layers=size.single,
            attention_head_dim=size.head,
            num_attention_heads=size.heads,
            joint_attention_dim=size.joint,
            pooled_projection_dim=768,
            axes_dims_rope=(size.head // 8, size.head // 16 * 7, size.head // 16 * 7),
        )
    return made.eval().requires_grad_(False)


def make_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A pipeline around it, with neither encoders nor autoencoder: embeddings in, latents out."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_call(
    size: Size, rows: int = 1, steps: int = 4, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The arguments of a call: random embeddings of so many prompts."""
    seeded = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(rows, size.words, size.joint, generator=seeded).to(device, dtype),
        "pooled_prompt_embeds": torch.randn(rows, 768, generator=seeded).to(device, dtype),
        "height": size.side,
        "width": size.side,
        "guidance_scale": 3.5,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
