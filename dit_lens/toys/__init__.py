"""Toys: small text-to-image DiTs that were really trained, on pictures whose content is known."""

from __future__ import annotations

from pathlib import Path

from dit_lens.errors import StoreError, nearest

WEIGHTS = Path(__file__).parent / "weights"


def path(name: str) -> Path:
    """The folder of a toy's pipeline."""
    known = (
        sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / "model_index.json").is_file())
        if WEIGHTS.is_dir()
        else []
    )
    if name not in known:
        raise StoreError(f"there is no toy called {name!r}.{nearest(name, known)}")
    return WEIGHTS / name
