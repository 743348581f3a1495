"""Fingerprints of the settings of a study that JSON cannot hold, such as a judge: equal for equal values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dit_lens.arguments.numbers import as_plain
from dit_lens.core.runs.state import describe_part
from dit_lens.core.runs.values import PLAIN, Parts, Reader


def fingerprint_values(settings: Mapping[str, Any]) -> tuple[dict[str, Parts], list[str]]:
    """The fingerprints of what JSON cannot hold of settings, and what of it has no value that can be compared.

    >>> def above(limit):
    ...     return lambda image, prompt: {"bright": float(image.getextrema()[1] > limit)}
    >>> found, unknown = fingerprint_values({"k": 4, "judge": above(0.5)})
    >>> found["judge"]["limit"], unknown
    ('0.5', [])

    Returns name of the setting -> part -> its fingerprint, or the value itself where that is short; and names.

    settings: by argument.
    """
    found: dict[str, Parts] = {}
    unknown: list[str] = []
    for name, value in _find_values(settings):
        reader = Reader(describe_part)
        found[name] = reader.parts(value)
        unknown += [f"{name} ({what})" for what in dict.fromkeys(reader.unknown)]
    return found, unknown


def _find_values(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """What is not plain in nested mappings and lists, by where it is."""
    value = as_plain(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _find_values(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _find_values(item, f"{name}[{i}]")
    elif not isinstance(value, (*PLAIN, np.generic, np.ndarray)):
        yield name, value
