"""Where tokens are: in the arguments of the transformer, in images, and in the tensors of blocks.

Torch and plain data only, as ``execute``, with which it travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dit_lens.families.locations import ImageTokens

if TYPE_CHECKING:
    from dit_lens.families.locations import GridRule, Location, TextRule


Copied: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor | None]  # rows and tokens, and which of the tokens there are


class PlanMismatchError(RuntimeError):
    """The pipeline did something else than the plan expects."""


def argument(arguments: tuple[tuple, dict], name: str, position: Any) -> Any:
    """An argument of a forward pass by name, or by position where it was passed so."""
    args, kwargs = arguments
    return kwargs[name] if name in kwargs else args[position]


def select_tensor(value: Any, side: str, location: Location) -> Any:
    """The tensor at a location, out of a module's input or output."""
    if side == "input":
        entry = location["entry"]
        if entry is not None:
            return select_entry(value, location, *entry)
        return argument(value, location["slot"], location["position"])
    return value if location["slot"] is None else value[location["slot"]]


def select_entry(arguments: tuple[tuple, dict], location: Location, rule: str, block: int, blocks: int) -> Any:
    """What a ControlNet adds after a block, out of the list that the transformer is given.

    arguments: of the transformer.
    location: whose slot is the list.
    rule, block, blocks: see ``entry`` of :class:`~dit_lens.PointSpec`.
    """
    args, kwargs = arguments
    given = location["slot"] in kwargs or len(args) > (location["position"] or 0)
    listed: Any = argument(arguments, location["slot"], location["position"]) if given else None
    count = 0 if listed is None else len(listed)
    if rule == "named":
        found = (listed or {}).get(block)
    elif rule == "before":
        found = listed[block - 1] if 0 < block <= count else None
    elif count and kwargs.get("controlnet_blocks_repeat"):
        found = listed[block % count]
    elif count:
        found = listed[block // -(-blocks // count) if rule == "share" else int(block / (blocks / count))]
    else:
        found = None
    if found is None:
        raise PlanMismatchError(f"the ControlNet adds nothing at {location.get('name')} in this forward pass")
    return found


def replace_tensor(value: Any, side: str, location: Location, tensor: Any) -> Any:
    """A copy of a module's input or output with one tensor exchanged.

    value: (args, kwargs) of an input, or an output.
    side: "input" or "output".
    location: of the tensor in it.
    tensor: what replaces it.
    """
    if side == "input":
        args, kwargs = value
        old = argument(value, location["slot"], location["position"])
        # Some attentions are given one tensor twice, once to make queries and once to make keys and values of it.
        return (
            tuple(tensor if one is old else one for one in args),
            {name: tensor if one is old else one for name, one in kwargs.items()},
        )
    if location["slot"] is None:
        return tensor
    if isinstance(value, dict):  # the output class of a model, whose fields are counted
        return type(value)(**{**value, list(value)[location["slot"]]: tensor})
    return type(value)((*value[: location["slot"]], tensor, *value[location["slot"] + 1 :]))


def find_image_tokens(arguments: tuple[tuple, dict], rule: GridRule) -> ImageTokens:
    """Where the image tokens of a forward pass are, by the rule of its family."""
    value = optional_argument(arguments, [rule["argument"]], rule["position"])
    latents = argument(arguments, rule["latents"], rule["latents_position"])
    if rule["rule"] in ("ids", "positions", "marks"):
        ids = value[0] if value.ndim == 3 else value
        if rule["rule"] == "positions":
            ids = ids[-latents.shape[1] :]
        if rule["rule"] == "marks":
            marks = argument(arguments, rule["marks"], None)[0]
            ids = ids[marks == rule["marked"]]
        target = ids[:, 0] == ids[:, 0].amin()
        positions = ids[target][:, 1:3]
        grid = [int(extent) + 1 for extent in positions.amax(0) - positions.amin(0)]
        first, total = int(target.to(torch.uint8).argmax()), len(ids)
    elif rule["rule"] == "shapes":
        shapes = value[0] if isinstance(value[0], list) else [value[0]]
        f, *grid = shapes[0 if rule["target"] == "first" else -1]
        grid = [f, *grid] if f > 1 else grid
        first, total = 0, prod(grid) if rule["target"] == "last" else sum(map(prod, shapes))
    elif rule["rule"] == "counts" and value is None and rule["coordinates"] is not None:
        grid, first = _count_coordinates(argument(arguments, rule["coordinates"], None)[0])
        total = latents.shape[1]
    elif rule["rule"] == "counts":
        grid = [argument(arguments, name, None) for name in ("num_frames", "height", "width")]
        first, total = 0, prod(grid)
    else:
        grid, images = grid_of(value, rule["rule"], rule["patch"])
        first, total = 0, prod(grid) * images
    total = -(-total // rule["pad"]) * rule["pad"]
    if rule["pad_to"] is not None and grid[0] != grid[1]:
        total = max(total, rule["pad_to"])
    starts = [] if rule["mask"] is None else argument(arguments, rule["mask"], None).sum(1).tolist()
    return ImageTokens(tuple(grid), prod(grid), first, total, starts)


def _count_coordinates(places: Tensor) -> tuple[list[int], int]:
    """The grid (f, h, w) that coordinates [frame, y, x] of tokens make, and the first of its tokens.

    Those of given frames come before it, none of which is the first frame.
    """
    first = int((places[0] == places[0].amin()).to(torch.uint8).argmax())
    h, w = (len(axis[first:].unique()) for axis in places[1:])
    return [(places.shape[1] - first) // (h * w), h, w], first


class ImageFinder:
    """Where the image tokens of every forward pass are.

    What tensors told is kept while the call is given the same ones, as reading them would wait for the device.

    rule: of the family.
    """

    def __init__(self, rule: GridRule):
        self.rule = rule
        self.told: list[tuple[Any, int]] = []  # tensors and how often each had been written
        self.length: int | None = None
        self.found: ImageTokens | None = None

    def find(self, arguments: tuple[tuple, dict]) -> ImageTokens:
        """The image tokens of a forward pass. arguments: of the pass."""
        rule = self.rule
        latents = argument(arguments, rule["latents"], rule["latents_position"])
        length = latents.shape[1] if isinstance(latents, Tensor) else None
        names = [rule["argument"], rule["marks"], rule["mask"], rule["coordinates"]]
        places = [(name, rule["position"] if name == rule["argument"] else None) for name in names if name is not None]
        values = [optional_argument(arguments, [name], position) for name, position in places]
        values = [value for value in values if value is not None]
        told = [(one, one._version) for one in values if isinstance(one, Tensor) and not one.is_inference()]  # noqa: SLF001 torch's own
        same = len(told) == len(values) == len(self.told) and length == self.length
        same = same and all(a is b and at == then for (a, at), (b, then) in zip(told, self.told, strict=True))
        if self.found is None or not same:
            self.told, self.length, self.found = told, length, find_image_tokens(arguments, rule)
        return self.found


def find_text_masks(arguments: tuple[tuple, dict], rule: TextRule) -> list[Tensor]:
    """For each argument that masks text tokens which of them take part in attention, bool [row, token] in main memory.

    Empty where the call has no such argument, so that all of them do.
    """
    found = []
    for path, position in zip(rule["masks"], rule["positions"], strict=True):
        value = optional_argument(arguments, path, position)
        if value is not None:
            found.append(read_mask(value, rule).cpu())
    return found


def list_text_arguments(arguments: tuple[tuple, dict], rule: TextRule) -> list[Any]:
    """The arguments of a forward pass that hold the text, and its masks; None for one that is left out."""
    paths = [*([name] for name in rule["texts"]), *rule["masks"]]
    places = zip(paths, [*rule["text_positions"], *rule["positions"]], strict=True)
    return [optional_argument(arguments, path, position) for path, position in places]


def check_text(text: Sequence[Any], first: Sequence[Any], when: str) -> None:
    """Fails where a forward pass is given another text than the first of its branch was, by which ops chose tokens.

    Values are compared only where a pipeline passes other tensors than before, so that nothing waits for the device.
    A text that is left out, as a cache stands for it, is none.

    text, first: as :func:`list_text_arguments` lists them.
    when: the forward pass, for the message.
    """
    for one, other in zip(first, text, strict=True):
        if one is not None and other is not None and not _is_same(one, other):
            raise PlanMismatchError(
                f"ops chose their tokens by the text of the first step, but {when} is given another one, as by a "
                "callback. Use token indices"
            )


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


def optional_argument(arguments: tuple[tuple, dict], path: Sequence[str], position: int | None) -> Any:
    """An argument of a forward pass, or what a mapping among them holds; None where there is none."""
    args, kwargs = arguments
    value = args[position] if position is not None and position < len(args) else kwargs.get(path[0])
    for name in path[1:]:
        value = None if value is None else value.get(name)
    return value


def read_mask(value: Any, rule: TextRule) -> Tensor:
    """Which text tokens an argument marks, bool [row, token]; see :class:`~dit_lens.Prompts`."""
    form, multiple = rule["masked_by"], rule["multiple"]
    if form == "list":
        lengths = torch.tensor([-(-len(one) // multiple) * multiple for one in value])
    elif form == "length":
        lengths = value.flatten().cpu()
    elif form in ("count", "even"):
        lengths = value.bool().sum(1).cpu()
        if form == "even" and len(set(lengths.tolist())) > 1:
            raise PlanMismatchError(
                f"the prompts have {', '.join(map(str, lengths.tolist()))} text tokens, of which this model makes rows "
                "that cannot be followed; run prompts of other lengths one by one"
            )
        return torch.arange(value.shape[1]) < lengths[:, None]
    elif form == "last":
        return value[:, -1].bool()
    elif form == "token":
        return value.reshape(len(value), -1).bool()
    else:
        return value == form
    return torch.arange(int(lengths.max())) < lengths[:, None]


def mask_text(masks: Sequence[Tensor], rows: range, count: int) -> Tensor | None:
    """Which of a stream's ``count`` text tokens take part, bool [row, token]; None where all do.

    masks: as :func:`find_text_masks` finds them.
    rows: those of one branch.
    """
    if not masks:
        return None
    mask = masks[0]
    if len(masks) > 1 and count != mask.shape[1]:  # put in one order, what takes part first
        lengths = torch.stack([one.sum(1) for one in masks]).sum(0)
        mask = torch.arange(sum(one.shape[1] for one in masks)) < lengths[:, None]
    mask = mask[rows.start : rows.stop, :count]
    mask = torch.nn.functional.pad(mask, (0, count - mask.shape[1]))
    return None if mask.all() else mask


def grid_of(latents: Any, axes: str, patch: Sequence[int]) -> tuple[list[int], int]:
    """The grid of an image with these axes (see :func:`pack`), and how many images a row holds."""
    shape = (
        dict(zip("cfhw", latents[0].shape, strict=True))
        if axes == "list"
        else dict(zip(axes, latents.shape, strict=True))
    )
    frames, h, w = (shape.get(axis, 1) // side for axis, side in zip("fhw", patch, strict=True))
    return [frames, h, w] if frames > 1 else [h, w], shape.get("i", 1)


def count_rows(arguments: tuple[tuple, dict], rule: GridRule) -> int:
    """How many rows the transformer is given in a forward pass."""
    latents = argument(arguments, rule["latents"], rule["latents_position"])
    return latents.shape[rule["axes"].index("b")] if "b" in rule["axes"] else len(latents)


def check_grid(grid: tuple[int, ...], expected: list[int] | None) -> None:
    """Fails where the pipeline drew another size than the plan was made for."""
    if expected is not None and list(grid) != expected:
        raise PlanMismatchError(
            f"the plan expects a grid of {' x '.join(map(str, expected))} image tokens, but the pipeline made "
            f"{' x '.join(map(str, grid))}"
        )


def check_whole(length: int, location: Location, image: ImageTokens) -> None:
    """Fails where a module attends in parts, or to tokens that a cache holds, so that what it has are not all tokens.

    length: how many tokens it has.
    location: which of them are meant.
    image: where image tokens are.
    """
    if location["layout"] != "own" and length < image.total:
        raise PlanMismatchError(
            f"{location.get('name')} has {length} tokens in this forward pass, fewer than the image and its "
            f"references, {image.total}: its module attends in parts, or a cache holds the others"
        )


def pack(value: Any, axes: str, patch: Sequence[int]) -> Tensor:
    """An image as tokens [row, token, channel]: its patches row by row, each (channel, y, x)."""
    if axes == "tokens":
        return value
    x = torch.stack(list(value)) if axes == "list" else value
    x = arrange_axes(x, "bcfhw" if axes == "list" else axes)
    b, i, c, f, h, w = x.shape
    pf, ph, pw = patch
    x = x.reshape(b, i, c, f // pf, pf, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(b, -1, c * pf * ph * pw)


def regroup(tokens: Tensor, groups: int) -> Tensor:
    """Tokens whose channels were ``groups`` groups of equal size, with the members of all groups side by side."""
    return tokens.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)


def unpack(tokens: Tensor, like: Any, axes: str, patch: Sequence[int]) -> Any:
    """The inverse of :func:`pack`, in the form of ``like``.

    tokens: [row, token, channel].
    like: an image, or a list of them, of the shape that is wanted.
    axes: its axes, or "tokens".
    patch: latent frames, rows and columns of a token.
    """
    if axes == "tokens":
        return tokens
    form = torch.stack(list(like)) if axes == "list" else like
    letters = "bcfhw" if axes == "list" else axes
    b, i, c, f, h, w = arrange_axes(form, letters).shape
    pf, ph, pw = patch
    x = tokens.reshape(b, i, f // pf, h // ph, w // pw, c, pf, ph, pw).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    x = x.reshape(b, i, c, f, h, w)
    order = ["bicfhw".index(letter) for letter in letters]
    x = x.permute(*order, *(axis for axis in range(6) if axis not in order)).reshape(form.shape)
    return list(x) if axes == "list" else x


def arrange_axes(x: Tensor, axes: str) -> Tensor:
    """Axes in the order bicfhw, missing ones of size 1."""
    for letter in "bicfhw":
        if letter not in axes:
            x, axes = x.unsqueeze(-1), axes + letter
    return x.permute(*(axes.index(letter) for letter in "bicfhw"))


def to_tokens(value: Any, location: Location) -> Tensor:
    """The value at a location as [row, token, channel]."""
    tensor = pack(value, location["axes"], location["patch"])
    tensor = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
    return tensor.transpose(0, 1) if location["sequence_first"] else tensor


def from_tokens(tensor: Tensor, value: Any, location: Location) -> Any:
    """The inverse of :func:`to_tokens`."""
    tensor = tensor.transpose(0, 1) if location["sequence_first"] else tensor
    tensor = tensor.squeeze(1) if getattr(value, "ndim", 0) == 2 else tensor
    return unpack(tensor, value, location["axes"], location["patch"])


def stream_tokens(value: Any, location: Location, image: ImageTokens) -> Tensor:
    """The tokens of a location's stream in every row of a forward pass."""
    tensor = to_tokens(value, location)
    return select_stream(tensor, location, image, range(len(tensor)))[0]


def select_stream(tensor: Tensor, location: Location, image: ImageTokens, rows: range) -> tuple[Tensor, Copied | None]:
    """The rows and tokens of one stream, and None: a view of the tensor.

    Where text is of another length in every row: a copy, and what :func:`write_back` needs. Of the text stream it has
    as many tokens as the longest row, zeros where a row has none.

    tensor: [row, token, channel].
    location: whose layout and stream are meant.
    image: where image tokens are in this forward pass.
    rows: those of one branch.
    """
    some = tensor if len(rows) == len(tensor) else tensor[rows.start : rows.stop]
    length, layout, of_image = tensor.shape[1], location["layout"], location["stream"] == "img"
    if layout == "whole":
        start, count = 0, length
    elif layout == "own":
        start, count = (min(image.first, length - image.count), image.count) if of_image else (0, length)
    elif layout == "text_first":
        start, count = (length - image.total + image.first, image.count) if of_image else (0, length - image.total)
    elif layout == "image_first":
        start, count = (image.first, image.count) if of_image else (image.total, length - image.total)
    else:
        starts = [int(image.starts[row]) for row in rows]
        if len(set(starts)) > 1:
            # Indices stay in main memory, so that nothing waits for the device.
            first, row = (torch.tensor(some)[:, None] for some in (starts, list(rows)))
            if of_image:
                index = (row, first + torch.arange(image.count))
                return tensor[index], (index, None)
            token = torch.arange(max(starts))
            there = token < first
            missing = ~there[..., None].to(tensor.device)
            return some[:, : max(starts)].masked_fill(missing, 0), ((row, token[None]), there)
        start, count = (starts[0], image.count) if of_image else (0, starts[0])
    return some if count == length else some.narrow(1, start, count), None


def write_back(tensor: Tensor, copy: Tensor, where: Copied) -> None:
    """Puts back what :func:`select_stream` copied. where: its index, and which of its tokens there are."""
    (row, token), there = where
    if there is None:
        tensor[row, token] = copy
    else:
        row, token = row.expand(there.shape)[there], token.expand(there.shape)[there]
        tensor[row, token] = copy[there]
