"""Judges: functions that score an image against its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.errors import PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens

Judge = Callable[["Image", str], Mapping[str, float]]


def judge_for(lens: DiTLens, prompts: Sequence[str], judge: Judge | None) -> Judge | None:
    """The judge that was given; for a toy whose prompts are scenes, reading the image back; else none."""
    if judge is not None or lens.vocabulary is None:
        return judge
    from dit_lens.toys.scenes import Scene

    try:
        for prompt in prompts:
            Scene.parse(prompt)
    except PromptError:
        return None
    return scene_judge


def scene_judge(image: Image, prompt: str) -> dict[str, float]:
    """Reads a toy's image back: 1 or 0 for every attribute of the prompt; their mean is the ``fidelity``."""
    from dit_lens.toys.scenes import Scene, describe

    found = describe(image).scene
    right = {name: float(same) for name, same in Scene.parse(prompt).agreement(found).items()}
    return {"readable": float(found is not None), "fidelity": sum(right.values()) / len(right), **right}


def judged(judge: Judge | None, image: Image, prompt: str) -> dict[str, Any]:
    """A judge's numbers, or none."""
    return {} if judge is None else dict(judge(image, prompt))
