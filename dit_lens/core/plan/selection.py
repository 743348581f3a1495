"""Which rows, tokens and channels an op means, as explicit indices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.indices import to_indices
from dit_lens.core.request.text_tokens import CLASSES
from dit_lens.core.request.token_set import TokenSet
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
    at: (site, step) where tokens are others at every one of them, as in a TokenSet; None for all.
    """

    rows: list[int] | None
    tokens: list[int] | None
    branch: str | None = None
    text_tokens: int | None = None
    at: tuple[str, int] | None = None

    def holds(self, site: str, step: int) -> bool:
        """Whether the group is of a site and step."""
        return self.at in (None, (site, step))


def select_groups(op: Op, sites: Sequence[Site], steps: Sequence[int], outline: Outline) -> list[Group]:
    """The rows and tokens of an op: one group, or where they are chosen by the text one for each branch and row."""
    return _split_by_words(_select_by_tokens(op, sites, steps, outline), op, outline)


def _select_by_tokens(op: Op, sites: Sequence[Site], steps: Sequence[int], outline: Outline) -> list[Group]:
    """The groups that ``rows``, ``tokens`` and ``mask`` name."""
    rows = select_rows(op, outline)
    rows = rows if rows is None or op.sees_rows else sorted(rows)
    streams = {site.stream for site in sites}
    if words := list_named(op.tokens):
        if streams != {"txt"}:
            what = "a class of tokens" if _is_class(op.tokens) else "a word" if len(words) == 1 else "words"
            raise OpError(
                f"tokens={op.tokens!r} names {what}, which only the txt stream has; {op.site!r} is not that. "
                "Use mask= or token indices."
            )
        if any(site.point.startswith("mod.") for site in sites):
            raise OpError(f"{op.site!r} is one vector for each image, not tokens. Use channels=, not tokens= or mask=.")
        return _groups_by_text(op, list(range(outline.rows)) if rows is None else rows, outline)
    if (op.mask is not None or op.tokens is not None) and any(site.point.startswith("mod.") for site in sites):
        raise OpError(f"{op.site!r} is one vector for each image, not tokens. Use channels=, not tokens= or mask=.")
    if op.mask is not None:
        if streams != {"img"} or op.tokens is not None:
            raise OpError("mask= chooses image tokens: use it on the img stream, and without tokens=.")
        return [Group(rows, select_mask(op.mask, outline))]
    if isinstance(op.tokens, TokenSet):
        return _groups_by_step(op, op.tokens, rows, sites, steps, outline)
    return [Group(rows, _tokens(op, streams, outline))]


def _split_by_words(groups: list[Group], op: Op, outline: Outline) -> list[Group]:
    """The groups, of rows and branches whose text has the same tokens of ``op.words_of_rows``; the others have no part.

    Where that names no words, and where no text has them, groups stay as they are.
    """
    words: Any = op.words_of_rows
    if not list_named(words):
        return groups
    text, found = outline.text(), []
    for group, one in itertools.product(groups, outline.timeline.select_branches(op.branch or op.default_branch)):
        rows: dict[tuple[int, ...], list[int]] = {}
        for row in range(outline.rows) if group.rows is None else group.rows:
            rows.setdefault(tuple(text.find(one, row, words)), []).append(row)
        if group.branch in (None, one):
            found += [replace(group, rows=some, branch=one) for keys, some in rows.items() if keys]
    return found or groups


def _groups_by_step(
    op: Op, tokens: TokenSet, rows: list[int] | None, sites: Sequence[Site], steps: Sequence[int], outline: Outline
) -> list[Group]:
    """One group for each site and step: an edit leaves out those without tokens, so long as one has some."""
    found = [
        Group(rows, tokens.at(site.name, step, outline.steps, outline.tokens(site.stream)), at=(site.name, step))
        for site in sites
        for step in steps
    ]
    if not any(group.tokens for group in found):
        raise OpError(
            f"tokens= has no {tokens.kind} at any of the chosen sites and steps, so that {type(op).__name__} has "
            "nothing to touch. tokens.sizes tells where there are some; leave the op out, or find them by a lower bar."
        )
    if op.edits:
        return [group for group in found if group.tokens]
    sizes = {
        site.name: {len(group.tokens or ()) for step in steps for group in found if group.at == (site.name, step)}
        for site in sites
    }
    for site, some in sizes.items():
        if 0 in some or (len(some) > 1 and getattr(op, "reduce", None) is None):
            raise OpError(
                f"tokens= has {' or '.join(map(str, sorted(some)))} {tokens.kind} at {site}, from step to step, which "
                "fit no one tensor. Read steps one by one (steps=), find as many at each (k=)"
                + ("." if 0 in some else ", or reduce over them (reduce=).")
            )
    return found


def select_rows(op: Op, outline: Outline) -> list[int] | None:
    """The rows of an op in the order in which they are named; None means all."""
    rows = None if op.rows is None else to_indices(op.rows, outline.rows, "row", "this run has", "images")
    if rows == []:
        raise OpError("rows=[] selects no image. Leave rows= out for all of them, or leave the op out.")
    return rows


def list_named(tokens: Any) -> list[str]:
    """The words that tokens= names, or a class; none where it holds indices."""
    listed = [tokens] if isinstance(tokens, str) else list(tokens) if isinstance(tokens, list | tuple) else []
    return listed if all(isinstance(word, str) for word in listed) else []


def _groups_by_text(op: Op, rows: list[int], outline: Outline) -> list[Group]:
    """One group for each branch and row whose text has what is asked for.

    An edit leaves out a branch whose text does not have a word, so long as the other has it, and rows that have no
    tokens of a class, so long as one has. A read needs them in each row and branch. Of several words each must be
    somewhere.
    """
    text, branches = outline.text(), outline.timeline.select_branches(op.branch or op.default_branch)
    asked: Any = op.tokens
    found = {(branch, row): text.find(branch, row, asked) for branch in branches for row in rows}
    some = any if op.edits else all
    missing = [row for row in rows if not some(found[branch, row] for branch in branches)]
    if missing and not (op.edits and _is_class(asked) and any(found.values())):
        lacking = [branch for branch in branches if not found[branch, missing[0]]]
        raise OpError(_what_is_missing(asked, lacking, missing[0], text))
    for word in [] if _is_class(asked) else list_named(asked):
        if not any(text.find(branch, row, [word]) for branch, row in found):
            raise OpError(
                f"the word {word!r} of tokens={asked!r} is in no prompt of the chosen rows and branches. Leave it out. "
                "lens.to_str_tokens(prompt) lists the tokens of a prompt."
            )
    return [Group([row], tokens, branch, text.length(branch, row)) for (branch, row), tokens in found.items() if tokens]


def _is_class(asked: Any) -> bool:
    return isinstance(asked, str) and asked in CLASSES


def _what_is_missing(asked: Any, lacking: Sequence[str], row: int, text: StreamText) -> str:
    """What is said of a word or class that the text of a row has not.

    asked: of the op.
    lacking: the branches that have none.
    row: the first such row.
    text: of the call.
    """
    if _is_class(asked):
        return (
            f"tokens={asked!r}: row {row} has no tokens of this class in {' and '.join(lacking)}. This call has "
            f"{', '.join(text.classes())}. Choose rows= that have some; tokens=[{asked!r}] means the word."
        )
    prompts = dict.fromkeys(prompt for branch in lacking for prompt in text.prompts(branch, row))
    where = " nor in ".join(map(repr, prompts)) or "its prompt"
    which = f" (row {row}, {' and '.join(lacking)})" if "uncond" in lacking else ""
    return (
        f"the word {' or '.join(map(repr, list_named(asked)))} is not in {where}{which}. "
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


def select_mask(given: Any, outline: Outline) -> list[int]:
    """The image tokens of a mask."""
    import numpy as np

    try:
        mask = np.asarray(given.tolist() if hasattr(given, "tolist") else given)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise OpError(
            f"mask= must be a bool array [h, w]; this {type(given).__name__} cannot be read as one ({problem})."
        ) from problem
    if mask.ndim not in (2, 3) or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise OpError(
            f"mask= must be a bool array [h, w]; it has shape {list(mask.shape)} and dtype {mask.dtype}. "
            "Threshold it first."
        )
    grid = outline.find_grid()
    if grid is None:
        raise OpError(
            "mask= needs the token grid, and this pipeline could not be followed to where it makes it. Use tokens=, "
            "whose numbers run.grid of a first run tells."
        )
    if mask.shape not in (grid, grid[-2:]):
        frames = ", in every frame or each" if len(grid) == 3 else ""
        raise OpError(
            f"the mask is {' x '.join(map(str, mask.shape))}, but this run has a grid of "
            f"{' x '.join(map(str, grid))} image tokens{frames}. Resize it to the grid (dit_lens.clusters.to_grid), or "
            "change height= and width=."
        )
    mask = np.broadcast_to(mask, grid)
    if not mask.any():
        raise OpError("mask= chooses no token: every entry is False. Leave the op out, or choose another mask.")
    return [int(token) for token in np.flatnonzero(mask)]
