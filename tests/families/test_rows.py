"""Every row passes the check at load, and every row with one thing wrong is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import pytest

from dit_lens.errors import FamilyError
from dit_lens.families import Anatomy, Family, Final, Pipeline, PointSpec, Readout, Stack, write_template
from dit_lens.families.checks import check
from dit_lens.families.table import TABLE
from tests.zoo.truth import TEXT_IN_THE_FINAL_NORM

FAMILIES = {family.name: family for family in TABLE}
FLIPPED = {"text_first": "image_first", "image_first": "text_first", "ragged": "image_first"}


@cache
def live(name: str) -> diffusers.ModelMixin:
    """The transformer of a family, which no check changes."""
    family = FAMILIES[name]
    return getattr(diffusers, family.transformer)(**family.example.config)


def checked(family: Family, name: str | None = None) -> list[str]:
    """What holds of a row. name: of the family whose transformer it is, if not its own."""
    return [one.name for one in check(Anatomy(family, live(name or family.name)))]


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
    side = 1 if family.prediction.axes != "bchw" or family.latents.patch > 1 else 2
    return [] if family.latents.patch == 1 else [replace(family, grid=replace(family.grid, patch=side))]


def specs(
    change: Callable[[PointSpec], PointSpec | None], points: tuple[str, ...] = ("attn_out", "mlp_out")
) -> Callable[[Family], list[Family]]:
    """The family with one of these points changed, for the first that the change applies to in each stack."""

    def in_stack(stack: Stack) -> Stack | None:
        for stream, inside in stack.points.items():
            for point in points:
                spec = inside.get(point)
                other = change(spec) if isinstance(spec, PointSpec) else None
                if other is not None:
                    return replace(stack, points={**stack.points, stream: {**inside, point: other}})
        return None

    return in_turn(in_stack)


def other_gate(spec: PointSpec) -> PointSpec | None:
    """Another slot or slice of what the gate is taken from."""
    gate = spec.gate
    if gate is None:
        return None
    if isinstance(gate.slot, int) and gate.span is None:
        return replace(spec, gate=replace(gate, slot=gate.slot + 1))
    return replace(spec, gate=replace(gate, span=(gate.span[0] - 1, gate.span[1] - 1)))


def readouts(change: Callable[[Readout], Readout | None]) -> Callable[[Family], list[Family]]:
    """The family with another readout, where the change applies."""

    def changed(family: Family) -> list[Family]:
        other = None if family.readout is None else change(family.readout)
        return [] if other is None else [replace(family, readout=other)]

    return changed


def with_time(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, time=replace(pipeline.time, argument="moment"))


NEURONS = ("proj_out", (1, None))  # of blocks whose last projection takes attention beside them
MUTATIONS: dict[str, Callable[[Family], list[Family]]] = {
    "slots swapped": in_turn(swapped),
    "offset": in_turn(lambda s: replace(s, layout=FLIPPED[s.layout]) if s.layout in FLIPPED else None),
    "joint taken for two": in_turn(
        lambda s: replace(s, layout="own") if s.layout in ("text_first", "ragged") else None
    ),
    "slot too high": in_turn(lambda s: replace(s, outputs=dict.fromkeys(s.outputs, 7))),
    "unknown argument": in_turn(lambda s: replace(s, inputs=dict.fromkeys(s.inputs, "nothing"))),
    "unknown path": in_turn(lambda s: replace(s, path=f"{s.path}_of_old")),
    "axes turned": in_turn(lambda s: replace(s, sequence_first=not s.sequence_first)),
    "a stack missing": without_last_stack,
    "patch": another_patch,
    "no such norm": lambda family: [replace(family, final=Final("norm_of_old"))],
    "another norm": lambda family: [replace(family, final=Final(f"{family.stacks[-1].path}.0"))],
    "nothing modulates it": lambda family: (
        [replace(family, final=replace(family.final, mod="nothing"))]
        if family.transformer in TEXT_IN_THE_FINAL_NORM and family.name != "DiT"  # whose example has one class
        else []
    ),
    "width of what modulates it": lambda family: (
        [replace(family, final=replace(family.final, mod_width="7"))] if isinstance(family.final.mod, PointSpec) else []
    ),
    "another argument modulates it": lambda family: (
        [replace(family, final=replace(family.final, mod=PointSpec("", "input", 7)))]
        if isinstance(family.final.mod, PointSpec)
        else []
    ),
    "what modulates it is no module after the blocks": lambda family: [
        replace(family, final=replace(family.final, mod=PointSpec(family.stacks[-1].path + ".0", "input", 0)))
    ],
    "width of a predicted token": lambda family: [
        replace(family, prediction=replace(family.prediction, width=f"{family.prediction.width}*2"))
    ],
    "a module that does not say its width": specs(
        lambda spec: PointSpec("act_mlp", layout=spec.layout) if (spec.module, spec.span) == NEURONS else None,
        ("mlp.post",),
    ),
    "what enters the block for what enters attention": specs(lambda _: PointSpec("", "input", 0), ("attn.in",)),
    "another gate": specs(other_gate),
    "no gate": specs(lambda spec: replace(spec, gate=None) if spec.gate is not None else None),
    "gate squashed, or not": specs(
        lambda spec: None if spec.gate is None else replace(spec, gate=replace(spec.gate, tanh=not spec.gate.tanh))
    ),
    "order of a predicted token": lambda family: (
        [replace(family, readout=replace(family.readout, order={"cyx": "yxc", "yxc": "cyx"}[family.readout.order]))]
        if family.readout is not None and family.prediction.axes == "bchw" and family.latents.patch == 2
        else []
    ),
    "another projection": readouts(lambda r: replace(r, modules=r.modules[:-1]) if r.modules else None),
    "no shift": readouts(lambda r: replace(r, shift=None) if r.shift else None),
    "shift told, or not": readouts(lambda r: replace(r, passes_temb=not r.passes_temb)),
    "time": lambda family: [replace(family, pipelines=(with_time(family.pipelines[0]),))],
    "grid": lambda family: [replace(family, grid=replace(family.grid, argument="nothing"))],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_row_passes(name):
    family = FAMILIES[name]
    points = {
        point
        for stack in family.stacks
        for inside in stack.points.values()
        for point, spec in inside.items()
        if isinstance(spec, PointSpec)
    }
    expected = ["structure", "sizes", "chain", "residual", "inputs", "final", "modulation", "grid", "write", "readout"]
    if "mlp_out" not in points:
        expected.remove("residual")
    if family.readout is None:
        expected.remove("readout")
    assert checked(family) == expected


@pytest.mark.parametrize(
    ("name", "mutation"),
    [(name, mutation) for name, family in FAMILIES.items() for mutation in MUTATIONS if MUTATIONS[mutation](family)],
)
def test_a_mutated_row_is_caught(name, mutation):
    family = FAMILIES[name]
    for mutant in MUTATIONS[mutation](family):
        with pytest.raises(FamilyError, match=family.name.replace(".", r"\.")):
            checked(mutant)


def test_the_page_of_models_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import models

    assert models.PAGE.read_text() == models.page(), "run `python docs/models.py`"


def test_a_template_is_a_row_that_passes():
    import dit_lens

    source = write_template(FAMILIES["Chroma"], "ChromaTransformer2DModel")
    row = eval(source, {"dit_lens": dit_lens})
    assert checked(row, "Chroma") == ["structure", "sizes", "chain", "final", "modulation", "grid", "write", "readout"]
