"""The check at load: a family's row is tried on a shrunken clone of the same class, and on the live structure."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.errors import FamilyError
from dit_lens.families.anatomy import Anatomy
from dit_lens.families.example_call import build_call
from dit_lens.families.hooked_clone import MISFITS, HookedClone
from dit_lens.families.layout import from_tokens, pack, replace_tensor, select_stream, select_tensor, to_tokens, unpack
from dit_lens.families.live import Functions, find_difference, find_processors, note_functions
from dit_lens.families.processors import put_processors
from dit_lens.families.row import Family

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

    from dit_lens.families.locations import TensorLocation

TEXT = 5
PROJECTED = {**dict.fromkeys(("attn.q", "attn.k", "attn.v"), "attn.in"), "mlp.pre": "mlp.in"}
WRITES = ("attn_out", "attn2_out", "cross_out", "mlp_out", "ip_out")


@dataclass(frozen=True)
class Check:
    """One statement about a family that was found to hold."""

    name: str
    says: str


def check(anatomy: Anatomy) -> list[Check]:
    """Checks a live transformer; FamilyError says exactly what differs from the family's row, or from what was tried.

    A clone of the same class is tried once per process. Where the live transformer runs something else, such as the
    processors of an adapter, or a class that was patched since, that is tried as well, as far as a clone can have it.
    """
    rules = (anatomy.time_rule(), anatomy.grid_rule)
    tried = _try_class(anatomy.family, type(anatomy.transformer))
    if find_difference(anatomy, tried.functions) is not None:
        tried = _try_clone(anatomy.family, type(anatomy.transformer), find_processors(anatomy))
        if (difference := find_difference(anatomy, tried.functions)) is not None:
            raise FamilyError(f"{anatomy.family.name}: {difference}")
    anatomy.order, anatomy.once, anatomy.tried = tried.order, tried.once, tried.functions
    locations = [anatomy.locate(site) for site in anatomy.sites]
    says = f"{anatomy.depth} blocks, {len(locations)} sites, {len(rules)} rules: all their modules and arguments exist"
    return [Check("structure", says), *tried.checks]


@dataclass(frozen=True)
class Tried:
    """What came of trying a clone.

    checks: the statements that hold.
    order: of the modules of a block, as :attr:`Anatomy.order`.
    once: what has one row for all, as :attr:`Anatomy.once`.
    functions: what ran.
    """

    checks: tuple[Check, ...]
    order: dict[tuple[str, str, str], int]
    once: frozenset[tuple[str, str, str]]
    functions: Functions


@lru_cache
def _try_class(family: Family, transformer: type[ModelMixin]) -> Tried:
    """The row, tried on a tiny random transformer of a class: once per process and class."""
    return _try_clone(family, transformer, ())


def _try_clone(
    family: Family, transformer: type[ModelMixin], processors: Iterable[tuple[tuple[str, str], Any]]
) -> Tried:
    """The row, tried on a tiny random transformer of the same class.

    processors: what computes attentions, by stack and path within a block; others than the class's own are tried too.
    """
    # A device in a with block makes every operation slower: only where new tensors would lie elsewhere.
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), on_cpu:
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs, too
        tiny = transformer(**family.example.config).eval()
        anatomy = Anatomy(family, tiny)
        extra = put_processors(anatomy, processors, TEXT)
        _randomise_weights(tiny)
        call = {**build_call(anatomy, TEXT), **extra}
        anatomy.order = HookedClone(anatomy, call).order()
        clone = HookedClone(Anatomy(family, tiny), call)
        checks = [
            _check_sizes(clone),
            _check_chain(clone),
            _check_residual(clone),
            _check_inputs(clone),
            _check_final(clone),
            _check_modulation(clone),
            _check_grid(clone),
            _check_write(clone),
            _check_readout(clone),
        ]
        once = clone.find_once()
    return Tried(tuple(one for one in checks if one is not None), anatomy.order, once, note_functions(anatomy))


@torch.no_grad()
def _randomise_weights(module: nn.Module) -> None:
    """Parameters that start at zero would hide what passes through them, and some are not initialised at all."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif not parameter.any():
            parameter.normal_(std=0.1)


def _check_sizes(clone: HookedClone) -> Check:
    """Every site has as many channels as its module says."""
    anatomy = clone.anatomy
    for site in clone.points:
        if site.name not in clone.seen:
            continue
        tensor, span, says = clone.seen[site.name], clone.locations[site].span, anatomy.channels(site)
        has = (tensor if span is None else tensor[..., slice(*span)]).shape[-1]
        if has != says:
            raise FamilyError(
                f"{clone.name}: {site} has {has} channels, and its row takes it for {says}. Is its module or its "
                "span wrong?"
            )
    return Check("sizes", "every site has as many channels as its module says")


def _check_chain(clone: HookedClone) -> Check:
    """What leaves block i enters block i + 1, stream by stream."""
    for stack, blocks in zip(clone.anatomy.family.stacks, clone.anatomy.stacks.values(), strict=True):
        for block in blocks[:-1]:
            for stream in {"img", "txt"} - set(stack.rewritten):
                leaving, entering = (
                    clone.seen.get(name)
                    for name in (f"blocks.{block}.{stream}", f"blocks.{block + 1}.{stream}.resid_pre")
                )
                if leaving is not None and entering is not None and not _same(leaving, entering):
                    raise FamilyError(
                        f"{clone.name}: what leaves blocks.{block}.{stream} is not what enters block {block + 1}. "
                        "Is a slot of its stack wrong?"
                    )
    return Check("chain", "what leaves a block enters the next one, in both streams")


def _check_residual(clone: HookedClone) -> Check | None:
    """resid_post = resid_pre + what attention and MLP write, and resid_mid lies between, where the row names them."""
    bases = [name.removesuffix(".mlp_out") for name in clone.seen if name.endswith(".mlp_out")]
    for base in bases:
        writes = {write: clone.seen[f"{base}.{write}"] for write in WRITES if f"{base}.{write}" in clone.seen}
        after = clone.seen[base]
        fits = all(one.shape == after.shape for one in writes.values())
        early = [value for write, value in writes.items() if write not in ("mlp_out", "ip_out")]
        before = torch.stack([clone.seen[f"{base}.resid_pre"], *early]).sum(0) if fits else after
        middle = clone.seen.get(f"{base}.resid_mid", before)
        late = [value for write, value in writes.items() if write in ("mlp_out", "ip_out")]
        if not (fits and _close(middle, before) and _close(after, sum(late, start=before))):
            raise FamilyError(
                f"{clone.name}: {base} is not its input plus {' plus '.join(writes)}. Is a gate or a norm wrong?"
            )
    if not bases:
        return None
    adapter = ", with its IP-Adapter's ip_out," if any(name.endswith(".ip_out") for name in clone.seen) else ""
    return Check(
        "residual", f"a block adds attn_out and mlp_out{adapter} to its input and nothing else; resid_mid lies between"
    )


def _check_inputs(clone: HookedClone) -> Check | None:
    """Projections of attention and MLP, given what enters those, make what they do in the model."""
    tried = 0
    for site in clone.points:
        of = PROJECTED.get(site.point)
        given = clone.seen.get(f"blocks.{site.block}.{site.stream}.{of}")
        made, location = clone.seen.get(site.name), clone.locations[site]
        if given is None or made is None or location.axes != "tokens":
            continue
        with torch.no_grad():
            again = clone.get(location.module)(given)
        start, stop = location.span or (0, None)
        if not _close(again[..., start:stop], made[..., start:stop]):
            raise FamilyError(
                f"{clone.name}: {site} is not what its module makes of blocks.{site.block}.{site.stream}.{of}. Is the "
                "module or the argument of that wrong?"
            )
        tried += 1
    return Check("inputs", "attn.in and mlp.in are what projections read") if tried else None


def _check_final(clone: HookedClone) -> Check:
    """The image tokens of the last block are those that are projected out."""
    width = clone.seen["velocity"].shape[-1]
    if not _same(clone.seen[clone.last], clone.seen["final.img"]) or width != clone.anatomy.out_width:
        raise FamilyError(
            f"{clone.name}: {clone.last} is not what enters {clone.anatomy.family.final.module}, or a predicted token "
            f"does not have {clone.anatomy.out_width} channels. Are stacks missing or out of order?"
        )
    return Check("final", "the last block's image tokens enter the final norm")


def _check_modulation(clone: HookedClone) -> Check | None:
    """Rows that share what enters the final norm, and what modulates it, share their prediction, if it makes that."""
    anatomy, final = clone.anatomy, clone.anatomy.family.final
    if final.mod is None or anatomy.family.readout is None:
        return None
    shared = [site for site in clone.points if site.point in ("final", "mod.final")]
    hooks = [clone.entering(clone.locations[site], _share_first_row) for site in shared]
    seen = clone.watch(clone.call, *hooks)["velocity"]
    rest = "nothing else" if isinstance(final.mod, str) else "what modulates it"
    if not _close(seen[:1].expand_as(seen), seen):
        raise FamilyError(
            f"{clone.name}: image tokens that enter {final.module} and {rest} are not all that its prediction is made "
            "of. Is mod= of its Final wrong?"
        )
    return Check("modulation", f"a prediction is made of what enters the final norm and {rest}")


def _share_first_row(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def _check_grid(clone: HookedClone) -> Check:
    """Changing one latent token changes exactly the row-major position y w + x of the first image block's input."""
    family, rule = clone.anatomy.family, clone.rule
    h, w = family.example.grid
    position, latents, axes = w + 1, clone.call[rule["latents"]], family.grid.axes
    tokens = pack(latents, axes, rule["patch"]).clone()
    tokens[:, tokens.shape[1] - clone.image.count + position if axes == "tokens" else position] += 1
    moved = clone.watch({**clone.call, rule["latents"]: unpack(tokens, latents, axes, rule["patch"])})
    first = next(site.name for site in clone.points if site.point == "resid_pre" and site.stream == "img")
    changed = (moved[first] != clone.seen[first]).any(-1)[0]
    if changed.nonzero().flatten().tolist() != [position] or clone.image.grid[-2:] != (h, w):
        raise FamilyError(
            f"{clone.name}: image tokens are not where the rule {family.grid.rule!r} and the layout of the stacks put "
            "them."
        )
    return Check("grid", "image tokens lie row by row, y w + x")


def _check_write(clone: HookedClone) -> Check:
    """Changing a block's image tokens changes what the transformer predicts."""
    blocks = [site for site in clone.points if site.stream == "img" and site.point == "resid_post"]
    for site in (blocks[0], blocks[-1]):
        location = clone.locations[site]
        hook = clone.changing(location, _add_one(location, clone))
        if _same(clone.watch(clone.call, hook)["velocity"], clone.seen["velocity"]):
            raise FamilyError(f"{clone.name}: writing {site} does not reach the model's output.")
    return Check("write", "a write to a block's image tokens reaches the output")


def _add_one(location: TensorLocation, clone: HookedClone) -> Any:
    """Adds 1 to a block's image tokens."""
    plain = location.plain()

    def change(value: Any) -> Any:
        tensor = to_tokens(select_tensor(value, "output", plain), plain).clone()
        select_stream(tensor, plain, clone.image, range(len(tensor)))[0].add_(1)
        return replace_tensor(value, "output", plain, from_tokens(tensor, select_tensor(value, "output", plain), plain))

    return change


def _check_readout(clone: HookedClone) -> Check | None:
    """The last block's tokens, read out, are the model's own prediction."""
    family = clone.anatomy.family
    if family.readout is None:
        return None
    try:
        fits, why = _close(clone.read_out(clone.seen[clone.last]), clone.seen["velocity"]), ""
    except MISFITS as problem:
        fits, why = False, f" ({problem})"
    if not fits:
        raise FamilyError(
            f"{clone.name}: {family.final.module} and {', '.join(family.readout.modules) or 'nothing'} after it do not "
            f"make the model's prediction of the last block's tokens{why}. Is the readout of its row wrong?"
        )
    return Check("readout", "final norm and projection of the last block's tokens are the model's prediction")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
