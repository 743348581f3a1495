"""The x0 lens: what each block, at each step, would draw if it were the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.arguments.saving import saved_by
from dit_lens.core.request.indices import to_indices
from dit_lens.core.request.ops import Read
from dit_lens.families.sites import list_patterns
from dit_lens.instruments.latents import check_autoencoder, decode_latents
from dit_lens.old_names import OldName

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import plotly.graph_objects as go
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.core.session import Session

BLOCKS = 7
STEPS = 4


@dataclass(frozen=True)
class X0:
    """Images of the clean latents that were predicted.

    images: site -> [step][row]. steps: their indices. run: the run they were read from, tensors included.
    """

    images: dict[str, list[list[Image]]]
    steps: tuple[int, ...]
    run: Run

    pictures = OldName("images")

    save = saved_by("Its run has, found.run.save(folder); each image of found.images has a save of its own.")

    def figure(self, row: int = 0) -> go.Figure:
        """One prompt's images: steps from top to bottom, blocks from left to right."""
        from dit_lens.plots import sheet

        row = to_indices(row, len(next(iter(self.images.values()))[0]), "row", "there are", "images")[0]
        sigmas = self.run.sigmas
        names = [f"step {step}<br>noise {sigmas[step]:.2f}" for step in self.steps]
        columns = [site.removesuffix(".img.x0").replace("blocks.", "block ") for site in self.images]
        columns = ["the model" if name == "x0" else name for name in columns]
        rows = [[images[i][row] for images in self.images.values()] for i in range(len(self.steps))]
        return sheet(rows, names, columns, title="The image each block predicts")


def read_x0(lens: Session, prompt: Any, site: Pattern | None = None, *, steps: Steps = None, **call: Any) -> X0:
    """See :meth:`dit_lens.DiTLens.read_x0`."""
    check_autoencoder(lens)
    names = _pick_evenly(lens.sites("blocks.*.img.x0"), BLOCKS) if site is None else _sites(lens, site)
    if steps is None:
        steps = _pick_evenly(list(range(lens.outline(prompt, **call).steps)), STEPS)
    run = lens.run(prompt, [Read([*names, "x0"], steps=steps)], **call)
    reading = run.readings[0]
    images = {}
    for name, value in reading.tensors.items():
        s, b = value.shape[:2]
        drawn = decode_latents(lens, value.flatten(0, 1), run.grid)
        images[name] = [drawn[i * b : (i + 1) * b] for i in range(s)]
    return X0(images, reading.steps, run)


def _sites(lens: Session, pattern: Pattern) -> list[str]:
    """Blocks named with or without the point."""
    return [name for name in lens.sites([_with_point(one) for one in list_patterns(pattern)]) if name != "x0"]


def _with_point(pattern: str | Callable[[str], bool]) -> str | Callable[[str], bool]:
    """A pattern of blocks, or a function that chooses some, for their readouts alone."""
    if isinstance(pattern, str):
        return pattern if pattern.endswith("x0") else f"{pattern}.x0"
    return lambda name: name.endswith(".img.x0") and (pattern(name) or pattern(name.removesuffix(".x0")))


def _pick_evenly(values: list, count: int) -> list:
    """At most ``count`` of them, evenly spaced, first and last included."""
    if len(values) <= count:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]
