"""dit_lens: look inside Diffusion Transformers.

    import dit_lens as dl

    lens = dl.DiTLens.toy()                                # or dl.DiTLens(pipe) for a diffusers pipeline of your own
    prompt = "a big red circle left on a checkered blue background"
    massive = lens.massive_channels(prompt, k=12, seed=0)  # site -> the channels with outsized responses
    with lens.trace(prompt, seed=0) as t:
        h = t.read("blocks.*.img", reduce="|mean|")        # reduced where it is: [step, row, channel] per block
        t.zero("blocks.*.img", channels=massive)           # ... and the picture collapses
    t.images[0], h["blocks.3.img"], t.receipt

Letters used throughout: b row (picture) of a batch, s denoising step, n image token, d channel, h w token grid.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that has it; nothing heavy is imported before a name is used (PEP 562)
_WHERE = {
    "DiTLens": "lens",
    "Run": "run",
    "Receipt": "receipt",
    "ChannelSet": "channels",
    "compare": "comparison",
    "atlas": "explorer",
    "explore": "explorer",
    "steer": "explorer",
    "views": "explorer",
    "encode_prompts": "encode",
    "recommend": "recommendation",
    "Read": "ops",
    "Zero": "ops",
    "Scale": "ops",
    "Add": "ops",
    "Swap": "ops",
    "Resample": "ops",
    "TokenMean": "ops",
    "MeanAblate": "ops",
    "Apply": "ops",
    "sigma": "ops",
    "Family": "families",
    "Grid": "families",
    "Guidance": "families",
    "Readout": "families",
    "Tap": "families",
    "Time": "families",
    "Stack": "families",
    "register_family": "families",
}
_MODULES = (
    "channels",
    "clusters",
    "errors",
    "explorer",
    "families",
    "inversion",
    "metrics",
    "ops",
    "plots",
    "prompts",
    "protocols",
    "studies",
    "toys",
)

__all__ = [
    "Add",
    "Apply",
    "ChannelSet",
    "DiTLens",
    "Family",
    "Grid",
    "Guidance",
    "MeanAblate",
    "Read",
    "Readout",
    "Receipt",
    "Resample",
    "Run",
    "Scale",
    "Stack",
    "Swap",
    "Tap",
    "Time",
    "TokenMean",
    "Zero",
    "atlas",
    "channels",
    "clusters",
    "compare",
    "encode_prompts",
    "errors",
    "explore",
    "explorer",
    "families",
    "inversion",
    "metrics",
    "ops",
    "plots",
    "prompts",
    "protocols",
    "recommend",
    "register_family",
    "sigma",
    "steer",
    "studies",
    "toys",
    "views",
]

if TYPE_CHECKING:
    from dit_lens import (
        channels,
        clusters,
        errors,
        explorer,
        families,
        inversion,
        metrics,
        ops,
        plots,
        prompts,
        protocols,
        studies,
        toys,
    )
    from dit_lens.channels import ChannelSet
    from dit_lens.comparison import compare
    from dit_lens.encode import encode_prompts
    from dit_lens.explorer import atlas, explore, steer, views
    from dit_lens.families import Family, Grid, Guidance, Readout, Stack, Tap, Time, register_family
    from dit_lens.lens import DiTLens
    from dit_lens.ops import Add, Apply, MeanAblate, Read, Resample, Scale, Swap, TokenMean, Zero, sigma
    from dit_lens.receipt import Receipt
    from dit_lens.recommendation import recommend
    from dit_lens.run import Run


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"dit_lens.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"dit_lens.{name}")
    raise AttributeError(f"module 'dit_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
