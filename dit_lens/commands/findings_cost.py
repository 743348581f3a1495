"""What the findings cost, before they are drawn: images and hours, by one batch that is timed on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.commands.chapters import CHAPTERS, Size
from dit_lens.lens import DiTLens
from dit_lens.studies.shared.checkpoints import check_arguments_only

if TYPE_CHECKING:
    from dit_lens.studies.shared.registry import StudyRecord

TIMED = 2  # prompts, drawn together


def count_study(study: StudyRecord, lens: DiTLens, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The cells of a study, and how many images they draw; a mistake in the arguments raises here."""
    with check_arguments_only() as counts:
        study.function(lens, **arguments)
    cells, images = counts[0]
    return cells, images or 0


def count_images(lens: DiTLens, size: Size) -> dict[str, int]:
    """How many images every chapter draws, about; a mistake in the size raises here.

    lens: lens on the toy.
    size: how much is drawn.
    """
    return {chapter.name: count_study(chapter.study, lens, chapter.arguments(size))[1] for chapter in CHAPTERS}


def describe_cost(toys: Sequence[str], size: Size) -> str:
    """The images and hours of every toy, in lines of text.

    toys: names of the toys.
    size: how much is drawn.
    """
    lines, total = [], 0.0
    for toy in toys:
        lens = DiTLens.toy(toy)
        seconds, images = _time_image(lens, size), count_images(lens, size)
        hours = seconds * sum(images.values()) / 3600
        total += hours
        listed = ", ".join(f"{name} {count:,}" for name, count in images.items())
        lines.append(f"{toy}: {hours:.1f} hours for about {sum(images.values()):,} images ({listed})")
    return "\n".join([*lines, f"together {total:.1f} hours, by the {seconds:.2g} s that an image takes here now"])


def _time_image(lens: DiTLens, size: Size) -> float:
    """Seconds that an image takes in a batch of a few, after a first one, which takes longer."""
    some, call = Size(prompts=TIMED).texts, dict[str, Any]({"seed": 0, **size.call})
    first: dict[str, Any] = {**call, "num_inference_steps": 1}
    with lens.quiet():
        lens.run(some[:1], **first)
        began = time.perf_counter()
        lens.run(some, **call)
    return (time.perf_counter() - began) / TIMED
