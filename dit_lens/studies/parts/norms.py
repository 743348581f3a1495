"""Edits of what the norms of a model make of the residual stream: the two parts of zeroing, each without the other.

Zeroing channels takes away what they held, and makes the next norm raise all others, as less is left to divide by.

norm-frozen  takes away, and raises nothing: norms divide by the statistics they would have had without.
rescaled     takes nothing away, and raises: norms give out the others exactly as large as zeroing would make them.

No input of a norm does either, as what it gives out has one length. So the norms themselves are hooked, by the ops at
the sites around them: those that read the stream as it enters a block or the final norm, and the one between attention
and MLP. A hook goes when its norm has run, at the latest when its block has.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dit_lens.core.request.ops import Apply
from dit_lens.families.sites import Site
from dit_lens.studies.parts.confounds import split_streams
from dit_lens.studies.parts.doses import Doses, note, share_of

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Op, Steps
    from dit_lens.families import Anatomy


class Reader(NamedTuple):
    """What reads a block's output.

    enters: the site of the next block's input, or the final norm's; None: nothing reads it.
    leaves: the site behind it: the next block's output, or the prediction.
    middle: path within the next block of the module that is given the residual between attention and MLP; "" for none.
    """

    enters: str | None
    leaves: str | None
    middle: str = ""


def find_readers(sites: Sequence[str], anatomy: Anatomy) -> dict[str, Reader]:
    """What reads the outputs of blocks: site -> reader. The last block's text is read by nothing.

    sites: outputs of blocks.
    anatomy: of the model.
    """
    known = [site.name for site in anatomy.sites]
    return {site: _add_middle(find_reader(site, known), known, anatomy) for site in sites}


def find_reader(site: str, sites: Collection[str]) -> Reader:
    """What reads a block's output: the next block with the stream, or the final norm.

    >>> find_reader("blocks.0.img", ["blocks.2.img.resid_pre", "final.img"])
    Reader(enters='blocks.2.img.resid_pre', leaves='blocks.2.img', middle='')
    """
    _, block, stream = site.split(".")
    later = (other.split(".") for other in sites if other.endswith(f".{stream}.resid_pre"))
    if number := min((int(other[1]) for other in later if int(other[1]) > int(block)), default=None):
        return Reader(f"blocks.{number}.{stream}.resid_pre", f"blocks.{number}.{stream}")
    return Reader(f"final.{stream}", "velocity") if f"final.{stream}" in sites else Reader(None, None)


def _add_middle(reader: Reader, sites: Collection[str], anatomy: Anatomy) -> Reader:
    middle = f"{reader.leaves}.resid_mid"
    if middle not in sites or reader.enters is None:
        return reader
    block, within = (anatomy.locate(Site.parse(name)).module for name in (reader.enters, middle))
    return reader._replace(middle=within.removeprefix(f"{block}."))


# (norm, tokens that enter it [n, d], branch) -> (what it gives out instead [n, d], the dose)
Change = Callable[[Any, Tensor, str], tuple[Tensor, float]]


def make_frozen_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, readers: Mapping[str, Reader], step: int
) -> list[Op]:
    """Zeroing while norms use the statistics that they would have had without it.

    Its dose is the energy that the tokens which enter a norm lack, as a share of the energy they would have; 0 where no
    norm was held.

    channels: site -> channels that are zeroed.
    row: row of the batch that is edited.
    steps: denoising steps.
    readers: what reads each site.
    step: the step at which the dose is weighed.
    """
    return [op for part in split_streams(channels) for op in _make_frozen_ops(part, row, steps, readers, step)]


def _make_frozen_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, readers: Mapping[str, Reader], step: int
) -> list[Op]:
    first = next(iter(channels))
    cuts: dict[str, Tensor] = {}  # by branch: what the tokens lack

    def cut(x: Tensor, hook: Any) -> Tensor:
        whole = x if hook.name == first else x + cuts[hook.branch]
        new = x.clone()
        new[..., list(channels[hook.name])] = 0
        cuts[hook.branch] = whole - new
        return new

    def freeze(norm: Any, tokens: Tensor, branch: str) -> tuple[Tensor, float]:
        lacking = cuts[branch][0].to(tokens)
        return normalise(norm, tokens, tokens + lacking), share_of(lacking, tokens + lacking)

    ops: list[Op] = []
    for site in channels:
        ops.append(Apply(site, rows=row, steps=steps, fn=cut))
        ops += _make_norm_ops(readers[site], row, steps, freeze, step)
    return ops


def make_rescaled_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, readers: Mapping[str, Reader], step: int
) -> list[Op]:
    """Norms give out all channels but the top as large as if these were zero; nothing is removed.

    Its dose is the share of energy whose zeroing raises the others as much: 1 - 1 / gain^2; 0 where no norm was held.

    channels: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    steps: denoising steps.
    readers: what reads each site.
    step: the step at which the dose is weighed.
    """
    ops: list[Op] = []
    for site, top in channels.items():
        ops += _make_norm_ops(readers[site], row, steps, _raise_others(list(top)), step)
    return ops


def _raise_others(top: list[int]) -> Change:
    def change(norm: Any, tokens: Tensor, _: str) -> tuple[Tensor, float]:
        zeroed = tokens.clone()
        zeroed[..., top] = 0
        old, new = normalise(norm, tokens, tokens), normalise(norm, zeroed, zeroed)
        new[..., top] = old[..., top]
        others = [c for c in range(tokens.shape[-1]) if c not in top]
        return new, 1 - share_of(old[..., others], new[..., others])

    return change


def _make_norm_ops(reader: Reader, row: int, steps: Steps, change: Change, step: int) -> list[Op]:
    """Ops that change what the norms behind a site give out.

    reader: what reads the site.
    row: row of the batch that is edited.
    steps: denoising steps.
    change: (norm, tokens that enter it [n, d], branch) -> (what it gives out instead, the dose).
    step: the step at which the dose is noted.
    """
    if reader.enters is None or reader.leaves is None:
        return []
    doses: Doses = {}
    hooks = NormHooks()

    def enter(x: Tensor, hook: Any) -> None:
        hooks.watch(hook, x[0], reader.middle, change, doses)

    def leave(x: Tensor, hook: Any) -> None:  # noqa: ARG001 an op's function
        hooks.remove(hook.branch)

    return [
        Apply(reader.enters, rows=row, steps=steps, fn=enter),
        Apply(reader.leaves, rows=row, steps=steps, fn=leave),
        *note(reader.leaves, row, step, doses),
    ]


class NormHooks:
    """The hooks on the norms of one module, for one image.

    They hold this object weakly, and go with it: whatever ends a run, none stays behind.
    """

    def __init__(self) -> None:
        self.handles: dict[str, list[Any]] = {}  # by branch

    def __del__(self) -> None:
        for branch in list(self.handles):
            self.remove(branch)

    def remove(self, branch: str) -> None:
        """Takes the hooks of a branch away."""
        for handle in self.handles.pop(branch, ()):
            handle.remove()

    def watch(self, hook: Any, tokens: Tensor, middle: str, change: Change, doses: Doses) -> None:
        """Changes what norms make of these tokens, as they are or as the residual between attention and MLP.

        hook: of the op at the input of the module whose norms are hooked.
        tokens: the image's tokens there, [n, d].
        middle: path of the module that is given that residual; "" for none.
        change: as in :func:`_make_norm_ops`.
        doses: receives the dose of what reads the tokens as they are, by branch.
        """
        me, row, branch, place = weakref.ref(self), hook.rows[0], hook.branch, {}
        self.remove(branch)

        def hold(name: str, norm: Any, args: tuple[Any, ...], given: Any) -> Tensor | None:
            x = args[0] if args else None
            fits = isinstance(x, Tensor) and isinstance(given, Tensor) and x.ndim == 3 and x.shape == given.shape
            if me() is None or not fits or x.shape[-1] != tokens.shape[-1] or row >= len(x):
                return None
            is_middle = bool(middle) and (name == middle or name.startswith(f"{middle}."))
            start = place.get(x.shape[1]) if is_middle else find_tokens(x[row], tokens)
            if start is None:
                return None
            place[x.shape[1]] = start
            where = (row, slice(start, start + len(tokens)))
            entered = x[where]
            if not _is_like(normalise(norm, entered, entered), given[where]):
                return None  # a norm of another formula
            made, dose = change(norm, entered, branch)
            if not is_middle:
                doses[branch] = dose
            new = given.clone()
            new[where] = made.to(given)
            return new

        self.handles[branch] = [
            module.register_forward_hook(partial(hold, name))
            for name, module in hook.module.named_modules()
            if is_norm(module)
        ]


def find_tokens(x: Tensor, tokens: Tensor) -> int | None:
    """Where tokens lie in a longer sequence, bit for bit; None where they do not.

    >>> find_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [3.0]]))
    1

    x: [m, d].
    tokens: [n, d].
    """
    tokens = tokens.to(x)
    starts = (x[: max(0, len(x) - len(tokens) + 1)] == tokens[0]).all(-1).nonzero()[:, 0].tolist()
    return next((start for start in starts if torch.equal(x[start : start + len(tokens)], tokens)), None)


def is_norm(module: Any) -> bool:
    """Whether a module divides tokens by their own size, and is no module that holds such a one."""
    kind = type(module).__name__
    return ("LayerNorm" in kind or "RMSNorm" in kind) and not list(module.children()) and hasattr(module, "eps")


def normalise(norm: Any, tokens: Tensor, like: Tensor) -> Tensor:
    """What LayerNorm or RMSNorm makes of tokens with the statistics of others.

    >>> norm = torch.nn.LayerNorm(2, eps=0.0)
    >>> normalise(norm, torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]])).tolist()
    [[0.0, -2.0]]

    norm: the module, for its eps, weight and bias.
    tokens: [n, d].
    like: those whose mean (of a LayerNorm) and size count, [n, d].
    """
    x, other = tokens.float(), like.float()
    if "LayerNorm" in type(norm).__name__:
        mean = other.mean(-1, keepdim=True)
        x, other = x - mean, other - mean
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    new = x * torch.rsqrt(other.square().mean(-1, keepdim=True) + eps)
    for name, join in (("weight", torch.mul), ("bias", torch.add)):
        if (value := getattr(norm, name, None)) is not None:
            new = join(new, value.float())
    return new


def _is_like(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the second."""
    error, size = (float((x.float()).abs().max()) for x in (one - other.float(), other))
    return error <= 8 * torch.finfo(other.dtype).eps * max(size, 1.0) + 1e-5
