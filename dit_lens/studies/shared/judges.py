"""Judges: functions that score an image against its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.errors import PromptError
from dit_lens.toys.scenes import Scene, recognise_scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens

Judge = Callable[["Image", str], Mapping[str, float]]


def choose_judge(lens: DiTLens, prompts: Sequence[str], judge: Judge | None) -> Judge | None:
    """The judge that was given; for a toy whose prompts are all scenes, :func:`scene_judge`; else None.

    lens: the lens of the study.
    prompts: all prompts of the study.
    judge: what the user gave.
    """
    if judge is not None or lens.vocabulary is None:
        return judge
    try:
        for prompt in prompts:
            Scene.parse(prompt)
    except PromptError:
        return None
    return scene_judge


def scene_judge(image: Image, prompt: str) -> dict[str, float]:
    """Reads a toy's image back: 1 or 0 for every attribute of the prompt; their mean is the ``fidelity``."""
    found = recognise_scene(image).scene
    right = {name: float(same) for name, same in Scene.parse(prompt).agreement(found).items()}
    return {"readable": float(found is not None), "fidelity": sum(right.values()) / len(right), **right}


def ask_judge(judge: Judge | None, image: Image, prompt: str) -> dict[str, Any]:
    """What a judge says of an image, name -> number; empty without a judge.

    judge: a judge, or None.
    image: the image.
    prompt: the prompt that the image is compared with.
    """
    return {} if judge is None else dict(judge(image.copy(), prompt))  # it may draw on it
