"""The cells of a study: what is finished is kept, written whole or not at all, and found again when the study goes on.

A study is a loop over cells in a fixed order. ``cells.get(key, make)`` returns a finished cell, or makes it and keeps
it: in memory, or in a folder that outlives Ctrl-C and kill -9.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.core.runs.files import read_json, read_versioned, recovered, whole_folder, write_json
from dit_lens.core.runs.provenance import describe
from dit_lens.errors import StoreError

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens

FORMAT = 1

# What decides a model's numbers; a study goes on with the same one, on any machine.
IDENTITY = ("family", "pipeline", "transformer", "scheduler", "lora", "dtype", "quantization", "weights")


@dataclass
class Cell:
    """What one finished part of a study left.

    lines: of the study's table. images and masks: for the result, under names of their own. arrays: what later cells
    need, such as channel scores; they stay out of the result.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def remark(folder: str | Path, settings: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Keeps with a study's folder what is known of it from outside, such as its protocol, for :func:`load`."""
    file = Path(folder) / "study.json"
    data = read_versioned(file, "study", FORMAT)
    write_json(file, {**data, "remarks": {"settings": dict(settings), "notes": list(notes)}})


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
        names = {name: f"{i:04d}.png" for i, name in enumerate(cell.images)}
        for name, file in names.items():
            cell.images[name].save(fresh / file)
        parts = {part: values for part in ("masks", "arrays") if (values := getattr(cell, part))}
        for part, values in parts.items():
            whole = {name: np.ascontiguousarray(value) for name, value in values.items()}
            save_file(whole, fresh / f"{part}.safetensors")
        there = {"key": key, "lines": cell.lines, "images": names, "parts": list(parts)}
        write_json(fresh / "cell.json", there)


def _read(folder: Path, key: str | None = None) -> Cell:
    from PIL import Image, UnidentifiedImageError
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = recovered(folder)
    data = read_json(folder / "cell.json", "a cell of a study")
    try:
        if key not in (None, data["key"]):
            raise StoreError(f"{folder} is the cell {data['key']!r}, and {key!r} was to come here. Start a new folder.")
        images = {name: Image.open(folder / file).copy() for name, file in data["images"].items()}
        parts = {part: load_file(folder / f"{part}.safetensors") for part in data["parts"]}
    except (OSError, KeyError, SafetensorError, UnidentifiedImageError) as damage:
        raise StoreError(f"{folder} is damaged: {damage}. Delete it, and the study makes it again.") from damage
    return Cell(data["lines"], images, **parts)


def _numbered(folder: Path) -> Iterator[Path]:
    """The folders 000000, 000001 ... as far as they go without a gap."""
    number = 0
    while recovered(place := folder / f"{number:06d}").exists():
        yield place
        number += 1


def _valid(line: dict[str, Any]) -> dict[str, Any]:
    """A line as JSON knows it, which has neither NaN nor the numbers of numpy."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in line.items()}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in plain.items()}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON reads them back: functions by name, tensors and images by a digest of what is in them."""
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
