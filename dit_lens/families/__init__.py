"""Families: which DiT a pipeline holds, and where each of its named tensors lives. Nothing else names a model class."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from dit_lens.errors import FamilyError
from dit_lens.families.anatomy import Anatomy
from dit_lens.families.row import Family, Grid, Guidance, Readout, Stack, Tap, Time
from dit_lens.families.table import TABLE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Anatomy",
    "Family",
    "Grid",
    "Guidance",
    "Readout",
    "Stack",
    "Tap",
    "Time",
    "families",
    "find",
    "refuse_unsafe",
    "register_family",
]

_registered: list[Family] = []


def families() -> tuple[Family, ...]:
    """Every known family; rows registered at run time come first."""
    return (*reversed(_registered), *TABLE)


def register_family(family: Family) -> None:
    """Adds a row for a DiT this library does not know. It is checked like the others when a pipeline is loaded."""
    _registered.append(family)


def find(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline's transformer; FamilyError names the nearest one when there is none."""
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
        f"Nearest: {close} ({known[close]}). Describe it with dit_lens.register_family(dit_lens.Family(name=..., "
        f"transformer={name!r}, ...)), starting from that row."
    )


def refuse_unsafe(pipe: DiffusionPipeline) -> None:
    """Refuses what would silently change which calls and modules run; looked at before every run."""
    transformer = pipe.transformer
    if getattr(transformer, "is_cache_enabled", False):
        raise FamilyError(
            "a step cache is enabled, which skips blocks without saying so. "
            "Call pipe.transformer.disable_cache() first."
        )
    if hasattr(transformer, "_orig_mod") or getattr(transformer, "_compiled_call_impl", None) is not None:
        raise FamilyError(
            "the transformer is compiled, so nothing inside it can be read or changed. "
            "Load the pipeline again without torch.compile."
        )
