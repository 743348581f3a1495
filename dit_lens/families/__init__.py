"""Which DiT a pipeline holds, and where each named tensor lives: the only place that names a model class.

Imports errors only; everything else may import from it.
"""

from __future__ import annotations

from typing import Any

from dit_lens.families.anatomy import Anatomy
from dit_lens.families.live import refuse_unsafe
from dit_lens.families.registry import find, find_by_pipeline, known_families, register_family, write_template
from dit_lens.families.row import (
    Example,
    Family,
    Final,
    Grid,
    Guidance,
    Latents,
    Pipeline,
    Prediction,
    Prompts,
    Readout,
    Refusal,
    Time,
)
from dit_lens.families.stack import PointSpec, Stack
from dit_lens.old_names import warn_of_old_name

__all__ = [
    "Anatomy",
    "Example",
    "Family",
    "Final",
    "Grid",
    "Guidance",
    "Latents",
    "Pipeline",
    "PointSpec",
    "Prediction",
    "Prompts",
    "Readout",
    "Refusal",
    "Stack",
    "Time",
    "find",
    "find_by_pipeline",
    "known_families",
    "refuse_unsafe",
    "register_family",
    "write_template",
]


def __getattr__(name: str) -> Any:
    if name == "families":
        warn_of_old_name("families.families", "families.known_families", stacklevel=3)
        return known_families
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
