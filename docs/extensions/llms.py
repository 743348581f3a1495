"""llms.txt: the site and the public names in one short text, for readers that are language models."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import desc_content
from sphinx.application import Sphinx

import dit_lens as dl


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True}


def _write(app: Sphinx, problem: Exception | None) -> None:
    if problem is None and app.builder.name == "html":
        Path(app.outdir, "llms.txt").write_text(text(app), "utf-8")


def text(app: Sphinx) -> str:
    """The quick start, a line for every page with its first sentence, and a line for every public name."""
    pages = [_page(app, name) for name in _in_order(app, app.config.root_doc)]
    names = [_name(name, getattr(dl, name)) for name in sorted(dl.__all__)]
    methods = [
        _name(f"DiTLens.{name}", getattr(dl.DiTLens, name)) for name in vars(dl.DiTLens) if not name.startswith("_")
    ]
    start = inspect.cleandoc(dl.__doc__ or "")
    parts = ["# dit_lens", start, "## Pages", "\n".join(pages), "## Names", "\n".join(names)]
    return "\n\n".join([*parts, "## What a lens can do", "\n".join(methods), ""])


def _in_order(app: Sphinx, page: str) -> list[str]:
    """A page and all below it, as the tables of contents list them."""
    return [page, *(name for child in app.env.toctree_includes.get(page, []) for name in _in_order(app, child))]


def _page(app: Sphinx, name: str) -> str:
    title = app.env.titles[name].astext()
    paragraphs = (one for one in app.env.get_doctree(name).findall(nodes.paragraph) if _is_running_text(one))
    first = next(paragraphs, None)
    said = "" if first is None else f": {_first(first.astext())}"
    return f"- [{title}]({app.builder.get_target_uri(name)}){said}"


def _is_running_text(paragraph: nodes.paragraph) -> bool:
    return isinstance(paragraph.parent, nodes.section | desc_content)


def _name(name: str, found: Any) -> str:
    takes = f"({', '.join(_arguments(found))})" if callable(found) else ""
    return f"- `dit_lens.{name}{takes}`: {_first(inspect.getdoc(found) or '')}"


def _arguments(found: Any) -> list[str]:
    """What it takes, by name, with the stars of what takes any."""
    taken = [one for name, one in inspect.signature(found).parameters.items() if name != "self"]
    return [str(one.replace(annotation=one.empty, default=one.empty)) for one in taken]


def _first(words: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[.?!])\s", " ".join(words.split()), maxsplit=1)[0]
