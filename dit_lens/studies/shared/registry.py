"""The studies by name: how each turns its cells into a result."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.core.runs.files import read_versioned
from dit_lens.errors import StoreError
from dit_lens.studies.shared.cells import FORMAT, _numbered, _read

if TYPE_CHECKING:
    from dit_lens.studies.shared.result import Result


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


def assembled(study: str, settings: dict[str, Any], cells: Sequence[Any]) -> Result:
    """What a study's own module makes of its cells; a sweep's, of the results of its parts."""
    from dit_lens.studies import STUDIES

    if study not in STUDIES:
        raise StoreError(
            f"there is no study {study!r} in this version of dit_lens. It has: {', '.join(sorted(STUDIES))}."
        )
    return importlib.import_module(f"dit_lens.studies.{study}").assemble(settings, cells)
