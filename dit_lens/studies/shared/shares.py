"""Which cells of a study are made in this process, and where it has the others from.

Every process that takes part in a study runs the study's own code, from its first cell to its last. A share says at
each cell whether it is made here. A cell that is made elsewhere comes when it is looked into: whoever never does, never
waits for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol, TypeVar

from dit_lens.arguments.numbers import list_entries, to_int
from dit_lens.arguments.saving import saved_by
from dit_lens.errors import OpError, show, warn


class StudyFunction(Protocol):
    """A function that runs a study."""

    __name__: str

    def __call__(self, *args: Any, **options: Any) -> Any: ...


Function = TypeVar("Function", bound=StudyFunction)


class Share:
    """What one process makes of a study."""

    def get(self, slot: Any, advance: Callable[[], None]) -> Any:
        """The cell of a ``Slot``, at once or later. advance: called once, when the cell counts as done."""
        raise NotImplementedError

    def skips(self, number: int, count: int) -> bool:  # noqa: ARG002 most shares want all of them
        """Whether so many cells from a number on can be passed over, as nothing here is made of them."""
        return False

    def finish(self) -> None:
        """Called when the study's code has asked for its last cell."""


class Whole(Share):
    """All cells are made here, one after the other."""

    def get(self, slot: Any, advance: Callable[[], None]) -> Any:
        cell = slot.read() if slot.is_kept else slot.make()
        advance()
        return cell


class Shard(Share):
    """One of n equal parts, the same whenever it is run. It waits for no other: it makes what it needs of theirs.

    number: which part, from 0.
    count: how many there are.
    """

    def __init__(self, number: int, count: int):
        self.number, self.count = number, count
        self._groups: dict[str, int] = {}  # in the order of the study

    def get(self, slot: Any, advance: Callable[[], None]) -> Any:
        place = self._groups.setdefault(slot.group, len(self._groups))
        # Turned by one from row to row: what comes back after every so many cells does not always fall to one shard.
        if (place + place // self.count) % self.count == self.number and not slot.is_kept:
            cell = slot.make()
        else:
            cell = slot.later(lambda: slot.read() if slot.is_kept else slot.make())
        advance()
        return cell

    def finish(self) -> None:
        if len(self._groups) < self.count:
            warn(
                f"this study has {len(self._groups)} parts that can be made apart, so {self.count} shards are more "
                "than it can use. Pass a smaller batch_size=, or fewer shards."
            )


class UnfinishedStudyError(Exception):
    """The cells of this process are made, and others of the study are not there yet.

    result: an empty ``Result``, whose note says so.
    """

    def __init__(self, result: Any):
        super().__init__(result.notes[0])
        self.result = result


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """A study as another process can carry it out, with a lens of its own.

    study: name of the study.
    arguments: its arguments by name, but for the lens and where its cells are.
    model: the model that the lens must be on, as a study's folder tells it.
    """

    study: str
    arguments: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)


Opener = Callable[[StudyJob, Callable[[], Mapping[str, Any]]], Share]


class Workers:
    """What carries out a study's cells: ``RayWorkers``, ``ServerWorkers``."""

    save = saved_by("A study that was given out= keeps its cells there, whoever makes them.")

    def open(self) -> AbstractContextManager[Opener]:
        """Starts the workers, and ends them at last; what opens a share takes a job, and what describes its model."""
        raise NotImplementedError


# What opens the share of every study inside (None: all of it), and the innermost call of a study.
_OPEN: ContextVar[Opener | None] = ContextVar("open", default=None)
_JOB: ContextVar[StudyJob | None] = ContextVar("job", default=None)


def open_share(describe: Callable[[], Mapping[str, Any]]) -> Share:
    """The share of a study that begins here. describe: returns its model as the folder of a study tells it."""
    opened, job = _OPEN.get(), _JOB.get()
    return Whole() if opened is None or job is None else opened(job, describe)


@contextmanager
def share_studies(opened: Opener) -> Generator[None]:
    """Every study inside makes the cells of a share. opened: called for each study."""
    outer = _OPEN.set(opened)
    try:
        yield
    finally:
        _OPEN.reset(outer)


def divisible(study: Function) -> Function:
    """Adds ``shard=`` and ``workers=`` to a study that has ``out=``; its docstring says what they are."""
    signature = inspect.signature(study)
    if "out" not in signature.parameters:
        return study

    @wraps(study)
    def called(*args: Any, shard: tuple[int, int] | None = None, workers: Workers | None = None, **given: Any) -> Any:
        outer = _JOB.set(StudyJob(study=study.__name__, arguments=_name_arguments(signature, args, given)))
        try:
            with _open(shard, workers, given.get("out")) as opened:
                if opened is None:
                    return study(*args, **given)
                with share_studies(opened):
                    return study(*args, **given)
        except UnfinishedStudyError as stop:
            return stop.result
        finally:
            _JOB.reset(outer)

    vars(called)["__signature__"] = _add_parameters(signature)
    called.__doc__ = _add_lines(study.__doc__ or "")
    return called  # ty: ignore[invalid-explicit-return]


def _name_arguments(signature: inspect.Signature, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a study by name, but for the lens and the folder."""
    named = dict(signature.bind_partial(*args, **given).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return {name: value for name, value in named.items() if name not in ("lens", "out")}


def _open(shard: Any, workers: Workers | None, out: Any) -> AbstractContextManager[Opener | None]:
    """What opens the shares of the studies in a call; None where nothing was said."""
    if shard is not None and workers is not None:
        raise OpError("shard= and workers= both divide the cells. Give one of them.")
    if workers is not None:
        return workers.open()
    if shard is None:
        return nullcontext()
    number, count = _read_shard(shard, out)
    return nullcontext(lambda *_: Shard(number, count))


def _read_shard(shard: Any, out: Any) -> tuple[int, int]:
    """The number of a shard and how many there are; OpError if that cannot be."""
    found = [number for one in list_entries(shard) or [] if (number := to_int(one)) is not None]
    if len(found) != 2 or not 0 <= found[0] < found[1]:
        raise OpError(
            f"shard={show(shard)} is not a valid part. Give (i, n): the number of the part, from 0, and how many there "
            "are, such as shard=(0, 8)."
        )
    if out is None:
        raise OpError(
            f"shard={show(shard)} makes some of the cells, and a result takes all of them. Pass out=FOLDER: all shards "
            "can have the same one."
        )
    return found[0], found[1]


def _add_parameters(signature: inspect.Signature) -> inspect.Signature:
    """A study's own signature, with ``shard`` and ``workers`` after ``out``."""
    own = list(signature.parameters.values())
    position = 1 + list(signature.parameters).index("out")
    kinds = {"shard": "tuple[int, int] | None", "workers": f"{Workers.__module__}.Workers | None"}
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in kinds.items()
    ]
    return signature.replace(parameters=[*own[:position], *extra, *own[position:]])


LINES = """
    shard: (i, n): only part i of n, from 0, of the cells is made, in a folder ``out`` that all parts can share; the
      result is whole once the last one is there (see ``studies.merge``).
    workers: who makes the cells, such as ``dl.RayWorkers(load, num=8)``; this process by default."""


def _add_lines(text: str) -> str:
    """A docstring with what :func:`divisible` adds, after the lines of ``out``."""
    before, mark, after = text.partition("\n    out: ")
    if not mark:
        return text
    lines = after.split("\n")
    own = 1 + next((i for i, line in enumerate(lines[1:]) if not line.startswith("      ")), len(lines) - 1)
    return "\n".join([before + mark + lines[0], *lines[1:own]]) + LINES + "\n" + "\n".join(lines[own:])
