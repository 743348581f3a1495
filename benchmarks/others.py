"""Random transformers of other families, as large as the models that people use, or tiny for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from benchmarks.models import building

FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class Other:
    """A family, as it is drawn here: embeddings in, latents out, no guidance.

    name: the model whose size it has.
    pipeline, transformer: names of the classes.
    large, tiny: arguments of the transformer.
    texts: argument -> shape of its embeddings, from the arguments of the transformer and the number of words.
    sides: pixels of a side of the picture, large and tiny.
    words: text tokens, large and tiny.
    scheduler: class of the scheduler.
    empty: parts of the pipeline that are left out.
    extra: other arguments of the call.
    """

    name: str
    pipeline: str
    transformer: str
    large: dict[str, Any]
    tiny: dict[str, Any]
    texts: Callable[[dict[str, Any], int], dict[str, tuple[int, ...]]]
    sides: tuple[int, int]
    words: tuple[int, int]
    empty: tuple[str, ...]
    scheduler: Any = FLOW
    extra: dict[str, Any] | None = None

    def make(self, *, tiny: bool, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """A pipeline, and the arguments of a call of one prompt."""
        config = self.tiny if tiny else self.large
        with building(device, dtype):
            transformer = getattr(diffusers, self.transformer)(**config)
        transformer = transformer.to(device, dtype).eval().requires_grad_(False)
        parts = {"transformer": transformer, "scheduler": self.scheduler(), **dict.fromkeys(self.empty)}
        pipe = getattr(diffusers, self.pipeline)(**parts)
        pipe.set_progress_bar_config(disable=True)
        words, side = self.words[tiny], self.sides[tiny]
        seeded = torch.Generator().manual_seed(1)
        call = {
            name: torch.ones(shape, dtype=torch.long, device=device)
            if name.endswith("mask")
            else torch.randn(shape, generator=seeded).to(device, dtype)
            for name, shape in self.texts(config, words).items()
        }
        return pipe, {**call, "height": side, "width": side, "output_type": "latent", **(self.extra or {})}


SD3 = Other(
    "SD3.5-large",
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    {
        "num_layers": 38,
        "num_attention_heads": 38,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "in_channels": 16,
        "out_channels": 16,
        "sample_size": 128,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "in_channels": 16,
        "out_channels": 16,
        "sample_size": 8,
        "pos_embed_max_size": 16,
    },
    lambda config, words: {
        "prompt_embeds": (1, words, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (1, config["pooled_projection_dim"]),
    },
    sides=(1024, 64),
    words=(333, 8),
    empty=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    extra={"guidance_scale": 1.0},
)

QWEN = Other(
    "Qwen-Image",
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    {
        "num_layers": 60,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 3584,
        "in_channels": 64,
        "out_channels": 16,
        "axes_dims_rope": (16, 56, 56),
    },
    {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "in_channels": 64,
        "out_channels": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    lambda config, words: {
        "prompt_embeds": (1, words, config["joint_attention_dim"]),
        "prompt_embeds_mask": (1, words),
    },
    sides=(1024, 64),
    words=(64, 8),
    empty=("vae", "text_encoder", "tokenizer"),
)

SANA = Other(
    "SANA-1.6B",
    "SanaPipeline",
    "SanaTransformer2DModel",
    {
        "num_layers": 20,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "in_channels": 32,
        "out_channels": 32,
        "sample_size": 32,
        "patch_size": 1,
    },
    {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "in_channels": 32,
        "out_channels": 32,
        "sample_size": 4,
        "patch_size": 1,
    },
    lambda config, words: {
        "prompt_embeds": (1, words, config["caption_channels"]),
        "prompt_attention_mask": (1, words),
    },
    sides=(1024, 128),
    words=(300, 8),
    empty=("vae", "text_encoder", "tokenizer"),
    extra={"guidance_scale": 1.0, "use_resolution_binning": False},
)

OTHERS = (SD3, QWEN, SANA)
