"""A cell at its place in a study: where it is kept, what makes it, and one that is fetched when it is looked into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_lens.core.runs.files import find_folder
from dit_lens.errors import StoreError
from dit_lens.studies.shared.cells import Cell, read_cell, write_cell, write_packed


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of a cell in its study.

    study: name of the study.
    number: number of the cell, in the order of the study's code.
    key: name of the cell.
    group: cells of one group share work, so that one process makes them all.
    folder: where it is kept; None to keep it in memory.
    closed: the folder of the study, if no new cells go with those in it.
    create: what makes the cell.
    """

    study: str
    number: int
    key: str
    group: str
    folder: Path | None
    closed: Path | None
    create: Callable[[], Cell]

    @property
    def is_kept(self) -> bool:
        """Whether the cell is finished in the folder."""
        return self.folder is not None and find_folder(self.folder).exists()

    def read(self) -> Cell:
        """The cell as it is kept in the folder."""
        if self.folder is None:
            raise StoreError(f"the cell {self.key!r} of {self.study} is in no folder.")
        return read_cell(self.folder, self.study, self.key)

    def make(self) -> Cell:
        """Makes the cell, and keeps it."""
        self.check_open()
        cell = self.create()
        cell.clean_lines()
        if self.folder is not None:
            write_cell(self.folder, self.key, cell)
        return cell

    def check_open(self) -> None:
        """Raises StoreError where no new cell may be kept."""
        if self.closed is not None:
            raise StoreError(
                f"{self.closed} was begun by an earlier release of dit_lens, which drew other random controls: new "
                "cells do not go with those in it. Load what there is with "
                f"dl.studies.Result.load({str(self.closed)!r}), or choose another folder for out=."
            )

    def take(self, files: Mapping[str, bytes]) -> None:
        """Writes the cell that another process made and packed to the folder, if there is one."""
        if self.folder is not None:
            write_packed(self.folder, files)

    def later(self, fetch: Callable[[], Cell]) -> LaterCell:
        """The cell, to be fetched when it is looked into."""
        return LaterCell(self, fetch)


class LaterCell(Cell):
    """A cell that is not at hand: it is fetched when something of it is asked for.

    slot: its place.
    fetch: waits for it, reads it or makes it.
    """

    def __init__(self, slot: Slot, fetch: Callable[[], Cell]):
        self._slot, self._fetch = slot, fetch

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet."""
        if name not in Cell.__dataclass_fields__:
            raise AttributeError(name)
        self.fill(self._fetch())
        return getattr(self, name)

    def fill(self, cell: Cell) -> None:
        """Takes what is in another cell, which stays here from then on."""
        vars(self).update(vars(cell))

    @property
    def is_there(self) -> bool:
        """Whether it can be had without making it."""
        return "lines" in vars(self) or self._slot.is_kept
