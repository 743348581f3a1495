"""What the JSON of a run may hold: the type of every field, checked when it is loaded.

What passes can be shown, tabulated and saved again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_lens.errors import OpError, show

ANY = object()  # whatever JSON has, and this library writes
DEEPEST = 100  # lists in lists; Python's own writer of JSON ends at some hundreds
LARGEST = 2**63

# A schema is a type or None; a tuple of schemas, of which one fits, the usual first; [one] for a list of any length,
# [one, two, ...] for one of exactly these; {str: one} for a mapping of any names, {"a": one, ...} for these names,
# with "a?" for one that may be missing, and with str for any others. Whole numbers are counts and indices: from 0 up.
WHOLE = [int]
SOME = ([int], None)

ENTRY = {
    "op": int,
    "kind": str,
    "site": str,
    "branch": str,
    "steps": WHOLE,
    "rows": SOME,
    "tokens": SOME,
    "channels": SOME,
    "elements": int,
    "before": [float],
    "after": [float],
    "keys?": (str, None),
}
READING = {
    "name": str,
    "steps": WHOLE,
    "total_steps": int,
    "branches": [str],
    "both": bool,
    "rows": WHOLE,
    "tokens": ([int], None, {str: [[int]]}),
    "channels": {str: SOME},
    "reduce": (str, None),
    "shape_of_grid": SOME,
    "sites": [str],
    "masks?": [str],
    "features?": bool,
}
RUN = {
    "format": int,
    "spec": {"prompt": ([str], None), "seed": ([int], None), "call": {str: ANY}, "ops": [{str: ANY}], str: ANY},
    "provenance": {"family": str, "pipeline": str, "model?": (str, None), "device": str, "dtype": str, str: ANY},
    "grid": WHOLE,
    "clock": [[int, float, float]],
    "images": int,
    "latents": bool,
    "readings": [READING],
    "receipt": [ENTRY],
}


def check_record(value: Any, schema: Any, where: str) -> None:
    """Raises OpError where a value is not of the type that its field has.

    >>> check_record({"steps": [0, "one"]}, {"steps": [int]}, "a read")
    Traceback (most recent call last):
    ...
    dit_lens.errors.OpError: a read: steps[1] is 'one', not a whole number from 0 up

    value: what JSON gave.
    schema: such as RUN.
    where: what the value is, for the message.
    """
    if fault := _find_fault(value, schema, ""):
        raise OpError(f"{where}: {fault.lstrip('.')}")


def is_text(value: Any) -> bool:
    r"""Whether a value is text that a file can hold: without halves of characters.

    >>> is_text("x"), is_text("\ud83d"), is_text(7)
    (True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find_fault(value: Any, schema: Any, name: str) -> str | None:
    """What does not fit, by name; None if all does."""
    if isinstance(schema, tuple):
        faults = [_find_fault(value, one, name) for one in schema]
        return None if None in faults else faults[0]
    if isinstance(schema, list):
        return _fault_in_list(value, schema, name)
    if isinstance(schema, dict):
        return _fault_in_mapping(value, schema, name)
    if schema is ANY:
        return _fault_in_any(value, name)
    fits, meant = FITS[schema]
    return None if fits(value) else f"{name or 'it'} is {show(value)}, not {meant}"


def _fault_in_list(value: Any, schema: list[Any], name: str) -> str | None:
    if not isinstance(value, list | tuple):
        return f"{name or 'it'} is {show(value)}, not a list"
    if len(schema) > 1 and len(value) != len(schema):
        return f"{name or 'it'} has {len(value)} entries, not {len(schema)}"
    each = schema if len(schema) > 1 else schema * len(value)
    pairs = enumerate(zip(value, each, strict=True))
    return next((fault for i, (one, kind) in pairs if (fault := _find_fault(one, kind, f"{name}[{i}]"))), None)


def _fault_in_mapping(value: Any, schema: dict[Any, Any], name: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{name or 'it'} is {show(value)}, not a mapping"
    kinds = {key.rstrip("?"): kind for key, kind in schema.items() if key is not str}
    if missing := [key for key in schema if key is not str and not key.endswith("?") and key not in value]:
        return f"{name or 'it'} has no {missing[0]}"
    for key, one in value.items():
        if not is_text(key) or (key not in kinds and str not in schema):
            return f"{name or 'it'} holds {show(key)}, which is not known"
        if fault := _find_fault(one, kinds[key] if key in kinds else schema[str], f"{name}.{key}"):
            return fault
    return None


def _fault_in_any(value: Any, name: str) -> str | None:
    """Text that no file can hold, and lists in lists that no writer goes down, are not what was written."""
    level = [value]
    for _ in range(DEEPEST):
        if odd := [one for one in level if isinstance(one, str) and not is_text(one)]:
            return f"{name or 'it'} holds {show(odd[0])}, which is no text"
        lists = [[*one, *one.values()] if isinstance(one, Mapping) else one for one in level if _holds_others(one)]
        if not lists:
            return None
        level = [one for some in lists for one in some]
    return f"{name or 'it'} holds lists in lists, more than {DEEPEST} deep"


def _holds_others(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_number(value: Any) -> bool:
    """Infinite ones and NaN included: a norm of a run that overflowed is one."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST)


FITS = {
    int: (_is_whole, "a whole number from 0 up"),
    float: (_is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (is_text, "text"),
    None: (lambda value: value is None, "null"),
}
