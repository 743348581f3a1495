"""Converts docstrings, prose in which ``name: what it is.`` explains a parameter, to reStructuredText.

Examples and markup in double backquotes or roles stay as they are. In the rest, characters such as ``|`` and ``*`` are
escaped, each explained parameter becomes an item of a list, "Raises ..." and "Returns ..." become paragraphs, and the
names of errors become links.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

_MARKUP = re.compile(r"(``.+?``|:[\w:]+:`.+?`)")
_ERROR = re.compile(r"\b(Site|Op|Prompt|Family|Execution|Store|NotYet)Error\b")
_NEW_PARAGRAPH = re.compile(r"(?<=[.)])\s+(?=Raises |Returns |Source: )")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:  # noqa: ARG001
    names = _explainable_names(obj)
    lines[:] = [line for paragraph in _split_paragraphs(lines) for line in [*_convert(paragraph, names), ""]]


def _explainable_names(obj: Any) -> set[str]:
    """Returns the names that a docstring may explain: of parameters, and of the fields of a data class."""
    try:
        return {*inspect.signature(obj).parameters, *getattr(obj, "__annotations__", ())}
    except (TypeError, ValueError):
        return set()


def _split_paragraphs(lines: list[str]) -> Iterator[list[str]]:
    found: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            found.append(line)
        elif found:
            yield found
            found = []


def _convert(paragraph: list[str], names: set[str]) -> Iterator[str]:
    """Yields a paragraph as lines of reStructuredText."""
    if paragraph[0].startswith("    "):
        yield from ["::", "", *paragraph]
    elif paragraph[0].startswith(">>>"):
        yield from paragraph
    elif paragraph[0].startswith("- "):
        yield from map(_escape, paragraph)
    else:
        text = " ".join(line.strip() for line in paragraph)
        for piece in (part for explained in _split_names(text, names) for part in _NEW_PARAGRAPH.split(explained)):
            explained_names, colon, rest = piece.partition(": ")
            known = bool(colon) and set(re.split(r",? and |, ", explained_names)) <= names
            yield f"- **{explained_names}**: {_escape(rest)}" if known else _escape(piece)
            yield ""


def _split_names(text: str, names: set[str]) -> list[str]:
    """Splits a paragraph before every ``name: `` or ``name, name: `` that explains names."""
    if not names:
        return [text]
    name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.split(rf"(?:^|(?<=[.)])\s+)(?=(?:{name})(?:(?:, | and |, and )(?:{name}))*: )", text)


def _escape(text: str) -> str:
    """Escapes all text outside markup."""
    parts = _MARKUP.split(text)
    return "".join(part if i % 2 else _escape_text(part) for i, part in enumerate(parts))


def _escape_text(text: str) -> str:
    """Escapes special characters, and makes links of the names of errors."""
    return _ERROR.sub(r":class:`~dit_lens.errors.\g<0>`", re.sub(r"([*|\\_])", r"\\\1", text))
