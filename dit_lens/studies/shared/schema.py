"""Checks JSON against a JSON schema: as much of the standard as the schemas of this package use."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

from dit_lens.errors import show

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    "null": lambda value: value is None,
}
KNOWN = {"$schema", "$id", "$defs", "title", "description", "type", "const", "enum", "minimum", "minLength", "pattern"}
KNOWN |= {"items", "properties", "required", "additionalProperties", "$ref"}


def load_schema(name: str) -> dict[str, Any]:
    """A schema of this package. name: of its file, such as "model_report.schema.json"."""
    return json.loads((resources.files("dit_lens.studies") / name).read_text("utf-8"))


def find_mistakes(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    """What in a value does not conform to a schema, in words; nothing where all does.

    >>> schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 1}}}
    >>> list(find_mistakes({"n": 0}, schema)), list(find_mistakes({}, schema)), list(find_mistakes({"n": 1}, schema))
    (['n is 0, which is below 1'], ["the whole lacks 'n'"], [])

    value: what JSON has been read into.
    schema: a JSON schema (draft 2020-12) of the words in KNOWN, with references to its own ``$defs``.
    """
    return _find(value, schema, schema, "")


def _find(value: Any, schema: dict[str, Any], whole: dict[str, Any], where: str) -> Iterator[str]:
    if unknown := schema.keys() - KNOWN:
        raise NotImplementedError(f"a schema with {sorted(unknown)}")
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    told = where or "the whole"
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", list(TYPES))
    if not any(TYPES[name](value) for name in types):
        yield f"{told} is {show(value)}, which is no {' or '.join(types)}"
        return
    yield from (f"{told} is {show(value)}, {why}" for why in _find_limits(value, schema))
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from _find(item, schema["items"], whole, f"{where}[{i}]")
    if isinstance(value, dict):
        yield from (f"{told} lacks {name!r}" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
            if inner is False:
                yield f"{told} has {show(name)}, which the format does not know"
            elif isinstance(inner, dict):
                yield from _find(item, inner, whole, f"{where}.{name}".removeprefix("."))


def _find_limits(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    """What of a single value lies outside of its limits."""
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        yield f"and not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"and none of {', '.join(map(repr, schema['enum']))}"
    if "minimum" in schema and TYPES["number"](value) and value < schema["minimum"]:
        yield f"which is below {schema['minimum']}"
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            yield "which is too short"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"which does not look like {schema['pattern']}"
