"""A study as it runs: cells are taken from its folder or made, under one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm.auto import tqdm

from dit_lens.core.runs.files import recovered
from dit_lens.errors import StudyInterrupted
from dit_lens.studies.shared.cells import Cell, _read, _valid, _write, claim, plain
from dit_lens.studies.shared.registry import assembled

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.result import Result

# The bar that studies inside `one_bar` advance instead of showing their own.
_BAR: ContextVar[tqdm | None] = ContextVar("bar", default=None)

# Whether a study is only to check its arguments, which it does before its first cell.
_REHEARSING: ContextVar[bool] = ContextVar("rehearsing", default=False)


class Cells:
    """The finished cells of one study on one lens; a context with one progress bar.

    study: its name, which is also its module's. settings: every choice that decides a number, as plain data; functions
    among them count by their names. total: cells of the whole study. out: a folder, or None to keep them in memory.
    Raises StoreError where ``out`` holds another study, other settings or another model.
    """

    def __init__(
        self, study: str, settings: Mapping[str, Any], *, lens: DiTLens, total: int, out: str | Path | None = None
    ):
        self.study = study
        self.settings: dict[str, Any] = plain(settings)
        self.folder = None if out is None else Path(out)
        self.finished: list[Cell] = []
        self._lens, self._total = lens, total
        if _REHEARSING.get():
            raise _RehearsedError
        if self.folder is not None:
            claim(self.folder, study, self.settings, lens)

    def __enter__(self) -> Self:
        self._quiet = self._lens.quiet()
        self._quiet.__enter__()
        shared = _BAR.get()
        self._bar = tqdm(total=self._total, desc=self.study, unit="cell") if shared is None else shared
        self._unit = 1 if shared is None else 1 / self._total
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if _BAR.get() is None:
            self._bar.close()
        self._quiet.__exit__(None, None, None)
        if isinstance(problem, KeyboardInterrupt):
            done = len(self.finished)
            raise StudyInterrupted(self.study, done, self._total, self.folder, self.result() if done else None)

    def get(self, key: str, make: Callable[[], Cell]) -> Cell:
        """The cell under a key: the one that is kept, else what ``make`` returns, which is kept before this returns."""
        folder = None if self.folder is None else self.folder / "cells" / f"{len(self.finished):06d}"
        if folder is not None and recovered(folder).exists():
            cell = _read(folder, key)
        else:
            cell = make()
            cell.lines = [_valid(line) for line in cell.lines]
            if folder is not None:
                _write(folder, key, cell)
        self.finished.append(cell)
        self._bar.update(self._unit)
        return cell

    def result(self) -> Result:
        """The result of the cells so far."""
        return assembled(self.study, self.settings, self.finished)


class _RehearsedError(Exception):
    """A study's arguments are in order."""


@contextmanager
def rehearsal() -> Generator[None]:
    """A study inside it checks its arguments, and ends before it draws."""
    outer = _REHEARSING.set(True)
    try:
        with suppress(_RehearsedError):
            yield
    finally:
        _REHEARSING.reset(outer)


@contextmanager
def one_bar(study: str, total: int) -> Generator[None]:
    """One bar for ``total`` studies that run inside; every cell of theirs advances it by its share of one study."""
    # Shares are fractions, so only the percentage is worth showing.
    with tqdm(total=total, desc=study, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:
        outer = _BAR.set(bar)
        try:
            yield
        finally:
            _BAR.reset(outer)
