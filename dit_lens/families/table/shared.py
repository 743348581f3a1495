"""What many rows share: the shapes of blocks, the ways of guidance, and parts of the calls that check a row."""

from __future__ import annotations

from collections.abc import Mapping

from dit_lens.families.row import Guidance, Readout, Stack
from dit_lens.families.table.points import Points

Inside = Mapping[str, Points]
NOTHING: Inside = {}

BOTH = {"img": "hidden_states", "txt": "encoder_hidden_states"}
JOINED = {"img": "hidden_states", "txt": "hidden_states"}
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

PACKED = Readout()
PATCHED = Readout(order="yxc")

HEADS = "num_attention_heads*attention_head_dim"
PIXELS = "out_channels*patch_size*patch_size"
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2}


def image_stack(
    path: str, name: str = "block", argument: str = "hidden_states", points: Inside = NOTHING, attends: str = ""
) -> Stack:
    """Blocks that hold image tokens only; text enters by cross-attention."""
    return Stack(name, path, {"img": argument}, {"img": None}, points=points, attends=attends)


def joint_stack(
    path: str,
    name: str,
    layout: str,
    argument: str = "hidden_states",
    points: Inside = NOTHING,
    *,
    sequence_first: bool = False,
) -> Stack:
    """Blocks whose one tensor holds text and image tokens."""
    return Stack(name, path, {"img": argument, "txt": argument}, ONE, layout, sequence_first, points=points)


def text_stack(path: str, name: str, argument: str = "hidden_states", points: Inside = NOTHING) -> Stack:
    """Blocks that hold text tokens only."""
    return Stack(name, path, {"txt": argument}, {"txt": None}, points=points)


def double_stack(
    path: str = "transformer_blocks",
    name: str = "double",
    outputs: dict = TEXT_FIRST,
    points: Inside = NOTHING,
    attends: str = "text_first",
) -> Stack:
    """Blocks with a tensor for each stream."""
    return Stack(name, path, BOTH, outputs, points=points, attends=attends)
