"""Which rows, tokens and channels an op means, as explicit indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.numbers import to_indices
from dit_lens.errors import OpError

if TYPE_CHECKING:
    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.request.ops import Op
    from dit_lens.families.sites import Site


@dataclass(frozen=True)
class Group:
    """Rows that share their tokens; None means all."""

    rows: list[int] | None
    tokens: list[int] | None


def select_groups(op: Op, sites: Sequence[Site], outline: Outline) -> list[Group]:
    """The rows and tokens of an op: one group, except where a word stands elsewhere in each row's prompt."""
    rows = None if op.rows is None else sorted(to_indices(op.rows, outline.rows, "row", "this run has", "images"))
    if rows == []:
        raise OpError("rows=[] selects no image. Leave rows= out for all of them, or leave the op out.")
    streams = {site.stream for site in sites}
    if isinstance(op.tokens, str):
        if streams != {"txt"}:
            raise OpError(
                f"tokens={op.tokens!r} names a word, which only the txt stream has; {op.site!r} is not that. "
                "Use mask= or token indices."
            )
        return [
            Group([row], outline.find_word(row, op.tokens)) for row in (range(outline.rows) if rows is None else rows)
        ]
    if (op.mask is not None or op.tokens is not None) and any(site.point.startswith("mod.") for site in sites):
        raise OpError(f"{op.site!r} is one vector for each image, not tokens. Use channels=, not tokens= or mask=.")
    if op.mask is not None:
        if streams != {"img"} or op.tokens is not None:
            raise OpError("mask= chooses image tokens: use it on the img stream, and without tokens=.")
        return [Group(rows, _masked_tokens(op.mask, outline))]
    return [Group(rows, _tokens(op, streams, outline))]


def select_channels(op: Op, site: Site, width: int) -> list[int] | None:
    """The channels of an op at one site; None means all."""
    chosen = op.channels
    if chosen is None:
        return None
    if isinstance(chosen, Mapping):
        if site.name not in chosen:
            raise OpError(
                f"channels= has no entry for {site}. It has "
                f"{', '.join(list(chosen)[:8])}{' ...' if len(chosen) > 8 else ''}. "
                "Narrow the op's site to those, for instance site=list(channels)."
            )
        chosen = chosen[site.name]
    return to_indices(chosen, width, "channel", f"{site} has", "channels")


def _tokens(op: Op, streams: set[str], outline: Outline) -> list[int] | None:
    if op.tokens is None:
        return None
    sizes = [size for size in map(outline.tokens, streams) if size is not None]
    return to_indices(
        op.tokens, min(sizes, default=None), "token", f"the {' and '.join(sorted(streams))} stream has", "tokens"
    )


def _masked_tokens(given: Any, outline: Outline) -> list[int]:
    import numpy as np

    try:
        mask = np.asarray(given.tolist() if hasattr(given, "tolist") else given)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise OpError(
            f"mask= must be a bool array [h, w]; this {type(given).__name__} cannot be read as one ({problem})."
        ) from problem
    if mask.ndim != 2 or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise OpError(
            f"mask= must be a bool array [h, w]; it has shape {list(mask.shape)} and dtype {mask.dtype}. "
            "Threshold it first."
        )
    if outline.grid is None:
        raise OpError(
            "mask= needs the token grid, which this pipeline decides while it runs. "
            "Pass height= and width=, or tokens=."
        )
    if mask.shape != outline.grid:
        raise OpError(
            f"the mask is {mask.shape[0]} x {mask.shape[1]}, but this run has a grid of {outline.grid[0]} x "
            f"{outline.grid[1]} image tokens. Resize it to the grid (dit_lens.clusters.to_grid), or change "
            "height= and width=."
        )
    if not mask.any():
        raise OpError("mask= chooses no token: every entry is False. Leave the op out, or choose another mask.")
    return [int(token) for token in np.flatnonzero(mask)]
