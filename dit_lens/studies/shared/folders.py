"""The ``out`` folder of a study: whose it is, and the result of what is finished in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.arguments.numbers import as_plain
from dit_lens.core.execution import identity
from dit_lens.core.runs.files import (
    alone_in,
    find_folder,
    read_versioned,
    report_damage,
    report_unwritten,
    write_json,
)
from dit_lens.core.runs.provenance import describe, digest
from dit_lens.errors import ExecutionError, StoreError, warn
from dit_lens.studies.shared.cells import number_folders, read_cell
from dit_lens.studies.shared.fingerprints import fingerprint_values
from dit_lens.studies.shared.old_data import update_study
from dit_lens.studies.shared.registry import get_study
from dit_lens.studies.shared.streams import STREAMS

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens

FORMAT = 1

DAMAGED = "Restore it from a copy, or run the study in a new folder."

# What decides a model's numbers; a study continues with the same one, on any machine.
# What earlier releases did not store of it comes last.
IDENTITY = ("family", "pipeline", "transformer", "scheduler", "lora", "dtype", "quantization", "weights")
NEW = {
    "server": "the server",
    "state": "every weight, adapter and setting of the scheduler",
    "defaults": "the defaults of the lens",
}

APART = "Merge the folders of one study, with one setting and one model; these go into two folders."

CALL = "{} there, {} now"  # how two values are told: of a folder and a call
SOURCES = "{} in the first, {} in the second"  # of two folders

MOST_TOLD = 4  # differences in a message
LONGEST = 80  # characters of a value in one


def claim_folder(
    folder: Path,
    study: str,
    settings: Mapping[str, Any],
    lens: DiTLens,
    meant: Mapping[str, Any] | None = None,
    cells: int | None = None,
) -> None:
    """Makes a folder this study's, or checks that it is; StoreError says what differs.

    What cannot be compared, as an earlier release did not store it, or as it has no value, is said in a warning.

    folder: the ``out`` of the study; made if it does not exist.
    study: name of the study.
    settings: every choice that decides a number, by argument.
    lens: the lens whose model the study runs.
    meant: argument -> what it means, of arguments that can be written in several ways; compared in their place.
    cells: how many cells the study has; None for a study of studies.
    """
    values, unknown = fingerprint_values(settings)
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "study": study,
        "settings": describe_settings(settings),
        "values": values,
        "meant": describe_settings(meant or {}),
        "model": describe_settings(describe_model(lens, settings.get("call", {}))),
        "streams": STREAMS,
        "cells": cells,
    }
    if not _begin(folder, wanted):
        check_same_study(folder, wanted)
    _warn_of_unknown(unknown)


def _begin(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Makes a folder a study's, unless it is one's already; of several processes one does, and the others find it."""
    file = folder / "study.json"
    if find_folder(file).exists():
        return False
    with report_unwritten(folder):
        others = folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir())
        if others and not file.exists():
            raise StoreError(f"{folder} holds other files and no study. Choose a new folder for out=.")
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            if file.exists():
                return False
            write_json(file, wanted)
    return True


def check_same_study(folder: Path, wanted: Mapping[str, Any], source: Path | None = None) -> None:
    """Raises StoreError where the study in a folder is another one, and says what differs.

    folder: the folder.
    wanted: what the file of a study has, of the study that is to go on there.
    source: the folder that ``wanted`` is from, whose cells are to come there; None for a call of the study.
    """
    with report_damage(folder, DAMAGED):
        found = update_study(read_versioned(folder / "study.json", "study", FORMAT))
    compare_studies(folder, found, wanted, source)


def compare_studies(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], source: Path | None) -> None:
    """As :func:`check_same_study`, of a file that has been read. found: what it has."""
    study, wanted = wanted["study"], copy.deepcopy(dict(wanted))
    with report_damage(folder, DAMAGED):
        found = {**found, **{part: dict(found[part]) for part in ("settings", "model")}}
    if found["study"] != study:
        if source is not None:
            raise StoreError(f"{folder} holds the study {found['study']!r}, and {source} {study!r}. {APART}")
        raise StoreError(f"{folder} holds the study {found['study']!r}. Choose another folder for out=.")
    _check_machine(folder, study, found["model"], wanted["model"], source)
    for name in wanted["meant"].keys() & found.get("meant", {}).keys():
        for one in (found, wanted):
            one["settings"][name] = one["meant"][name]
            one["values"] = {part: value for part, value in one["values"].items() if part.split("[")[0] != name}
    if newer := [name for name in wanted["settings"] if name not in found["settings"]]:
        raise StoreError(
            f"{folder} was begun by an earlier release of dit_lens, whose {study} had no {', '.join(newer)}: "
            f"{'new cells' if source is None else f'the cells of {source}'} do not go with those in it. Load what "
            f"there is with dl.studies.Result.load({str(folder)!r}), or choose another folder for out=."
        )
    values = wanted["values"]
    missing = [NEW[name] for name in NEW if name not in found["model"]]
    missing += [] if "values" in found else [f"the functions and arrays given ({', '.join(values)})"] * bool(values)
    now = {name: value for name, value in wanted["model"].items() if name not in NEW or name in found["model"]}
    for part, there, here, depth in (
        ("setting", found["settings"], wanted["settings"], 1),
        ("function or array", found.get("values", values), values, 2),
        ("model", found["model"], now, 4),
    ):
        if odd := _differences(there, here, depth, sides=CALL if source is None else SOURCES):
            more = f"; and {len(odd) - MOST_TOLD} more" if len(odd) > MOST_TOLD else ""
            told = f"{'; '.join(odd[:MOST_TOLD])}{more}"
            if source is not None:
                raise StoreError(
                    f"{folder} and {source} hold {study} studies, the second with another {part}; {told}. {APART}"
                )
            raise StoreError(
                f"{folder} holds a {study} study with another {part}; {told}. "
                "Call it as before to continue it, or choose another folder for out=."
            )
    if missing:
        warn(
            f"{folder} was begun by an earlier release of dit_lens, which did not store everything that decides a "
            f"number. Not compared with {source or 'this call'}: {', '.join(missing)}."
        )


def check_same_model(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ExecutionError where a worker's lens is on another model than the study's.

    there: the model of the study.
    here: that of the worker.
    """
    if odd := _differences(there, here, 4, "model"):
        raise ExecutionError(
            f"the lens that a worker loaded is on another model than the study's: {'; '.join(odd[:MOST_TOLD])}. Let "
            "load= make the lens that the study is called with, its defaults among them."
        )


def _check_machine(
    folder: Path, study: str, there: Mapping[str, Any], here: Mapping[str, Any], source: Path | None
) -> None:
    """Raises StoreError where a study of a model here would go on on a server, or the other way round."""
    if "server" not in there and there.get("weights") is None:
        return  # an earlier release did not store which server it was
    servers = there.get("server"), here["server"]
    if (servers[0] is None) != (servers[1] is None):
        begun, now = (f"the server {server['host']}" if server else "this machine" for server in servers)
        other = "this lens is" if source is None else f"{source} one"
        remedy = "Continue it where it was begun, or choose another folder for out=." if source is None else APART
        raise StoreError(
            f"{folder} holds a {study} study of a model on {begun}, and {other} on {now}. A server does not tell its "
            f"weights, unless it is one of dit-lens serve, so whether both are the same model is not known. {remedy}"
        )


def _differences(there: Any, here: Any, depth: int, name: str = "", sides: str = CALL) -> list[str]:
    """What differs, by name; mappings are looked into, to a depth. New parts come last. sides: which value is whose."""
    if depth and isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = sorted({*there, *here}, key=lambda key: (key in NEW, key))
        return [
            line
            for key in keys
            for line in _differences(there.get(key), here.get(key), depth - 1, f"{name}.{key}" if name else key, sides)
        ]
    return [] if there == here else [f"{name}: {sides.format(*_shorten_both(there, here))}"]


def _warn_of_unknown(unknown: Sequence[str]) -> None:
    if unknown:
        warn(
            f"whether these are the same when the study is continued cannot be known, as they have no value that can "
            f"be compared: {', '.join(unknown)}. Continue it with the same ones only."
        )


def has_other_streams(folder: Path) -> bool:
    """Whether the cells of a study's folder have random numbers that today's code would not draw."""
    return read_versioned(folder / "study.json", "study", FORMAT).get("streams") != STREAMS


def add_remarks(folder: str | Path, settings: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Keeps in a study's folder what a caller knows of it, such as its protocol; :func:`load_study` adds it again.

    folder: the folder of the study.
    settings: what is added to the settings of the result.
    notes: what is added to its notes.
    """
    file = Path(folder) / "study.json"
    data = read_versioned(file, "study", FORMAT)
    write_json(file, {**data, "remarks": {"settings": dict(settings), "notes": list(notes)}})


def load_study(folder: str | Path) -> Any:
    """The result of what a study has finished in its ``out`` folder; needs no model."""
    folder = Path(folder)
    with report_damage(folder, DAMAGED):
        data = update_study(read_versioned(folder / "study.json", "study", FORMAT))
        # A sweep has a folder for every study that it ran. What shards have not made yet ends both rows.
        parts = list(takewhile(lambda part: any(number_folders(part / "cells")), number_folders(folder / "parts")))
        cells = list(number_folders(folder / "cells"))
        later = count_cells(folder) - len(cells) - sum(map(count_cells, parts))
        found = [load_study(part) for part in parts] or [read_cell(cell, data["study"]) for cell in cells]
        if not found:
            beyond = f" but {later} later cells, without the first one" if later else ""
            raise StoreError(
                f"{folder} holds a {data['study']} study with nothing finished yet{beyond}. Call it again to continue."
            )
        result = get_study(data["study"]).assemble(data["settings"], found)
        if later:
            result.notes.append(
                f"not the whole study: {later} more cells are finished, but not those before them. It is whole when "
                "all shards have run"
            )
        remarks = data.get("remarks", {"settings": {}, "notes": []})
        result.settings |= remarks["settings"]
        result.notes += remarks["notes"]
        return result


def list_cells(folder: Path) -> list[int]:
    """The numbers of the finished cells in the folder of a study, without those of the studies in a sweep."""
    place = folder / "cells"
    return sorted(int(cell.name) for cell in place.glob("[0-9]*") if cell.name.isdecimal()) if place.is_dir() else []


def count_cells(folder: Path) -> int:
    """How many finished cells there are in the folder of a study, or in those of a sweep."""
    return len(list_cells(folder)) + sum(map(count_cells, number_folders(folder / "parts")))


def describe_model(lens: DiTLens, call: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a lens: in words, by its weights and what is set beside them; or by the name of its server.

    The server counts where it does not tell its weights.

    call: the arguments of the study's runs, beside which the lens has defaults.
    """
    reached = lens.engine.reaches_weights
    found = identity.describe_model(lens) if reached else {**describe(lens.pipe, lens.family), "state": None}
    defaults = {name: value for name, value in lens.defaults.items() if name not in call}
    return {
        **{name: found[name] for name in (*IDENTITY, "state")},
        "server": None if reached else lens.engine.server,
        "defaults": describe_settings(defaults) | fingerprint_values(defaults)[0],
    }


def describe_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON reads them back: functions by name, tensors and images by a digest of what is in them."""
    return json.loads(json.dumps(dict(settings), default=_encode))


def _encode(value: Any) -> Any:
    if (plain := as_plain(value)) is not value:  # a number is the same number in whatever type it was given
        return plain
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided:
            return f"tensor without plain values, {list(value.shape)}"
        value = value.detach().float().cpu().numpy()
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} {digest(value.tobytes())}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return str(value)


def _shorten_both(*values: Any) -> list[str]:
    """Two values as text, of which the part is shown where they begin to differ."""
    texts = [json.dumps(value) for value in values]
    if max(map(len, texts)) <= LONGEST:
        return texts
    pairs = enumerate(zip(*texts, strict=False))
    differ = next((i for i, (one, other) in pairs if one != other), min(map(len, texts)))
    start = max(0, differ - LONGEST // 4)
    return [
        f"{'...' * (start > 0)}{text[start : start + LONGEST]}{'...' * (len(text) > start + LONGEST)}" for text in texts
    ]
