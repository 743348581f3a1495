"""The studies by name. Each one registers itself with :func:`study`; whatever needs a study by name asks here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.arguments.signatures import sets
from dit_lens.errors import StoreError
from dit_lens.studies.shared.shares import Function, StudyFunction, divisible

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What the library knows about one study.

    name: name of the study in ``dl.studies``, in saved results and in ``sweep``.
    function: the function that runs the study.
    question: the question that it answers about massive channels, in one line.
    assemble: function (settings, cells) -> result; it needs no model, so that a folder of cells can be loaded.
    figure: function (summary, **options) -> plotly figure.
    figure_options: function settings -> options of the figure, where the settings decide some; else None.
    old_names: names in earlier releases; results and folders that were saved then still have them.
    """

    name: str
    function: StudyFunction
    question: str
    assemble: Callable[[Mapping[str, Any], Sequence[Any]], Any]
    figure: Callable[..., go.Figure]
    figure_options: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    old_names: tuple[str, ...] = ()


# Arguments that studies refuse themselves, with what their model and their prompts allow.
REFUSED_BY_STUDIES = ("k", "seeds", "prompts", "pairs", "shard")
SET_BY_STUDIES = ("prompt", "ops", "seed", "record", "prefix")  # in every run that they make

_records: dict[str, StudyRecord] = {}


def study(
    *,
    question: str,
    assemble: Callable[[Mapping[str, Any], Sequence[Any]], Any],
    figure: Callable[..., go.Figure],
    figure_options: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    old_names: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Registers the function below it as a study, under the function's own name.

        @study(question="Claim 1: are they critical?", assemble=assemble, figure=disruption_figure)
        def disruption(lens, prompts, ...): ...

    question: the question that it answers about massive channels, in one line.
    assemble: function (settings, cells) -> result.
    figure: function (summary, **options) -> plotly figure.
    figure_options: function settings -> options of the figure, where the settings decide some; else None.
    old_names: names in earlier releases.
    """

    def register(function: Function) -> Function:
        if "call" in inspect.signature(function).parameters:
            function = sets(*SET_BY_STUDIES)(function)
        function = checked(divisible(function), but=REFUSED_BY_STUDIES)
        record = StudyRecord(
            name=function.__name__,
            function=function,
            question=question,
            assemble=assemble,
            figure=figure,
            figure_options=figure_options,
            old_names=old_names,
        )
        _records[record.name] = record
        return function

    return register


def study_names() -> tuple[str, ...]:
    """The names of all studies, in alphabetical order."""
    return tuple(sorted(_records))


def find_study(name: str) -> StudyRecord | None:
    """The study of a name, which may be its name in an earlier release; None if there is none.

    >>> find_study("births").name
    'write_attribution'
    """
    return next((record for record in _records.values() if name in (record.name, *record.old_names)), None)


def get_study(name: str) -> StudyRecord:
    """The study of a name; StoreError if this version does not have it."""
    record = find_study(name)
    if record is None:
        raise StoreError(f"there is no study {name!r} in this version of dit_lens. It has: {', '.join(study_names())}.")
    return record
