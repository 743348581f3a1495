"""The call that made a result, as code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from dit_lens.studies.shared.registry import get_study

# Name of the judge that a study takes if none is given.
STOCK_JUDGE = "scene_judge"

# Arguments of a study that do not change what it finds, or that its prompts and judge decide.
LEFT_OUT = ("call", "batch_size", "judge", "attributes")


def write_call(study: str, settings: Mapping[str, Any]) -> str:
    """The call of a study, with every choice that differs from its defaults.

    >>> settings = {"prompts": ["a red circle"], "k": [8], "seeds": [0, 1], "draws": 3, "steps": "None", "call": {}}
    >>> print(write_call("disruption", settings))
    import dit_lens as dl
    <BLANKLINE>
    result = dl.studies.disruption(
        lens,
        ['a red circle'],
        k=[8],
        seeds=[0, 1],
        draws=3,
    )
    result.figure()

    What JSON cannot hold, such as a judge of your own, stands as a comment.
    """
    record, lines = get_study(study), []
    for name, parameter in inspect.signature(record.function).parameters.items():
        if name in settings and name not in LEFT_OUT:
            value = _write_argument(name, settings[name], parameter.default)
            lines += [] if value is None else [value if parameter.default is parameter.empty else f"{name}={value}"]
    if (judge := settings.get("judge")) not in (None, STOCK_JUDGE):
        lines.append(f"judge=...,  # {judge}")
    lines += [f"{name}={value!r}" for name, value in settings.get("call", {}).items()]
    arguments = "".join(f"    {line},\n" for line in lines)
    return f"import dit_lens as dl\n\nresult = dl.studies.{record.name}(\n    lens,\n{arguments})\nresult.figure()"


def _write_argument(name: str, value: Any, default: Any) -> str | None:
    """A setting, as JSON keeps it, in code; None if it is the argument's default."""
    if default is inspect.Parameter.empty:
        return repr(value)
    if is_dataclass(default) and not isinstance(default, type):
        fields = ", ".join(f"{name}={number!r}" for name, number in value.items())
        return None if value == asdict(default) else f"dl.studies.{type(default).__name__}({fields})"
    if callable(default):
        return None if value == default.__name__ else f"...  # {value}"
    if str(value) == str(default) or (isinstance(default, tuple) and value == list(default)):
        return None
    return value if name == "steps" and isinstance(value, str) else repr(value)  # a slice or an interval, as text
