"""A widget that can also be a page: one HTML file with its data, which works from disk without a kernel."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from dit_lens.core.runs.files import write_text
from dit_lens.core.runs.html import data_url

if TYPE_CHECKING:
    from PIL.Image import Image

HERE = Path(__file__).parent

SMALL = 192  # pixels of an image's longer side that is sent without loss

# Nothing from anywhere: the module is made from text in the page, images are decoded from its data.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>
<style>:root {{ color-scheme: light dark; }}
body {{ margin: 0; padding: 8px; background: light-dark(#fff, #0d1117); }}</style>
</head><body>
{body}
</body></html>
"""


def module_of(name: str) -> str:
    """A widget's module: what all share, and its own."""
    return "\n".join((HERE / file).read_text("utf-8") for file in ("common.js", f"{name}.js"))


class Widget(anywidget.AnyWidget):
    """What the explorer and the steering panel share. State is in synced traits; ``to_html`` writes it as a page."""

    _esm: str
    _css = HERE / "widget.css"

    def to_html(self, path: str | Path, *, title: str = "dit_lens") -> Path:
        """Writes one HTML file that works from disk: no kernel, no network. Whole or not at all; returns its path."""
        path = Path(path)
        page = _PAGE.format(policy=_POLICY, title=html.escape(title), body=self.fragment())
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_text(path, page)

    def fragment(self) -> str:
        """The view as a piece of a page: markup, data, style and the module that draws it."""
        state = self.whole_state()
        key = f"dit-lens-{self.model_id}"
        plain = {name: value for name, value in state.items() if not isinstance(value, bytes)}
        packed = "".join(
            f'<script type="text/plain" data-for="{key}" data-name="{name}">{_packed(value)}</script>'
            for name, value in state.items()
            if isinstance(value, bytes)
        )
        host = (HERE / "host.js").read_text("utf-8").replace("ID", key)
        return (
            f"<style>{self._css}</style>"
            f'<div id="{key}"></div>'
            f'<script type="application/json" id="{key}-state">{_script(plain)}</script>'
            f'<script type="application/json" id="{key}-module">{_script(str(self._esm))}</script>'
            f'{packed}<script type="module">{host}</script>'
        )

    def whole_state(self) -> dict[str, Any]:
        """All synced traits that are the view's own, with nothing left to be asked for later."""
        foreign = {*anywidget.AnyWidget.class_trait_names(), "_esm", "_css", "_anywidget_id"}
        return {name: getattr(self, name) for name in self.traits(sync=True) if name not in foreign}

    def preview(self) -> Image | None:
        """The image that is shown where no widget can be."""
        return None

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if os.environ.get("DIT_LENS_RENDER") == "static":
            return {"text/html": self.fragment(), "text/plain": repr(self)}, {}
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        data, metadata = bundle
        return {**data, "text/html": self._fallback(), "text/plain": repr(self)}, metadata

    def _fallback(self) -> str:
        image = self.preview()
        shown = "" if image is None else f'<img src="{data_url(image)}" alt="preview" style="width:256px"><br>'
        return f"{shown}<small>{html.escape(repr(self))}. Run the cell to use it here; .to_html(path) keeps it.</small>"


def bytes_trait() -> Any:
    """Bytes that are sent to the browser."""
    return traitlets.Bytes(b"").tag(sync=True)


def webp(image: Image, largest: int | None = None) -> bytes:
    """An image as WebP, without loss where it is small. largest: pixels of the longer side, to which it is shrunk."""
    image, buffer = image.convert("RGB"), io.BytesIO()
    if largest is not None:
        image.thumbnail((largest, largest))
    image.save(buffer, "WEBP", lossless=max(image.size) <= SMALL, quality=90)
    return buffer.getvalue()


def _packed(value: bytes) -> str:
    return base64.b64encode(gzip.compress(value, 6, mtime=0)).decode("ascii")


def _script(value: Any) -> str:
    """JSON inside a script element, which only "<" could end."""
    return json.dumps(value).replace("<", "\\u003c")
