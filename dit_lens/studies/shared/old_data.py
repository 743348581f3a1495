"""What earlier releases saved, as it is called now: the one place that knows old names of files, keys and columns.

Version 0.1.0 wrote "pictures" for images, and columns such as "says_source".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_lens.studies.shared.registry import find_study

_KEYS = {"pictures": "images"}  # of JSON files, and of the settings of transfer_image
_FIDELITY = {"says_source": "fidelity_source", "says_target": "fidelity_target"}
_COLUMNS = {
    "organisation": {"behind": "iou_gap", "others": "iou_other_prompts"},
    "patching": _FIDELITY,
    "transfer": _FIDELITY,
    "transfer_image": {**_FIDELITY, "picture_error": "image_error"},
}
_OLD_LABEL = re.compile(r"^picture (?=\d+ -> )")  # of a pair of transfer_image whose image has no caption


def update_study(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of study.json or result.json under today's names: study, settings, images, columns of tables."""
    new = _rename(data, _KEYS)
    new["settings"] = _update_settings(data["settings"])
    new["study"] = _update_name(data["study"])
    swept = new["settings"].get("study")  # the tables of a sweep have the columns of the study that was swept
    for name in ("table", "summary"):
        if name in new:
            new[name] = _update_table(new[name], swept or new["study"])
    return new


def update_cell(data: Mapping[str, Any], study: str) -> dict[str, Any]:
    """The content of cell.json under today's names.

    data: what was read from the file.
    study: name of the study that the cell belongs to.
    """
    new = _rename(data, _KEYS)
    new["lines"] = [
        {_update_column(name, study): _update_label(value) for name, value in line.items()} for line in data["lines"]
    ]
    return new


def find_images(folder: Path) -> Path:
    """The folder of a saved result's images."""
    old = folder / "pictures"
    return old if old.is_dir() else folder / "images"


def _update_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    new = _rename(settings, _KEYS)
    if "study" in new:  # of a sweep
        new["study"] = _update_name(new["study"])
    return new


def _update_name(study: str) -> str:
    """Today's name of a study; a study that this version does not have keeps its name."""
    record = find_study(study)
    return study if record is None else record.name


def _update_table(table: Mapping[str, Any], study: str) -> dict[str, Any]:
    """A table as JSON, {"data": rows, "columns": names}, under today's names."""
    return {
        "data": [[_update_label(value) for value in row] for row in table["data"]],
        "columns": [_update_column(name, study) for name in table["columns"]],
    }


def _update_column(name: str, study: str) -> str:
    """Today's name of a column; bounds, and measures at equal distance, are named after the measure itself."""
    before = "matched_" if name.startswith("matched_") else ""
    after = next((end for end in ("_low", "_high") if name.endswith(end)), "")
    measure = name.removeprefix(before).removesuffix(after)
    return f"{before}{_COLUMNS.get(study, {}).get(measure, measure)}{after}"


def _update_label(value: Any) -> Any:
    return _OLD_LABEL.sub("image ", value) if isinstance(value, str) else value


def _rename(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in data.items()}
