"""Writes llms.txt: the pages of the site and the public names in a short text, for language models."""

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


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        Path(app.outdir, "llms.txt").write_text(summarise_site(app), "utf-8")


def summarise_site(app: Sphinx) -> str:
    """Returns the quick start, a line for every page with its first sentence, and a line for every public name."""
    pages = [_summarise_page(app, name) for name in _list_pages(app, app.config.root_doc)]
    names = [_summarise_name(name, getattr(dl, name)) for name in sorted(dl.__all__)]
    methods = [
        _summarise_name(f"DiTLens.{name}", getattr(dl.DiTLens, name))
        for name in vars(dl.DiTLens)
        if not name.startswith("_")
    ]
    start = inspect.cleandoc(dl.__doc__ or "")
    parts = ["# dit_lens", start, "## Pages", "\n".join(pages), "## Names", "\n".join(names)]
    return "\n\n".join([*parts, "## What a lens can do", "\n".join(methods), ""])


def _list_pages(app: Sphinx, page: str) -> list[str]:
    """Returns a page and all pages below it, in the order of the tables of contents."""
    return [page, *(name for child in app.env.toctree_includes.get(page, []) for name in _list_pages(app, child))]


def _summarise_page(app: Sphinx, name: str) -> str:
    title = app.env.titles[name].astext()
    paragraphs = (node for node in app.env.get_doctree(name).findall(nodes.paragraph) if _is_running_text(node))
    first = next(paragraphs, None)
    summary = "" if first is None else f": {_first_sentence(first.astext())}"
    return f"- [{title}]({app.builder.get_target_uri(name)}){summary}"


def _is_running_text(paragraph: nodes.paragraph) -> bool:
    return isinstance(paragraph.parent, nodes.section | desc_content)


def _summarise_name(name: str, found: Any) -> str:
    parameters = f"({', '.join(_list_parameters(found))})" if callable(found) else ""
    return f"- `dit_lens.{name}{parameters}`: {_first_sentence(inspect.getdoc(found) or '')}"


def _list_parameters(found: Any) -> list[str]:
    """Returns the names of the parameters, with the stars of ``*args`` and ``**kwargs``."""
    parameters = [one for name, one in inspect.signature(found).parameters.items() if name != "self"]
    return [str(one.replace(annotation=one.empty, default=one.empty)) for one in parameters]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()), maxsplit=1)[0]
