"""The code in a page, run as a reader would: ``python`` blocks one after the other, ``pycon`` blocks as doctests.

What needs a GPU or weights stands in ``{code-block}`` with a caption that says so, and is not run. Images that a page
shows after a block are what the block's last line is worth; ``python docs/blocks.py PAGE ...`` draws them again.
"""

from __future__ import annotations

import ast
import doctest
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"^```(?P<kind>python|pycon)\n(?P<code>.*?)^```\n(?:\n!\[[^\]]*\]\((?P<image>[^)]+)\))?", re.MULTILINE | re.DOTALL
)
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(page: Path) -> Iterator[tuple[Path, Any]]:
    """Runs the blocks of a page in one namespace; yields the images that follow blocks, with what they show."""
    text = page.read_text("utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        value = (_checked if block["kind"] == "pycon" else execute)(block["code"], names, page, line)
        if block["image"]:
            yield page.parent / block["image"], value


def execute(code: str, names: dict[str, Any], page: Path, line: int) -> Any:
    """Runs a block; returns what its last line is worth. Tracebacks point into the page."""
    tree = ast.increment_lineno(ast.parse(code), line)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, page, "exec"), names)
    return None if last is None else eval(compile(last, page, "eval"), names)


def _checked(code: str, names: dict[str, Any], page: Path, line: int) -> None:
    """Runs the examples of a block; raises AssertionError where they answer otherwise than they say."""
    test = doctest.DocTestParser().get_doctest(code, names, page.stem, str(page), line)
    test.globs = names
    said: list[str] = []
    if doctest.DocTestRunner(optionflags=_OPTIONS).run(test, out=said.append, clear_globs=False).failed:
        raise AssertionError("".join(said))


if __name__ == "__main__":
    from dit_lens.commands.page import write_figures

    for page in map(Path, sys.argv[1:]):
        write_figures(dict(run(page.resolve())), width=760)
