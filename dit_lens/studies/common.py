"""What the studies share: channel sets per picture, the arms, and how pictures are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.channels import ChannelSet, top_channels
from dit_lens.errors import OpError, PromptError
from dit_lens.ops import Read
from dit_lens.sites import match

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens
    from dit_lens.ops import Pattern, Steps
    from dit_lens.run import Run

Judge = Callable[["Image", str], Mapping[str, float]]


@dataclass(frozen=True)
class Arm:
    """A set of channels per picture, under the name of the arm and its draw."""

    name: str
    draw: int
    sets: tuple[ChannelSet, ...]


def score_ops(site: Pattern, score: str, steps: Steps) -> list[Read]:
    """The reads from which channel sets are made."""
    return [Read(site, reduce=score, steps=steps, name="score"), Read(site, reduce="rms", steps=steps, name="rms")]


def sets_of(run: Run, k: int, score: str) -> list[ChannelSet]:
    """For every picture of a run its own top-k channels per site, averaged over the steps that were read."""
    scores, rms = run["score"], run["rms"]
    return [
        top_channels(
            {site: value[:, row].float().mean(0) for site, value in scores.items()},
            {site: value[:, row].float().square().mean(0) for site, value in rms.items()},
            k,
            score,
        )
        for row in range(len(run.images))
    ]


def control_arms(top: Sequence[ChannelSet], draws: int, seed: int) -> list[Arm]:
    """A top-k family and its controls: bottom, random (every draw one map for all sites), energy-matched."""
    random = [Arm("random", draw, tuple(one.random(seed + draw) for one in top)) for draw in range(draws)]
    matched = Arm("energy-matched", 0, tuple(one.energy_matched(seed) for one in top))
    return [Arm("top", 0, tuple(top)), Arm("bottom", 0, tuple(one.bottom() for one in top)), *random, matched]


def check_k(lens: DiTLens, site: Pattern, ks: Sequence[int]) -> None:
    """Every k fits every site, with room for a control of the same size; raised before anything runs."""
    if not ks:
        raise OpError("k=[] asks for no set of channels. Give at least one k.")
    for found in match(site, lens.anatomy.sites, lens.anatomy.stacks):
        width = lens.anatomy.channels(found)
        for k in ks:
            if not 1 <= k <= width // 2:
                raise OpError(
                    f"k={k} leaves no control of equal size: {found} has {width} channels. "
                    f"Choose k from 1 to {width // 2}."
                )


def listed(prompts: str | Sequence[str]) -> list[str]:
    """One or several prompts as a list; an empty list is an error."""
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    if not found:
        raise PromptError("the list of prompts is empty. Pass at least one prompt.")
    return found


def judge_for(lens: DiTLens, prompts: Sequence[str], judge: Judge | None) -> Judge | None:
    """The judge that was given; for a toy whose prompts are scenes, reading the picture back; else none."""
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
    """Reads a toy's picture back: 1 or 0 for every attribute of the prompt; their mean is the ``fidelity``."""
    from dit_lens.toys.scenes import Scene, describe

    found = describe(image).scene
    right = {name: float(same) for name, same in Scene.parse(prompt).agreement(found).items()}
    return {"readable": float(found is not None), "fidelity": sum(right.values()) / len(right), **right}


def judged(judge: Judge | None, image: Image, prompt: str) -> dict[str, Any]:
    """A judge's numbers, or none."""
    return {} if judge is None else dict(judge(image, prompt))
