"""Toys: small text-to-image DiTs that were really trained, on images whose content is known."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dit_lens.errors import StoreError, nearest
from dit_lens.toys.kinds import KINDS, kind

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"
BESIDE = Path(__file__).parents[2] / "toys"  # in the repository, not in the package: "flux-seed1", "flux-seed2"


def untrained(name: str) -> nn.Module:
    """The transformer of a toy as it was before training began."""
    of, _, seed = name.partition("-seed")
    return kind(of).build(int(seed or 0)).transformer.eval().requires_grad_(requires_grad=False)


@contextmanager
def quiet_loading() -> Generator[None]:
    """Without the bars and advice of diffusers and transformers: a toy is there in a moment and lacks nothing."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def path(name: str) -> Path:
    """The folder of a toy's pipeline."""
    known = {file.parent.name: file.parent for place in (WEIGHTS, BESIDE) for file in place.glob("*/model_index.json")}
    if name in KINDS and name not in known:
        trained = ", ".join(sorted(known)) or "none"
        raise StoreError(
            f"the toy {name!r} has not been trained yet: there is no {WEIGHTS / name}. Train it with "
            f"dit-lens train-toy {name} --out DIR and load DIR/pipeline. Trained ones: {trained}."
        )
    if name not in known:
        raise StoreError(f"there is no toy called {name!r}.{nearest(name, sorted(known))}")
    return known[name]
