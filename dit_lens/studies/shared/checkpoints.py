"""A study as it runs: its cells are read from its folder or made, under one progress bar.

A study is a loop over cells in a fixed order. ``cells.get(key, make)`` returns a finished cell, or makes it and keeps
it: in memory, or in a folder that outlives Ctrl-C and kill -9. Where several processes share a study, a cell that
another one makes comes when it is looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pandas as pd
from tqdm.auto import tqdm

from dit_lens.errors import StudyInterrupted
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.folders import claim_folder, describe_model, describe_settings, has_other_streams
from dit_lens.studies.shared.registry import get_study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.shares import UnfinishedStudyError, open_share
from dit_lens.studies.shared.slots import LaterCell, Slot

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens


class SharedBar(NamedTuple):
    """A bar of several studies. by_cell: whether a study advances it by 1 for each cell, or by 1 in all."""

    bar: tqdm
    by_cell: bool


# The bar that studies inside `share_progress_bar` advance instead of showing their own.
_BAR: ContextVar[SharedBar | None] = ContextVar("bar", default=None)


class Count(NamedTuple):
    """What a study is before its first cell: its number of cells, and of images at most, where that is known."""

    cells: int
    images: int | None


# Where a study that is only to check its arguments, which it does before its first cell, says how large it is.
_CHECKING: ContextVar[list[Count] | None] = ContextVar("checking", default=None)


class StudyCheckpoints:
    """The finished cells of one study on one lens; a context with one progress bar.

    Raises StoreError if ``out`` holds another study, other settings or another model.

    study: name of the study.
    settings: every choice that decides a number; those that JSON cannot hold count by their values.
    lens: the lens that the study runs on.
    total: number of cells of the whole study.
    out: folder for the cells, or None to keep them in memory.
    meant: argument -> what it means, of arguments that can be written in several ways; a study goes on with the same.
    images: number of images that the whole study draws, at most; None where that is not known.
    """

    def __init__(
        self,
        study: str,
        settings: Mapping[str, Any],
        *,
        lens: DiTLens,
        total: int,
        out: str | Path | None = None,
        meant: Mapping[str, Any] | None = None,
        images: int | None = None,
    ):
        self.study = study
        self.settings: dict[str, Any] = describe_settings(settings)
        self.folder = None if out is None else Path(out)
        self.finished: list[Cell] = []
        self._lens, self._total = lens, total
        self._title = study if images is None else f"{study}, {images:,} images"
        if (counts := _CHECKING.get()) is not None:
            counts.append(Count(total, images))
            raise _CheckedError
        if self.folder is not None:
            claim_folder(self.folder, study, settings, lens, meant, total)
        self._closed = self.folder if self.folder is not None and has_other_streams(self.folder) else None
        self._share = open_share(lambda: describe_settings(describe_model(lens, settings.get("call", {}))))

    def __enter__(self) -> Self:
        self._quiet = self._lens.quiet()
        self._quiet.__enter__()
        shared = _BAR.get()
        self._bar = tqdm(total=self._total, desc=self._title, unit="cell") if shared is None else shared.bar
        self._unit = 1 if shared is None or shared.by_cell else 1 / self._total
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if _BAR.get() is None:
            self._bar.close()
        self._quiet.__exit__(None, None, None)
        if isinstance(problem, KeyboardInterrupt):
            done = list(takewhile(_is_there, self.finished))
            result = self._assemble(done) if done else None
            raise StudyInterrupted(self.study, len(done), self._total, self.folder, result)

    def get(self, key: str, make: Callable[[], Cell], group: str | None = None) -> Cell:
        """Returns the cell of a key: the one that is kept, else what ``make`` returns, which is kept first.

        key: name of the cell.
        make: makes it.
        group: cells of one group share work, so that one process makes them all; by default each is one of its own.
        """
        number = len(self.finished)
        slot = Slot(
            study=self.study,
            number=number,
            key=key,
            group=group or key,
            folder=None if self.folder is None else self.folder / "cells" / f"{number:06d}",
            closed=self._closed,
            create=make,
        )
        cell = self._share.get(slot, lambda: self._bar.update(self._unit))
        self.finished.append(cell)
        return cell

    def skips(self, count: int) -> bool:
        """Whether this process makes none of the next cells, so many, and passes them over.

        Asked before work that only these cells need; where nobody asks, that work is done for nothing.
        """
        if not self._share.skips(len(self.finished), count):
            return False
        self.finished += [Cell() for _ in range(count)]
        return True

    def result(self) -> Result:
        """The result of all cells; UnfinishedStudyError where other processes have not made theirs yet."""
        self._share.finish()
        if missing := [cell for cell in self.finished if not _is_there(cell)]:
            total = len(self.finished)
            note = (
                f"{total - len(missing)} of {total} cells of this {self.study} are in {self.folder}. When all are "
                f"there, dl.studies.Result.load({str(self.folder)!r}) is its result; the same call without shard= "
                "makes what is missing"
            )
            raise UnfinishedStudyError(
                Result(self.study, pd.DataFrame(), pd.DataFrame(), dict(self.settings), notes=[note])
            )
        return self._assemble(self.finished)

    def _assemble(self, cells: Sequence[Cell]) -> Result:
        return get_study(self.study).assemble(self.settings, cells)


def _is_there(cell: Cell) -> bool:
    return not isinstance(cell, LaterCell) or cell.is_there


class _CheckedError(Exception):
    """The arguments of a study are valid."""


@contextmanager
def check_arguments_only() -> Generator[list[Count]]:
    """A study inside this context checks its arguments, and ends before it draws.

    Yields a list, in which it says how large it is.
    """
    counts: list[Count] = []
    outer = _CHECKING.set(counts)
    try:
        with suppress(_CheckedError):
            yield counts
    finally:
        _CHECKING.reset(outer)


@contextmanager
def hide_progress_bar() -> Generator[None]:
    """The studies inside show no bar."""
    outer = _BAR.set(SharedBar(tqdm(disable=True), True))
    try:
        yield
    finally:
        _BAR.reset(outer)


@contextmanager
def share_progress_bar(study: str, total: int, *, by_cell: bool = False) -> Generator[None]:
    """Shows one bar for the studies that run inside.

    study: what it is called.
    total: how many studies there are, each of which advances it by one, cell by cell; or how many cells they have.
    by_cell: whether the total is of cells.
    """
    # Shares of studies are fractions, so only the percentage is worth showing.
    plain = {} if by_cell else {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"}
    with tqdm(total=total, desc=study, unit="cell", **plain) as bar:
        outer = _BAR.set(SharedBar(bar, by_cell))
        try:
            yield
        finally:
            _BAR.reset(outer)
