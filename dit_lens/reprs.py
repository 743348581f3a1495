"""How a lens and a run show themselves, as text and in a notebook."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.families import Guidance
    from dit_lens.lens import DiTLens
    from dit_lens.run import Run

STREAM_WORDS = {"img": "img (the picture's tokens)", "txt": "txt (the prompt's)"}
STYLE = "border-collapse:collapse;font-size:0.9em"
PICTURE = "height:128px;margin-right:4px;image-rendering:pixelated"
CELL = "text-align:left;padding:0.15em 0.9em 0.15em 0;vertical-align:top"


def lens_lines(lens: DiTLens) -> list[tuple[str, str]]:
    """What a person wants to know of a lens, as (heading, text)."""
    anatomy, family = lens.anatomy, lens.family
    stacks = [f"{name} {blocks.start}-{blocks.stop - 1}" for name, blocks in anatomy.stacks.items() if len(blocks)]
    grid = anatomy.planned_grid(lens.pipe, lens.defaults)
    embedded = family.embedded is not None and bool(lens.pipe.transformer.config[family.embedded])
    guidance = guidance_text(family.guidance_of(lens.pipe))
    streams = [stream for stream in STREAM_WORDS if any(site.stream == stream for site in anatomy.sites)]
    inside = list(dict.fromkeys(site.point.split(".")[0] for site in anatomy.sites if site.block is not None))
    size = sum(parameter.numel() for parameter in lens.pipe.transformer.parameters())
    return [
        ("family", f"{family.name} ({type(lens.pipe.transformer).__name__}, {size / 1e6:.4g} M parameters)"),
        ("blocks", f"{anatomy.depth}: {', '.join(stacks)}"),
        ("width", f"{anatomy.width} channels; a predicted token has {anatomy.out_width}"),
        ("streams", ", ".join(STREAM_WORDS[stream] for stream in streams)),
        (
            "sites",
            f"blocks.0-{anatomy.depth - 1}.{{{','.join(streams)}}}[.{'|'.join(inside)}], final.img, velocity, x0",
        ),
        ("grid", f"{grid[0]} x {grid[1]} image tokens by default" if grid else "known when it runs"),
        ("guidance", ("a guidance scale is embedded; " if embedded else "") + guidance),
        ("checks", f"{', '.join(check.name for check in lens.checks)} passed"),
        ("on", lens.engine.place),
    ]


def guidance_text(guidance: Guidance | None) -> str:
    """How the branches run, in words."""
    if guidance is None:
        return "one conditional call per step"
    calls = ", then ".join(" and ".join(call) + (" rows" if len(call) > 1 else "") for call in guidance.calls)
    when = "always" if guidance.scale is None else f"{guidance.scale} > {guidance.above:g}"
    return f"{when}{' with a negative prompt' if guidance.negative else ''} runs {calls}"


def lens_text(lens: DiTLens) -> str:
    """A lens as a terminal shows it."""
    return "\n".join(
        [f"DiTLens on {type(lens.pipe).__name__}", *(f"  {head:<9}{text}" for head, text in lens_lines(lens))]
    )


def lens_html(lens: DiTLens) -> str:
    """A lens as a notebook shows it."""
    return f"<b>DiTLens</b> on {type(lens.pipe).__name__}{_table(lens_lines(lens))}"


def run_html(run: Run) -> str:
    """A run as a notebook shows it: its first pictures, and what is known of it."""
    pictures = "".join(
        f'<img src="{data_url(image)}" alt="picture {i}" style="{PICTURE}">' for i, image in enumerate(run.images[:8])
    )
    more = f" and {len(run.images) - 8} more" if len(run.images) > 8 else ""
    _, *lines = repr(run).splitlines()
    return f"{pictures}{more}{_table([(line[2:10].strip(), line[10:]) for line in lines])}"


def data_url(image: Image) -> str:
    """A picture as a data URL, for pages that must not ask the network."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _table(lines: list[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th style="{CELL}">{html.escape(head)}</th><td style="{CELL}">{html.escape(text)}</td></tr>'
        for head, text in lines
    )
    return f'<table style="{STYLE}">{rows}</table>'
