"""The ``out`` folder of a study: whose it is, and the result of what is finished in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.core.runs.files import read_versioned, write_json
from dit_lens.core.runs.provenance import describe
from dit_lens.errors import StoreError
from dit_lens.studies.shared.cells import number_folders, read_cell
from dit_lens.studies.shared.old_data import update_study
from dit_lens.studies.shared.registry import get_study

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens

FORMAT = 1

# What decides a model's numbers; a study continues with the same one, on any machine.
IDENTITY = ("family", "pipeline", "transformer", "scheduler", "lora", "dtype", "quantization", "weights")


def claim_folder(folder: Path, study: str, settings: Mapping[str, Any], lens: DiTLens) -> None:
    """Makes a folder this study's, or checks that it is; StoreError says what differs.

    folder: the ``out`` of the study; made if it does not exist.
    study: name of the study.
    settings: every choice that decides a number, by argument.
    lens: the lens whose model the study runs.
    """
    file = folder / "study.json"
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "study": study,
        "settings": to_plain_data(settings),
        "model": to_plain_data(describe_model(lens)),
    }
    if not file.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise StoreError(f"{folder} holds other files and no study. Choose a new folder for out=.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return
    found = update_study(read_versioned(file, "study", FORMAT))
    if found["study"] != study:
        raise StoreError(f"{folder} holds the study {found['study']!r}. Choose another folder for out=.")
    for part in ("settings", "model"):
        odd = [
            f"{name}: {_shorten(found[part].get(name))} there, {_shorten(wanted[part].get(name))} now"
            for name in sorted({*found[part], *wanted[part]})
            if found[part].get(name) != wanted[part].get(name)
        ]
        if odd:
            raise StoreError(
                f"{folder} holds a {study} study with another {part.removesuffix('s')}; {'; '.join(odd)}. "
                "Call it as before to continue it, or choose another folder for out=."
            )


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
    data = update_study(read_versioned(folder / "study.json", "study", FORMAT))
    cells = number_folders(folder / "cells")
    # A sweep has a folder for every study that it ran.
    found = [load_study(part) for part in number_folders(folder / "parts") if any(number_folders(part / "cells"))]
    found = found or [read_cell(cell, data["study"]) for cell in cells]
    if not found:
        raise StoreError(
            f"{folder} holds a {data['study']} study with nothing finished yet. Call it again to continue."
        )
    result = get_study(data["study"]).assemble(data["settings"], found)
    remarks = data.get("remarks", {"settings": {}, "notes": []})
    result.settings |= remarks["settings"]
    result.notes += remarks["notes"]
    return result


def describe_model(lens: DiTLens) -> dict[str, Any]:
    """The model of a lens, in words and by a few of its weights."""
    found = describe(lens.pipe, lens.family)
    return {name: found[name] for name in IDENTITY}


def to_plain_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON reads them back: functions by name, tensors and images by a digest of what is in them."""
    return json.loads(json.dumps(dict(settings), default=_encode))


def _encode(value: Any) -> Any:
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


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
