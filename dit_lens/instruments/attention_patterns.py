"""Patterns of attention, computed from q and k of chosen heads while the model draws; nothing else is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_lens.arguments.numbers import list_entries, to_int
from dit_lens.core.execution.at_weights import Probe
from dit_lens.core.execution.attending import ARGUMENTS, tell_cut
from dit_lens.errors import ExecutionError, OpError, PromptError, SiteError, show
from dit_lens.families.layout import find_image_tokens
from dit_lens.families.locations import ImageTokens
from dit_lens.families.sites import Site
from dit_lens.instruments.attention import Attention

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.execution.engine import Engine
    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.request.ops import Op, Steps
    from dit_lens.core.session import Session
    from dit_lens.families.locations import GridRule

Edges: TypeAlias = "list[tuple[int, set[int], Tensor, Tensor]]"  # row, heads, queries and keys


def read_pattern(
    lens: Session,
    prompt: Any,
    block: int | Sequence[int],
    *,
    heads: int | Sequence[int],
    ops: Sequence[Op] | Op = (),
    steps: Steps = -1,
    branch: str = "cond",
    **call: Any,
) -> Attention:
    """See :meth:`dit_lens.DiTLens.read_pattern`."""
    lens.engine.check_weights("patterns of attention need")
    if "batch_size" in call:
        raise PromptError("patterns are read from one batch: leave batch_size= out, and pass fewer prompts at once.")
    blocks = [lens.anatomy.check_block(one) for one in list_numbers("block", block)]
    modules, order = _find_attention(lens, blocks)
    wanted = find_heads(lens, heads, dict.fromkeys(blocks, "attn"))
    outline = lens.outline(prompt, **call)
    if branch not in outline.branches:
        raise OpError(f"a pattern is of one branch, and {branch!r} is not one of {', '.join(outline.branches)}.")
    chosen = outline.select(steps)
    what = {"modules": modules, "heads": wanted, "steps": tuple(chosen)}
    watch = PatternWatch.of(outline, branch, lens.anatomy.grid_rule, **what)
    with lens.engine.within(watch):
        run = lens.run(prompt, ops, **call)
    rows = range(*watch.rows)
    depth, kept = lens.anatomy.depth, watch.stack_kept()
    return Attention(kept, order, tuple(chosen), wanted, watch.image, rows, run, depth, branch, outline.text)


def read_incoming(
    lens: Session, prompt: Any, blocks: Sequence[int], streams: Collection[str], *, branch: str = "cond", **call: Any
) -> dict[tuple[int, str], Tensor]:
    """How much attention every token gets at every step: (block, stream) -> [step, row, token].

    The mean over all heads and queries; no pattern outlives its step. Others: as in
    :meth:`dit_lens.DiTLens.read_pattern`.

    streams: "img", "txt" or both.
    """
    lens.engine.check_weights("patterns of attention need")
    modules, order = _find_attention(lens, blocks)
    outline = lens.outline(prompt, **call)
    steps = tuple(range(outline.steps))
    watch = IncomingWatch.of(outline, branch, lens.anatomy.grid_rule, modules=modules, heads=None, steps=steps)
    with lens.engine.within(watch):
        run = lens.run(prompt, **call)
    tensors = {one: kept.cpu() for one, kept in watch.stack_kept().items()}
    rows, depth = range(*watch.rows), lens.anatomy.depth
    read = Attention(tensors, order, steps, (), watch.image, rows, run, depth)
    return {(one, stream): read.incoming(one, stream) for one in blocks for stream in streams}


def _find_attention(lens: Session, blocks: Sequence[int]) -> tuple[dict[int, str], dict[int, str]]:
    """Block -> the path of its module in the transformer, and the order of the streams inside its attention."""
    found = {one: lens.anatomy.find_attention(one) for one in blocks}
    return {one: path for one, (path, _) in found.items()}, {one: order for one, (_, order) in found.items()}


def list_numbers(what: str, value: Any) -> list[int]:
    """One number or several, of whatever integer type."""
    single = to_int(value)
    found = [to_int(one) for one in list_entries(value) or ()] if single is None else [single]
    if not found or None in found:
        raise OpError(f"{what} {show(value)} is not a number or a list of numbers.")
    return [one for one in found if one is not None]


def find_heads(lens: Session, heads: Any, modules: Mapping[int, str]) -> tuple[int, ...]:
    """The numbers of heads, counted from the end where they are negative.

    heads: one or several.
    modules: block -> which attention of it is meant, "attn" or "cross".

    Raises OpError where a block has no such head, or where one would be another in each block.
    """
    found: dict[int, list[int]] = {}
    for block, module in modules.items():
        try:
            count = len(lens.anatomy.heads(Site(block, "img", f"{module}.q")))
        except SiteError:  # its module does not count them, so that the run has to
            count = None
        found[block] = [_find_head(head, count, block) for head in list_numbers("head", heads)]
    first, *others = found
    if odd := [block for block in others if found[block] != found[first]]:
        raise OpError(
            f"heads={show(heads)} are heads {found[first]} of block {first} and {found[odd[0]]} of block {odd[0]}, as "
            "these have other numbers of heads. Count from 0, or take the blocks one by one."
        )
    return tuple(found[first])


def _find_head(head: int, count: int | None, block: int) -> int:
    """The number of one head; count: how many there are, None where only the run can tell."""
    if count is None and head < 0:
        raise OpError(f"head {head} counts from the end, but how many block {block} has only the run can tell.")
    if count is not None and not -count <= head < count:
        raise OpError(f"head {head} does not exist: block {block} has {count}, 0 to {count - 1}.")
    return head if count is None else head % count


class _Mode(TorchFunctionMode):
    """Shows a watch every call of scaled dot-product attention."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and self.watch.block is not None:
            self.watch.see({**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})})
        elif func is tell_cut and self.watch.block is not None:
            self.watch.see_again(*args)
        return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class Watch(Probe, ABC):
    """Sees the attention of chosen blocks in a run, and keeps what is made of it.

    modules: block -> the path, in the transformer, of the module in which its attention is computed.
    heads: those to keep; None: all.
    steps: those to keep.
    planned: how many steps the run has.
    forwards: how many forward passes a step has.
    forward: the one to keep.
    rows: the first of its rows to keep, and the one after the last.
    rule: by which image tokens are found.
    kept: (step, block) -> what was made of it.
    made: forward passes of the transformer so far, less one.
    place: where the forward pass had its image tokens, as :class:`ImageTokens` is made of it.
    """

    modules: dict[int, str]
    heads: tuple[int, ...] | None
    steps: tuple[int, ...]
    planned: int
    forwards: int
    forward: int
    rows: tuple[int, int]
    rule: GridRule
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)
    made: int = field(default=-1, init=False)
    place: tuple[Any, ...] = field(default=((), 0, 0, 0, []), init=False)

    def __post_init__(self) -> None:
        self.block: int | None = None  # where the run is
        self._seen: dict[str, Any] | None = None  # the arguments of the call that was kept there

    @classmethod
    def of(cls, outline: Outline, branch: str, rule: GridRule, **what: Any) -> Self:
        """A watch of one branch of a run. what: its other arguments."""
        forward, number = outline.timeline.locate(branch)
        rows = (number * outline.rows, (number + 1) * outline.rows)
        passes = len(outline.timeline.forwards)
        return cls(planned=outline.steps, forwards=passes, forward=forward, rows=rows, rule=rule, **what)

    @abstractmethod
    def compute(self, given: dict[str, Any]) -> Tensor | None:
        """What is kept of the attention that is called with these arguments, which are of the chosen rows and heads.

        Edges that were knocked out are at "cut", if any were (:func:`cut_edges`). None where it is not the one that is
        meant.
        """

    @property
    def image(self) -> ImageTokens:
        """Where the forward pass had its image tokens."""
        return ImageTokens(*self.place)

    def see(self, given: dict[str, Any]) -> None:
        """Keeps a call of attention if it is wanted. given: its arguments."""
        step, forward = divmod(self.made, self.forwards)
        if forward == self.forward and step in self.steps and (step, self.block) not in self.kept:
            self._check_heads(given["query"])
            found = self.compute(self._choose(given))
            if found is not None and self.block is not None:
                self.kept[step, self.block], self._seen = found, given

    def see_again(self, query: Tensor, edges: Edges) -> None:
        """Keeps the call of attention with this query, if it was wanted, without the edges that were knocked out."""
        if self._seen is None or query is not self._seen["query"]:
            return
        first, last = self.rows
        count = query.shape[1]
        places = {head: i for i, head in enumerate(range(count) if self.heads is None else self.heads)}
        cut = [
            (row - first, [places[head] for head in sorted(heads) if head in places], queries, keys)
            for row, heads, queries, keys in edges
            if first <= row < last
        ]
        found = self.compute({**self._choose(self._seen), "cut": cut})
        if found is not None and self.block is not None:
            self.kept[self.made // self.forwards, self.block] = found

    @contextmanager
    def around(self, engine: Engine) -> Generator[None]:
        """Follows the transformer; whatever happens, its hooks are removed."""
        transformer = engine.pipe.transformer

        def begin(_: Any, args: tuple, kwargs: dict) -> None:
            self.made += 1
            step, forward = divmod(self.made, self.forwards)
            if forward == self.forward and step in self.steps:
                image = find_image_tokens((args, kwargs), self.rule)
                self.place = (tuple(image.grid), image.count, image.first, image.total, list(image.starts))

        def leave(*_: Any) -> None:
            self.block = self._seen = None

        handles = [transformer.register_forward_pre_hook(begin, with_kwargs=True)]
        for number, path in self.modules.items():
            module = transformer.get_submodule(path)
            handles.append(module.register_forward_pre_hook(lambda *_, number=number: setattr(self, "block", number)))
            handles.append(module.register_forward_hook(leave))
        try:
            with _Mode(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def stack_kept(self) -> dict[int, Tensor]:
        """Block -> [step, ...]."""
        planned = self.planned * self.forwards
        if self.made + 1 != planned:
            raise ExecutionError(
                f"the transformer was called {self.made + 1} times instead of {planned}: the batch was split, as "
                "memory ran out. Pass fewer prompts at once."
            )
        missing = sorted({(step, block) for step in self.steps for block in self.modules} - set(self.kept))
        if missing:
            step, block = missing[0]
            raise ExecutionError(
                f"block {block} called no scaled dot-product attention at step {step}. Is another attention backend "
                "set? pipe.transformer.set_attention_backend('native') has patterns."
            )
        for block in self.modules:
            if len({self.kept[step, block].shape for step in self.steps}) > 1:
                raise ExecutionError(f"block {block} has other tokens at other steps. Read its steps one by one.")
        return {block: torch.stack([self.kept[step, block] for step in self.steps]) for block in self.modules}

    def _check_heads(self, query: Tensor) -> None:
        """Where no module counts its heads, so that they could not be checked before the run."""
        count = query.shape[1]
        for head in self.heads or ():
            if not 0 <= head < count:
                raise OpError(f"head {head} does not exist: block {self.block} has {count}, 0 to {count - 1}.")

    def _choose(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of attention for the chosen rows and heads alone; every head has a key of its own."""
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        count = query.shape[1]
        heads = list(range(count) if self.heads is None else self.heads)
        shared = count // key.shape[1]  # heads that share a key
        rows = slice(*self.rows)
        if mask is not None:
            mask = mask.expand(*query.shape[:2], query.shape[-2], key.shape[-2])[rows, heads]
        chosen = {"query": query[rows, heads], "key": key[rows, [head // shared for head in heads]], "attn_mask": mask}
        return {**chosen, "is_causal": bool(given.get("is_causal")), "scale": given.get("scale")}


class PatternWatch(Watch):
    """Keeps patterns, in main memory."""

    def compute(self, given: dict[str, Any]) -> Tensor:
        """[row, head, query, key]."""
        return _form_pattern(given).cpu()


def _form_pattern(given: dict[str, Any]) -> Tensor:
    """softmax(q k / sqrt(d) + mask): [row, head, query, key]."""
    query, key, mask, scale = given["query"], given["key"], given["attn_mask"], given["scale"]
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given["is_causal"]:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if (gone := cut_edges(given)) is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(gone, -torch.inf)
    return scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)


def cut_edges(given: dict[str, Any]) -> Tensor | None:
    """Which edges were knocked out: bool [row, head, query, key]; None where none were.

    given: arguments of attention for chosen rows and heads, with (row, heads, queries, keys) at "cut".
    """
    if not given.get("cut"):
        return None
    query, key = given["query"], given["key"]
    gone = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool, device=query.device)
    for row, heads, queries, keys in given["cut"]:
        some = torch.tensor(heads, dtype=torch.long, device=query.device)
        gone[row, some[:, None, None], queries[:, None], keys] = True
    return gone


def take_head(given: dict[str, Any], head: int) -> dict[str, Any]:
    """The arguments of attention for one of the chosen heads."""
    taken = {**given, **{name: given[name][:, head : head + 1] for name in ("query", "key")}}
    if given["attn_mask"] is not None:
        taken["attn_mask"] = given["attn_mask"][:, head : head + 1]
    taken["cut"] = [(row, [0], *edges) for row, heads, *edges in given.get("cut", ()) if head in heads]
    return taken


class IncomingWatch(Watch):
    """Keeps how much attention every token gets."""

    def compute(self, given: dict[str, Any]) -> Tensor:
        """The pattern's mean over heads and queries, head by head, so that memory holds one at a time.

        [row, 1, 1, key].
        """
        found = given["query"].new_zeros((), dtype=torch.float32)
        for head in range(given["query"].shape[1]):
            found = found + _form_pattern(take_head(given, head)).mean(-2, keepdim=True)
        return found / given["query"].shape[1]
