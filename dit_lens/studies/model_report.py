"""What a protocol's studies found on one model, as a file that many people can write and one table can hold."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.files import LARGEST_JSON, file_inside, read_json, write_bytes, write_json
from dit_lens.errors import StoreError, show
from dit_lens.studies.shared.schema import find_mistakes, load_schema

KIND, SCHEMA = "dit_lens model report", 1
REPORT, PICTURES = "result.json", "pictures.csv.gz"
SHOWN = 3  # mistakes in a message


@dataclass
class ModelReport:
    """What a protocol's studies found on one model: what ``dit-lens study`` leaves, and ``dit-lens board`` compares.

        report = dl.studies.ModelReport.load("results/flux-dev")
        report.verdicts                                     # one row per claim
        report.table.query("study == 'disruption'")         # one row per measurement

    content: what result.json has; ``dit_lens/studies/model_report.schema.json`` says what each entry is.
    table: one row per measurement of every study, which is in the column "study".
    """

    content: dict[str, Any]
    table: pd.DataFrame

    @property
    def verdicts(self) -> pd.DataFrame:
        """One row per claim: claim, study, verdict, measure, mean, low, high."""
        lines = [
            {name: one[name] for name in ("claim", "study", "verdict", "measure")}
            | (one["value"] or dict.fromkeys(("mean", "low", "high")))
            for one in self.content["verdicts"]
        ]
        return pd.DataFrame(lines, columns=["claim", "study", "verdict", "measure", "mean", "low", "high"])

    @checked
    def save(self, folder: str | Path) -> Path:
        """Writes pictures.csv.gz and then result.json, each whole or not at all; returns the path of result.json.

        folder: the folder, in which other files stay.
        """
        packed, columns = _pack(self.table)
        table = {"file": PICTURES, "sha256": hashlib.sha256(packed).hexdigest(), "rows": len(self.table)}
        content = {**self.content, "kind": KIND, "schema": SCHEMA, "table": {**table, "columns": columns}}
        file = Path(folder) / REPORT
        _check(content, file)
        write_bytes(Path(folder) / PICTURES, packed)
        write_json(file, content)
        return file

    @classmethod
    @checked
    def load(cls, path: str | Path) -> ModelReport:
        """Reads what :meth:`save` wrote; StoreError, which names the file and what is wrong, for anything else.

        path: the folder, or the result.json in it.
        """
        file = Path(path)
        file = file if file.name == REPORT else file / REPORT
        content = read_json(file_inside(file.parent, REPORT), "a model report")
        _check(content, file)
        table = content["table"]
        return cls(content, _unpack(file_inside(file.parent, table["file"]), table))

    def __repr__(self) -> str:
        model, prompts = self.content["model"], self.content["prompts"]
        head = f"{model['id']}: {self.content['protocol']['name']}, {prompts['n']} prompts, {len(self.table)} rows"
        return "\n".join([head, *(f"  {one['claim']}: {one['verdict']}" for one in self.content["verdicts"])])


@cache
def _load_schema() -> dict[str, Any]:
    return load_schema("model_report.schema.json")


def _check(content: Any, file: Path) -> None:
    """Raises StoreError for what is no model report."""
    if isinstance(content, dict) and content.get("kind") != KIND and {"study", "summary"} <= content.keys():
        raise StoreError(
            f"{file} is the result of one study, {show(content['study'])}, and no model report: read it with "
            "dl.studies.Result.load. `dit-lens study PIPELINE --out DIR` writes a report."
        )
    mistakes = list(islice(find_mistakes(content, _load_schema()), SHOWN + 1))
    if mistakes:
        more = "; and more" if len(mistakes) > SHOWN else ""
        raise StoreError(
            f"{file} is no model report of schema {SCHEMA}: {'; '.join(mistakes[:SHOWN])}{more}. "
            "`dit-lens study PIPELINE --out DIR` writes one."
        )


def _pack(table: pd.DataFrame) -> tuple[bytes, dict[str, str]]:
    """A table as compressed CSV, the same bytes for the same table, and the kinds of its columns."""
    columns = {str(name): list(table[name].astype(object)) for name in table}
    kinds = {name: _find_kind(values) for name, values in columns.items()}
    texts = {name: [_write(value, kinds[name]) for value in values] for name, values in columns.items()}
    written = io.StringIO(newline="")
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*texts.values(), strict=True))
    return gzip.compress(written.getvalue().encode(), mtime=0), kinds


def _find_kind(values: Sequence[Any]) -> str:
    known = [value for value in values if not _is_missing(value)]
    if known and all(isinstance(value, bool | np.bool_) for value in known):
        return "truth"
    numbers = all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in known)
    return "number" if known and numbers else "text"


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _write(value: Any, kind: str) -> str:
    if _is_missing(value):
        return ""
    return repr(value.item() if isinstance(value, np.generic) else value) if kind != "text" else str(value)


def _unpack(file: Path, said: Mapping[str, Any]) -> pd.DataFrame:
    """The table of a report; StoreError where it is another than result.json says."""
    remedy = "Restore the folder, or run the command again, which goes on from its cells."
    try:
        packed = file.read_bytes()
        with gzip.open(io.BytesIO(packed)) as opened:
            text = opened.read(LARGEST_JSON + 1).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as damage:
        raise StoreError(f"{file} cannot be read: {damage}. {remedy}") from damage
    if hashlib.sha256(packed).hexdigest() != said["sha256"]:
        raise StoreError(f"{file} is not the table that {REPORT} beside it tells of: its hash is another. {remedy}")
    if len(text) > LARGEST_JSON:
        raise StoreError(f"{file} is larger than {LARGEST_JSON // 2**20} MiB when unpacked, so it is not read.")
    csv.field_size_limit(LARGEST_JSON)
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    names, width = list(said["columns"]), len(said["columns"])
    if header != names or len(rows) != said["rows"] or any(len(row) != width for row in rows):
        raise StoreError(
            f"{file} has {len(rows)} rows of {', '.join(header)}, and {REPORT} tells of {said['rows']} rows of "
            f"{', '.join(names)}. {remedy}"
        )
    try:
        columns = {name: _read([row[i] for row in rows], said["columns"][name]) for i, name in enumerate(names)}
    except (ValueError, KeyError) as problem:
        raise StoreError(f"{file} has a value that is of no such kind as {REPORT} says: {problem}. {remedy}") from None
    return pd.DataFrame(columns)


def _read(texts: Sequence[str], kind: str) -> list[Any]:
    if kind == "text":
        return [text or None for text in texts]
    if kind == "truth":
        return [{"True": True, "False": False, "": None}[text] for text in texts]
    if all(text.lstrip("-").isdecimal() for text in texts):
        return [int(text) for text in texts]
    return [float(text) if text else math.nan for text in texts]
