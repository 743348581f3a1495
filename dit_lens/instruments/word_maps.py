"""Maps of words: how much every image token has to do with a word, by attention or by what attention puts out.

Letters: s step, b row, n image token, h w token grid, w word, d channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_lens.analysis.subjects import threshold
from dit_lens.arguments.checks import checked
from dit_lens.arguments.saving import saved_by
from dit_lens.core.execution.at_weights import Probe
from dit_lens.core.request.attention import mask_edges
from dit_lens.core.request.division import Division, refuse_several_images
from dit_lens.core.request.indices import to_indices
from dit_lens.core.request.ops import Apply, Swap
from dit_lens.core.request.values import is_several, list_values
from dit_lens.core.session import list_ops
from dit_lens.errors import ExecutionError, OpError, PromptError, SiteError, check_choice, nearest
from dit_lens.families.layout import select_stream
from dit_lens.families.locations import ImageTokens
from dit_lens.families.sites import Site
from dit_lens.instruments.attention import find_kept, find_word, list_words
from dit_lens.instruments.attention_patterns import Watch, cut_edges, find_heads, list_numbers, take_head

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.request.ops import Op, Steps
    from dit_lens.core.request.text_tokens import StreamText
    from dit_lens.core.runs.run import Run
    from dit_lens.core.session import Session
    from dit_lens.families import Anatomy

CROSS = "cross"  # the order of tokens in attention whose keys are the text's tokens alone


@dataclass(frozen=True, eq=False)
class WordMap:
    """How much every image token has to do with words.

    tensors: word -> [block, step, row, h, w], float32, in main memory; [..., f, h, w] of a video.
    blocks, steps: which were kept.
    method: "attention": values are shares of a token's attention; "concept": shares of the words compared.
    run: the run.
    depth: how many blocks the model has; -1 is the last of them.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    blocks: tuple[int, ...]
    steps: tuple[int, ...]
    method: str
    run: Run = field(repr=False)
    depth: int = field(repr=False)

    save = saved_by("Its run has, found.run.save(folder); its numbers are found.tensors, word -> tensor.")

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @checked
    def __getitem__(self, word: str) -> Tensor:
        """The mean over blocks: [step, row, h, w]."""
        if word not in self.tensors:
            raise OpError(f"there is no map of {word!r}.{nearest(word, self.tensors)}")
        return self.tensors[word].mean(0)

    @checked
    def mask(self, word: str | None = None, *, block: int | None = None, row: int = 0) -> np.ndarray:
        """Where a word is, bool [h, w]: the mean over steps (and blocks), cut in two by Otsu's threshold.

        word: one of the words; may be left out where there is one.
        block: one of the blocks, by its number in the model (-1: the model's last); by default their mean.
        row: of the run.
        """
        found = self._mean(word, block, row)
        return found > threshold(found)

    @checked
    def overlay(
        self, word: str | None = None, *, block: int | None = None, row: int = 0, truth: Any = None
    ) -> go.Figure:
        """The mask of a word over the image. truth: the true one, bool [H, W]. The others as in :meth:`mask`."""
        from dit_lens.plots import cluster_overlay

        mask = self.mask(word, block=block, row=row)
        where = "" if block is None else f", block {find_kept(block, self.blocks, self.depth)}"
        title = f"“{self._one(word)}” by {self.method}{where}"
        return cluster_overlay(self._image(row), mask, truth=truth, title=title)

    @checked
    def figure(self, row: int = 0) -> go.Figure:
        """One prompt's image, and the map of every word under it: the mean over blocks and steps."""
        from dit_lens.plots import word_map_figure

        maps = {word: self._mean(word, None, row) for word in self.words}
        small = "share of an image token's attention" if self.method == "attention" else "share among the words"
        facts = f"{small}; mean of {len(self.blocks)} blocks and {len(self.steps)} steps"
        return word_map_figure(self._image(row), maps, title="Where the words are", subtitle=facts)

    def _image(self, row: int) -> Image:
        if not self.run.images:
            raise OpError("this run kept latents and no image to lay a map over. Leave output_type= out.")
        return self.run.images[self._find_row(row)]

    def _find_row(self, row: int) -> int:
        """One of the rows with maps; those of concepts come after them."""
        return to_indices(row, next(iter(self.tensors.values())).shape[2], "row", "there are", "images")[0]

    def _one(self, word: str | None) -> str:
        if word is None and len(self.words) > 1:
            raise OpError(f"there are maps of {', '.join(map(repr, self.words))}. Say which is meant.")
        return self.words[0] if word is None else word

    def _mean(self, word: str | None, block: int | None, row: int) -> np.ndarray:
        """The mean over steps and blocks of one row's map, or of one block's: [h, w]."""
        word = self._one(word)
        kept = self[word]
        if block is not None:
            kept = self.tensors[word][self.blocks.index(find_kept(block, self.blocks, self.depth))]
        if kept.ndim != 4:
            raise OpError(f"the maps of a video are [step, row, f, h, w]; draw frames of found[{word!r}] one by one.")
        return kept[:, self._find_row(row)].mean(0).numpy()


def word_map(
    lens: Session,
    prompt: Any,
    words: str | Sequence[str],
    *,
    method: str = "attention",
    concepts: Sequence[str] = (),
    blocks: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    ops: Sequence[Op] | Op = (),
    steps: Steps = None,
    **call: Any,
) -> WordMap:
    """See :meth:`dit_lens.DiTLens.word_map`."""
    lens.engine.check_weights("maps of words need")
    check_choice(method, ("attention", "concept"), "method")
    if "batch_size" in call:
        raise PromptError(
            "maps of words are read from one batch: leave batch_size= out, and pass fewer prompts at once."
        )
    asked = Asked(blocks, heads, ops, steps, call)
    if method == "concept":
        return _map_by_concept(lens, prompt, list_words(words), list_words(concepts), asked)
    if concepts:
        raise OpError("concepts= are compared by what attention puts out: pass method='concept' with it.")
    return _map_by_attention(lens, prompt, list_words(words), asked)


@dataclass(frozen=True)
class Asked:
    """What both methods are asked for; see :meth:`dit_lens.DiTLens.word_map`."""

    blocks: int | Sequence[int] | None
    heads: int | Sequence[int] | None
    ops: Sequence[Op] | Op
    steps: Steps
    call: dict[str, Any]


def _find_words(text: StreamText, rows: int, words: Sequence[str]) -> list[list[list[int]]]:
    """[row][word] -> its tokens in the text; PromptError where a prompt lacks a word."""
    return [[find_word(text, "cond", row, word) for word in words] for row in range(rows)]


def _part(kept: Tensor, words: Sequence[str], run: Run) -> dict[str, Tensor]:
    """Word -> [block, step, row, h, w], of [block, step, row, n, word]."""
    maps = kept.cpu().unflatten(3, run.grid)
    return {word: maps[..., i].contiguous() for i, word in enumerate(words)}


# By attention


def _map_by_attention(
    lens: Session,
    prompt: Any,
    words: list[str],
    asked: Asked,
) -> WordMap:
    """The share of each image token's attention that goes to the tokens of a word, by the model's own attention.

    The pattern of n tokens is never formed: attention is called once more with values that are 1 at the tokens of a
    word and 0 elsewhere, one channel a word, so that what it puts out is the share.
    """
    if not words:
        raise OpError("there are no words to map. Give at least one of the prompt.")
    modules, orders = _find_text_attention(lens, asked.blocks)
    outline = lens.outline(prompt, **asked.call)
    text, chosen = outline.text(), outline.select(asked.steps)
    tokens = _find_words(text, outline.rows, words)
    lengths = [text.length("cond", row) for row in range(outline.rows)]
    kinds = {block: "cross" if order == CROSS else "attn" for block, order in orders.items()}
    wanted = None if asked.heads is None else find_heads(lens, asked.heads, kinds)
    what = {"modules": modules, "heads": wanted, "steps": tuple(chosen), "orders": orders, "tokens": tokens}
    watch = WordWatch.of(outline, "cond", lens.anatomy.grid_rule, **what, length=max(lengths))
    with lens.engine.within(watch):
        run = lens.run(prompt, asked.ops, **asked.call)
    kept = torch.stack(list(watch.stack_kept().values()))
    return WordMap(_part(kept, words, run), tuple(modules), tuple(chosen), "attention", run, lens.anatomy.depth)


@dataclass(eq=False, kw_only=True)
class WordWatch(Watch):
    """Keeps the share of each image token's attention that goes to the tokens of words.

    orders: block -> the order of the streams in its attention, or CROSS.
    tokens: [row][word] -> tokens of the text.
    length: tokens of the longest text.
    """

    orders: dict[int, str]
    tokens: list[list[list[int]]]
    length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._marks: dict[
            tuple[Any, ...], Tensor
        ] = {}  # for each arrangement of keys: few, and the same in most blocks

    def compute(self, given: dict[str, Any]) -> Tensor | None:
        """[row, n, word]."""
        key, block = given["key"], self.block
        if block is None or (self.orders[block] == CROSS and key.shape[2] != self.length):
            return None  # of an image that is given as well
        image, order = self.image, self.orders[block]
        form = (order, key.shape, key.dtype, key.device, image.first, image.total, *image.starts)
        if form not in self._marks:
            self._marks[form] = _mark_tokens(self, order, key, self.tokens)
        share = _share_of_marks(given, self._marks[form])[..., : len(self.tokens[0])]
        location: Any = {"stream": "img", "layout": "own" if order == CROSS else order}
        return select_stream(share, location, _own_rows(self), range(len(share)))[0]


def _list_blocks(anatomy: Anatomy, blocks: int | Sequence[int] | None) -> Sequence[int]:
    """The numbers of blocks; None: of all."""
    if blocks is None:
        return range(anatomy.depth)
    return [anatomy.check_block(one) for one in list_numbers("block", blocks)]


def _find_text_attention(lens: Session, blocks: int | Sequence[int] | None) -> tuple[dict[int, str], dict[int, str]]:
    """Block -> the module in which image tokens attend to text, and the order of the streams in it, or CROSS.

    Modules are told by their paths in the transformer.

    blocks: those that are wanted, all of which must have it; None: all that have it.
    """
    anatomy = lens.anatomy
    wanted = _list_blocks(anatomy, blocks)
    crossed = {site.block: site for site in anatomy.sites if site.point == "cross_out"}
    modules: dict[int, str] = {}
    orders: dict[int, str] = {}
    for block in wanted:
        if block in crossed:
            modules[block] = anatomy.locate(crossed[block]).module.removeprefix("transformer.")
            orders[block] = CROSS
        elif all(anatomy.why_not(block, stream, "resid_pre") is None for stream in ("img", "txt")):
            modules[block], orders[block] = anatomy.find_attention(block)
        elif blocks is not None:
            raise SiteError(f"blocks.{block} of {lens.family.name} attends to no text.")
    if not modules:
        raise SiteError(f"no block of {lens.family.name} is known to attend to text, so words have no maps.")
    return modules, orders


def _mark_tokens(watch: Watch, order: str, key: Tensor, tokens: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Values for attention, 1 in channel w at the tokens of word w: [row, head, key, channel].

    There are as many channels as keys have, or more, as fast kernels want it so.

    watch: knows where image tokens are.
    order: of the streams among the keys.
    key: [row, head, key, channel].
    tokens: [row][word] -> tokens of the text.
    """
    rows, heads, length, width = key.shape
    image = _own_rows(watch)
    numbers = torch.arange(length)[None, :, None].expand(rows, -1, 1)
    if order != CROSS:
        location: Any = {"stream": "txt", "layout": order}
        numbers = select_stream(numbers, location, image, range(rows))[0]
    marks = torch.zeros(rows, 1, length, max(width, len(tokens[0])))
    for row, words in enumerate(tokens):
        count = image.starts[row] if order == "ragged" else numbers.shape[1]
        for word, some in enumerate(words):
            if max(some) >= count:
                raise ExecutionError(
                    f"block {watch.block} attends to {count} text tokens of row {row}, where the word has token "
                    f"{max(some)} of them."
                )
            marks[row, 0, numbers[row, list(some), 0], word] = 1
    return marks.to(key).expand(-1, heads, -1, -1)


def _share_of_marks(given: dict[str, Any], marks: Tensor) -> Tensor:
    """What attention makes of marks, mean over heads: [row, query, channel].

    Where edges were knocked out, head by head, so that memory holds one mask at a time; a query without any key has 0.

    given: arguments of attention, without values.
    marks: the values, [row, head, key, channel].
    """
    if not given.get("cut"):
        return scaled_dot_product_attention(**given, value=marks).float().mean(1)
    found, count = marks.new_zeros((), dtype=torch.float32), marks.shape[1]
    for head in range(count):
        one = take_head(given, head)
        gone = cut_edges(one)
        del one["cut"]
        lost = None
        if gone is not None:
            one["attn_mask"], lost = mask_edges(one["attn_mask"], gone)
        share = scaled_dot_product_attention(**one, value=marks[:, head : head + 1]).float()
        found = found + (share if lost is None else share.masked_fill(lost, 0))[:, 0]
    return found / count


def _own_rows(watch: Watch) -> ImageTokens:
    """Where image tokens are in the watched rows alone."""
    grid, count, first, total = watch.image.grid, watch.image.count, watch.image.first, watch.image.total
    return ImageTokens(grid, count, first, total, watch.image.starts[slice(*watch.rows)])


# By what attention puts out


def _map_by_concept(
    lens: Session,
    prompt: Any,
    words: list[str],
    concepts: list[str],
    asked: Asked,
) -> WordMap:
    """How alike what attention puts out for image tokens is to what it puts out for words.

    A concept is a prompt of its own in a further row of the batch, whose image tokens are those of row 0 before every
    block: its text reads that image, and nothing of row 0 reads it.
    """
    if len(words) + len(concepts) < 2:
        raise OpError("words are compared with one another: give at least two, or concepts= to compare with.")
    if both := set(words) & set(concepts):
        raise OpError(f"{min(both)!r} is a word and a concept. Name it once.")
    probes, call = [], asked.call
    lens.outline(prompt, **call)  # told first, what is wrong with the call alone
    if concepts:
        refuse_several_images({**lens.defaults, **call}, "concepts read one image")
        if not isinstance(prompt, str):
            raise PromptError("concepts read the image of one prompt: give one, as a string.")
        rows = list(range(1, 1 + len(concepts)))
        probes = [Swap("blocks.*.img.resid_pre", source="row:0", rows=rows, branch="cond")]
        prompt, call = [prompt, *concepts], _share_with_concepts(lens, call, len(concepts))
    found = _find_outputs(lens, asked.blocks)
    outline = lens.outline(prompt, **call)
    text, chosen = outline.text(), outline.select(asked.steps)
    images = 1 if concepts else outline.rows
    tokens = _find_words(text, images, words)
    read = [text.find("cond", 1 + i, "prompt") for i in range(len(concepts))]
    compare = Comparison(tokens, read)
    reads = [
        Apply([img, txt], fn=compare.note, steps=chosen, branch="cond", channels=_find_channels(lens, img, asked.heads))
        for img, txt in found.values()
    ]
    with lens.engine.within(compare):
        run = lens.run(prompt, [*probes, *list_ops(asked.ops), *reads], **call)
    kept = torch.stack([torch.stack([compare.kept[step, block] for step in chosen]) for block in found])
    return WordMap(
        _part(kept, [*words, *concepts], run), tuple(found), tuple(chosen), "concept", run, lens.anatomy.depth
    )


def _share_with_concepts(lens: Session, call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The call of one prompt as that of a batch with so many concepts, whose rows are given what row 0 is given."""
    if isinstance(call.get("generator"), list | tuple):
        raise PromptError("generator= lists one for each image, and concepts take rows of the batch. Pass seed=.")
    shared = Division.of(lens.pipe, lens.family).share(call, [0] * (1 + count), 1)
    seed = call.get("seed")
    return {**shared, "seed": list_values(seed)[0]} if is_several(seed) else shared


def _find_outputs(lens: Session, blocks: int | Sequence[int] | None) -> dict[int, tuple[str, str]]:
    """Block -> the sites of what attention puts out for image and for text tokens.

    blocks: those that are wanted, all of which must have both; None: all that have.
    """
    anatomy = lens.anatomy
    wanted = _list_blocks(anatomy, blocks)
    found = {}
    for block in wanted:
        why = anatomy.why_not(block, "img", "attn.z") or anatomy.why_not(block, "txt", "attn.z")
        if why is None:
            found[block] = (Site(block, "img", "attn.z").name, Site(block, "txt", "attn.z").name)
        elif blocks is not None:
            raise SiteError(f"words and image are not compared in blocks.{block}: {why}.")
    if not found:
        raise SiteError(
            f"text and image of {lens.family.name} share no attention, so they are not compared by what it puts out. "
            "Take method='attention'."
        )
    return found


def _find_channels(lens: Session, site: str, heads: int | Sequence[int] | None) -> list[int] | None:
    """The channels of some heads."""
    if heads is None:
        return None
    every, wanted = lens.heads(site), list_numbers("head", heads)
    if wrong := [head for head in wanted if not -len(every) <= head < len(every)]:
        raise OpError(f"head {wrong[0]} does not exist: {site} has {len(every)}, 0 to {len(every) - 1}.")
    return [channel for head in wanted for channel in every[head]]


@dataclass(eq=False)
class Comparison(Probe):
    """Keeps the share of each word in the likeness of image tokens to words.

    tokens: [row][word] -> tokens of the text of rows with images.
    read: the tokens of each concept, in the rows after those.
    kept: (step, block) -> [row, n, word].
    """

    tokens: list[list[list[int]]]
    read: list[list[int]]
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.waiting: dict[tuple[int, int, str], Tensor] = {}

    def note(self, tensor: Tensor, hook: Any) -> None:
        """What :class:`~dit_lens.Apply` calls."""
        images, expected = len(self.tokens), len(self.tokens) + len(self.read)
        if len(tensor) != expected:
            raise ExecutionError(
                f"{hook.name} had {len(tensor)} rows instead of {expected}: the batch was split, as memory ran out. "
                "Pass fewer prompts or concepts at once."
            )
        site = Site.parse(hook.name)
        step, block = hook.step, site.block or 0
        self.waiting[step, block, site.stream] = self._mean_words(tensor) if site.stream == "txt" else tensor[:images]
        if (step, block, "img") in self.waiting and (step, block, "txt") in self.waiting:
            image, word = (self.waiting.pop((step, block, stream)).float() for stream in ("img", "txt"))
            # Helbling et al. 2025, arXiv 2502.04320, eq. 8: softmax over concepts of dot products of attention outputs
            self.kept[step, block] = (image @ word.transpose(1, 2)).softmax(-1)

    def _mean_words(self, text: Tensor) -> Tensor:
        """[row, word, channel] of text [row, token, channel]: the mean over a word's tokens; concepts come last."""
        images = len(self.tokens)
        concepts = [text[images + i, list(tokens)].mean(0) for i, tokens in enumerate(self.read)]
        return torch.stack(
            [
                torch.stack([*(text[row, list(tokens)].mean(0) for tokens in words), *concepts])
                for row, words in enumerate(self.tokens)
            ]
        )
