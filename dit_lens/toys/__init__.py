"""Small trained text-to-image DiTs with known images: import how to find and load them from here, files by name."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dit_lens.arguments.checks import checked
from dit_lens.errors import StoreError, nearest
from dit_lens.old_names import find_old_names
from dit_lens.toys.kinds import KINDS, kind

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"
BESIDE = Path(__file__).parents[2] / "toys"  # beside the package: other seeds that were trained here, "flux-seed1"

__getattr__ = find_old_names(__name__, {"hushed": "quiet_loading"})


@checked
def untrained(name: str) -> nn.Module:
    """The transformer of a toy as it was before training began."""
    of, _, seed = name.partition("-seed")
    return kind(of).build(int(seed or 0)).transformer.eval().requires_grad_(requires_grad=False)


@contextmanager
def quiet_loading() -> Generator[None]:
    """Silences the progress bars and logs of diffusers and transformers while a toy is loaded."""
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


@checked
def path(name: str) -> Path:
    """The folder of a toy's pipeline."""
    known = {file.parent.name: file.parent for place in (WEIGHTS, BESIDE) for file in place.glob("*/model_index.json")}
    of, _, seed = name.partition("-seed")
    if name in known:
        return known[name]
    if of in KINDS and (name == of or seed.isdigit()):
        trained = ", ".join(sorted(known)) or "none"
        folder = (BESIDE if seed else WEIGHTS) / name
        raise StoreError(
            f"the toy {name!r} has not been trained yet: there is no {folder}. Train it with {train_command(name)}, "
            f"and move DIR/pipeline there or load it as it is. Trained ones: {trained}."
        )
    raise StoreError(f"there is no toy called {name!r}.{nearest(name, sorted(known))}")


@checked
def find_pipeline(name: str | Path) -> str | Path:
    """The folder of "toy:flux"; any other folder or repository as it is.

    >>> find_pipeline("toy:flux") == path("flux"), find_pipeline("black-forest-labs/FLUX.1-dev")
    (True, 'black-forest-labs/FLUX.1-dev')
    """
    return path(name.removeprefix("toy:")) if isinstance(name, str) and name.startswith("toy:") else name


@checked
def train_command(name: str) -> str:
    """The command that trains a toy, which leaves its pipeline in DIR/pipeline.

    >>> train_command("flux-seed1")
    'dit-lens train-toy flux --seed 1 --out DIR'
    """
    of, _, seed = name.partition("-seed")
    return f"dit-lens train-toy {of}{f' --seed {seed}' if seed else ''} --out DIR"
