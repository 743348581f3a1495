"""The cells of a study: what is finished is kept, written whole or not at all, and found again when the study goes on.

A study is a loop over cells in a fixed order. ``cells.get(key, make)`` returns a finished cell, or makes it and keeps
it: in memory, or in a folder that outlives Ctrl-C and kill -9.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from dit_lens.errors import PromptError, StoreError, StudyInterrupted
from dit_lens.provenance import describe
from dit_lens.store import read_json, read_versioned, settled, whole_folder, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens
    from dit_lens.studies.result import Result

FORMAT = 1

# The bar that studies inside `one_bar` advance instead of showing their own.
_BAR: ContextVar[tqdm | None] = ContextVar("bar", default=None)

# Whether a study is only to check its arguments, which it does before its first cell.
_REHEARSING: ContextVar[bool] = ContextVar("rehearsing", default=False)

# What decides a model's numbers; a study goes on with the same one, on any machine.
IDENTITY = ("family", "pipeline", "transformer", "scheduler", "lora", "dtype", "quantization", "weights")


@dataclass
class Cell:
    """What one finished part of a study left.

    lines: of the study's table. pictures and masks: for the result, under names of their own. arrays: what later cells
    need, such as channel scores; they stay out of the result.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


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
        if folder is not None and settled(folder).exists():
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


def load(folder: str | Path) -> Result:
    """The result of what a study has finished in its ``out`` folder, without the model."""
    folder = Path(folder)
    data = read_versioned(folder / "study.json", "study", FORMAT)
    found = [load(part) for part in _numbered(folder / "parts") if any(_numbered(part / "cells"))]
    found = found or [_read(cell) for cell in _numbered(folder / "cells")]
    if not found:
        raise StoreError(f"{folder} holds a {data['study']} study with nothing finished yet. Call it again to go on.")
    result = assembled(data["study"], data["settings"], found)
    remarks = data.get("remarks", {"settings": {}, "notes": []})
    result.settings |= remarks["settings"]
    result.notes += remarks["notes"]
    return result


def remark(folder: str | Path, settings: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Keeps with a study's folder what is known of it from outside, such as its protocol, for :func:`load`."""
    file = Path(folder) / "study.json"
    data = read_versioned(file, "study", FORMAT)
    write_json(file, {**data, "remarks": {"settings": dict(settings), "notes": list(notes)}})


def assembled(study: str, settings: dict[str, Any], cells: Sequence[Any]) -> Result:
    """What a study's own module makes of its cells; a sweep's, of the results of its parts."""
    from dit_lens.studies import STUDIES

    if study not in STUDIES:
        raise StoreError(
            f"there is no study {study!r} in this version of dit_lens. It has: {', '.join(sorted(STUDIES))}."
        )
    return importlib.import_module(f"dit_lens.studies.{study}").assemble(settings, cells)


@dataclass(frozen=True)
class Batch:
    """Prompts that run together from one seed. rows: their numbers in the study."""

    seed: int
    rows: range
    prompts: tuple[str, ...]

    @property
    def key(self) -> str:
        """The batch in the key of a cell."""
        return f"{self.seed}/{self.rows.start}"


def batches(prompts: Sequence[str], seeds: Sequence[int], batch_size: int | None) -> list[Batch]:
    """The batches of a study: for every seed consecutive prompts, all of them where no size is given."""
    size = len(prompts) if batch_size is None else batch_size
    if size < 1:
        raise PromptError(f"batch_size={batch_size} must be at least 1.")
    spans = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    return [Batch(seed, rows, tuple(prompts[i] for i in rows)) for seed in seeds for rows in spans]


def identity(lens: DiTLens) -> dict[str, Any]:
    """The model of a lens, in words and by a few of its weights."""
    found = describe(lens.pipe, lens.family)
    return {name: found[name] for name in IDENTITY}


def claim(folder: Path, study: str, settings: Mapping[str, Any], lens: DiTLens) -> None:
    """Makes the folder this study's, or checks that it is. Raises StoreError that says what differs."""
    file = folder / "study.json"
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "study": study,
        "settings": plain(settings),
        "model": plain(identity(lens)),
    }
    if not file.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise StoreError(f"{folder} holds other files and no study. Choose a new folder for out=.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return
    found = read_versioned(file, "study", FORMAT)
    if found["study"] != study:
        raise StoreError(f"{folder} holds the study {found['study']!r}. Choose another folder for out=.")
    for part in ("settings", "model"):
        odd = [
            f"{name}: {_short(found[part].get(name))} there, {_short(wanted[part].get(name))} now"
            for name in sorted({*found[part], *wanted[part]})
            if found[part].get(name) != wanted[part].get(name)
        ]
        if odd:
            raise StoreError(
                f"{folder} holds a {study} study with another {part.removesuffix('s')}; {'; '.join(odd)}. "
                "Call it as before to go on, or choose another folder for out=."
            )


def _write(folder: Path, key: str, cell: Cell) -> None:
    from safetensors.numpy import save_file

    with whole_folder(folder) as fresh:
        names = {name: f"{i:04d}.png" for i, name in enumerate(cell.pictures)}
        for name, file in names.items():
            cell.pictures[name].save(fresh / file)
        parts = {part: values for part in ("masks", "arrays") if (values := getattr(cell, part))}
        for part, values in parts.items():
            whole = {name: np.ascontiguousarray(value) for name, value in values.items()}
            save_file(whole, fresh / f"{part}.safetensors")
        there = {"key": key, "lines": cell.lines, "pictures": names, "parts": list(parts)}
        write_json(fresh / "cell.json", there)


def _read(folder: Path, key: str | None = None) -> Cell:
    from PIL import Image, UnidentifiedImageError
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = settled(folder)
    data = read_json(folder / "cell.json", "a cell of a study")
    try:
        if key not in (None, data["key"]):
            raise StoreError(f"{folder} is the cell {data['key']!r}, and {key!r} was to come here. Start a new folder.")
        pictures = {name: Image.open(folder / file).copy() for name, file in data["pictures"].items()}
        parts = {part: load_file(folder / f"{part}.safetensors") for part in data["parts"]}
    except (OSError, KeyError, SafetensorError, UnidentifiedImageError) as damage:
        raise StoreError(f"{folder} is damaged: {damage}. Delete it, and the study makes it again.") from damage
    return Cell(data["lines"], pictures, **parts)


def _numbered(folder: Path) -> Iterator[Path]:
    """The folders 000000, 000001 ... as far as they go without a gap."""
    number = 0
    while settled(place := folder / f"{number:06d}").exists():
        yield place
        number += 1


def _valid(line: dict[str, Any]) -> dict[str, Any]:
    """A line as JSON knows it, which has neither NaN nor the numbers of numpy."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in line.items()}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in plain.items()}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON reads them back: functions by name, tensors and pictures by a digest of what is in them."""
    return json.loads(json.dumps(dict(settings), default=_named))


def _named(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} {sha256(value.tobytes()).hexdigest()[:16]}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
