"""A tiny random pipeline of every family: offline, seeded, a few thousand parameters, a grid that is not square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Entry:
    """One pipeline to try.

    name: of the entry.
    transformer: the class of its transformer.
    build: makes the pipeline.
    call: number of prompts -> arguments of the pipeline.
    grid: image tokens, (h, w) or (frames, h, w).
    branches: of one step: for each forward pass, those of its rows in order.
    text_tokens: of the text stream; None where there is none.
    blocks: of all stacks.
    rows: prompts to try.
    """

    name: str
    transformer: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[int], dict[str, Any]]
    grid: tuple[int, ...]
    branches: tuple[tuple[str, ...], ...]
    text_tokens: int | None
    blocks: int
    rows: int = 2


def entries() -> tuple[Entry, ...]:
    """Every pipeline of the zoo."""
    from tests.zoo import cogview, cross, dual, flux, hunyuan, joint, next_dit, video

    groups = (flux, dual, cogview, hunyuan, next_dit, joint, cross, video)
    return tuple(entry for group in groups for entry in group.ENTRIES)
