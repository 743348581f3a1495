"""Writes the answers, costs and figures of the gallery: ``python -m docs.gallery [PAGE ...]``, all pages by default.

A page has a heading, the paper, code, and what it shows on the toy. Answers are written in as the code gives them, and
the cost follows from the runs that the code makes.
"""

from __future__ import annotations

import contextlib
import doctest
import re
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dit_lens as dl
from benchmarks.models import SIZES, make_call, make_pipeline, make_transformer
from dit_lens.core.plan.cost import format_bytes
from docs import blocks

HERE = Path(__file__).resolve().parent / "gallery"
INDEX = HERE / "index.md"
PAGES = sorted(path for path in HERE.glob("*.md") if path != INDEX)
LINES = 20  # of code, at most
STEPS = 28  # of an image of FLUX.1-dev
A_ROW_PER_BLOCK = ("freeflux", "stable-flow", "mmdit-blocks", "localizing-knowledge")  # and one that is left alone

_COST = re.compile(r"^\*\*On FLUX\.1-dev\*\*.*?\Z", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Drawn:
    """A run that a page makes.

    rows: images at once.
    steps: of each; 1: a pass over an image.
    reads: what is kept.
    """

    rows: int
    steps: int
    reads: tuple[dl.Read, ...]


class CountingLens(dl.DiTLens):
    """A lens that notes its runs."""

    drawn: list[Drawn]

    def run(self, prompt: Any = None, ops: Any = (), **call: Any) -> dl.Run:
        run = super().run(prompt, ops, **call)
        asked = [ops] if isinstance(ops, dl.ops.Op) else list(ops or ())
        reads = tuple(op for op in asked if isinstance(op, dl.Read))
        self.drawn.append(Drawn(len(run.latents if run.latents is not None else run.images), len(run.timesteps), reads))
        return run


@contextlib.contextmanager
def share_toys() -> Generator[list[Drawn]]:
    """Inside it all pages share the toys; what it gives is the list of runs that are made."""
    drawn: list[Drawn] = []

    def toy(name: str = "flux") -> CountingLens:
        lens = _load(name)
        lens.drawn = drawn
        return lens

    with mock.patch.object(dl.DiTLens, "toy", toy):
        yield drawn


_TOY = dl.DiTLens.toy.__func__  # as it was before it is replaced


@cache
def _load(name: str) -> CountingLens:
    return _TOY(CountingLens, name)


@cache
def _flux() -> dl.DiTLens:
    """FLUX.1-dev without weights, whose plans are those of the model."""
    return dl.DiTLens(make_pipeline(make_transformer(SIZES["flux"], "meta", torch.bfloat16)))


def describe_cost(page: Path, drawn: Sequence[Drawn]) -> str:
    """What the runs of a page would cost on FLUX.1-dev: a paragraph of it."""
    if page.stem in A_ROW_PER_BLOCK:
        depth = {9: SIZES["flux"].blocks + 1}
        drawn = [replace(one, rows=depth.get(one.rows, one.rows)) for one in drawn]
    images = sum(one.rows for one in drawn if one.steps > 1)
    single = sum(one.rows for one in drawn if one.steps == 1)
    size = sum(_count_bytes(one) for one in drawn)
    parts = [f"{images} image{'s' * (images > 1)} ({STEPS * images:,} forward passes)"] if images else []
    parts += [f"{single} single forward passes"] if single else []
    kept = f"; reads keep {format_bytes(size)}" if size else ""
    return f"**On FLUX.1-dev** at 1024 x 1024 and {STEPS} steps: {' and '.join(parts)}{kept}."


def _count_bytes(one: Drawn) -> int:
    """The bytes of a run's reads; channels and tokens that were found on the toy count by their number."""
    reads = []
    for read in one.reads:
        site = [
            name.replace(".cross.", ".attn.") for name in ([read.site] if isinstance(read.site, str) else read.site)
        ]
        channels = range(next(map(len, read.channels.values()))) if isinstance(read.channels, dl.ChannelSet) else None
        reads.append(replace(read, site=site, channels=channels))
    call = make_call(SIZES["flux"], one.rows, STEPS if one.steps > 1 else 1)
    return _flux().cost(None, reads, **call).bytes if reads else 0


class _Answers(doctest.DocTestRunner):
    """Puts what examples answer in the place of what they were said to."""

    def report_failure(self, out: Any, test: Any, example: doctest.Example, got: str) -> None:  # noqa: ARG002 of doctest
        example.want = got

    def report_unexpected_exception(self, out: Any, test: Any, example: doctest.Example, exc_info: Any) -> None:  # noqa: ARG002 of doctest
        raise exc_info[1]


def write_page(page: Path) -> dict[Path, Any]:
    """Runs a page and writes its answers and its cost; returns its figures."""
    text, names, figures = page.read_text("utf-8"), {"__name__": "__main__"}, {}
    with share_toys() as drawn:
        for block in list(blocks.BLOCK.finditer(text)):
            if block["kind"] == "python":
                shown = blocks.execute(block["code"], names, page, text.count("\n", 0, block.start("code")))
                figures |= {page.parent / block["image"]: shown} if block["image"] else {}
                continue
            test = doctest.DocTestParser().get_doctest(block["code"], names, page.stem, str(page), 0)
            test.globs = names
            _Answers(verbose=False).run(test, out=lambda _: None, clear_globs=False)
            text = text.replace(block["code"], "".join(map(_print_example, test.examples)))
    cost = describe_cost(page, drawn)
    page.write_text(f"{_COST.sub('', text).rstrip()}\n\n{cost}\n", "utf-8")
    return figures


def _print_example(example: doctest.Example) -> str:
    first, *more = example.source.splitlines()
    return "\n".join([f">>> {first}", *(f"... {line}" for line in more), example.want])


def count_lines(text: str) -> int:
    """Lines of code on a page."""
    code = "".join(block["code"] for block in blocks.BLOCK.finditer(text) if block["kind"] == "python")
    examples = [block["code"] for block in blocks.BLOCK.finditer(text) if block["kind"] == "pycon"]
    asked = [line for block in examples for line in block.splitlines() if line.startswith((">>>", "..."))]
    return len([line for line in code.splitlines() if line.strip()]) + len(asked)


if __name__ == "__main__":
    from dit_lens.commands.page import write_figures

    for page in [HERE / f"{Path(name).stem}.md" for name in sys.argv[1:]] or PAGES:
        write_figures(write_page(page), width=760)
        print(page.stem, count_lines(page.read_text("utf-8")), flush=True)  # noqa: T201 a script
