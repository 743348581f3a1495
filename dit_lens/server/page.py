"""The page of a server: what it serves, how to use it, and what whoever has its token can do."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from dit_lens.server.names import Served

WARNING = "Whoever holds the token of this server runs code on its machine, with the rights of whoever started it."

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>dit-lens serves {name}</title>
<h1>{name}</h1>
<table>{rows}</table>
<p>{warning}</p>
<pre>
from dit_lens import DiTLens

lens = DiTLens.remote({model}, host="...", token="...")  # the address of this page, and the token
</pre>
</html>
"""


def render_page(served: Served, counts: Mapping[str, int]) -> str:
    """HTML, with no scripts, styles or images.

    counts: jobs that wait, run and are kept.
    """
    lines = [*served.describes, ("jobs", ", ".join(f"{count} {what}" for what, count in counts.items()))]
    rows = "".join(f"<tr><th align=left>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in lines)
    return PAGE.format(name=escape(served.name), model=escape(repr(served.name)), rows=rows, warning=escape(WARNING))
