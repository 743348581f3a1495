"""Patterns of attention, computed from q and k of chosen heads while the model draws; nothing else is stored."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_lens.errors import ExecutionError, OpError, SiteError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.lens import DiTLens
    from dit_lens.ops import Steps
    from dit_lens.plan import Plan
    from dit_lens.run import Run
    from dit_lens.steps import Timeline

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Attention:
    """How much every query token attends to every key token: rows sum to 1.

    tensors: block -> [step, row, head, query, key], float32, in main memory. order: block -> "text_first",
    "image_first" or "own": where text and image tokens lie among them. steps, heads: which were kept. run: the run.
    """

    tensors: dict[int, Tensor]
    order: dict[int, str]
    steps: tuple[int, ...]
    heads: tuple[int, ...]
    run: Run

    def __getitem__(self, block: int) -> Tensor:
        if block not in self.tensors:
            raise SiteError(f"block {block} was not read; there are {', '.join(map(str, self.tensors))}.")
        return self.tensors[block]

    def between(self, block: int, queries: str = "img", keys: str = "txt") -> Tensor:
        """The part from one stream to another: [step, row, head, query, key] with image tokens row by row.

        queries, keys: "img" or "txt". Reference tokens and padding belong to neither.
        """
        tensor = self[block]
        return tensor[..., self._span(block, queries, tensor.shape[-2]), :][
            ..., self._span(block, keys, tensor.shape[-1])
        ]

    def _span(self, block: int, stream: str, length: int) -> slice:
        h, w = self.run.grid[-2:]
        image = h * w * (self.run.grid[0] if len(self.run.grid) == 3 else 1)
        if stream not in ("img", "txt"):
            raise OpError(f"{stream!r} is no stream. Say 'img' or 'txt'.")
        if stream == "txt" and length == image:
            raise OpError(f"block {block} attends from and to image tokens only, so there is no text.")
        text_first = self.order[block] == "text_first"
        if stream == "img":
            return slice(length - image, length) if text_first else slice(0, image)
        return slice(0, length - image) if text_first else slice(image, length)


def read_pattern(
    lens: DiTLens,
    prompt: Any,
    block: int | Sequence[int],
    *,
    heads: int | Sequence[int],
    steps: Steps = -1,
    branch: str = "cond",
    **call: Any,
) -> Attention:
    """See :meth:`dit_lens.DiTLens.read_pattern`."""
    depth = lens.anatomy.depth
    blocks = [block] if isinstance(block, int) else list(block)
    for one in blocks:
        if not -depth <= one < depth:
            raise SiteError(f"block {one} does not exist: there are {depth}, 0 to {depth - 1}.")
    blocks = [one % depth for one in blocks]
    wanted = tuple([heads] if isinstance(heads, int) else heads)
    order = {one: lens.anatomy.attention(one)[1] for one in blocks}
    timeline, plan = lens.planned(prompt, **call)
    if branch not in timeline.branches:
        raise OpError(f"this call has no {branch!r} branch, only {', '.join(timeline.branches)}.")
    chosen = timeline.select(steps)
    watch = Watch(wanted, {(step, one) for step in chosen for one in blocks}, timeline, plan, branch)
    with watch.on(lens, blocks):
        run = lens.run(prompt, **call)
    return Attention(watch.stacked(chosen, blocks), order, tuple(chosen), wanted, run)


class Watch(TorchFunctionMode):
    """Sees every call of scaled dot-product attention, and keeps the pattern of those that are wanted."""

    def __init__(
        self, heads: tuple[int, ...], wanted: set[tuple[int, int]], timeline: Timeline, plan: Plan, branch: str
    ):
        super().__init__()
        self.heads, self.wanted, self.timeline = heads, wanted, timeline
        self.call, self.block_of_branch = timeline.place(branch)
        self.rows = plan.program["rows"]
        self.made = -1  # calls of the transformer so far
        self.block: int | None = None
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and self.block is not None:
            given = {**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})}
            self._check_heads(given["query"])
            step, call = divmod(self.made, len(self.timeline.calls))
            key = (step, self.block)
            if call == self.call and key in self.wanted and key not in self.kept:
                self.kept[key] = self._pattern(given)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def on(self, lens: DiTLens, blocks: list[int]) -> Generator[None]:
        """Follows the pipeline's transformer; whatever happens, its hooks are removed."""

        def begin(*_: Any) -> None:
            self.made += 1

        def leave(*_: Any) -> None:
            self.block = None

        handles = [lens.pipe.transformer.register_forward_pre_hook(begin)]
        for number in blocks:
            module, _ = lens.anatomy.attention(number)
            handles.append(module.register_forward_pre_hook(lambda *_, number=number: setattr(self, "block", number)))
            handles.append(module.register_forward_hook(leave))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def stacked(self, steps: list[int], blocks: list[int]) -> dict[int, Tensor]:
        """Block -> [step, row, head, query, key]."""
        missing = sorted(self.wanted - set(self.kept))
        if missing:
            step, block = missing[0]
            raise ExecutionError(
                f"block {block} called no scaled dot-product attention at step {step}. Is another attention backend "
                "set? pipe.transformer.set_attention_backend('native') has patterns."
            )
        return {block: torch.stack([self.kept[step, block] for step in steps]) for block in blocks}

    def _check_heads(self, query: Tensor) -> None:
        """At the first attention, long before the steps that are kept."""
        count = query.shape[1]
        for head in self.heads:
            if not 0 <= head < count:
                raise OpError(f"head {head} does not exist: block {self.block} has {count}, 0 to {count - 1}.")

    def _pattern(self, given: dict[str, Any]) -> Tensor:
        """softmax(q k / sqrt(d) + mask) of the chosen rows and heads: [row, head, query, key]."""
        query, key, mask, scale = given["query"], given["key"], given.get("attn_mask"), given.get("scale")
        count = query.shape[1]
        rows = slice(self.block_of_branch * self.rows, (self.block_of_branch + 1) * self.rows)
        shared = count // key.shape[1]  # heads that share a key
        q = query[rows, list(self.heads)].float()
        k = key[rows, [head // shared for head in self.heads]].float()
        scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if given.get("is_causal"):
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if mask is not None:
            mask = mask.expand(*query.shape[:2], *scores.shape[-2:])[rows, list(self.heads)]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).cpu()
