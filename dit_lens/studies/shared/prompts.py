"""Prompts as data: read from CSV or JSONL, the bundled list for real models, and scenes for the toys.

prompts = dl.prompts.load("prompts.csv")           # columns: prompt, and if you like id, subject, pair, role
dl.studies.disruption(lens, prompts)
dl.studies.transfer(lens, prompts.pairs)           # (source, target) of every contrastive pair
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Self, overload

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.errors import PromptError, StoreError, nearest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

ROLES = ("source", "target")
COLUMNS = ("id", "prompt", "subject", "pair", "role")


class Prompt(str):
    """One prompt: a text, with what is known about it.

    >>> prompt = Prompt("a red fox in snow", id="fox-1", subject="fox")
    >>> prompt.title(), prompt.subject
    ('A Red Fox In Snow', 'fox')

    What is not known is "".

    text: the text.
    id: its name, unique in a list.
    subject: the word of the text that names what is drawn.
    pair: the contrastive pair that it belongs to.
    role: whether it is the "source" or the "target" of that pair.
    """

    __slots__ = ("id", "pair", "role", "subject")

    @checked
    def __new__(cls, text: str, *, id: str, subject: str = "", pair: str = "", role: str = "") -> Self:  # noqa: A002
        """A text with what is known about it."""
        found = super().__new__(cls, text)
        found.id, found.subject, found.pair, found.role = id, subject, pair, role
        return found

    @property
    def text(self) -> str:
        """The text alone."""
        return str(self)


@checked_fields
@dataclass(frozen=True)
class PromptList(Sequence[Prompt]):
    """Prompts in order; a slice is a list of prompts again.

    >>> prompts = bundled()
    >>> prompts[0].subject, len(prompts[:3].texts), len(prompts.pairs)
    ('fox', 3, 20)
    """

    prompts: tuple[Prompt, ...]

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> PromptList: ...

    def __getitem__(self, index: int | slice) -> Prompt | PromptList:
        return PromptList(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        """The texts alone."""
        return [prompt.text for prompt in self.prompts]

    @property
    def subjects(self) -> list[str]:
        """The subject of every text; "" if it is not known."""
        return [prompt.subject for prompt in self.prompts]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(source text, target text) of every pair of which both are here, in the order of the sources."""
        targets = {prompt.pair: prompt.text for prompt in self.prompts if prompt.role == "target"}
        sources = [prompt for prompt in self.prompts if prompt.role == "source" and prompt.pair in targets]
        return [(prompt.text, targets[prompt.pair]) for prompt in sources]

    @property
    def unpaired(self) -> PromptList:
        """The prompts that belong to no pair."""
        return PromptList(tuple(prompt for prompt in self.prompts if not prompt.pair))

    def __repr__(self) -> str:
        shown = [f"  {prompt.id}: {prompt.text}" for prompt in self.prompts[:3]]
        more = ["  ..."] if len(self) > 3 else []
        return "\n".join([f"PromptList: {len(self)} prompts, {len(self.pairs)} pairs", *shown, *more])


@checked
def load(path: str | Path) -> PromptList:
    r"""Reads prompts from a CSV file with a header, or from JSONL with one object per line.

    >>> from tempfile import TemporaryDirectory
    >>> folder = TemporaryDirectory()
    >>> file = Path(folder.name) / "prompts.csv"
    >>> _ = file.write_text("prompt,pair,role\na cat,1,source\na dog,1,target\n")
    >>> load(file).pairs
    [('a cat', 'a dog')]

    Columns: ``prompt``, and optionally ``id`` (else the number of the line), ``subject`` (a word of the prompt) and,
    both or neither, ``pair`` and ``role`` ("source" or "target"; a pair has one of each). UTF-8.
    Raises StoreError if the file does not exist or is of another kind, and PromptError, which names line and column, if
    it cannot be read so.
    """
    file = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if file.suffix.lower() not in readers:
        raise StoreError(f"{file} is neither .csv nor .jsonl. Save the prompts as one of these.")
    if not file.is_file():
        raise StoreError(f"there is no file {file}.")
    return _check_rows(file.name, readers[file.suffix.lower()](file))


def bundled() -> PromptList:
    """60 varied prompts with a named subject for real models, and 20 contrastive pairs that differ in the subject.

    >>> prompts = bundled()
    >>> len(prompts.unpaired), prompts.pairs[0]
    (60, ('A photograph of a cat asleep on a red sofa', 'A photograph of a dog asleep on a red sofa'))
    """
    file = resources.files("dit_lens.studies.shared") / "prompts_bundled.jsonl"
    return _check_rows(file.name, _jsonl_rows(file))


@checked
def scenes(n: int, seed: int, *, held_out: bool = False) -> PromptList:
    """Captions of scenes that the toys draw, no two equal; the subject is the shape.

    >>> scenes(2, seed=0).subjects
    ['...', '...']

    n: number of captions.
    seed: seed of the choice.
    held_out: True for combinations that were not in training, False for those that were; see ``dit_lens.toys.scenes``.
    """
    from dit_lens.toys.scenes import sample_scenes

    if n < 1:
        raise PromptError(f"n={n:,} scenes were asked for. Ask for at least 1.")
    drawn = sample_scenes(n, seed, held_out=held_out, distinct=True)
    found = (Prompt(scene.caption, id=f"scene-{i}", subject=scene.shape) for i, scene in enumerate(drawn))
    return PromptList(tuple(found))


@dataclass(frozen=True)
class _Row:
    """The content of one line of a file, column by column."""

    line: int
    id: str = ""
    prompt: str = ""
    subject: str = ""
    pair: str = ""
    role: str = ""


def _text(file: Path | Traversable) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # Excel puts a mark before the first column
    except UnicodeDecodeError as problem:
        raise PromptError(f"{file.name} is not in UTF-8: {problem}.") from problem


def _csv_rows(file: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        _check_columns(file.name, 1, reader.fieldnames or [])
        for row in reader:
            if None in row:
                raise PromptError(
                    f"{file.name}, line {reader.line_num}: more cells than the header has columns. "
                    'Put a text with commas in double quotes: "a cat, asleep".'
                )
            yield _Row(reader.line_num, **{name: (value or "").strip() for name, value in row.items()})
    except csv.Error as problem:
        raise PromptError(f"{file.name}, line {reader.line_num}: not valid CSV: {problem}.") from problem


def _jsonl_rows(file: Path | Traversable) -> Iterator[_Row]:
    for number, text in enumerate(_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as problem:
            raise PromptError(f"{file.name}, line {number}: not valid JSON: {problem}.") from problem
        if not isinstance(row, dict):
            raise PromptError(f'{file.name}, line {number}: not a JSON object. Write {{"prompt": "a cat"}}.')
        _check_columns(file.name, number, row)
        for name, value in row.items():
            if not isinstance(value, str | int | None) or isinstance(value, bool):
                raise PromptError(f"{file.name}, line {number}, column {name}: {value!r} is not a text.")
        yield _Row(number, **{name: "" if value is None else str(value).strip() for name, value in row.items()})


def _check_columns(name: str, line: int, found: Iterable[str]) -> None:
    columns = list(found)
    for column in columns:
        if column not in COLUMNS:
            raise PromptError(f"{name}, line {line}: there is no column {column!r}.{nearest(str(column), COLUMNS)}")
    if twice := [column for i, column in enumerate(columns) if column in columns[:i]]:
        raise PromptError(f"{name}, line {line}: the column {twice[0]!r} is there twice.")
    if "prompt" not in columns:
        raise PromptError(f"{name}, line {line}: the column 'prompt' is missing; there are: {', '.join(columns)}.")


def _check_rows(name: str, rows: Iterable[_Row]) -> PromptList:
    """The prompts of the rows of a file; PromptError if a row is not valid."""
    lines: dict[str, int] = {}
    roles: dict[tuple[str, str], int] = {}
    found = []
    for row in rows:
        at = f"{name}, line {row.line}, column"
        known = row.id or str(row.line)
        if not row.prompt:
            raise PromptError(f"{at} prompt: it is empty.")
        if known in lines:
            raise PromptError(f"{at} id: {known!r} is that of line {lines[known]} already. Give every prompt its own.")
        if row.subject and not re.search(rf"(?<!\w){re.escape(row.subject)}(?!\w)", row.prompt, re.IGNORECASE):
            raise PromptError(f"{at} subject: {row.subject!r} is not a word of the prompt {row.prompt!r}.")
        if bool(row.pair) != bool(row.role):
            missing = "role" if row.pair else "pair"
            raise PromptError(f"{at} {missing}: it is empty. Give pair and role together, or neither.")
        if row.role and row.role not in ROLES:
            raise PromptError(f"{at} role: there is no role {row.role!r}.{nearest(row.role, ROLES)}")
        if row.role and (row.pair, row.role) in roles:
            before = roles[row.pair, row.role]
            raise PromptError(f"{at} role: line {before} is the {row.role} of pair {row.pair!r} already.")
        lines[known] = row.line
        if row.role:
            roles[row.pair, row.role] = row.line
        found.append(Prompt(row.prompt, id=known, subject=row.subject, pair=row.pair, role=row.role))
    if not found:
        raise PromptError(f"{name} holds no prompts.")
    for (pair, role), line in roles.items():
        other = ROLES[1 - ROLES.index(role)]
        if (pair, other) not in roles:
            raise PromptError(f"{name}, line {line}, column pair: pair {pair!r} has a {role} and no {other}.")
    return PromptList(tuple(found))
