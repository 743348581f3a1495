"""dit_lens: look inside Diffusion Transformers.

    import dit_lens as dl

    lens = dl.DiTLens.toy()                                # or dl.DiTLens(pipe) for a diffusers pipeline of your own
    prompt = "a big red circle left on a checkered blue background"
    massive = lens.massive_channels(prompt, k=12, seed=0)  # site -> the channels with outsized responses
    with lens.trace(prompt, seed=0) as t:
        h = t.read("blocks.*.img", reduce="|mean|")        # reduced where it is: [step, row, channel] per block
        t.zero("blocks.*.img", channels=massive)           # ... and the image collapses
    t.images[0], h["blocks.3.img"], t.receipt

Letters used throughout: b row (image) of a batch, s denoising step, n image token, d channel, h w token grid.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dit_lens.old_names import OLD_MODULES, PUBLIC, warn_of_old_name

__version__ = "0.1.0"

# name -> the module that has it; nothing heavy is imported before a name is used (PEP 562)
_WHERE = {
    "DiTLens": "lens",
    "Job": "core.jobs",
    "Run": "core.runs.run",
    "Receipt": "core.runs.receipt",
    "compare": "core.runs.comparison",
    "ChannelSet": "analysis.channels",
    "atlas": "explorer",
    "explore": "explorer",
    "steer": "explorer",
    "explorer_reads": "explorer",
    "from_hub": "hub",
    "push_to_hub": "hub",
    "Steering": "instruments.steering_vectors",
    "encode_prompts": "instruments.text_embeddings",
    "recommend": "instruments.recommend",
    "Read": "core.request.ops",
    "Zero": "core.request.ops",
    "Scale": "core.request.ops",
    "Add": "core.request.ops",
    "Skip": "core.request.ops",
    "AttentionMask": "core.request.ops",
    "Feature": "core.request.ops",
    "ReadFeatures": "core.request.ops",
    "Guide": "core.request.ops",
    "Rope": "core.request.ops",
    "Swap": "core.request.ops",
    "Resample": "core.request.ops",
    "TokenMean": "core.request.ops",
    "MeanAblate": "core.request.ops",
    "Apply": "core.request.ops",
    "sigma": "core.request.ops",
    "TokenSet": "core.request.token_set",
    "Family": "families",
    "Grid": "families",
    "Guidance": "families",
    "Readout": "families",
    "PointSpec": "families",
    "Time": "families",
    "Stack": "families",
    "register_family": "families",
    "RayWorkers": "studies.shared.ray_workers",
    "ServerWorkers": "studies.shared.server_workers",
}
# public module -> where it is
_MODULES = {
    "channels": "analysis.channels",
    "clusters": "analysis.clusters",
    "dictionaries": "core.request.dictionaries",
    "metrics": "analysis.metrics",
    "errors": "errors",
    "explorer": "explorer",
    "families": "families",
    "inversion": "instruments.inversion",
    "ops": "core.request.ops",
    "plots": "plots",
    "prompts": "studies.shared.prompts",
    "protocols": "studies.shared.protocols",
    "studies": "studies",
    "toys": "toys",
}
_FOUND = {**OLD_MODULES, **_MODULES}

__all__ = [
    "Add",
    "Apply",
    "AttentionMask",
    "ChannelSet",
    "DiTLens",
    "Family",
    "Feature",
    "Grid",
    "Guidance",
    "Guide",
    "Job",
    "MeanAblate",
    "PointSpec",
    "RayWorkers",
    "Read",
    "ReadFeatures",
    "Readout",
    "Receipt",
    "Resample",
    "Rope",
    "Run",
    "Scale",
    "ServerWorkers",
    "Skip",
    "Stack",
    "Steering",
    "Swap",
    "Time",
    "TokenMean",
    "TokenSet",
    "Zero",
    "atlas",
    "channels",
    "clusters",
    "compare",
    "dictionaries",
    "encode_prompts",
    "errors",
    "explore",
    "explorer",
    "explorer_reads",
    "families",
    "from_hub",
    "inversion",
    "metrics",
    "ops",
    "plots",
    "prompts",
    "protocols",
    "push_to_hub",
    "recommend",
    "register_family",
    "sigma",
    "steer",
    "studies",
    "toys",
]

if TYPE_CHECKING:
    from dit_lens import errors, explorer, families, plots, studies, toys
    from dit_lens.analysis import channels, clusters, metrics
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.jobs import Job
    from dit_lens.core.request import dictionaries, ops
    from dit_lens.core.request.ops import (
        Add,
        Apply,
        AttentionMask,
        Feature,
        Guide,
        MeanAblate,
        Read,
        ReadFeatures,
        Resample,
        Rope,
        Scale,
        Skip,
        Swap,
        TokenMean,
        Zero,
        sigma,
    )
    from dit_lens.core.request.token_set import TokenSet
    from dit_lens.core.runs.comparison import compare
    from dit_lens.core.runs.receipt import Receipt
    from dit_lens.core.runs.run import Run
    from dit_lens.explorer import atlas, explore, explorer_reads, steer
    from dit_lens.families import Family, Grid, Guidance, PointSpec, Readout, Stack, Time, register_family
    from dit_lens.hub import from_hub, push_to_hub
    from dit_lens.instruments import inversion
    from dit_lens.instruments.recommend import recommend
    from dit_lens.instruments.steering_vectors import Steering
    from dit_lens.instruments.text_embeddings import encode_prompts
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared import prompts, protocols
    from dit_lens.studies.shared.ray_workers import RayWorkers
    from dit_lens.studies.shared.server_workers import ServerWorkers


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"dit_lens.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"dit_lens.{_MODULES[name]}")
    if name in PUBLIC:
        warn_of_old_name(f"dit_lens.{name}", f"dit_lens.{PUBLIC[name]}", stacklevel=3)
        return getattr(sys.modules[__name__], PUBLIC[name])
    raise AttributeError(f"module 'dit_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _ShortNames(MetaPathFinder, Loader):
    """Makes ``import dit_lens.ops`` mean ``dit_lens.core.request.ops``, and so for every public module and old name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        name = fullname.removeprefix("dit_lens.")
        return ModuleSpec(fullname, self) if _FOUND.get(name, name) != name else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = spec.name.removeprefix("dit_lens.")
        if name in OLD_MODULES:
            warn_of_old_name(spec.name, f"dit_lens.{OLD_MODULES[name]}", stacklevel=3)
        module = importlib.import_module(f"dit_lens.{_FOUND[name]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run under its own name; importlib has replaced its spec, which is put back."""
        module.__spec__ = None if module.__spec__ is None else module.__spec__.loader_state


sys.meta_path.append(_ShortNames())
