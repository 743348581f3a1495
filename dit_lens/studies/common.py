"""What the studies share: channel sets per picture, the arms, and how pictures are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dit_lens.call import seed_of
from dit_lens.channels import ChannelSet, top_channels
from dit_lens.errors import OpError, PromptError
from dit_lens.ops import Read
from dit_lens.sites import match

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_lens.lens import DiTLens
    from dit_lens.ops import Op, Pattern, Steps
    from dit_lens.run import Run

Judge = Callable[["Image", str], Mapping[str, float]]

DRAWS = 10  # of a random control, so that the variance between them is inside the interval


@dataclass(frozen=True)
class Arm:
    """A set of channels per picture, under the name of the arm and its draw."""

    name: str
    draw: int
    sets: tuple[ChannelSet, ...] = ()


class Drawn(Protocol):
    """What is drawn together: prompts, from one seed."""

    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


@dataclass
class Drawing:
    """Runs batches. Where edits begin late, a batch is recorded once and its edits start from there, bit for bit.

    twice: with the same prompts once more below, untouched, as sources of values. late: edits leave the first step be.
    """

    lens: DiTLens
    call: Mapping[str, Any]
    twice: bool = False
    late: bool = False
    _recorded: tuple[Drawn, Run] | None = field(default=None, init=False)

    def clean(self, part: Drawn, reads: Sequence[Read] = (), *, record: bool = False) -> Run:
        """A batch without edits."""
        return self.lens.run(self._prompts(part), reads, seed=part.seed, record=record, **self.call)

    def edited(self, part: Drawn, ops: Sequence[Op]) -> Run:
        """A batch under edits."""
        prefix = None
        if self.late:
            if self._recorded is None or self._recorded[0] != part:
                self._recorded = (part, self.clean(part, record=True))
            prefix = self._recorded[1]
        return self.lens.run(self._prompts(part), ops, seed=part.seed, prefix=prefix, **self.call)

    def _prompts(self, part: Drawn) -> Sequence[str]:
        return part.prompts * 2 if self.twice else part.prompts


def begins_late(lens: DiTLens, prompt: str, steps: Steps, call: Mapping[str, Any]) -> bool:
    """Whether steps leave out the first one of a run."""
    return lens.planned(prompt, **call)[0].select(steps)[0] > 0


def score_ops(site: Pattern, score: str, steps: Steps = None) -> list[Read]:
    """The reads from which channel sets are made."""
    return [Read(site, reduce=score, steps=steps, name="score"), Read(site, reduce="rms", steps=steps, name="rms")]


def kept_scores(run: Run, rows: int | None = None) -> dict[str, np.ndarray]:
    """What :func:`sets_of` needs of a run: per picture and site the score and the energy, averaged over steps.

    rows: how many of the first pictures are wanted; all by default.
    """
    found = {"score": run["score"], "energy": {site: rms.float().square() for site, rms in run["rms"].items()}}
    return {
        f"{row}/{name}/{site}": value[:, row].float().mean(0).numpy()
        for name, values in found.items()
        for site, value in values.items()
        for row in range(value.shape[1] if rows is None else rows)
    }


def sets_of(kept: Mapping[str, np.ndarray], k: int, score: str) -> list[ChannelSet]:
    """For every picture its own top-k channels per site, from what :func:`kept_scores` returned."""
    rows: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    for key, value in kept.items():
        row, name, site = key.split("/", 2)
        if name in ("score", "energy"):
            rows.setdefault(int(row), {"score": {}, "energy": {}})[name][site] = torch.from_numpy(value)
    return [top_channels(rows[row]["score"], rows[row]["energy"], k, score) for row in sorted(rows)]


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
            if not isinstance(k, Integral):
                raise OpError(f"k={k!r} is no number of channels. Give a whole number from 1 to {width // 2}.")
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


def seeded(seeds: int | Sequence[int]) -> list[int]:
    """One or several seeds as a list. None, or one twice, which would count one picture as two, is an error."""
    found = [seed_of(seed) for seed in several(seeds)]
    if not found:
        raise PromptError("the list of seeds is empty. Pass at least one seed.")
    if len(set(found)) < len(found):
        raise PromptError(f"seeds={found} names a seed twice, which draws the same picture again. Name each once.")
    return found


def several(values: Any) -> tuple[Any, ...]:
    """One or several numbers."""
    return (values,) if isinstance(values, Number) else tuple(values)


def in_pairs(pairs: Sequence[tuple[Any, str]], source: str = "source prompt") -> list[tuple[Any, str]]:
    """Pairs of a source and a target prompt; anything else is an error."""
    if not pairs:
        raise OpError(f"there are no pairs. Give at least one ({source}, target prompt).")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], str):
            raise OpError(f"pairs[{i}] is {pair!r}, which is no pair. Give a list of ({source}, target prompt).")
    return [(pair[0], pair[1]) for pair in pairs]


def share_of_width(k: int, width: int) -> str:
    """The note that belongs beside every k: 12 of 3,072 and 12 of 128 are different things."""
    return f"k={k} is {k / width:.1%} of {width} channels"


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
