"""Which DiT a pipeline holds, and where its named tensors live: import rows and the registry from here."""

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
from dit_lens.families.stack import Adapter, PointSpec, Stack
from dit_lens.old_names import find_old_names

__all__ = [
    "Adapter",
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

__getattr__ = find_old_names(__name__, {"Tap": "PointSpec", "families": "known_families"})
