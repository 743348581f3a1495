"""What the tiny pipelines are made of: sizes, embeddings, schedulers, and calls that several of them take."""

import functools
import inspect
import zlib
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

GRID = (4, 6)
TOKENS = 7  # of the text stream
SECOND = 5  # of a second encoder
FEATURES = 12  # of an embedding
SIZE = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent"}
PROMPTS = ["a house", "3 birds"]
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}

# The branches of one step: those of each forward pass, in the order of its rows.
COND = (("cond",),)
JOINT = (("uncond", "cond"),)
COND_UNCOND = (("cond", "uncond"),)
SPLIT = (("cond",), ("uncond",))


def tiny(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Seed a builder, wake what it initialises to zero, and put the pipeline into evaluation mode."""

    @functools.wraps(build)
    def seeded() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build()
            for name in ("transformer", "unconditional_transformer"):
                if hasattr(pipe, name):
                    wake(getattr(pipe, name))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return seeded


@torch.no_grad()
def wake(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Give every parameter that is exactly zero a small random value."""
    model.eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=scale)


def absent(cls: type, **components) -> DiffusionPipeline:
    """A pipeline whose components are None but for those given."""
    needed = inspect.signature(cls.__init__).parameters.values()
    missing = [p.name for p in needed if p.name != "self" and p.default is p.empty]
    return cls(**{**dict.fromkeys(missing), **components})


def texts(name: str, rows: int, *shape: int) -> torch.Tensor:
    """Random features, seeded by name and row."""
    seeds = [zlib.crc32(f"{name}{row}".encode()) for row in range(rows)]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def pair(name: str, rows: int, *shape: int) -> dict:
    """Random features for an argument and its negative."""
    return {key: texts(key, rows, *shape) for key in (name, f"negative_{name}")}


def masks(name: str, rows: int, tokens: int = TOKENS) -> dict:
    """Full masks for an argument and its negative."""
    return {key: torch.ones(rows, tokens, dtype=torch.long) for key in (name, f"negative_{name}")}


def autoencoder() -> AutoencoderKL:
    """An autoencoder of factor 8."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
    )


def flow(**settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def masked_call(rows):
    """Embeddings and their masks, for prompt and negative prompt."""
    return {
        **SIZE,
        "guidance_scale": 3.0,
        **pair("prompt_embeds", rows, TOKENS, FEATURES),
        **masks("prompt_attention_mask", rows),
    }


def guided_call(rows):
    """Embeddings of prompt and negative prompt."""
    return {**SIZE, "guidance_scale": 3.0, **pair("prompt_embeds", rows, TOKENS, FEATURES)}


def no_text_call(rows):
    """The same for a pipeline whose negative prompt has a text by default."""
    return {**guided_call(rows), "negative_prompt": None}


def prompt_masks_call(rows):
    """Embeddings and masks as Qwen-Image calls them, guided by guidance_scale."""
    return {**guided_call(rows), **masks("prompt_embeds_mask", rows)}


def true_cfg_call(rows):
    """Embeddings and masks as Qwen-Image calls them, guided by true_cfg_scale."""
    embeds = {**pair("prompt_embeds", rows, TOKENS, FEATURES), **masks("prompt_embeds_mask", rows)}
    return {**SIZE, "true_cfg_scale": 3.0, **embeds}
