"""The table of assumptions quotes what the code says, and leaves out nothing that is compared with a run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guarantees.md"
GAP = "\0"  # what an f-string fills in
# Raised where a family's row contradicts itself, which the checks at load find; no call can bring it about.
OF_ROWS = {"has no rule to read", "is to be given what nothing was kept of"}


def rows():
    """The rows of the table: assumed, taken from, compared with, said."""
    text = PAGE.read_text("utf-8").partition("## What is assumed")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r" \| ", line.strip("| ")) for line in lines[2:]]


def texts(tree):
    """Every text of a module, with gaps for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def trees():
    """The code, parsed: no module's own, since every process would read it when it looks for tests."""
    return [ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "dit_lens").rglob("*.py"))]


@pytest.fixture(scope="module")
def said(trees):
    """Every text of the code."""
    return [text for tree in trees for text in texts(tree)]


def pattern(quoted):
    """What finds a quoted text, whose "..." stand for anything, in the texts of the code."""
    return re.compile(".*".join(re.escape(part) for part in quoted.strip("`").split("...")), re.DOTALL)


def mismatches(trees):
    """What is said where a run is not as it was planned."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PlanMismatchError":
                yield next(texts(ast.Module([ast.Expr(node.args[0])], [])))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_code_says_what_the_table_quotes(row, said):
    assert len(row) == 4
    assert re.fullmatch(r"`[^`]+`", row[3])
    assert any(map(pattern(row[3]).search, said)), row[3]


def test_the_table_has_everything_that_is_compared_with_a_run(trees):
    found = set(mismatches(trees))
    quoted = [pattern(row[3]) for row in rows()]
    unknown = {said for said in found if not any(known in said for known in OF_ROWS)}
    assert [said for said in sorted(unknown) if not any(one.search(said) for one in quoted)] == []
    assert len(unknown) > 10
