"""How a lens and a run show themselves, as text and in a notebook."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.runs.run import Run

STYLE = "border-collapse:collapse;font-size:0.9em"

IMAGE = "height:128px;margin-right:4px;image-rendering:pixelated"

CELL = "text-align:left;padding:0.15em 0.9em 0.15em 0;vertical-align:top"


def run_html(run: Run) -> str:
    """A run as a notebook shows it: its first images, and what is known of it."""
    images = "".join(
        f'<img src="{data_url(image)}" alt="image {i}" style="{IMAGE}">' for i, image in enumerate(run.images[:8])
    )
    more = f" and {len(run.images) - 8} more" if len(run.images) > 8 else ""
    _, *lines = repr(run).splitlines()
    return f"{images}{more}{_table([(line[2:10].strip(), line[10:]) for line in lines])}"


def data_url(image: Image) -> str:
    """An image as a data URL, for pages that must not ask the network."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _table(lines: list[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th style="{CELL}">{html.escape(head)}</th><td style="{CELL}">{html.escape(text)}</td></tr>'
        for head, text in lines
    )
    return f'<table style="{STYLE}">{rows}</table>'
