"""What a person wants to know of a lens at first sight, as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_lens.errors import show

if TYPE_CHECKING:
    from dit_lens.core.session import Session
    from dit_lens.families import Guidance

STREAM_WORDS = {"img": "img (the image's tokens)", "txt": "txt (the prompt's)"}


def summarise_lens(lens: Session) -> list[tuple[str, str]]:
    """What a person wants to know of a lens, as (heading, text)."""
    anatomy, family = lens.anatomy, lens.family
    stacks = [f"{name} {blocks.start}-{blocks.stop - 1}" for name, blocks in anatomy.stacks.items() if len(blocks)]
    grid = anatomy.plan_grid(lens.pipe, lens.defaults)
    embedded = family.guidance_flag is not None and bool(lens.pipe.transformer.config[family.guidance_flag])
    guidance = describe_guidance(family.pipeline(type(lens.pipe)).guidance)
    streams = [stream for stream in STREAM_WORDS if any(stream in stack.outputs for stack in anatomy.family.stacks)]
    inside = list(dict.fromkeys(site.point.split(".")[0] for site in anatomy.sites if site.block is not None))
    size = sum(parameter.numel() for parameter in lens.pipe.transformer.parameters())
    return [
        ("family", f"{family.name} ({type(lens.pipe.transformer).__name__}, {size / 1e6:.4g} M parameters)"),
        ("blocks", f"{anatomy.depth}: {', '.join(stacks)}"),
        ("width", f"{anatomy.width} channels; a predicted token has {anatomy.out_width}"),
        ("streams", ", ".join(STREAM_WORDS[stream] for stream in streams)),
        (
            "sites",
            f"blocks.0-{anatomy.depth - 1}.{{{','.join(streams)}}}[.{'|'.join(inside)}], "
            + ", ".join(site.name for site in anatomy.sites if site.block is None),
        ),
        ("grid", f"{grid[0]} x {grid[1]} image tokens by default" if grid else "known when it runs"),
        ("guidance", ("a guidance scale is embedded; " if embedded else "") + guidance),
        *(
            [("call", ", ".join(f"{name}={show(value)}" for name, value in lens.defaults.items()))]
            if lens.defaults
            else []
        ),
        ("checks", f"{', '.join(check.name for check in lens.checks)} passed"),
        ("on", lens.engine.device_name),
    ]


def describe_guidance(guidance: Guidance | None) -> str:
    """How the branches run, in words."""
    if guidance is None:
        return "one conditional call per step"
    rows = (" and ".join(branches) + (" rows" if len(branches) > 1 else "") for branches in guidance.forwards)
    passes = ", then ".join(rows)
    when = "always" if guidance.scale is None else f"{guidance.scale} > {guidance.above:g}"
    return f"{when}{' with a negative prompt' if guidance.negative else ''} runs {passes}"
