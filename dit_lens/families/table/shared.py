"""What many rows share: the shapes of blocks, how pipelines guide and encode, autoencoders, and parts of examples."""

from __future__ import annotations

from collections.abc import Mapping

from dit_lens.families.row import Final, Grid, Guidance, Latents, Prediction, Readout, Refusal
from dit_lens.families.stack import PointSpec, Stack
from dit_lens.families.table.points import Points

Inside = Mapping[str, Points]
NOTHING: Inside = {}

BOTH = {"img": "hidden_states", "txt": "encoder_hidden_states"}
TEXT_FIRST = {"txt": 0, "img": 1}
IMAGE_FIRST = {"img": 0, "txt": 1}
ONE = {"img": None, "txt": None}

# One call with both branches as rows, or one call for each branch.
UNCOND_COND = (("uncond", "cond"),)
COND_UNCOND = (("cond", "uncond"),)
TWO_CALLS = (("cond",), ("uncond",))

ROWS = Guidance(UNCOND_COND)
CALLS = Guidance(TWO_CALLS)
NEGATIVE = ("negative_prompt", "negative_prompt_embeds")
TRUE_CFG = Guidance(TWO_CALLS, scale="true_cfg_scale", negative=NEGATIVE)

PAG = Refusal(
    "pag_scale", "it adds rows of perturbed attention to the transformer's calls, which are neither branch", off=0
)

# Images that rows are drawn from, and the masks of what is drawn.
STARTS = ("image", "mask_image", "masked_image_latents")

# What encode_prompt returns, beside the usual prompt_embeds and negative_prompt_embeds.
WITH_MASK = ("prompt_embeds", "prompt_embeds_mask")
WITH_MASKS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")

# Why prompts cannot be encoded before a run.
NO_ENCODER = "it has no encode_prompt"
NO_EMBEDDINGS = "it takes no prompt_embeds="
UNNAMED = "its encode_prompt returns values without names"
WITH_IMAGES = "it encodes prompts together with images"


def not_returned(*names: str) -> str:
    """Why prompts cannot be encoded before a run: the pipeline needs more than its ``encode_prompt`` gives."""
    return f"its encode_prompt does not return {', '.join(names)}"


# Autoencoders, by the classes of diffusers.
FLUX2_VAE = Latents(normalised="token", statistics="bn")  # AutoencoderKLFlux2
WAN_VAE = Latents(normalised="channel", channels="z_dim", frames=True)  # AutoencoderKLWan, AutoencoderKLQwenImage
VIDEO_VAE = Latents(frames=True)  # AutoencoderKLHunyuanVideo, AutoencoderKLCogVideoX

# What modulates the final norm: the norm's second argument, or the transformer makes shift and scale itself.
SECOND = PointSpec("", "input", 1)
OF_TIME = "its transformer makes shift and scale there itself, of the time alone"
NORM_OUT = Final(mod=SECOND)

PACKED = Readout()
PATCHED = Readout(order="yxc")

HEADS = "num_attention_heads*attention_head_dim"
PIXELS = "out_channels*patch_size*patch_size"

IMAGE = Grid("bchw", patch="patch_size")
IMAGE_OUT = Prediction(PIXELS, "bchw")

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2}
LATENTS = "randn b in_channels h w"


def image_stack(
    path: str, name: str = "block", argument: str = "hidden_states", points: Inside = NOTHING, attends: str = ""
) -> Stack:
    """Blocks that hold image tokens only; text enters by cross-attention.

    path, name, points, attends: as in :class:`~dit_lens.Stack`.
    argument: the one that holds the image stream.
    """
    return Stack(name, path, {"img": argument}, {"img": None}, points=points, attends=attends)


def text_stack(path: str, name: str, argument: str = "hidden_states", points: Inside = NOTHING) -> Stack:
    """Blocks that hold text tokens only.

    path, name, points: as in :class:`~dit_lens.Stack`.
    argument: the one that holds the text stream.
    """
    return Stack(name, path, {"txt": argument}, {"txt": None}, points=points)


def joint_stack(
    path: str,
    name: str,
    layout: str,
    argument: str = "hidden_states",
    points: Inside = NOTHING,
    *,
    sequence_first: bool = False,
) -> Stack:
    """Blocks whose one tensor holds text and image tokens.

    path, name, layout, points, sequence_first: as in :class:`~dit_lens.Stack`.
    argument: the one that holds both streams.
    """
    return Stack(name, path, {"img": argument, "txt": argument}, ONE, layout, sequence_first, points=points)


def double_stack(
    path: str = "transformer_blocks",
    name: str = "double",
    outputs: Mapping[str, int | None] = TEXT_FIRST,
    points: Inside = NOTHING,
    attends: str = "text_first",
) -> Stack:
    """Blocks with a tensor for each stream.

    path, name, outputs, points, attends: as in :class:`~dit_lens.Stack`.
    """
    return Stack(name, path, BOTH, outputs, points=points, attends=attends)
