"""Judges: functions that score an image against its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.arguments.functions import name_of
from dit_lens.arguments.numbers import to_number
from dit_lens.core.runs.record import is_text
from dit_lens.errors import OpError, PromptError, show
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
    """What a judge says of an image, name -> number; empty without a judge. OpError if it says something else.

    judge: a judge, or None.
    image: the image.
    prompt: the prompt that the image is compared with.
    """
    if judge is None:
        return {}
    said = judge(image.copy(), prompt)  # it may draw on it
    if not isinstance(said, Mapping):
        raise OpError(
            f"a judge gives name -> number, such as {{'fidelity': 0.5}}; {name_of(judge)} returned {show(said)}."
        )
    for name, value in said.items():
        if not is_text(name) or not _is_measure(value):
            raise OpError(
                f"a judge gives name -> number, such as {{'fidelity': 0.5}}; {name_of(judge)} returned {show(value)} "
                f"for {show(name)}."
            )
    return {name: float(value) if hasattr(value, "detach") else value for name, value in said.items()}


def _is_measure(value: Any) -> bool:
    """Whether a table can hold a value as a number; NaN and None stand for one that is missing."""
    return value is None or isinstance(value, bool | float | np.bool_ | np.floating) or to_number(value) is not None
