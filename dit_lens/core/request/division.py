"""Whose a pipeline argument is: which part of it belongs to some of the prompts of a call, or to each image of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from dit_lens.arguments.numbers import as_plain
from dit_lens.core.request.values import is_several, list_values
from dit_lens.errors import PromptError, show
from dit_lens.families.arguments import IMAGES_PER_PROMPT
from dit_lens.families.row import Pipeline, Prompts
from dit_lens.families.table.inputs import Holding, find_holding
from dit_lens.families.table.shared import WITH_IMAGES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families import Family


@dataclass(frozen=True)
class PromptSpan:
    """Some prompts of a call, and the images drawn of them.

    prompts: which, in any order; one may be there several times.
    count: of all prompts of the call.
    each: images drawn of a prompt.
    asked: whether batch_size= asks for it; where memory ran out, nobody did.
    """

    prompts: Sequence[int]
    count: int
    each: int
    asked: bool = True

    @property
    def rows(self) -> list[int]:
        """The images drawn of these prompts."""
        return [prompt * self.each + j for prompt in self.prompts for j in range(self.each)]

    @property
    def total(self) -> int:
        """How many images the whole call draws."""
        return self.count * self.each


@dataclass(frozen=True)
class Division:
    """How the arguments of a pipeline are divided.

    pipeline: its entry in the family's row.
    prompts: how prompts enter it, from the family's row.
    """

    pipeline: Pipeline
    prompts: Prompts

    @classmethod
    def of(cls, pipe: DiffusionPipeline, family: Family) -> Self:
        """That of a pipeline."""
        return cls(family.pipeline(type(pipe)), family.prompts)

    def holding(self, name: str) -> Holding:
        """What an argument holds; layered embeddings and offsets are of prompts whatever their name."""
        return (
            "prompts" if name in (*self.prompts.layered, *self.prompts.offsets) else find_holding(self.pipeline, name)
        )

    def starts(self, name: str, value: Any) -> bool:
        """Whether an argument says, for each row, from what it starts: its noise, or its image."""
        return value is not None and self.holding(name) in ("latents", "row images", "prompt images")

    def select(self, name: str, value: Any, part: PromptSpan) -> Any:
        """What an argument is for some of the prompts; PromptError where nobody knows."""
        holding = self.holding(name)
        if value is None or holding == "whole":
            return value
        if holding in ("texts", "prompts"):
            return self._select_entries(name, value, part)
        if holding == "latents":
            return value[part.rows]
        if holding in ("row images", "prompt images"):
            return _select_images(name, value, part, of_rows=holding == "row images")
        if holding == "function":
            raise _refuse(name, "is called with the rows of one batch only, and once more for every batch", part)
        if not _is_shared(name, value, holding):
            raise _refuse(name, f"holds {_describe(value)}, of which nobody knows what belongs to which prompt", part)
        return value

    def _select_entries(self, name: str, value: Any, part: PromptSpan) -> Any:
        if name in self.prompts.offsets:  # those of these prompts, from 0 up
            return _prepend_zero(value.diff()[list(part.prompts)].cumsum(0, dtype=value.dtype))
        chosen = list(part.prompts) if self.count(name, value) == part.count else part.rows
        if isinstance(value, list | tuple):
            return [value[i] for i in chosen]
        return value[:, chosen] if name in self.prompts.layered else value[chosen]

    def share(self, call: Mapping[str, Any], prompts: Sequence[int], count: int) -> dict[str, Any]:
        """What the arguments of a call are for some of its prompts, as users give them; they are checked by each run.

        >>> usual = Division(Pipeline("", None), Prompts())
        >>> usual.share({"negative_prompt": ["dark", "dull"], "height": 64}, [1, 1, 0], count=2)
        {'negative_prompt': ['dull', 'dull', 'dark'], 'height': 64}

        For what draws the same prompts in several calls. PromptError for entries that are not as many as prompts, and
        for a value of which nobody knows what belongs to which prompt.

        call: the arguments.
        prompts: which, in any order; one may be there several times.
        count: how many prompts there are.
        """
        if list(prompts) == list(range(count)):
            return dict(call)
        part = PromptSpan(prompts, count, 1)
        return {name: self._share(name, value, part) for name, value in call.items()}

    def _share(self, name: str, value: Any, part: PromptSpan) -> Any:
        holding = self.holding(name)
        if holding == "function" or (holding == "texts" and not is_several(value)):
            return value  # one for all
        if holding == "texts":
            value = list_values(value)
        if value is None or holding not in ("texts", "prompts", "latents"):
            return self.select(name, value, part)
        entries = self.count(name, value) if hasattr(value, "__len__") else None
        if entries is None or (entries == 1 and holding == "prompts"):
            return value
        if entries != part.count:
            held = f"lists {entries} texts" if holding == "texts" else f"has {entries} entries"
            allowed = "one for each" if holding == "latents" else "one for all, or one each"
            raise PromptError(f"{name}= {held} for {part.count} prompts. Give {allowed}.")
        return self.select(name, value, part)

    def repeat(self, name: str, value: Any, each: int) -> Any:
        """An argument with one entry for each image, where it had one for each prompt. each: images of a prompt."""
        holding = self.holding(name)
        if value is None or holding not in ("texts", "prompts", "prompt images"):
            return value
        if holding == "prompt images" and count_images(name, value) == 1:
            return value
        if isinstance(value, list | tuple):
            return [entry for entry in value for _ in range(each)]
        if name in self.prompts.offsets:
            lengths = value.diff().repeat_interleave(each)
            return _prepend_zero(lengths.cumsum(0, dtype=value.dtype))
        if not hasattr(value, "repeat_interleave"):
            return value.repeat(each, axis=0)  # an array of numpy
        return value.repeat_interleave(each, dim=1 if name in self.prompts.layered else 0)

    def spread(self, name: str, value: Any, rows: int) -> Any:
        """An argument with an image for each row, where fewer serve them all in turn.

        Pipelines encode each image with the generator of one row, and copy what comes of it to the others: a row would
        depend on how many others there are.
        """
        count = count_images(name, value) if value is not None and self.holding(name) == "row images" else rows
        return value if not count or count == rows or rows % count else _take_images(name, value, range(rows), count)

    def check_spread(self, arguments: Mapping[str, Any], rows: int, each: int) -> None:
        """PromptError where rows must share an image that each would encode otherwise.

        each: images drawn of a prompt.
        """
        shared = [name for name, value in arguments.items() if self.spread(name, value, rows) is not value]
        if shared and arguments.get("padding_mask_crop") is not None:
            what = f"padding_mask_crop= takes one {shared[0]}= for all {rows} images that are drawn"
        elif shared and each > 1 and self.pipeline.encodes == WITH_IMAGES:
            what = f"{self.pipeline.name} takes one {shared[0]}= for all {each} images of a prompt"
        else:
            return
        raise PromptError(
            f"{what}, and encodes it with the noise of the first, so that an image would depend on the others. Draw "
            "one image at a time."
        )

    def count(self, name: str, value: Any) -> int:
        """How many prompts an argument has entries for."""
        if name in self.prompts.offsets:
            return len(value) - 1
        return value.shape[1] if name in self.prompts.layered else len(value)


def count_images(name: str, value: Any) -> int | None:
    """How many images an argument holds; None where its entries are several images themselves.

    >>> import numpy as np
    >>> count_images("image", np.zeros((8, 8, 3))), count_images("image", np.zeros((2, 8, 8, 3)))
    (1, 2)
    >>> count_images("mask_image", np.zeros((2, 8, 8))), count_images("image", [np.zeros((2, 8, 8, 3))] * 2)
    (2, None)
    """
    if isinstance(value, list | tuple):
        return len(value) if all(count_images(name, one) == 1 for one in value) else None
    return len(value) if _lists_images(name, value) else 1


def _lists_images(name: str, value: Any) -> bool:
    """Whether an array or tensor has an axis of images."""
    axes = getattr(value, "ndim", 0)
    flat = "mask" in name or name.endswith("latents")  # these may be without an axis of channels
    if axes == 3 and flat and not name.endswith("latents") and value.shape[-1] == 1:
        return False
    return axes > (2 if flat else 3)


def _take_images(name: str, value: Any, rows: Sequence[int], count: int) -> Any:
    """The images of some rows, where ``count`` of them serve all in turn."""
    chosen = [row % count for row in rows]
    if isinstance(value, list | tuple):
        return [value[i] for i in chosen]
    return value[chosen] if _lists_images(name, value) else [value] * len(chosen)


def _select_images(name: str, value: Any, part: PromptSpan, *, of_rows: bool) -> Any:
    """The images of some prompts. of_rows: whether several are one for each row, repeated in order, or each prompt."""
    count = count_images(name, value)
    if count == 1:
        return value
    if count is not None and of_rows and part.total % count == 0:
        return _take_images(name, value, part.rows, count)
    if count is not None and not of_rows and count == part.count:
        return _take_images(name, value, part.prompts, count)
    raise _refuse(
        name, f"holds {_describe(value)}, which does not fit {part.count} prompts and {part.total} images", part
    )


def _is_shared(name: str, value: Any, holding: Holding) -> bool:
    """Whether a value of this kind is the same for every row."""
    if holding == "image":
        return count_images(name, value) == 1
    if holding == "features":
        entries = value if isinstance(value, list | tuple) else [value]
        return all(getattr(entry, "ndim", 0) > 1 and len(entry) == 1 for entry in entries)
    if holding == "settings" and isinstance(value, Mapping):
        return all(_is_shared(name, one, "settings") for one in value.values())
    return value is None or isinstance(value, str | int | float)


def _refuse(name: str, why: str, part: PromptSpan) -> PromptError:
    call = "Leave batch_size= out, or call" if part.asked else "Call"
    return PromptError(
        f"{name}= {why}, so the prompts cannot go through in batches. {call} lens.run once for each batch, with its "
        f"own {name}=."
    )


def _describe(value: Any) -> str:
    """What a value is, in a few words."""
    shape = getattr(value, "shape", None)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}{'' if shape is None else f' of shape {list(shape)}'}"


def _prepend_zero(ends: Any) -> Any:
    import torch

    return torch.nn.functional.pad(ends, (1, 0))


def refuse_several_images(call: Mapping[str, Any], why: str) -> None:
    """PromptError for a call that draws several images of each prompt, where these would be taken for other prompts'.

    >>> refuse_several_images({"num_images_per_prompt": 2}, "a mask is of one image")
    Traceback (most recent call last):
    ...
    dit_lens.errors.PromptError: num_images_per_prompt=2 cannot be used here: a mask is of one image. Leave it out.

    call: arguments of the pipeline.
    why: not.
    """
    for name in IMAGES_PER_PROMPT:
        asked = as_plain(call.get(name))
        if asked is not None and not (isinstance(asked, int) and asked == 1):
            raise PromptError(f"{name}={show(asked)} cannot be used here: {why}. Leave it out.")
