"""The names of a study's images and masks: typed in code, text in ``result.images`` and on the disk."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from dit_lens.arguments.checks import checked, checked_fields

# The fields that follow item and seed, in the forms that studies use.
_FORMS = (
    (),
    ("k", "arm"),  # disruption
    ("arm", "part"),  # basis
    ("k", "arm", "part", "strength"),  # transfer, transfer_image
    ("step", "block", "arm"),  # organisation
    ("step", "block", "arm", "draw"),
    ("edit", "arm", "part"),  # carrier_or_detail
    ("row", "column", "draw"),  # patching
    ("block", "arm", "part"),  # blocks
)
_NUMBER, _WORD, _EITHER = r"\d+", r"[^/]*[^/\d][^/]*", r"[^/]+"
_PATTERNS = {
    **dict.fromkeys(("item", "seed", "k", "step", "block", "draw"), _NUMBER),
    **dict.fromkeys(("edit", "arm", "part"), _WORD),
    **dict.fromkeys(("row", "column"), _EITHER),
    "strength": r"\d[\d.e+-]*",
}


@checked_fields
@dataclass(frozen=True)
class ImageKey:
    """Which image or mask of a study. ``str(key)`` is its key in ``result.images`` or ``result.masks``.

    >>> str(ImageKey(0, 1, k=4, arm="top", part="whole", strength=0.5))
    '0/1/4/top/whole/0.5'
    >>> ImageKey.parse("0/1/2/3/random/5") == ImageKey(0, 1, step=2, block=3, arm="random", draw=5)
    True

    Fields that do not apply are None.

    item: number of the prompt, or of the pair of prompts, in the study.
    seed: seed of the noise.
    k: number of channels that were edited; 0 for an arm without a k of its own.
    step: denoising step.
    block: block of the transformer.
    edit: "ablation" or "transport", where a study does both.
    row: row of a map of patches: a site, or the number of a tile.
    column: column of a map of patches: a step, a group of channels, a head, or the number of a tile.
    arm: what was done, such as "top", or what else the image shows, such as "source", "untouched" or "truth".
    draw: number of a random draw; the first draw of an arm has None.
    part: part of the channels, of the image or of the energy that was edited, such as "mean", "masked" or "whole".
    strength: strength of the edit.
    """

    item: int
    seed: int
    k: int | None = None
    step: int | None = None
    block: int | None = None
    edit: str | None = None
    row: str | int | None = None
    column: str | int | None = None
    arm: str | None = None
    draw: int | None = None
    part: str | None = None
    strength: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the text, item and seed first."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return tuple(_text(name, value) for name, value in values.items() if value is not None)

    def __str__(self) -> str:
        return "/".join(self.parts)

    @classmethod
    @checked
    def parse(cls, text: str) -> ImageKey | None:
        """The key that a text stands for; None for a text without item and seed, such as a key of a sweep.

        In a text of none of the forms above, all that follows the seed is the arm.
        """
        for form in _FORMS:
            pattern = "/".join(rf"(?P<{name}>{_PATTERNS[name]})" for name in ("item", "seed", *form))
            if found := re.fullmatch(pattern, text):
                return cls(**{name: _value(name, part) for name, part in found.groupdict().items()})
        found = re.fullmatch(r"(\d+)/(\d+)/(.+)", text, re.DOTALL)
        return None if found is None else cls(int(found[1]), int(found[2]), arm=found[3])


def _text(name: str, value: object) -> str:
    return f"{value:g}" if name == "strength" else str(value)


def _value(name: str, text: str) -> Any:
    if name == "strength":
        return float(text)
    whole = _PATTERNS[name] == _NUMBER or (_PATTERNS[name] == _EITHER and text.isdecimal())
    return int(text) if whole else text
