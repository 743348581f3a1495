"""The base of the widgets: a widget is also a page, one HTML file with its data that works without a kernel."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import as_plain
from dit_lens.core.runs.files import write_text
from dit_lens.core.runs.html import data_url
from dit_lens.errors import OpError, show

if TYPE_CHECKING:
    from PIL.Image import Image

STATIC = Path(__file__).parent / "static"

SMALL = 192  # pixels of the longer side up to which an image is compressed without loss

# Loads nothing from the network: the module and the images are made from data in the page.
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


def join_modules(*names: str) -> str:
    """Returns a widget's JavaScript module: the common part, then the named files of ``static``.

    anywidget takes one module of text, and a page from disk cannot import files.
    """
    return "\n".join((STATIC / f"{name}.js").read_text("utf-8") for name in ("common", *names))


class Widget(anywidget.AnyWidget):
    """Base of the explorer and the steering panel. Its state is in synced traits; ``to_html`` writes it as a page."""

    _esm: str
    _css = STATIC / "widget.css"

    @checked
    def to_html(self, path: str | Path, *, title: str = "dit_lens") -> Path:
        """Writes one HTML file that works from disk, without kernel or network, and returns its path.

        The file is written completely or not at all.
        """
        page = _PAGE.format(policy=_POLICY, title=html.escape(title), body=self._write_fragment(address=True))
        return write_text(path, page)

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute of the view: numbers of numpy and torch count as Python's; OpError for what it cannot be."""
        try:
            super().__setattr__(name, as_plain(value))
        except (traitlets.TraitError, OverflowError) as problem:
            raise OpError(f"{type(self).__name__}.{name}={show(value)} cannot be used: {problem}") from problem

    def fragment(self) -> str:
        """Returns the view as part of a page: markup, data, style and the module that draws it."""
        return self._write_fragment(address=False)

    def _write_fragment(self, *, address: bool) -> str:
        """Writes the view as part of a page.

        The module runs as soon as the browser has read what is shown first; other pieces of the data come below it.
        address: whether the address of the page has the state of the view, after #.
        """
        state = self.whole_state()
        key = f"dit-lens-{self.model_id}"
        values = {name: value for name, value in state.items() if not _is_array(value)}
        arrays = list(_list_arrays(state))
        scripts = [_make_script(key, *array) for array in arrays]
        first = [number is None or self._is_shown_first(name, number) for name, number, _ in arrays]
        host = (STATIC / "host.js").read_text("utf-8").replace("ID", key)
        early, late = (
            "".join(script for script, shown in zip(scripts, first, strict=True) if shown == one)
            for one in (True, False)
        )
        return (
            f"<style>{self._css}</style>"
            f'<div id="{key}"{" data-address" if address else ""}></div>'
            f'<script type="application/json" id="{key}-state">{_to_script(values)}</script>'
            f'<script type="application/json" id="{key}-module">{_to_script(str(self._esm))}</script>'
            f'{early}<script type="module" async>{host}</script>{late}'
        )

    def _is_shown_first(self, name: str, number: int) -> bool:  # noqa: ARG002
        """Whether a page shows a numbered piece of an array when it opens."""
        return True

    def whole_state(self) -> dict[str, Any]:
        """Returns all synced traits of the view, including the data that the browser otherwise requests when needed.

        Bytes that are numbered, in a dict, are decoded piece by piece, when a page shows them.
        """
        inherited = {*anywidget.AnyWidget.class_trait_names(), "_esm", "_css", "_anywidget_id"}
        return {name: getattr(self, name) for name in self.traits(sync=True) if name not in inherited}

    def preview(self) -> Image | None:
        """Returns the image that is shown if the widget cannot be, or None."""
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
    """Makes a trait of bytes that are sent to the browser."""
    return traitlets.Bytes(b"").tag(sync=True)


def encode_webp(image: Image, largest: int | None = None) -> bytes:
    """Encodes an image as WebP, a small one without loss. largest: reduces the longer side to so many pixels."""
    image, buffer = image.convert("RGB"), io.BytesIO()
    if largest is not None:
        image.thumbnail((largest, largest))
    image.save(buffer, "WEBP", lossless=max(image.size) <= SMALL, quality=90)
    return buffer.getvalue()


def _is_array(value: Any) -> bool:
    """Whether a value of the state is bytes, or bytes in pieces."""
    return isinstance(value, bytes) or (isinstance(value, dict) and any(isinstance(v, bytes) for v in value.values()))


def _list_arrays(state: Mapping[str, Any]) -> Iterator[tuple[str, int | None, bytes]]:
    """The arrays of a page: name, number of a piece, bytes. A page decodes pieces as they are shown."""
    for name, value in state.items():
        if isinstance(value, bytes):
            yield name, None, value
        elif _is_array(value):
            yield from ((name, number, piece) for number, piece in value.items())


def _make_script(key: str, name: str, number: int | None, value: bytes) -> str:
    """An array as an element of a page that is not run. key: of the view."""
    piece = "" if number is None else f' data-block="{number}"'
    return f'<script type="text/plain" data-for="{key}" data-name="{name}"{piece}>{_compress(value)}</script>'


def _compress(value: bytes) -> str:
    return base64.b64encode(gzip.compress(value, 6, mtime=0)).decode("ascii")


def _to_script(value: Any) -> str:
    """Returns JSON for the inside of a script element, without "<", which could end the element."""
    return json.dumps(value).replace("<", "\\u003c")
