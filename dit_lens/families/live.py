"""What of a live pipeline would silently change which calls and modules run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dit_lens.errors import FamilyError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

CACHES = "cache|fbc|pyramid_attention"  # in the names of diffusers' hooks that skip work


def refuse_unsafe(pipe: DiffusionPipeline) -> None:
    """Refuses what would silently change which calls and modules run; looked at before every run."""
    modules = list(pipe.transformer.modules())
    hooks = [name for module in modules for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())]
    if getattr(pipe.transformer, "is_cache_enabled", False) or any(re.search(CACHES, name) for name in hooks):
        raise FamilyError(
            "a step cache is enabled, which skips blocks without saying so. "
            "Call pipe.transformer.disable_cache() first, or load the pipeline again where there is no such method."
        )
    if any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in modules):
        raise FamilyError(
            "the transformer or a part of it is compiled, so nothing inside it can be read or changed. "
            "Load the pipeline again without compiling it."
        )
    if any(map(_fused, modules)):
        raise FamilyError(
            "query, key and value projections are fused, so the modules that attn.q, attn.k and attn.v name are not "
            "called. Call pipe.transformer.unfuse_qkv_projections() first."
        )


def _fused(module: nn.Module) -> bool:
    """Whether an attention no longer calls to_q, to_k and to_v; older ones keep the mark, and tell by their processor.

    >>> from types import SimpleNamespace
    >>> _fused(SimpleNamespace(fused_projections=True, processor="JointAttnProcessor2_0()"))
    False
    """
    newer = hasattr(module, "unfuse_projections")
    return getattr(module, "fused_projections", False) and (newer or "Fused" in str(getattr(module, "processor", "")))
