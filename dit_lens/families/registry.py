"""The families that are known, and which of them describes a pipeline."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING

from torch.nn import Module

from dit_lens.arguments.checks import checked
from dit_lens.arguments.signatures import told
from dit_lens.errors import FamilyError
from dit_lens.families.live import refuse_unsafe
from dit_lens.families.module_tree import class_names
from dit_lens.families.row import Family
from dit_lens.families.table import TABLE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REGISTERED: list[Family] = []  # by register_family, the latest last


def known_families() -> tuple[Family, ...]:
    """Every known family; rows registered at run time come first, the latest before the others."""
    return (*reversed(REGISTERED), *TABLE)


@checked
def register_family(family: Family) -> None:
    """Adds a row for a DiT this library does not know. It is checked like the others when a pipeline is loaded."""
    REGISTERED.append(family)


@told
def find(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline's transformer; FamilyError names the nearest one where no row describes it."""
    if "ModularPipeline" in class_names(pipe):
        raise FamilyError(
            f"{type(pipe).__name__} is a modular pipeline, put together at run time: it has no fixed call whose steps "
            "and branches could be planned. Use the model's ordinary pipeline, where there is one (FLUX.3 has none)."
        )
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise FamilyError(
            f"{type(pipe).__name__} is not a diffusers pipeline. Pass one, such as FluxPipeline.from_pretrained(...)."
        )
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise FamilyError(
            f"{type(pipe).__name__} has no transformer (its parts are {', '.join(components)}), so it is not a DiT "
            "pipeline."
        )
    _refuse_second(pipe)
    refuse_unsafe(pipe)
    family = _find_row(transformer)
    if family is not None:
        _refuse_override(transformer, family)
        _refuse_control(pipe, family)
        return family
    name = type(transformer).__name__
    inside = (path for path, module in transformer.named_modules() if path and _find_row(module) is not None)
    if (path := next(inside, None)) is not None:
        kept = " Adapters stay in its layers." if path == "base_model.model" else ""
        raise FamilyError(
            f"pipe.transformer is a {name} around a {type(transformer.get_submodule(path)).__name__}. Unwrap it: "
            f"pipe.transformer = pipe.transformer.{path}.{kept}"
        )
    known = {family.transformer: family.name for family in known_families()}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    nearest = next(family for family in known_families() if family.transformer == close)
    raise FamilyError(
        f"no family describes {name}. Known: {', '.join(f'{family} ({cls})' for cls, family in known.items())}. "
        f"Nearest: {close} ({known[close]}). Describe it with dit_lens.register_family(row); a row like the nearest "
        f"one, to start from:\n{write_template(nearest, name)}"
    )


def _find_row(transformer: Module) -> Family | None:
    """The row of a transformer's class, or of a parent of it."""
    names = class_names(transformer)
    return next((family for family in known_families() if family.transformer in names), None)


def _refuse_override(transformer: Module, family: Family) -> None:
    """Refuses a class of somebody's own that does something else than the one that its row describes."""
    for base in type(transformer).__mro__:
        if base.__name__ == family.transformer:
            return
        if "forward" in vars(base):
            raise FamilyError(
                f"{base.__name__} overrides the forward of {family.transformer}, which the row of {family.name} "
                f"describes. If the row fits it as well: dit_lens.register_family(dataclasses.replace(row, "
                f"transformer={base.__name__!r})), and it is tried."
            )


def _refuse_control(pipe: DiffusionPipeline, family: Family) -> None:
    """Refuses a ControlNet whose residuals have no name."""
    named = any("control_out" in points for stack in family.stacks for points in stack.points.values())
    if getattr(pipe, "controlnet", None) is not None and not named:
        raise FamilyError(
            f"the ControlNet of this {type(pipe).__name__} adds to what blocks of {family.name} get, which has no "
            "name here, so their sums would not add up. Use the pipeline without one."
        )


def _refuse_second(pipe: DiffusionPipeline) -> None:
    """Refuses pipelines that pass from one denoiser to another, of which a run would see the first only."""
    described = find_by_pipeline(type(pipe))
    if described is not None and described.pipeline(type(pipe)).second_model:
        return
    if pipe.config.get("boundary_ratio", 0) is None:  # the second is there, and not called
        return
    for name, part in pipe.components.items():
        if name != "transformer" and isinstance(part, Module) and _find_row(part) is not None:
            kind = type(pipe).__name__
            raise FamilyError(
                f"this {kind} has two denoisers, transformer and {name}, and passes from one to the other during a run "
                "(boundary_ratio). dit_lens looks inside one. Make a pipeline of the one you study, which then does "
                f"all steps: {kind}(**{{**pipe.components, {name!r}: None}}, boundary_ratio=None)."
            )


@checked
def find_by_pipeline(kind: type) -> Family | None:
    """The family of a pipeline class, without its transformer; None where no row lists the class or a parent of it."""
    return next((family for family in known_families() if family.find_pipeline(kind) is not None), None)


def write_template(family: Family, transformer: str) -> str:
    """The source of a family's row, for another transformer, with "..." to fill in and no points inside blocks."""
    stacks = tuple(replace(stack, points={}) for stack in family.stacks)
    usual = replace(family.pipelines[0], name="...", refuses=())
    return _source(replace(family, name="...", transformer=transformer, pipelines=(usual,), stacks=stacks, note=""), "")


def _source(value: object, indent: str) -> str:
    if isinstance(value, dict):
        items = "".join(f"{indent}    {key!r}: {_source(item, '')},\n" for key, item in value.items())
        return f"{{\n{items}{indent}}}" if items else "{}"
    if not is_dataclass(value):
        return "..." if callable(value) else repr(value)
    inner = indent + "    "
    lines = []
    for one in fields(value):
        own = getattr(value, one.name)
        default = one.default_factory() if callable(one.default_factory) else one.default
        if own == default:
            continue
        if isinstance(own, tuple) and any(is_dataclass(item) for item in own):
            items = "".join(f"{inner}    {_source(item, inner + '    ')},\n" for item in own)
            lines.append(f"{inner}{one.name}=(\n{items}{inner}),\n")
        else:
            lines.append(f"{inner}{one.name}={_source(own, inner)},\n")
    inside = f"\n{''.join(lines)}{indent}" if lines else ""
    return f"dit_lens.families.{type(value).__name__}({inside})"
