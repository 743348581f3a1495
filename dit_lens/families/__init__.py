"""Families: which DiT a pipeline holds, and where each of its named tensors lives. Nothing else names a model class."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING

from dit_lens.errors import FamilyError
from dit_lens.families.anatomy import Anatomy
from dit_lens.families.row import Family, Grid, Guidance, PointSpec, Readout, Stack, Time
from dit_lens.families.table import TABLE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

__all__ = [
    "Anatomy",
    "Family",
    "Grid",
    "Guidance",
    "PointSpec",
    "Readout",
    "Stack",
    "Time",
    "families",
    "find",
    "refuse_unsafe",
    "register_family",
]

CACHES = "cache|fbc|pyramid_attention"  # in the names of diffusers' hooks that skip work

_registered: list[Family] = []


def families() -> tuple[Family, ...]:
    """Every known family; rows registered at run time come first."""
    return (*reversed(_registered), *TABLE)


def register_family(family: Family) -> None:
    """Adds a row for a DiT this library does not know. It is checked like the others when a pipeline is loaded."""
    _registered.append(family)


def find(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline's transformer; FamilyError names the nearest one when there is none."""
    if any(base.__name__ == "ModularPipeline" for base in type(pipe).__mro__):
        raise FamilyError(
            f"{type(pipe).__name__} is a modular pipeline, put together at run time: it has no fixed call whose steps "
            "and branches could be planned. Use the model's ordinary pipeline, where there is one (FLUX.3 has none)."
        )
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise FamilyError(
            f"{type(pipe).__name__} is not a diffusers pipeline. Pass one, such as FluxPipeline.from_pretrained(...)."
        )
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise FamilyError(
            f"{type(pipe).__name__} has no transformer (its parts are {', '.join(components)}), so it is not a DiT "
            "pipeline."
        )
    refuse_unsafe(pipe)
    classes = {base.__name__ for base in type(transformer).__mro__}
    for family in families():
        if family.transformer in classes:
            return family
    name = type(transformer).__name__
    known = {family.transformer: family.name for family in families()}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise FamilyError(
        f"no family describes {name}. Known: {', '.join(f'{family} ({cls})' for cls, family in known.items())}. "
        f"Nearest: {close} ({known[close]}). Describe it with dit_lens.register_family(row); a row like the nearest "
        f"one, to start from:\n{template(next(family for family in families() if family.transformer == close), name)}"
    )


def template(family: Family, transformer: str) -> str:
    """The source of a family's row, for another transformer; points inside blocks are left out."""
    stacks = tuple(replace(stack, points={}) for stack in family.stacks)
    row = replace(
        family, name="...", transformer=transformer, pipelines=("...",), stacks=stacks, variants={}, refuses={}
    )
    return _source(row, "")


def _source(value: object, indent: str) -> str:
    if not is_dataclass(value):
        return repr(value)
    inner = indent + "    "
    lines = []
    for one in fields(value):
        own = getattr(value, one.name)
        default = one.default_factory() if callable(one.default_factory) else one.default
        if own == default:
            continue
        if isinstance(own, tuple) and any(is_dataclass(item) for item in own):
            items = "".join(f"{inner}    {_source(item, inner + '    ')},\n" for item in own)
            lines.append(f"{inner}{one.name}=(\n{items}{inner}),\n")
        else:
            lines.append(f"{inner}{one.name}={_source(own, inner)},\n")
    inside = f"\n{''.join(lines)}{indent}" if lines else ""
    return f"dit_lens.{type(value).__name__}({inside})"


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
