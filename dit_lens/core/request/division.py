"""Whose a pipeline argument is: which part of it belongs to some of the prompts of a call, or to each image of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_lens.errors import PromptError
from dit_lens.families.row import Pipeline, Prompts
from dit_lens.families.table.inputs import Holding, find_holding
from dit_lens.families.table.shared import WITH_IMAGES


@dataclass(frozen=True)
class PromptSpan:
    """Some prompts of a call, and the images drawn of them.

    prompts: which.
    count: of all prompts of the call.
    each: images drawn of a prompt.
    asked: whether batch_size= asks for it; where memory ran out, nobody did.
    """

    prompts: range
    count: int
    each: int
    asked: bool = True

    @property
    def rows(self) -> range:
        """The images drawn of these prompts."""
        return range(self.prompts.start * self.each, self.prompts.stop * self.each)

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

    def holding(self, name: str) -> Holding:
        """What an argument holds; layered embeddings and offsets are of prompts whatever their name."""
        return (
            "prompts" if name in (*self.prompts.layered, *self.prompts.offsets) else find_holding(self.pipeline, name)
        )

    def select(self, name: str, value: Any, part: PromptSpan) -> Any:
        """What an argument is for some of the prompts; PromptError where nobody knows."""
        holding = self.holding(name)
        if value is None or holding == "whole":
            return value
        if holding in ("texts", "prompts"):
            return self._select_entries(name, value, part)
        if holding == "latents":
            return value[part.rows.start : part.rows.stop]
        if holding in ("row images", "prompt images"):
            return _select_images(name, value, part, of_rows=holding == "row images")
        if holding == "function":
            raise _refuse(name, "is called with the rows of one batch only, and once more for every batch", part)
        if not _is_shared(name, value, holding):
            raise _refuse(name, f"holds {_describe(value)}, of which nobody knows what belongs to which prompt", part)
        return value

    def _select_entries(self, name: str, value: Any, part: PromptSpan) -> Any:
        if name in self.prompts.offsets:  # those of these prompts, from 0 up
            return value[part.prompts.start : part.prompts.stop + 1] - value[part.prompts.start]
        span = part.prompts if self.count(name, value) == part.count else part.rows
        return value[:, span.start : span.stop] if name in self.prompts.layered else value[span.start : span.stop]

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


def _take_images(name: str, value: Any, rows: range, count: int) -> Any:
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
        return value[part.prompts.start : part.prompts.stop]
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
