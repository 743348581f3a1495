"""The page of a server: what it serves, how to use it, and what whoever has its token can do."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from dit_lens.server.names import Served

WARNING = "Whoever holds the token of this server runs code on its machine, with the rights of whoever started it."

COPY = "\n# the folder of this pipeline on your machine, which may lie elsewhere but has the same name"

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>dit-lens serves {name}</title>
<h1>{name}</h1>
<table>{rows}</table>
<p>{warning}</p>
<pre>
from dit_lens import DiTLens

lens = DiTLens.remote({model}, host="...", token="...")  # the address of this page, and the token{note}
</pre>
</html>
"""


def render_page(served: Served, counts: Mapping[str, int]) -> str:
    """HTML, with no scripts, styles or images.

    counts: jobs that wait, run and are kept.
    """
    lines = [*served.describes, ("jobs", ", ".join(f"{count} {what}" for what, count in counts.items()))]
    rows = "".join(f"<tr><th align=left>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in lines)
    note = COPY if served.local and served.label == served.name else ""
    name, model = escape(served.label), escape(repr(served.label))
    return PAGE.format(name=name, model=model, rows=rows, warning=escape(WARNING), note=note)
