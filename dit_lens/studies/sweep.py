"""A study over a grid of its own arguments: block ranges, step ranges, streams, sizes, seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dit_lens.core.request.ops import SigmaInterval
from dit_lens.errors import OpError, StudyInterrupted, nearest
from dit_lens.plots import sweep_figure
from dit_lens.studies.shared.checkpoints import check_arguments_only, share_progress_bar
from dit_lens.studies.shared.folders import claim_folder, describe_settings
from dit_lens.studies.shared.measures import keep_for_sweep
from dit_lens.studies.shared.registry import StudyRecord, find_study, study_names
from dit_lens.studies.shared.registry import study as register
from dit_lens.studies.shared.result import Result

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens

Study = Callable[..., Result]


def assemble(settings: Mapping[str, Any], parts: Sequence[Result]) -> Result:
    """The result of the combinations so far, from the result of each."""
    over = settings["over"]
    points = [dict(zip(over, values, strict=True)) for values in product(*over.values())][: len(parts)]
    names = [", ".join(f"{argument}={value}" for argument, value in point.items()) for point in points]
    named = list(zip(names, parts, strict=True))
    return Result(
        "sweep",
        _join([part.table for part in parts], points),
        _join([part.summary for part in parts], points),
        dict(settings),
        {f"{name}/{key}": image for name, part in named for key, image in part.images.items()},
        {f"{name}/{key}": mask for name, part in named for key, mask in part.masks.items()},
        _notes(parts, names),
    )


@register(
    question="What does a study find over a grid of its arguments?",
    assemble=assemble,
    figure=sweep_figure,
    figure_options=lambda settings: {"over": list(settings["over"])},
)
def sweep(
    study: str | Study,
    lens: DiTLens,
    prompts: Any,
    *,
    over: Mapping[str, Sequence[Any]],
    out: str | Path | None = None,
    **fixed: Any,
) -> Result:
    """Runs a study at every combination of values, and puts what it found in one table, one summary and one figure.

    >>> from dit_lens import DiTLens
    >>> result = sweep(
    ...     "disruption",
    ...     DiTLens.toy(),
    ...     "a big red circle left on a plain blue background",
    ...     over={"site": ["blocks[0:4].img", "blocks[4:8].img"], "k": [4]},
    ...     draws=1,
    ...     confounds=False,
    ...     num_inference_steps=1,
    ... )
    >>> result.summary.loc[result.summary["arm"] == "top", ["site", "k"]].values.tolist()
    [['blocks[0:4].img', 4], ['blocks[4:8].img', 4]]

    The table and the summary are the study's own, with one column per swept argument in front (it replaces a column of
    that name); intervals are of one combination each. ``figure()`` has lines over the first argument and a panel for
    every combination of the others; ``figure(measure="fidelity")`` draws another column. Every combination is checked
    before the first is drawn. Raises OpError for arguments that cannot be swept, and what the study raises.

    study: name of the study, or its function.
    lens: lens on the model.
    prompts: prompts or pairs, as the study takes them.
    over: argument -> values; the last argument changes fastest.
    out: folder with one folder per combination, from which the same call continues.
    fixed: the study's other arguments.
    """
    swept, points = _find_swept(study), _list_points(over, fixed)
    settings = describe_settings(
        {
            "study": swept.name,
            "prompts": prompts,
            "over": {argument: [label(value) for value in values] for argument, values in over.items()},
            "fixed": fixed,
        }
    )
    for point in points:
        with check_arguments_only(), keep_for_sweep(over):
            swept.function(lens, prompts, **fixed, **point)
    folder = None if out is None else Path(out)
    if folder is not None:
        claim_folder(folder, "sweep", settings, lens)
    parts: list[Result] = []
    with share_progress_bar("sweep", len(points)), keep_for_sweep(over):
        for i, point in enumerate(points):
            part = folder and folder / "parts" / f"{i:06d}"
            try:
                parts.append(swept.function(lens, prompts, **fixed, **point, out=part))
            except StudyInterrupted as stop:
                found = [*parts, *([stop.result] if stop.result else [])]
                whole = assemble(settings, found) if found else None
                raise StudyInterrupted("sweep", len(parts), len(points), folder, whole) from stop
    return assemble(settings, parts)


def label(value: Any) -> Any:
    """A swept value as it stands in a column: numbers and text as they are, ranges in words.

    >>> [label(value) for value in (4, (0.0, 0.5), slice(2, 5), ["blocks.0.img", "blocks.3.img"], None)]
    [4, '0 to 0.5', '2:5', 'blocks.0.img, blocks.3.img', 'all']
    """
    if value is None:
        return "all"
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, slice):
        return ":".join("" if part is None else str(part) for part in (value.start, value.stop, value.step)[:2])
    if isinstance(value, SigmaInterval):
        return f"sigma {value.high:g} to {value.low:g}"
    if isinstance(value, tuple) and any(isinstance(end, float) for end in value):
        return " to ".join(f"{end:g}" for end in value)
    if isinstance(value, Sequence):
        return ", ".join(str(label(part)) for part in value)
    return getattr(value, "__qualname__", str(value))


def _find_swept(study: str | Study) -> StudyRecord:
    name = study if isinstance(study, str) else getattr(study, "__name__", str(study))
    record = find_study(name)
    if record is None or record.name == "sweep":
        known = [other for other in study_names() if other != "sweep"]
        raise OpError(f"{name!r} is not a valid study to sweep.{nearest(name, known)}")
    return record


def _name_value(value: Any) -> str:
    """The label of a value, the same for 1 and 1.0."""
    name = label(value)
    return str(int(name)) if isinstance(name, float) and name.is_integer() else str(name)


def _list_points(over: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not over:
        raise OpError('over={} asks for nothing. Name an argument and its values, as in over={"k": [4, 8, 12]}.')
    for argument, values in over.items():
        if not values:
            raise OpError(f"over={{{argument!r}: ...}} takes a list of values, at least one; got {values!r}.")
        if argument in fixed or argument == "out":
            raise OpError(f"{argument} cannot be swept and given at once. Leave it out of one of them.")
        if len({_name_value(value) for value in values}) < len(values):
            raise OpError(f"over={{{argument!r}: ...}} has a value twice: {list(values)!r}.")
    return [dict(zip(over, values, strict=True)) for values in product(*over.values())]


def _join(tables: Sequence[pd.DataFrame], points: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The tables of all combinations under each other, with the swept arguments in front."""
    marked = [
        table.assign(**point)[[*point, *(name for name in table if name not in point)]]
        for table, point in zip(tables, points, strict=True)
    ]
    return pd.concat(marked, ignore_index=True)


def _notes(parts: Sequence[Result], names: Sequence[str]) -> list[str]:
    """What every combination says once; the rest under its combination."""
    shared = [note for note in parts[0].notes if all(note in part.notes for part in parts)]
    own = [
        f"{name}: {note}" for part, name in zip(parts, names, strict=True) for note in part.notes if note not in shared
    ]
    return [*shared, *own]
