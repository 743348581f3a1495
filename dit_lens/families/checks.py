"""The check at load: a family's row is tried on a shrunken clone of the same class, and on the live structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.errors import FamilyError
from dit_lens.execute import closed, fetch, image_tokens, opened, packed, replaced, stream_of, unpacked
from dit_lens.families.anatomy import Address, Anatomy
from dit_lens.families.calls import ROWS, build_call
from dit_lens.families.row import Family

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

TEXT = 5


@dataclass(frozen=True)
class Check:
    """One statement about a family that was found to hold."""

    name: str
    says: str


def check(anatomy: Anatomy) -> list[Check]:
    """Checks a live transformer; FamilyError says exactly what differs from the family's row."""
    for site in anatomy.sites:  # every module and argument exists
        anatomy.address(site)
    anatomy.time_rule(None)
    anatomy.grid_rule  # noqa: B018
    structure = Check("structure", f"all {anatomy.depth} blocks and their arguments are where the family says")
    return [structure, *_check_clone(anatomy.family, type(anatomy.transformer))]


@lru_cache
def _check_clone(family: Family, transformer: type[ModelMixin]) -> tuple[Check, ...]:
    """The row, tried on a tiny random transformer of the same class: once per process and class."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        clone = transformer(**family.tiny).eval()
        _wake(clone)
        call = build_call(family, clone, family.tried_on, TEXT)
    anatomy = Anatomy(family, clone)
    return (_chain(anatomy, call), _final(anatomy, call), _grid(anatomy, call), _write(anatomy, call))


def _chain(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """What leaves block i enters block i + 1, stream by stream."""
    seen = _watch(anatomy, call)
    names = {site.name for site in anatomy.sites}
    for stack, blocks in zip(anatomy.family.stacks, anatomy.stacks.values(), strict=True):
        for block in blocks[:-1]:
            for stream in {"img", "txt"} - set(stack.rewritten):
                leaving, entering = f"blocks.{block}.{stream}", f"blocks.{block + 1}.{stream}.resid_pre"
                if {leaving, entering} <= names and not _same(seen[leaving], seen[entering]):
                    raise FamilyError(
                        f"{anatomy.family.name}: what leaves {leaving} is not what enters block {block + 1}. "
                        "Is a slot of its stack wrong?"
                    )
    return Check("chain", "what leaves a block enters the next one, in both streams")


def _final(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """The image tokens of the last block are those that are projected out."""
    seen = _watch(anatomy, call)
    last = next((site.name for site in reversed(anatomy.sites) if site.block is not None and site.stream == "img"), "")
    if not last or not _same(seen[last], seen["final.img"]) or seen["velocity"].shape[-1] != anatomy.out_width:
        raise FamilyError(
            f"{anatomy.family.name}: {last or 'no block'} is not what enters {anatomy.family.final}. "
            "Are stacks missing or out of order?"
        )
    return Check("final", "the last block's image tokens enter the final norm")


def _grid(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """Changing one latent token changes exactly the row-major place y w + x of the first image block's input."""
    rule, axes = anatomy.grid_rule, anatomy.family.grid.axes
    latents = call[rule["latents"]]
    image = image_tokens(((), call), rule)
    h, w = anatomy.family.tried_on
    place = w + 1
    tokens = packed(latents, axes, rule["patch"]).clone()
    tokens[:, tokens.shape[1] - image.count + place if axes == "tokens" else place] += 1
    moved = {**call, rule["latents"]: unpacked(tokens, latents, axes, rule["patch"])}
    first = next(site.name for site in anatomy.sites if site.point == "resid_pre" and site.stream == "img")
    changed = (_watch(anatomy, moved)[first] != _watch(anatomy, call)[first]).any(-1)[0]
    if changed.nonzero().flatten().tolist() != [place] or image.grid[-2:] != (h, w):
        raise FamilyError(
            f"{anatomy.family.name}: image tokens are not where the rule {anatomy.family.grid.rule!r} and the layout "
            "of the stacks put them."
        )
    return Check("grid", "image tokens lie row by row, y w + x")


def _write(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """Changing a block's image tokens changes what the transformer predicts."""
    clean = _watch(anatomy, call)["velocity"]
    image = image_tokens(((), call), anatomy.grid_rule)
    blocks = [site for site in anatomy.sites if site.stream == "img" and site.point == "resid_post"]
    for site in (blocks[0], blocks[-1]):
        part = vars(anatomy.address(site))

        def change(value: Any, part: dict[str, Any] = part) -> Any:
            tensor = opened(fetch(value, "output", part), part).clone()
            stream_of(tensor, part, image, range(len(tensor)))[0].add_(1)
            return replaced(value, "output", part, closed(tensor, fetch(value, "output", part), part))

        with _hook(anatomy, anatomy.address(site), change):
            if _same(_watch(anatomy, call)["velocity"], clean):
                raise FamilyError(f"{anatomy.family.name}: writing {site} does not reach the model's output.")
    return Check("write", "a write to a block's image tokens reaches the output")


@torch.no_grad()
def _wake(clone: nn.Module) -> None:
    """Parameters that start at zero would hide what passes through them, and some are not initialised at all."""
    for parameter in clone.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif not parameter.any():
            parameter.normal_(std=0.1)


def _watch(anatomy: Anatomy, call: dict[str, Any]) -> dict[str, Tensor]:
    """The tokens of every site in one forward pass, by plain torch hooks."""
    seen: dict[str, Tensor] = {}
    image = image_tokens(((), call), anatomy.grid_rule)
    handles = []
    for site in anatomy.sites:
        address = anatomy.address(site)
        module = _module(anatomy, address)

        def keep(_: nn.Module, args: tuple, kwargs: dict, output: Any, site: Any = site, part: Any = address) -> None:
            value = output if part.side == "output" else (args, kwargs)
            tensor = opened(fetch(value, part.side, vars(part)), vars(part))
            if tensor.shape[0] != ROWS:
                raise ValueError(f"{site} has {tensor.shape[0]} rows in a call of {ROWS}")
            seen[site.name] = stream_of(tensor, vars(part), image, range(len(tensor)))[0].clone()

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        _run(anatomy, call)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        raise FamilyError(
            f"{anatomy.family.name}: a block of {anatomy.family.transformer} has another output or other arguments "
            f"than the family says ({problem})."
        ) from problem
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _hook(anatomy: Anatomy, address: Address, change: Any) -> Any:
    return _module(anatomy, address).register_forward_hook(lambda _module, _args, output: change(output))


def _module(anatomy: Anatomy, address: Address) -> nn.Module:
    return anatomy.transformer.get_submodule(address.module.removeprefix("transformer").removeprefix("."))


@torch.no_grad()
def _run(anatomy: Anatomy, call: dict[str, Any]) -> Tensor:
    return anatomy.transformer(**call)[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
