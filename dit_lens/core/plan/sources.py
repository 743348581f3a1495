"""Where values of edits come from: a tensor, a tensor per site, or a Run; all become [step, row, token, channel].

What is added is a number or [channel], or [step, channel].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.request.ops import to_real_tensor
from dit_lens.core.request.text_tokens import StreamText, match_tokens
from dit_lens.core.runs.reading import Reading, find_reading
from dit_lens.core.runs.run import Run
from dit_lens.errors import OpError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.plan.outline import Outline
    from dit_lens.families.sites import Site


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an op needs from its source at one site.

    op: the name of the op, for messages.
    means: whether means per channel are wanted instead of values per token.
    family: of the model.
    site: the site.
    steps, rows, tokens, channels: those to be replaced, in the order in which they are named; None means all.
    words: where tokens were chosen by the text of one branch and row: the words or class, the branch, the row.
    unordered: which of "steps", "rows", "tokens" and "channels" were named as a set, which has no order.
    outline: of the run.
    width: the number of channels at the site.
    """

    op: str
    means: bool
    family: str
    site: Site
    steps: list[int]
    rows: list[int] | None
    tokens: list[int] | None
    words: tuple[Any, str, int] | None
    channels: list[int] | None
    unordered: frozenset[str]
    outline: Outline
    width: int

    @property
    def name(self) -> str:
        """The name of the site."""
        return self.site.name


@dataclass(frozen=True)
class Values:
    """What a source holds for an op at one site.

    by_branch: branch (None: the same for all) -> [s or 1, b or 1, n or 1, d], steps, tokens and channels as chosen.
    rows: the numbers of its rows; one row stands for all.
    masks: branch -> which of these tokens it has, bool [b, n]; all of them where a branch is left out. What the
        pipeline masked is no data, and neither is what was not read.
    unmatched: row -> what is said where it is chosen, as its words are not those to replace.
    levels: the noise level of every step of its run, where that is known.
    """

    by_branch: dict[str | None, Tensor]
    rows: tuple[int, ...]
    masks: dict[str | None, Tensor] = field(default_factory=dict)
    unmatched: dict[int, str] = field(default_factory=dict)
    levels: tuple[float, ...] | None = None


def source_values(source: Any, wanted: Wanted) -> Values:
    """What a source holds, whichever form it has; OpError if it is not a source, or does not fit."""
    if isinstance(source, Run):
        return _from_run(source, wanted)
    if (reading := find_reading(source)) is not None:
        if wanted.name not in reading:
            raise OpError(f"{wanted.op}: the source never read {wanted.name}.{nearest(wanted.name, reading)}")
        _check_family("read", reading.family, wanted)
        return replace(_from_reading(reading, reading.shape_of_grid, wanted), levels=reading.levels)
    if isinstance(source, Mapping):
        if wanted.name not in source:
            raise OpError(f"{wanted.op}: the source has no tensor for {wanted.name}.{nearest(wanted.name, source)}")
        source = source[wanted.name]
    if not hasattr(source, "shape"):
        raise OpError(
            f"{wanted.op} at {wanted.name}: {type(source).__name__} is not a valid source. "
            "Give a Run, a tensor, or a mapping site -> tensor."
        )
    of_branches = {branch: _fit(tensor, wanted) for branch, tensor in _by_branch(source, wanted).items()}
    count = next(iter(of_branches.values())).shape[1]
    named = wanted.rows is not None and count == len(wanted.rows) < wanted.outline.rows
    return Values(of_branches, tuple(wanted.rows or ()) if named else tuple(range(count)))


def _by_branch(source: Tensor, wanted: Wanted) -> dict[str | None, Tensor]:
    """A plain tensor as it is, for all branches; one of both, [s, 2, b, n, d] with cond first, as two."""
    tensor = to_real_tensor(source, f"{wanted.op} at {wanted.name}: the source").detach()
    if wanted.means or tensor.ndim != 5 or tensor.shape[1] != 2:
        return {None: tensor}
    return {"cond": tensor[:, 0], "uncond": tensor[:, 1]}


def _from_run(run: Run, wanted: Wanted) -> Values:
    _check_family("run", run.provenance["family"], wanted)
    return replace(_from_reading(run.reading(wanted.name), run.grid, wanted), levels=tuple(run.sigmas))


def _check_family(what: str, family: str | None, wanted: Wanted) -> None:
    if family not in (None, wanted.family):
        raise OpError(
            f"{wanted.op}: the source {what} is of {family}, this model is {wanted.family}. "
            "Channels of one family mean nothing in another."
        )


def _from_reading(reading: Reading, grid: tuple[int, ...] | None, wanted: Wanted) -> Values:
    """What a read holds for an op. grid: image tokens of the run it is from."""
    if reading.features:
        raise OpError(
            f"{wanted.op}: the source read features of a dictionary at {wanted.name}, which are no channels. Read the "
            "site itself."
        )
    if wanted.means:
        if reading.reduce != "mean":
            raise OpError(
                f"{wanted.op} needs a run that read {wanted.name} with reduce='mean'; this one was read with "
                f"reduce={reading.reduce!r}."
            )
        means = {b: value.mean(1, keepdim=True).unsqueeze(2) for b, value in reading.by_branch(wanted.name).items()}
        return Values({branch: _pick(value, reading, wanted) for branch, value in means.items()}, (0,))
    if reading.reduce is not None:
        raise OpError(
            f"{wanted.op}: the source run kept {wanted.name} only as reduce={reading.reduce!r}. "
            "Read it without reduce= to swap it."
        )
    if wanted.site.stream == "img" and grid is not None and wanted.outline.grid not in (None, grid):
        raise OpError(
            f"{wanted.op}: the source run has a grid of {' x '.join(map(str, grid))} tokens, this one "
            f"{wanted.outline.grid[0]} x {wanted.outline.grid[1]}. Run both at one size."
        )
    if isinstance(reading.tokens, Mapping) and wanted.name in reading.tokens:
        return _from_steps(reading, reading.tokens[wanted.name], wanted)
    if isinstance(reading.tokens, Mapping):
        return _from_words(reading, reading.tokens, wanted)
    if reading.tokens is None and wanted.words is not None:
        return _from_text(reading, wanted.words[1], wanted)
    of_branches = reading.by_branch(wanted.name)
    values = {branch: _pick(value, reading, wanted) for branch, value in of_branches.items()}
    found = reading.masks.get(wanted.name)
    if found is None:
        return Values(values, reading.rows)
    masks = dict(zip(of_branches, found if reading.both else [found], strict=True))
    picked = {branch: _pick_tokens(mask[None], reading, wanted)[0] for branch, mask in masks.items()}
    return Values(values, reading.rows, picked)


def _from_steps(reading: Reading, tokens: Sequence[Sequence[int]], wanted: Wanted) -> Values:
    """What a read holds whose tokens are others at each step, for an op of one step. tokens: of its steps."""
    held = dict(zip(reading.steps, tokens, strict=True))
    of_step = held.get(wanted.steps[0], ()) if len(wanted.steps) == 1 else ()
    if wanted.tokens is None or not set(wanted.tokens) <= set(of_step):
        raise OpError(
            f"{wanted.op}: the source run read {wanted.name} at other tokens at every step (a TokenSet), which are not "
            "those to replace. Give the op the same tokens=, or read all tokens."
        )
    positions = [list(of_step).index(token) for token in wanted.tokens]
    return Values(
        {
            branch: _pick_channels(value, reading, wanted)[:, :, positions]
            for branch, value in reading.by_branch(wanted.name).items()
        },
        reading.rows,
    )


def _from_words(reading: Reading, tokens: Mapping[str, Sequence[Sequence[int]]], wanted: Wanted) -> Values:
    """What a read holds whose tokens are others in each row and branch; a row that lacks some has none of them.

    tokens: branch -> those of each row.
    """
    asked = wanted.tokens or ()
    if not asked or not any(set(asked) <= set(row) for rows in tokens.values() for row in rows):
        raise OpError(
            f"{wanted.op}: the source run read {wanted.name} at other tokens in other rows and branches "
            f"({list_some([list(row) for rows in tokens.values() for row in rows])}), which are not those to replace "
            f"({list_some(list(asked)) or 'all'}). Read rows and branches one by one (rows=, branch=), or read all "
            "tokens."
        )
    values: dict[str | None, Tensor] = {}
    masks: dict[str | None, Tensor] = {}
    for branch, value in reading.by_branch(wanted.name).items():
        rows = [list(row) for row in tokens[str(branch)]]
        held = [[row.index(one) if one in row else -1 for one in asked] for row in rows]
        chosen = _pick_channels(value, reading, wanted)
        values[branch] = torch.stack([chosen[:, i, positions] for i, positions in enumerate(held)], 1)
        masks[branch] = torch.tensor(held) >= 0
    return Values(values, reading.rows, masks)


def _from_text(reading: Reading, branch: str, wanted: Wanted) -> Values:
    """What a read of all tokens holds of some words, wherever they stand in its own text. branch: of the words."""
    of_branches = reading.by_branch(wanted.name)
    value, text = of_branches.get(branch), _text_of(reading, wanted)
    if value is None:  # another branch of the op holds it, or it is told
        return Values({other: _pick_channels(some, reading, wanted) for other, some in of_branches.items()}, (0,))
    value = _pick_channels(value, reading, wanted)
    found, unmatched = [], {}
    for row in reading.rows:
        missing = value.shape[2] - text.length(branch, row)  # what rows of batches were filled up with
        if missing < 0 or text.count not in (None, value.shape[2]):
            raise OpError(
                f"{wanted.op}: the source has {value.shape[2]} tokens at {wanted.name}, and the text of its run has "
                f"{text.length(branch, row)} (row {row}, {branch}) here, so where its words stand cannot be told. Use "
                "token indices, which go by number."
            )
        try:
            tokens = match_words(wanted, text, branch, row)
        except OpError as problem:
            unmatched[row], tokens = str(problem), [0] * len(wanted.tokens or ())
        found.append([token + (missing if text.pads_in_front() else 0) for token in tokens])
    picked = torch.stack([value[:, i, tokens] for i, tokens in enumerate(found)], 1)
    masks = reading.masks.get(wanted.name)
    if masks is None:
        return Values({branch: picked}, reading.rows, {}, unmatched)
    mask = masks[list(of_branches).index(branch)] if reading.both else masks
    held = torch.stack([mask[i, tokens] for i, tokens in enumerate(found)])
    return Values({branch: picked}, reading.rows, {branch: held}, unmatched)


def _text_of(reading: Reading, wanted: Wanted) -> StreamText:
    """The text of the run that a read is of; OpError where nobody knows it."""
    text = StreamText(unknown="it was stored without its prompt") if reading.call is None else None
    text = wanted.outline.text_of(reading.call or {}) if text is None else text
    if text.unknown is not None:
        raise OpError(
            f"{wanted.op} at {wanted.name}: where the words of tokens= stand in the source cannot be told: "
            f"{text.unknown}. Use token indices, which go by number."
        )
    return text


def match_words(wanted: Wanted, text: StreamText, branch: str, row: int) -> list[int]:
    """For each token of the words to replace the one of the same place in a row of the source; OpError where none is.

    wanted: with words.
    text: of the source.
    branch, row: of that.
    """
    asked, _, target = wanted.words or ("", "", 0)
    pairs = match_tokens((wanted.outline.text(), branch, target), (text, branch, row), asked)
    if pairs is None:
        there = text.find(branch, row, asked)
        raise OpError(
            f"{wanted.op} at {wanted.name}: the tokens of {asked!r} are {list_some(wanted.tokens or [])} in row "
            f"{target} of this run, and {list_some(there) or 'none'} in row {row} of the source ({branch}), so they do "
            "not correspond one to one. Choose what has as many tokens in both, or token indices, which go by number."
        )
    return [pairs[token] for token in wanted.tokens or ()]


def is_by_branch(value: Mapping) -> bool:
    """Whether a mapping goes from branches, and not from sites."""
    return len(value) > 0 and all(isinstance(key, str) and key in ("cond", "uncond") for key in value)


def pick_vectors(value: Any, wanted: Wanted) -> dict[str | None, Tensor]:
    """What is added at one site: branch (None: the same for all) -> a number, [channel] or [step, channel].

    value: one of these; branch -> one of them; or site -> either.
    wanted: where it is to be added.
    """
    if isinstance(value, Mapping) and not is_by_branch(value):
        if wanted.name not in value:
            raise OpError(
                f"{wanted.op}: value= has no entry for {wanted.name}.{nearest(wanted.name, list(value)[:8])} Narrow "
                "the op's site to those, for instance site=list(value)."
            )
        value = value[wanted.name]
    if isinstance(value, Mapping) and is_by_branch(value):
        return {branch: _fit_vector(one, wanted) for branch, one in value.items()}
    return {None: _fit_vector(value, wanted)}


def pick_branch(found: Mapping[str | None, Tensor], branch: str, name: str) -> Tensor:
    """What there is for a branch; OpError where there is nothing. name: the op and its site, for the message."""
    tensor = found.get(branch, found.get(None))
    if tensor is None:
        raise OpError(
            f"{name}: the source holds {', '.join(map(str, found))} only, not the {branch!r} branch. Give both (a Run "
            f"that read branch='both'), or pass branch={next(iter(found))!r}."
        )
    return tensor


def _fit_vector(value: Any, wanted: Wanted) -> Tensor:
    """A value as a number, [channel] or [step, channel], with the chosen steps."""
    tensor = to_real_tensor(value, f"{wanted.op} at {wanted.name}: value")
    width = wanted.width if wanted.channels is None else len(wanted.channels)
    steps, total = len(wanted.steps), wanted.outline.steps
    fits = tensor.ndim <= 2 and (tensor.ndim == 0 or tensor.shape[-1] in (1, width))
    if not fits or (tensor.ndim == 2 and tensor.shape[0] not in (1, steps, total)):
        raise OpError(
            f"{wanted.op} at {wanted.name}: value has shape {list(tensor.shape)}; it must be a number or a vector over "
            f"the {width} chosen channels, or [step, channel] for {steps} chosen steps or all {total} of the run."
        )
    if not bool(tensor.float().isfinite().all()):
        raise OpError(f"{wanted.op} at {wanted.name}: value is not finite, or too large for an activation.")
    if tensor.ndim:
        _refuse_two_orders(tensor.shape[-1], wanted.channels, wanted.width, wanted, "channels")
    if tensor.ndim == 2:
        _refuse_two_orders(tensor.shape[0], wanted.steps, total, wanted, "steps")
    if tensor.ndim == 2 and tensor.shape[0] == total != 1:
        return tensor[wanted.steps]
    return tensor


def _pick(value: Tensor, reading: Reading, wanted: Wanted) -> Tensor:
    """The steps, tokens and channels an op wants, out of what a run has read."""
    value = _pick_channels(value, reading, wanted)
    return value if wanted.means else _pick_tokens(value, reading, wanted)


def _pick_channels(value: Tensor, reading: Reading, wanted: Wanted) -> Tensor:
    """The steps and channels an op wants."""
    if reading.total_steps != wanted.outline.steps:
        raise OpError(
            f"{wanted.op}: the source run has {reading.total_steps} steps, this one {wanted.outline.steps}. "
            "Use the same num_inference_steps."
        )
    value = value[_positions(wanted, wanted.steps, reading.steps, "steps")]
    channels = list(range(wanted.width)) if wanted.channels is None else wanted.channels
    if reading.channels[wanted.name] is not None:
        value = value[..., _positions(wanted, channels, reading.channels[wanted.name], "channels")]
    elif wanted.channels is not None:
        value = value[..., channels]
    return value


def _pick_tokens(value: Tensor, reading: Reading, wanted: Wanted) -> Tensor:
    """The tokens an op wants, on axis 2, by their numbers; all there is of a site of one vector for each image."""
    there = wanted.outline.tokens(wanted.site.stream)
    if wanted.site.point.startswith("mod."):
        return value
    if reading.tokens is None:
        if there is not None and value.shape[2] != there:
            raise OpError(
                f"{wanted.op}: the source run has {value.shape[2]} tokens at {wanted.name}, this one {there}. "
                "Use prompts of equal length in tokens, and images of one size."
            )
        return value if wanted.tokens is None else value[:, :, wanted.tokens]
    if wanted.tokens is None and there is None:
        raise OpError(
            f"{wanted.op}: the source run read only some tokens of {wanted.name}, and how many there are only this run "
            "can tell. Name those to replace with tokens=."
        )
    tokens = list(range(there or 0)) if wanted.tokens is None else wanted.tokens
    return value[:, :, _positions(wanted, tokens, reading.tokens, "tokens")]


def _positions(wanted: Wanted, asked: list[int], kept: Any, what: str) -> list[int]:
    position = {index: i for i, index in enumerate(kept)}
    missing = [index for index in asked if index not in position]
    if missing:
        raise OpError(
            f"{wanted.op}: the source run read {wanted.name} without {what} {list_some(missing)}; it has "
            f"{list_some(list(kept))}. Read more, or narrow {what}=."
        )
    return [position[index] for index in asked]


def list_some(values: list[Any]) -> str:
    """The first of some values, for a message, and how many there are."""
    return ", ".join(map(str, values[:8])) + (f" ... ({len(values)} in all)" if len(values) > 8 else "")


def _fit(tensor: Tensor, wanted: Wanted) -> Tensor:
    """A plain tensor as [s, b, n, d]; axes that are full are narrowed to what the op chose."""
    if wanted.means and tensor.ndim > 1:  # [step, channel]
        if prod(tensor.shape[1:-1]) != 1:
            raise OpError(
                f"{wanted.op} at {wanted.name}: a mean is [channel] or [step, channel], and this one has shape "
                f"{list(tensor.shape)}. Give the run or the read itself, whose rows are averaged."
            )
        tensor = tensor.reshape(len(tensor), 1, 1, -1)
    if not 1 <= tensor.ndim <= 4:
        raise OpError(
            f"{wanted.op} at {wanted.name}: a source tensor is [step, row, token, channel] or its last axes, or of "
            f"both branches [step, 2, row, token, channel]; this one has {tensor.ndim}."
        )
    tensor = tensor.reshape(*(1,) * (4 - tensor.ndim), *tensor.shape)
    all_tokens = wanted.outline.tokens(wanted.site.stream)
    tensor = _narrow_axis(tensor, 3, wanted.channels, wanted.width, wanted, "channels")
    tensor = _narrow_axis(tensor, 2, wanted.tokens, all_tokens, wanted, "tokens")
    tensor = _fit_rows(tensor, wanted)
    return _narrow_axis(tensor, 0, wanted.steps, wanted.outline.steps, wanted, "steps")


def _fit_rows(tensor: Tensor, wanted: Wanted) -> Tensor:
    """A tensor with one row, one for each of the run, or one for each that was named, in their order."""
    rows = wanted.outline.rows
    some = wanted.rows is not None and tensor.shape[1] == len(wanted.rows) < rows
    _refuse_two_orders(tensor.shape[1], wanted.rows, rows, wanted, "rows")
    return tensor if some else _narrow_axis(tensor, 1, None, rows, wanted, "rows")


def _refuse_two_orders(size: int, chosen: list[int] | None, full: int | None, wanted: Wanted, what: str) -> None:
    """OpError where values may go by numbers as well as by the order in which an op names them: all, in another order.

    size: of the axis of the values.
    chosen: the indices that the op names; None means all.
    full: how many there are; None if unknown.
    wanted: what the op asks of the source, for messages.
    what: the name of the axis, for messages.
    """
    if chosen is None or size == 1:
        return
    if what in wanted.unordered and size == len(chosen) and size != full:
        raise OpError(
            f"{wanted.op} at {wanted.name}: {what}= is a set ({list_some(chosen)}), which has no order, and there is a "
            f"value for each of its {size}. Name them in a list, in the order of the values."
        )
    if full not in (None, size) or chosen == sorted(chosen):
        return
    if sorted(chosen) == list(range(size)):
        raise OpError(
            f"{wanted.op} at {wanted.name}: {what}= names all {size} in another order than ascending "
            f"({list_some(chosen)}), and there is a value for each: they may be meant in either order. Name them in "
            f"ascending order, or leave {what}= out, with values in that order."
        )


def _narrow_axis(
    tensor: Tensor, axis: int, chosen: list[int] | None, full: int | None, wanted: Wanted, what: str
) -> Tensor:
    """Takes of one axis what the op chose: a full axis goes by numbers, one of the chosen size is in their order.

    OpError where it may be either.

    tensor: the source, [step, row, token, channel].
    axis: which of them.
    chosen: the indices that the op chose; None means all.
    full: the size of the whole axis; None if unknown.
    wanted: what the op asks of the source, for messages.
    what: the name of the axis, for messages.
    """
    size = tensor.shape[axis]
    if size == 1 or (chosen is None and full in (None, size)):
        return tensor
    _refuse_two_orders(size, chosen, full, wanted, what)
    if chosen is not None and size == full:
        return tensor.index_select(axis, torch.tensor(chosen, dtype=torch.long))
    if chosen is not None and size == len(chosen):
        return tensor
    allowed = sorted({1, *([len(chosen)] if chosen is not None else []), *([full] if full is not None else [])})
    raise OpError(
        f"{wanted.op} at {wanted.name}: the source has shape {list(tensor.shape)} as [step, row, token, "
        f"channel]; {what} may be {' or '.join(map(str, allowed))}, not {size}."
    )
