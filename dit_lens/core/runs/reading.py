"""What one op has read: tensors by site, with the steps, branches, rows, tokens and channels that they are of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_lens.arguments.mappings import NamedMapping
from dit_lens.arguments.saving import saved_by
from dit_lens.arguments.signatures import told
from dit_lens.core.runs.record import READING, check_record
from dit_lens.errors import OpError, SiteError, nearest, show
from dit_lens.families.sites import Site

if TYPE_CHECKING:
    import xarray


class SiteTensor(Tensor):
    """A read that knows its token grid; every operation on it gives a plain tensor."""

    shape_of_grid: tuple[int, ...] | None
    token_axis: int | None

    __torch_function__ = torch.nn.Parameter.__torch_function__

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteTensor:
        """A copy that knows the grid as well; torch's own copies plain tensors only."""
        if id(self) not in memo:
            memo[id(self)] = found = self.as_subclass(Tensor).detach().clone().as_subclass(SiteTensor)
            found.shape_of_grid, found.token_axis = self.shape_of_grid, self.token_axis
        return memo[id(self)]

    def grid(self) -> Tensor:
        """The same values with tokens as [h, w]: [s, b, n, d] becomes [s, b, h, w, d]."""
        plain = self.as_subclass(Tensor)
        if self.shape_of_grid is None or self.token_axis is None:
            raise OpError(
                "this read has no token grid: it was reduced over tokens, narrowed to some of them, or is of the text "
                "stream."
            )
        if plain.shape[self.token_axis] != math.prod(self.shape_of_grid):
            raise OpError(
                f"this read has {plain.shape[self.token_axis]} tokens, which are no grid of "
                f"{' x '.join(map(str, self.shape_of_grid))}."
            )
        return plain.unflatten(self.token_axis, self.shape_of_grid)


@dataclass(frozen=True)
class Reading(NamedMapping[Tensor]):
    """One read of a run: site -> [s, b, n, d], or [s, 2, b, n, d] (cond first) when both branches were read.

    After a reduction the token axis is gone: [s, b, d, ...].

    name: its key, or "" where each site is a key of its own.
    tensors: what was read, by site.
    steps: the indices read, of ``total_steps``, in the order in which they were named; so are all others.
    total_steps: how many steps ran.
    branches: those it holds, in order.
    both: whether they have an axis of their own.
    rows: those it holds.
    tokens: those it holds; None means all. Where a word or a class of tokens is elsewhere in other rows or branches:
        branch -> those of each row.
    channels: those it holds, by site; None means all.
    reduce: how tokens were reduced, if they were.
    shape_of_grid: (h, w) of the image tokens, where it holds any.
    masks: which tokens are data, by site, where some are not; see :attr:`mask`.
    features: whether its channels are features of a dictionary.
    call: "prompt" and "call" of the run it is of, as in its spec, which say where words stand; None: not known.
    levels: the noise level of every step of that run; None: not known.
    family: of its model; None: not known.
    """

    name: str
    tensors: dict[str, Tensor] = field(repr=False)
    steps: tuple[int, ...]
    total_steps: int
    branches: tuple[str, ...]
    both: bool
    rows: tuple[int, ...]
    tokens: tuple[int, ...] | dict[str, tuple[tuple[int, ...], ...]] | None
    channels: dict[str, tuple[int, ...] | None]
    reduce: str | None
    shape_of_grid: tuple[int, ...] | None
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    features: bool = False
    call: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    levels: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    family: str | None = field(default=None, repr=False, compare=False)

    save = saved_by("It is saved with its run: run.save(folder).")

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are data: bool [b, n], or [2, b, n] (cond first) when both branches were read.

        None where all of them are, and after a reduction. What the pipeline masks is no data, such as the padding of
        shorter prompts, and neither is what fills rows up that have fewer tokens. Padding that takes part in attention
        is data.
        """
        found = [self.masks.get(site) for site in self.tensors]
        first = found[0] if found else None
        if any((one is None) != (first is None) or (one is not None and not _equal(one, first)) for one in found):
            raise OpError("the sites of this read have other text tokens each: see masks[site].")
        return first

    @property
    def is_ranked(self) -> bool:
        """Whether it holds (|mean|, channel) of the k largest channels; channels count among those it was taken of."""
        return self.reduce is not None and self.reduce.strip().startswith("topk")

    @property
    def on_grid(self) -> tuple[str, ...]:
        """The sites that were read at every token of the image."""
        if self.reduce is not None or self.tokens is not None or self.shape_of_grid is None:
            return ()
        return tuple(site for site in self.tensors if Site.parse(site).is_image)

    def __getitem__(self, site: str) -> SiteTensor:
        if not isinstance(site, str) or site not in self.tensors:
            raise SiteError(f"this read has no {show(site)}.{nearest(site, self.tensors)}")
        value = self.tensors[site].as_subclass(SiteTensor)
        gridded = site in self.on_grid
        value.shape_of_grid = self.shape_of_grid if gridded else None
        value.token_axis = (3 if self.both else 2) if gridded else None
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors and what is of the whole run, as plain data."""
        return {
            "name": self.name,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "branches": self.branches,
            "both": self.both,
            "rows": self.rows,
            "tokens": self.tokens,
            "channels": self.channels,
            "reduce": self.reduce,
            "shape_of_grid": self.shape_of_grid,
            "sites": list(self.tensors),
            **({"masks": list(self.masks)} if self.masks else {}),
            **({"features": True} if self.features else {}),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Reading:
        """A reading of what :meth:`to_json` wrote; ValueError if a tensor has another shape than the record says."""
        check_record(record, READING, "a read")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record.items()
            if name != "sites"
        }
        values["channels"] = {site: None if kept is None else tuple(kept) for site, kept in record["channels"].items()}
        if isinstance(record["tokens"], dict):
            values["tokens"] = {branch: tuple(map(tuple, rows)) for branch, rows in record["tokens"].items()}
        values["masks"] = {site: tensors[f"mask/{site}"] for site in record.get("masks", ())}
        reading = cls(tensors={site: tensors[site] for site in record["sites"]}, **values)
        if not reading.branches or not set(reading.branches) <= {"cond", "uncond"}:
            raise ValueError(f"a read is of the branches {list(reading.branches)}, not of cond or uncond")
        for site, tensor in reading.tensors.items():
            said = [len(reading.steps), *([2] if reading.both else []), len(reading.rows)]
            kept, axis = reading.channels[site], -1 if reading.reduce is None else len(said)
            if reading.is_ranked:
                _check_ranked(site, tensor, kept)
                kept = None  # such a read has an axis of the k largest in place of the channels
            axes = len(said) + (2 if reading.reduce is None else 1)
            if (
                list(tensor.shape[: len(said)]) != said
                or tensor.ndim < axes
                or (kept is not None and tensor.shape[axis] != len(kept))
            ):
                raise ValueError(f"{site} has the shape {list(tensor.shape)}, which is not what the record says")
        for site, mask in reading.masks.items():
            if list(mask.shape) != list(reading.tensors[site].shape[1:-1]) or mask.dtype != torch.bool:
                raise ValueError(
                    f"the mask of {site} has the shape {list(mask.shape)}, which is not that of its tokens"
                )
        return reading

    @property
    def tensor(self) -> SiteTensor:
        """The only tensor of a read of one site."""
        if len(self.tensors) != 1:
            raise SiteError(f"this read has {len(self.tensors)} sites; name one: {', '.join(list(self.tensors)[:8])}.")
        return self[next(iter(self.tensors))]

    @told
    def to_xarray(self) -> xarray.Dataset:
        """The read as arrays with named axes: step, branch, row, h, w (or token), channel; it needs xarray.

        >>> from dit_lens import DiTLens, Read
        >>> prompt = "a big red circle left on a plain blue background"
        >>> run = DiTLens.toy().run(prompt, [Read("blocks[2:4].img", name="h")], seed=0, num_inference_steps=2)
        >>> found = run["h"].to_xarray()
        >>> found["blocks.3.img"].dims
        ('step', 'row', 'h', 'w', 'channel')
        >>> found["blocks.3.img"].sel(step=1, channel=5).mean().item() == run["h"]["blocks.3.img"][1, ..., 5].mean()
        tensor(True)

        Coordinates are the numbers of steps, rows, tokens and channels, and the noise level of each step (``sigma``).
        Half precision becomes float32. What is no data (``mask``) is NaN.
        """
        try:
            import xarray
        except ModuleNotFoundError as missing:
            raise OpError("to_xarray needs xarray. Install it: pip install 'dit_lens[xarray]'.") from missing
        return xarray.Dataset({site: xarray.DataArray(**_label(self, site)) for site in self})

    @told
    def by_branch(self, site: str) -> dict[str | None, Tensor]:
        """[s, b, ...] for every branch that was read."""
        value = self[site].as_subclass(Tensor)
        return (
            {branch: value[:, i] for i, branch in enumerate(("cond", "uncond"))}
            if self.both
            else {self.branches[0]: value}
        )


def _label(reading: Reading, site: str) -> dict[str, Any]:
    """One site's values with the names and numbers of their axes, as xarray takes them."""
    value = reading[site].as_subclass(Tensor).detach().cpu()
    value = value.float() if value.dtype.itemsize < 4 else value  # numpy has no bfloat16
    axes = ["step", "branch", "row"] if reading.both else ["step", "row"]
    coordinates: dict[str, Any] = {"step": list(reading.steps), "row": list(reading.rows)}
    if reading.both:
        coordinates["branch"] = ["cond", "uncond"]
    if reading.levels is not None:
        coordinates["sigma"] = ("step", [reading.levels[step] for step in reading.steps])
    if reading.reduce is None:
        if site in reading.masks:
            value = value.masked_fill(~reading.masks[site].cpu()[..., None], torch.nan)
        token = _name_axis("token", reading, site)
        if site in reading.on_grid and reading.shape_of_grid is not None:
            value = value.unflatten(len(axes), reading.shape_of_grid)
            axes += ["frame", "h", "w"][-len(reading.shape_of_grid) :]
        else:
            axes.append(token)
        if isinstance(reading.tokens, tuple):
            coordinates[token] = list(reading.tokens)
    if reading.is_ranked:
        axes += [_name_axis("rank", reading, site), "of_rank"]
        coordinates["of_rank"] = ["|mean|", "channel"]
    else:
        channel = _name_axis("feature" if reading.features else "channel", reading, site)
        coordinates[channel] = list(reading.channels[site] or range(value.shape[len(axes)]))
        axes.append(channel)
    if value.ndim > len(axes):  # of several numbers a channel
        name, _, numbers = (reading.reduce or "").rstrip(") ").partition("(")
        axes.append("bin" if name.strip() == "histogram" else "quantile")
        if axes[-1] == "quantile":
            coordinates["quantile"] = [float(number) for number in numbers.split(",")]
    return {"data": value.numpy(), "dims": axes, "coords": coordinates, "attrs": {"reduce": reading.reduce or "none"}}


def _name_axis(axis: str, reading: Reading, site: str) -> str:
    """The name of an axis: with the site's where sites of the read differ in it."""
    if axis in ("channel", "feature"):
        same = len({(reading.channels[one], reading[one].shape[-1]) for one in reading}) == 1
    else:
        same = len({reading[one].shape for one in reading}) == 1
    return axis if same else f"{axis} of {site}"


def find_reading(value: Any) -> Reading | None:
    """The read that a value is, or stands for as the handle of a trace does; None for anything else."""
    found = value if isinstance(value, Reading) else getattr(value, "reading", None)
    return found if isinstance(found, Reading) else None


def _check_ranked(site: str, tensor: Tensor, kept: tuple[int, ...] | None) -> None:
    """ValueError where the k largest of a site are more, or others, than the channels that they are taken of."""
    if tensor.shape[-1:] != (2,):
        raise ValueError(f"{site} has the shape {list(tensor.shape)}, which is not what the record says")
    if kept is not None and not bool(((tensor[..., 1] >= 0) & (tensor[..., 1] < len(kept))).all()):
        raise ValueError(f"{site} ranks channels beyond the {len(kept)} that the record names")


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)
