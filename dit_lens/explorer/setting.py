"""The setting of the steering panel: which edit its controls describe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dit_lens.arguments.checks import checked_fields

ARMS = ("top", "bottom", "random", "energy-matched", "all")
WHERE = ("everywhere", "subject", "brush")


@checked_fields
@dataclass(frozen=True)
class Setting:
    """The setting of the controls, which describes one edit.

    strength: share of the source in the swapped channels, 0 to 1.
    arm: which channels: "top" (massive), "bottom", "random", "energy-matched" or "all".
    k: number of channels per block.
    blocks: half-open interval of block indices.
    steps: half-open interval of step indices.
    where: which tokens: "everywhere", the "subject" of the source (where its channels differ from those at the
      border), or those of ``mask`` ("brush").
    mask: numbers of image tokens, row by row, for ``where="brush"``.
    """

    strength: float = 1.0
    arm: str = "top"
    k: int = 8
    blocks: tuple[int, int] = (0, 1)
    steps: tuple[int, int] = (0, 1)
    where: str = "everywhere"
    mask: tuple[int, ...] = ()


def to_state(setting: Setting) -> dict[str, Any]:
    """Returns a setting as values of the widget's traits, which are lists instead of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(setting).items()}
