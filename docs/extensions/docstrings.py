"""The package's docstrings as Sphinx reads them: they are prose, in which ``name: what it is.`` explains an argument.

Examples and markup in double backquotes or roles stay as they are. In the rest ``|mean|`` and ``*`` mean themselves,
each explained argument becomes a line of a list, what is raised a paragraph, and an error's name a link.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

_MARKUP = re.compile(r"(``.+?``|:[\w:]+:`.+?`)")
_ERROR = re.compile(r"\b(Site|Op|Prompt|Family|Execution|Store|NotYet)Error\b")
_ENDS = re.compile(r"(?<=[.)])\s+(?=Raises |Returns )")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:  # noqa: ARG001
    arguments = _arguments(obj)
    lines[:] = [line for paragraph in _paragraphs(lines) for line in [*_written(paragraph, arguments), ""]]


def _arguments(obj: Any) -> set[str]:
    """The names that a docstring may explain: of arguments, and of a data class's fields."""
    try:
        return {*inspect.signature(obj).parameters, *getattr(obj, "__annotations__", ())}
    except (TypeError, ValueError):
        return set()


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    found: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            found.append(line)
        elif found:
            yield found
            found = []


def _written(paragraph: list[str], arguments: set[str]) -> Iterator[str]:
    """A paragraph as reStructuredText."""
    if paragraph[0].startswith((">>>", "    ")):
        yield from paragraph
    elif paragraph[0].startswith("- "):
        yield from map(_escaped, paragraph)
    else:
        text = " ".join(line.strip() for line in paragraph)
        for piece in (part for explained in _explained(text, arguments) for part in _ENDS.split(explained)):
            names, colon, rest = piece.partition(": ")
            known = bool(colon) and set(re.split(r",? and |, ", names)) <= arguments
            yield f"- **{names}**: {_escaped(rest)}" if known else _escaped(piece)
            yield ""


def _explained(text: str, arguments: set[str]) -> list[str]:
    """A paragraph cut before every ``name: `` or ``name, name: `` that explains arguments."""
    if not arguments:
        return [text]
    name = "|".join(map(re.escape, sorted(arguments, key=len, reverse=True)))
    return re.split(rf"(?:^|(?<=[.)])\s+)(?=(?:{name})(?:(?:, | and |, and )(?:{name}))*: )", text)


def _escaped(text: str) -> str:
    parts = _MARKUP.split(text)
    return "".join(part if i % 2 else _plain(part) for i, part in enumerate(parts))


def _plain(text: str) -> str:
    """Words that mean themselves, but for the errors of the package, which become links."""
    return _ERROR.sub(r":class:`~dit_lens.errors.\g<0>`", re.sub(r"([*|\\_])", r"\\\1", text))
