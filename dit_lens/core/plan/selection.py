"""Which rows, tokens and channels an op means, as explicit indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.numbers import to_indices
from dit_lens.core.request.text_tokens import CLASSES
from dit_lens.errors import OpError

if TYPE_CHECKING:
    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.request.ops import Op
    from dit_lens.core.request.text_tokens import StreamText
    from dit_lens.families.sites import Site


@dataclass(frozen=True)
class Group:
    """Rows that share their tokens; None means all.

    branch: where the tokens were chosen by the text of one branch, that branch.
    text_tokens: how many tokens the text stream then has.
    """

    rows: list[int] | None
    tokens: list[int] | None
    branch: str | None = None
    text_tokens: int | None = None


def select_groups(op: Op, sites: Sequence[Site], outline: Outline) -> list[Group]:
    """The rows and tokens of an op: one group, or where they are chosen by the text one for each branch and row."""
    rows = None if op.rows is None else sorted(to_indices(op.rows, outline.rows, "row", "this run has", "images"))
    if rows == []:
        raise OpError("rows=[] selects no image. Leave rows= out for all of them, or leave the op out.")
    streams = {site.stream for site in sites}
    words = [op.tokens] if isinstance(op.tokens, str) else _words(op.tokens)
    if words:
        if streams != {"txt"}:
            what = "names a class of tokens" if op.tokens in CLASSES else f"names {plural_word(words)}"
            raise OpError(
                f"tokens={op.tokens!r} {what}, which only the txt stream has; {op.site!r} is not that. "
                "Use mask= or token indices."
            )
        if any(site.point.startswith("mod.") for site in sites):
            raise OpError(f"{op.site!r} is one vector for each image, not tokens. Use channels=, not tokens= or mask=.")
        return _groups_by_text(op, words, list(range(outline.rows)) if rows is None else rows, outline)
    if (op.mask is not None or op.tokens is not None) and any(site.point.startswith("mod.") for site in sites):
        raise OpError(f"{op.site!r} is one vector for each image, not tokens. Use channels=, not tokens= or mask=.")
    if op.mask is not None:
        if streams != {"img"} or op.tokens is not None:
            raise OpError("mask= chooses image tokens: use it on the img stream, and without tokens=.")
        return [Group(rows, _masked_tokens(op.mask, outline))]
    return [Group(rows, _tokens(op, streams, outline))]


def _words(tokens: Any) -> list[str]:
    """The words of a list of words; none of anything else."""
    listed = list(tokens) if isinstance(tokens, list | tuple) else []
    return listed if listed and all(isinstance(word, str) for word in listed) else []


def plural_word(words: Sequence[str]) -> str:
    return "a word" if len(words) == 1 else "words"


def _groups_by_text(op: Op, words: Sequence[str], rows: list[int], outline: Outline) -> list[Group]:
    """One group for each branch and row whose text has what is asked for.

    An edit leaves out a branch whose text does not have it, so long as the other has it. A read needs it in each. A
    class of tokens may be missing in some rows of an edit.
    """
    text, timeline = outline.text(), outline.timeline
    branches = timeline.select_branches(op.branch or op.default_branch)
    found = {(branch, row): text.find(branch, row, op.tokens) for branch in branches for row in rows}
    is_class = isinstance(op.tokens, str) and op.tokens in CLASSES
    enough = (
        any(found.values())
        if is_class and op.edits
        else all((any if op.edits else all)(found[branch, row] for branch in branches) for row in rows)
    )
    if not enough:
        missing = next(row for row in rows if not (any if op.edits else all)(found[branch, row] for branch in branches))
        raise OpError(_what_is_missing(op, words, branches, missing, text))
    return [Group([row], tokens, branch, text.length(branch, row)) for (branch, row), tokens in found.items() if tokens]


def _what_is_missing(op: Op, words: Sequence[str], branches: Sequence[str], row: int, text: StreamText) -> str:
    if isinstance(op.tokens, str) and op.tokens in CLASSES:
        return (
            f"tokens={op.tokens!r}: row {row} has no tokens of this class in {' and '.join(branches)}. This call has "
            f"{', '.join(text.classes())}. Choose rows= that have some; tokens=[{op.tokens!r}] means the word."
        )
    lacking = [branch for branch in branches if not text.find(branch, row, op.tokens)]
    prompts = dict.fromkeys(prompt for branch in lacking for prompt in text.prompts(branch, row))
    where = " nor in ".join(map(repr, prompts)) or "its prompt"
    which = f" (row {row}, {' and '.join(lacking)})" if "uncond" in lacking else ""
    return (
        f"the word {' or '.join(map(repr, words))} is not in {where}{which}. "
        "lens.to_str_tokens(prompt) lists its tokens."
    )


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
