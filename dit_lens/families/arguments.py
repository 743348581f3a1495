"""How diffusers names the pipeline arguments that hold prompts, and the parts that encode them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")

_TEXT = r"(negative_)?prompt(_\d)?"
_EMBEDDING = r"(pooled_)?prompt_(embeds|attention_mask|cu_seqlens)\w*|prior_token_ids"
_ENCODER = r"text_encoder(_\d+)?"
_TOKENIZER = r"tokenizer(_\d+)?"


def holds_text(name: str) -> bool:
    """Whether an argument holds one text for each prompt.

    >>> [holds_text(name) for name in ("prompt", "negative_prompt_2", "prompt_embeds")]
    [True, True, False]
    """
    return re.fullmatch(_TEXT, name) is not None


def holds_embedding(name: str) -> bool:
    """Whether an argument holds what prompts become: embeddings or their masks. Negative ones do not count.

    >>> [holds_embedding(name) for name in ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds")]
    [True, True, False]
    """
    return re.fullmatch(_EMBEDDING, name) is not None


def stands_for_prompts(name: str) -> bool:
    """Whether an argument can be given in place of prompts: class labels, or embeddings of its main encoder.

    >>> [stands_for_prompts(name) for name in ("class_labels", "prompt_embeds_2", "prompt_embeds_mask")]
    [True, True, False]
    """
    return name == "class_labels" or re.fullmatch(r"prompt_embeds(_(?!mask)\w+)?", name) is not None


def belongs_to_prompts(name: str) -> bool:
    """Whether an argument has one entry for each prompt that is not its text: embeddings, masks, class labels."""
    return name == "class_labels" or holds_embedding(name.removeprefix("negative_"))


def is_text_encoder(part: str) -> bool:
    """Whether a part of a pipeline encodes prompts, by its name.

    >>> [is_text_encoder(part) for part in ("text_encoder", "text_encoder_2", "transformer")]
    [True, True, False]
    """
    return re.fullmatch(_ENCODER, part) is not None


def explain_unread(pipe: DiffusionPipeline) -> str:
    """Why a pipeline cannot read a prompt: what of its text encoders and tokenizers is gone; "" where none is."""
    optional = getattr(pipe, "_optional_components", ())
    gone = [
        name
        for name, part in pipe.components.items()
        if part is None and name not in optional and re.fullmatch(f"{_ENCODER}|{_TOKENIZER}", name)
    ]
    if not gone:
        return ""
    return (
        f"{type(pipe).__name__} cannot read a prompt: it has no {' and no '.join(gone)} (None), as after "
        "lens.release_encoders(). Put back what is missing, or give embeddings that lens.encode made before."
    )
