"""A lens as a notebook shows it: a small picture of the model, stack by stack, that opens to its points."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dit_lens.core.runs.html import CELL, STYLE
from dit_lens.families.sites import DEFAULT_POINT, POINTS, Site

if TYPE_CHECKING:
    from dit_lens.core.session import Session
    from dit_lens.families import Anatomy

COLOURS = {"txt": "#2B84C6", "img": "#D55E00"}  # that the colour-blind tell apart, on light pages and dark ones
WIDEST = 24  # squares of a stack that are drawn; more blocks share one
NAMES = {"img": "the image's tokens", "txt": "the prompt's tokens"}


def draw_model(lens: Session) -> str:
    """HTML without scripts: a line for every stack of blocks, whose squares are blocks, and lanes streams.

    A click opens the points of a stack: the pattern that names them, and how many channels they have. Where a stream
    lacks one, a crossed-out name tells why when it is pointed at.
    """
    anatomy = lens.anatomy
    streams = [one for one in COLOURS if any(site.stream == one for site in anatomy.sites)]
    keys = " ".join(f'<span style="color:{COLOURS[one]}">&#9632;</span> {one}: {NAMES[one]}' for one in streams)
    known = frozenset(anatomy.sites)
    stacks = [
        _draw_stack(anatomy, known, name, blocks, streams) for name, blocks in anatomy.stacks.items() if len(blocks)
    ]
    ends = [site for site in anatomy.sites if site.block is None]
    after = _rows([_line(site.name, anatomy.channels(site)) for site in ends])
    return (
        f'<div style="margin:0.4em 0">{keys}; click to see the points</div>'
        + "".join(stacks)
        + f'<details><summary style="cursor:pointer">after the blocks: {len(ends)} sites</summary>{after}</details>'
    )


def _draw_stack(anatomy: Anatomy, known: frozenset[Site], name: str, blocks: range, streams: Sequence[str]) -> str:
    """A stack, which opens to its points. known: the sites of the model."""
    first, last = blocks.start, blocks.stop - 1
    held = [one for one in streams if any(site.stream == one and site.block in blocks for site in known)]
    lanes = [one for one in held if any(Site(block, one) in known for block in blocks)]
    numbers = f"block {first}" if first == last else f"blocks {first} to {last}"
    points = [one for one in POINTS if any(Site(block, stream, one) in known for block in blocks for stream in held)]
    lines = [line for point in points for line in _list_point(anatomy, known, name, blocks, held, point)]
    return (
        f'<details><summary style="cursor:pointer"><b>{html.escape(name)}</b> {numbers} '
        f"{_draw_lanes(known, blocks, lanes)}</summary>{_rows(lines)}</details>"
    )


def _draw_lanes(known: frozenset[Site], blocks: range, streams: Sequence[str]) -> str:
    """A lane for each stream, with a square for each block that returns it; of a long stack for every few."""
    every = -(-len(blocks) // WIDEST)
    shown = list(blocks)[::every]
    squares = "".join(
        f'<rect x="{14 * i}" y="{14 * lane}" width="12" height="12" rx="2" fill="{COLOURS[stream]}">'
        f"<title>blocks.{block}.{stream}</title></rect>"
        for lane, stream in enumerate(streams)
        for i, block in enumerate(shown)
        if Site(block, stream) in known
    )
    width, height = 14 * len(shown), 14 * len(streams)
    label = f"{len(blocks)} blocks with {' and '.join(streams)}" + (f", a square for {every}" if every > 1 else "")
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{label}" '
        f'style="vertical-align:middle;margin-left:0.5em">{squares}</svg>'
    )


def _list_point(
    anatomy: Anatomy, known: frozenset[Site], name: str, blocks: range, streams: Sequence[str], point: str
) -> list[str]:
    """The lines of a point in a stack: one for all streams in which it has as many channels."""
    suffix = "" if point == DEFAULT_POINT else f".{point}"
    widths: dict[int, list[str]] = {}
    lacking = []
    for stream in streams:
        site = next((one for block in blocks if (one := Site(block, stream, point)) in known), None)
        if site is None:
            why = anatomy.why_not(blocks.start, stream, point) or "it is no site"
            lacking.append(f'<s title="{html.escape(why, quote=True)}" style="opacity:0.6;cursor:help">{stream}</s>')
        else:
            widths.setdefault(anatomy.channels(site), []).append(stream)
    return [
        _line(f"{name}.*.{_join(those)}{suffix}", channels, " ".join(lacking)) for channels, those in widths.items()
    ]


def _join(streams: Sequence[str]) -> str:
    """Streams as a pattern names them."""
    return streams[0] if len(streams) == 1 else f"{{{','.join(streams)}}}"


def _line(pattern: str, channels: int, lacking: str = "") -> str:
    """A line of a table. lacking: HTML of the streams that lack the point."""
    return (
        f'<tr><td style="{CELL};white-space:nowrap"><code>{html.escape(pattern)}</code></td>'
        f'<td style="{CELL};text-align:right"><span>{channels:,}</span></td><td style="{CELL}">{lacking}</td></tr>'
    )


def _rows(lines: Sequence[str]) -> str:
    """Lines as a table that scrolls where the page is narrow."""
    top = f'<tr><th style="{CELL}">sites</th><th style="{CELL}">channels</th><th></th></tr>'
    body = "".join(lines)
    return f'<div style="overflow-x:auto;margin:0.2em 0 0.6em 1.2em"><table style="{STYLE}">{top}{body}</table></div>'
