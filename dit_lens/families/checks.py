"""The check at load: a family's row is tried on a shrunken clone of the same class, and on the live structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.errors import FamilyError
from dit_lens.execute import fetch, image_tokens, replaced
from dit_lens.families.anatomy import Address, Anatomy
from dit_lens.families.row import Family

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

GRID = (2, 3)  # not square, so that a transposed grid shows
TEXT = 5


@dataclass(frozen=True)
class Check:
    """One statement about a family that was found to hold."""

    name: str
    says: str


def check(anatomy: Anatomy) -> list[Check]:
    """Checks a live transformer; FamilyError says exactly what differs from the family's row."""
    for site in anatomy.sites:
        anatomy.address(site)  # every module and argument exists
    structure = Check("structure", f"all {anatomy.depth} blocks and their arguments are where the family says")
    return [structure, *_check_clone(anatomy.family, type(anatomy.transformer))]


@lru_cache
def _check_clone(family: Family, transformer: type[ModelMixin]) -> tuple[Check, ...]:
    """The row, tried on a tiny random transformer of the same class: once per process and class."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        clone = transformer(**family.tiny).eval()
        call = CALLS[family.grid](clone)
    anatomy = Anatomy(family, clone)
    return (_chain(anatomy, call), _final(anatomy, call), _grid(anatomy, call), _write(anatomy, call))


def _chain(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """What leaves block i enters block i + 1, stream by stream."""
    seen = _watch(anatomy, call)
    names = {site.name for site in anatomy.sites}
    for block in range(anatomy.depth - 1):
        for stream in ("img", "txt"):
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
    last = f"blocks.{anatomy.depth - 1}.img"
    if not _same(seen[last], seen["final.img"]) or seen["velocity"].shape[-1] != anatomy.out_width:
        raise FamilyError(
            f"{anatomy.family.name}: {last} is not what enters {anatomy.family.final}. "
            "Are stacks missing or out of order?"
        )
    return Check("final", "the last block's image tokens enter the final norm")


def _grid(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """Changing one latent token changes exactly the row-major place y w + x of the first block's input."""
    clean = _watch(anatomy, call)["blocks.0.img.resid_pre"]
    place = GRID[1] + 2
    moved = {
        **call,
        "hidden_states": call["hidden_states"].index_add(
            1, torch.tensor([place]), torch.ones_like(call["hidden_states"][:, :1])
        ),
    }
    changed = (_watch(anatomy, moved)["blocks.0.img.resid_pre"] != clean).any(-1)[0]
    _, count, grid = image_tokens(((), call), {"grid_rule": anatomy.family.grid, "grid": None})
    if changed.nonzero().flatten().tolist() != [place] or grid != GRID or count != GRID[0] * GRID[1]:
        raise FamilyError(
            f"{anatomy.family.name}: image tokens are not where the rule {anatomy.family.grid!r} puts them."
        )
    return Check("grid", "image tokens lie row by row, y w + x")


def _write(anatomy: Anatomy, call: dict[str, Any]) -> Check:
    """Changing a block's image tokens changes what the transformer predicts."""
    clean = _watch(anatomy, call)["velocity"]
    for block in (0, anatomy.depth - 1):
        address = anatomy.address(anatomy.site(f"blocks.{block}.img"))
        with _hook(
            anatomy,
            address,
            lambda value, address=address: replaced(
                value, "output", vars(address), fetch(value, "output", vars(address)) + 1
            ),
        ):
            if _same(_run(anatomy, call), clean):
                raise FamilyError(
                    f"{anatomy.family.name}: writing blocks.{block}.img does not reach the model's output."
                )
    return Check("write", "a write to a block's image tokens reaches the output")


def _watch(anatomy: Anatomy, call: dict[str, Any]) -> dict[str, Tensor]:
    """Every site's tensor in one forward pass, by plain torch hooks."""
    seen: dict[str, Tensor] = {}
    handles = []
    for site in anatomy.sites:
        address = anatomy.address(site)
        module = _module(anatomy, address)

        def keep(
            _: nn.Module, args: tuple, kwargs: dict, output: Any, site: Any = site, address: Address = address
        ) -> None:
            value = output if address.side == "output" else (args, kwargs)
            tensor = fetch(value, address.side, vars(address))
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{site} is a {type(tensor).__name__}")
            seen[site.name] = tensor

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        _run(anatomy, call)
    except (IndexError, KeyError, TypeError) as problem:
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
    return anatomy.transformer(**call, return_dict=False)[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _flux_call(transformer: ModelMixin) -> dict[str, Any]:
    config = transformer.config
    y, x = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    ids = torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()
    return {
        "hidden_states": torch.randn(1, len(ids), config.in_channels),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.tensor([1.0]) if config.guidance_embeds else None,
    }


CALLS = {"img_ids": _flux_call}
