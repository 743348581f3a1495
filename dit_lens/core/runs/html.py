"""What a notebook shows of a lens or a run: images, and lines of (heading, text)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


STYLE = "border-collapse:collapse;font-size:0.9em"

IMAGE = "height:128px;margin-right:4px;image-rendering:pixelated"

CELL = "text-align:left;padding:0.15em 0.9em 0.15em 0;vertical-align:top"


def run_html(images: Sequence[Image], lines: Sequence[tuple[str, str]]) -> str:
    """A run as a notebook shows it: its first images, and what is known of it as (heading, text)."""
    shown = "".join(
        f'<img src="{data_url(image)}" alt="image {i}" style="{IMAGE}">' for i, image in enumerate(images[:8])
    )
    more = f" and {len(images) - 8} more" if len(images) > 8 else ""
    return f"{shown}{more}{table_html(lines)}"


def data_url(image: Image) -> str:
    """An image as a data URL, for pages that must not ask the network."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def table_html(lines: Sequence[tuple[str, str]]) -> str:
    """Lines of (heading, text) as a table."""
    rows = "".join(
        f'<tr><th style="{CELL}">{html.escape(head)}</th>'
        f'<td style="{CELL};overflow-wrap:anywhere">{html.escape(text)}</td></tr>'
        for head, text in lines
    )
    return f'<table style="{STYLE}">{rows}</table>'
