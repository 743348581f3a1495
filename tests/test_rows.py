"""Every row passes the check at load, and every row with one thing wrong is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import diffusers
import pytest

from dit_lens.errors import FamilyError
from dit_lens.families import Anatomy, Family, Stack
from dit_lens.families.checks import check
from dit_lens.families.table import TABLE

FAMILIES = {family.name: family for family in TABLE}
FLIPPED = {"text_first": "image_first", "image_first": "text_first", "ragged": "image_first"}


def checked(family: Family) -> list[str]:
    transformer = getattr(diffusers, family.transformer)(**family.tiny)
    return [one.name for one in check(Anatomy(family, transformer))]


def in_turn(change: Callable[[Stack], Stack | None]) -> Callable[[Family], list[Family]]:
    """The family with one stack changed, for each stack that the change applies to."""

    def changed(family: Family) -> list[Family]:
        found = []
        for i, stack in enumerate(family.stacks):
            other = change(stack)
            if other is not None:
                found.append(replace(family, stacks=(*family.stacks[:i], other, *family.stacks[i + 1 :])))
        return found

    return changed


def swapped(stack: Stack) -> Stack | None:
    slots = stack.outputs
    return replace(stack, outputs={"img": slots["txt"], "txt": slots["img"]}) if len(set(slots.values())) > 1 else None


def without_last_stack(family: Family) -> list[Family]:
    return [replace(family, stacks=family.stacks[:-1])] if len(family.stacks) > 1 else []


def another_patch(family: Family) -> list[Family]:
    if family.grid.axes == "tokens":
        return []
    side = 1 if family.prediction != "bchw" or family.patch > 1 else 2
    return [] if family.patch == 1 else [replace(family, grid=replace(family.grid, patch=side))]


MUTATIONS: dict[str, Callable[[Family], list[Family]]] = {
    "slots swapped": in_turn(swapped),
    "offset": in_turn(lambda s: replace(s, layout=FLIPPED[s.layout]) if s.layout in FLIPPED else None),
    "joint taken for two": in_turn(lambda s: replace(s, layout="own") if s.layout in ("text_first", "ragged") else None),
    "slot too high": in_turn(lambda s: replace(s, outputs=dict.fromkeys(s.outputs, 7))),
    "unknown argument": in_turn(lambda s: replace(s, inputs=dict.fromkeys(s.inputs, "nothing"))),
    "unknown path": in_turn(lambda s: replace(s, path=f"{s.path}_of_old")),
    "axes turned": in_turn(lambda s: replace(s, turned=not s.turned)),
    "a stack missing": without_last_stack,
    "patch": another_patch,
    "no such norm": lambda family: [replace(family, final="norm_of_old")],
    "another norm": lambda family: [replace(family, final=f"{family.stacks[-1].path}.0")],
    "width of a predicted token": lambda family: [replace(family, out_width=f"{family.out_width}*2")],
    "time": lambda family: [replace(family, time=replace(family.time, argument="moment"))],
    "grid": lambda family: [replace(family, grid=replace(family.grid, argument="nothing"))],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_row_passes(name):
    assert checked(FAMILIES[name]) == ["structure", "chain", "final", "grid", "write"]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mutated_row_is_caught(name, mutation):
    family = FAMILIES[name]
    mutants = MUTATIONS[mutation](family)
    if not mutants:
        pytest.skip("does not apply to this family")
    for mutant in mutants:
        with pytest.raises(FamilyError, match=family.name.replace(".", r"\.")):
            checked(mutant)
