"""Patterns of attention that were read: their parts by stream, one number for every head, and figures of them.

Letters: s step, h head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.arguments.checks import checked
from dit_lens.arguments.saving import saved_by
from dit_lens.core.request.indices import to_indices
from dit_lens.errors import OpError, PromptError, SiteError, check_choice
from dit_lens.families.layout import select_stream

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from torch import Tensor

    from dit_lens.core.request.text_tokens import StreamText
    from dit_lens.core.runs.run import Run
    from dit_lens.families.locations import ImageTokens


@dataclass(frozen=True)
class Attention:
    """How much every query token attends to every key token: rows sum to 1, or to 0 where every key is knocked out.

    tensors: block -> [step, row, head, query, key], float32, in main memory.
    order: block -> "text_first", "image_first", "ragged" or "own": where text and image tokens lie among them.
    steps, heads: which were kept.
    image: where the forward pass had its image tokens.
    rows: which of its rows these are.
    run: the run.
    depth: how many blocks the model has; -1 is the last of them.
    branch: which one they are of.
    text: finds the tokens of words.
    """

    tensors: dict[int, Tensor]
    order: dict[int, str]
    steps: tuple[int, ...]
    heads: tuple[int, ...]
    image: ImageTokens
    rows: range
    run: Run
    depth: int
    branch: str = "cond"
    text: Callable[[], StreamText] | None = field(default=None, repr=False)

    save = saved_by("Its run has, found.run.save(folder); its numbers are found.tensors, block -> tensor.")

    @checked
    def __getitem__(self, block: int) -> Tensor:
        return self.tensors[find_kept(block, self.tensors, self.depth)]

    @checked
    def between(self, block: int, queries: str = "img", keys: str = "txt") -> Tensor:
        """The part from one stream to another: [step, row, head, query, key] with image tokens row by row.

        queries, keys: "img" or "txt": the tokens that a read of that stream has, so references belong to neither.
        """
        block = find_kept(block, self.tensors, self.depth)
        tensor = self[block]
        across = self._token_indices(block, queries, tensor.shape[-2])[None, :, None, :, None]
        down = self._token_indices(block, keys, tensor.shape[-1])[None, :, None, None, :]
        return tensor.take_along_dim(across, -2).take_along_dim(down, -1)

    @checked
    def incoming(self, block: int, stream: str) -> Tensor:
        """What the tokens of a stream get of the queries and heads that were kept, on average: [step, row, token]."""
        block = find_kept(block, self.tensors, self.depth)
        tensor = self[block].mean((2, 3))
        return tensor.take_along_dim(self._token_indices(block, stream, tensor.shape[-1])[None], -1)

    @checked
    def measure(self, what: str = "text") -> dict[int, Tensor]:
        """One number for every head, of the queries of the image: block -> [step, row, head].

        what: "text", the share of their attention that goes to text; or "entropy", how evenly it is spread over all
            keys: 0 where each attends to one, 1 where each attends to all alike.
        """
        check_choice(what, ("text", "entropy"), "measure of a head")
        if what == "text":
            return {block: self.between(block).sum(-1).mean(-1) for block in self.tensors}
        return {block: self._measure_entropy(block) for block in self.tensors}

    def _measure_entropy(self, block: int) -> Tensor:
        tensor = self.tensors[block]
        queries = self._token_indices(block, "img", tensor.shape[-2])[None, :, None, :]
        entropies = torch.special.entr(tensor).sum(-1) / math.log(max(tensor.shape[-1], 2))
        return entropies.take_along_dim(queries, -1).mean(-1)

    @checked
    def figure(self, block: int | None = None, *, step: int | None = None, row: int = 0) -> go.Figure:
        """The patterns of a block's heads, side by side.

        block: one of those that were read; may be left out where there is one.
        step: one of those that were kept, by its number in the run; the last by default.
        row: of the run.
        """
        from dit_lens.plots import pattern_figure

        block, s, row = self._place(block, step, row)
        patterns = {f"head {head}": self.tensors[block][s, row, i].numpy() for i, head in enumerate(self.heads)}
        first = {"text_first": "text before image", "image_first": "image before text"}.get(self.order[block])
        facts = f"queries downwards, keys across{f', {first}' if first else ''}; brightness is the square root"
        return pattern_figure(patterns, title=f"Attention in block {block}, step {self.steps[s]}", subtitle=facts)

    @checked
    def sheet(self, what: str = "text", *, step: int | None = None, row: int = 0) -> go.Figure:
        """One number for every head that was read, blocks by heads.

        what: as in :meth:`measure`.
        step, row: as in :meth:`figure`.
        """
        from dit_lens.plots import head_figure

        _, s, row = self._place(next(iter(self.tensors)), step, row)
        values = {block: found[s, row].tolist() for block, found in self.measure(what).items()}
        titles = {
            "text": "Share of the image's attention that goes to text",
            "entropy": "How evenly the image attends (1: to all tokens alike)",
        }
        numbers = f"heads {', '.join(map(str, self.heads))}" if self.heads != tuple(range(len(self.heads))) else ""
        facts = f"step {self.steps[s]}, mean over image tokens{f'; {numbers}, from the left' if numbers else ''}"
        return head_figure(values, title=titles[what], subtitle=facts)

    @checked
    def words(
        self, words: str | Sequence[str], block: int | None = None, *, step: int | None = None, row: int = 0
    ) -> go.Figure:
        """How much each part of the image attends to words, head by head, over the image.

        block, step, row: as in :meth:`figure`.
        words: one or several of the row's prompt; the attention to all tokens of a word counts.
        """
        from dit_lens.plots import head_word_figure

        block, s, row = self._place(block, step, row)
        if self.text is None or not self.run.images:
            raise OpError("this run kept latents and no image to lay maps over. Leave output_type= out.")
        if len(self.run.grid or ()) != 2:
            raise OpError("tokens of a video have no grid (h, w) to lay over an image; take found.between(block).")
        kept, text = self.between(block)[s, row], self.text()
        tokens = {word: find_word(text, self.branch, row, word) for word in list_words(words)}
        maps = {
            f"head {head}": {
                word: kept[i][:, some].sum(-1).unflatten(0, self.run.grid).numpy() for word, some in tokens.items()
            }
            for i, head in enumerate(self.heads)
        }
        facts = f"block {block}, step {self.steps[s]}; each panel from its lowest value to its highest"
        title = "Where the image attends to each word"
        return head_word_figure(self.run.images[row], maps, title=title, subtitle=facts)

    def _place(self, block: int | None, step: int | None, row: int) -> tuple[int, int, int]:
        """The number of a block, the place of a step among those that were kept, and the number of a row."""
        if block is None and len(self.tensors) > 1:
            raise OpError(f"blocks {', '.join(map(str, self.tensors))} were read. Say which is meant.")
        block = find_kept(next(iter(self.tensors)) if block is None else block, self.tensors, self.depth)
        if step is not None and step not in self.steps:
            raise OpError(f"step {step} was not read; there are {', '.join(map(str, self.steps))}.")
        rows = self.tensors[block].shape[1]
        row = to_indices(row, rows, "row", "there are", "images")[0]
        return block, len(self.steps) - 1 if step is None else self.steps.index(step), row

    def _token_indices(self, block: int, stream: str, length: int) -> Tensor:
        """Which of ``length`` tokens belong to a stream: [row, token]."""
        if stream not in ("img", "txt"):
            raise OpError(f"{stream!r} is not a valid stream. Say 'img' or 'txt'.")
        if stream == "txt" and self.order[block] == "own":
            raise OpError(f"block {block} attends from and to image tokens only, so there is no text.")
        if length < self.image.total:
            raise OpError(
                f"block {block} attends in parts; this one has {length} tokens, fewer than the image and its "
                f"references, {self.image.total}. Take self[block] whole, or a step that has no references."
            )
        numbers = torch.arange(length)[None, :, None].expand(self.rows.stop, -1, 1)
        location: Any = {"stream": stream, "layout": self.order[block]}
        chosen, where = select_stream(numbers, location, self.image, self.rows)
        if where is not None and where[1] is not None:
            raise OpError(
                f"the prompts have {', '.join(map(str, where[1].sum(1).tolist()))} text tokens at "
                f"blocks.{block}.{stream}, which fit no one tensor; run prompts of other lengths one by one, or take "
                "self[block] whole."
            )
        return chosen[..., 0]


def find_kept(block: int, kept: Collection[int], depth: int) -> int:
    """The number of a block that was kept, counted from the model's end if it is negative; SiteError for another.

    >>> find_kept(-1, [5, 7], depth=8)
    7
    """
    if (number := block + depth if block < 0 else block) not in kept:
        raise SiteError(f"block {block} was not read; there are {', '.join(map(str, kept))}.")
    return number


def list_words(words: Any) -> list[str]:
    """One word or several, as a list; OpError for what is none, or given twice."""
    found = [words] if isinstance(words, str) else list(words)
    if wrong := [one for one in found if not isinstance(one, str) or not one.strip()]:
        raise OpError(f"{wrong[0]!r} is not a word.")
    if len(set(found)) < len(found):
        raise OpError(f"words are given twice: {', '.join(found)}.")
    return found


def find_word(text: StreamText, branch: str, row: int, word: str) -> list[int]:
    """The tokens of a word in the text of a row; PromptError where the prompt lacks it."""
    if found := text.find(branch, row, word):
        return found
    prompts = text.prompts(branch, row)
    raise PromptError(
        f"{word!r} is no word of {' / '.join(map(repr, prompts)) or 'an empty prompt'} (row {row}), so there is "
        "nothing to map. Words that are not in the prompt: lens.word_map(method='concept', concepts=[...])."
    )
