"""Judges: functions that score an image against its prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.arguments.functions import name_of
from dit_lens.arguments.numbers import to_number
from dit_lens.core.runs.record import is_text
from dit_lens.errors import OpError, PromptError, show
from dit_lens.studies.shared.measures import check_measures
from dit_lens.toys.scenes import Scene, recognise_scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens

Judge = Callable[["Image", str], Mapping[str, float]]
Attributes = Callable[[str], Mapping[str, str]]

ROUNDING = 1e-6  # by which a fidelity may lie outside of [0, 1]


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


def ask_judge(
    judge: Judge | None,
    image: Image,
    prompt: str,
    taken: Collection[str] = (),
    *,
    need_fidelity: bool = False,
) -> dict[str, Any]:
    """What a judge says of an image, name -> number; empty without a judge. OpError if it says something else.

    judge: a judge, or None.
    image: the image.
    prompt: the prompt that the image is compared with.
    taken: columns that the study's table has without the judge.
    need_fidelity: whether the study goes by the ``fidelity``, so that a judge has to give it.
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
    check_measures(said, taken, f"the judge {name_of(judge)}")
    found = {name: _as_measure(value) for name, value in said.items()}
    fidelity = found.get("fidelity", math.nan)
    if need_fidelity and "fidelity" not in found:
        raise OpError(
            f"this study goes by how far an image shows its prompt, 'fidelity', and the judge {name_of(judge)} gave "
            f"{', '.join(map(repr, found)) or 'nothing'}. Return {{'fidelity': number from 0 to 1}}, and what else you "
            "like."
        )
    if not (math.isnan(fidelity) or -ROUNDING <= fidelity <= 1 + ROUNDING):
        raise OpError(
            f"'fidelity' is from 0 (another image) to 1 (all that the prompt asks for), and the judge {name_of(judge)} "
            f"gave {show(said['fidelity'])}. Scale it, or give it another name."
        )
    return found


def _is_measure(value: Any) -> bool:
    """Whether a table can hold a value as a number; NaN and None stand for one that is missing."""
    return value is None or isinstance(value, bool | float | np.bool_ | np.floating) or to_number(value) is not None


def _as_measure(value: Any) -> Any:
    return math.nan if value is None else float(value) if hasattr(value, "detach") else value
