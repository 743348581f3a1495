"""What was read as arrays with named axes, in xarray's form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.request.reduce import parse
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import xarray

    from dit_lens.core.runs.reading import Reading

_GRIDS = {2: ("h", "w"), 3: ("frame", "h", "w")}


def to_xarray(reading: Reading) -> xarray.Dataset:
    """See :meth:`dit_lens.core.runs.reading.Reading.to_xarray`."""
    try:
        import xarray
    except ModuleNotFoundError as missing:
        raise OpError("to_xarray needs xarray. Install it: pip install 'dit_lens[xarray]'.") from missing
    return xarray.Dataset({site: _label(reading, site, xarray) for site in reading})


def _label(reading: Reading, site: str, xarray: Any) -> xarray.DataArray:
    """One site's values. Names of axes that other sites of the read have otherwise begin with the site's."""
    value = reading[site].detach().cpu()
    coordinates: dict[str, Any] = {"step": list(reading.steps), "row": list(reading.rows)}
    value = value.float() if value.dtype.itemsize < 4 else value  # numpy has no bfloat16
    axes = ["step", "branch", "row"] if reading.both else ["step", "row"]
    if reading.both:
        coordinates["branch"] = ["cond", "uncond"]
    if reading.levels is not None:
        coordinates["sigma"] = ("step", [reading.levels[step] for step in reading.steps])
    if reading.reduce is None:
        gridded = site in reading.on_grid and reading.shape_of_grid is not None
        value = reading[site].grid().detach().cpu().to(value.dtype) if gridded else value
        axes += _GRIDS[len(reading.shape_of_grid)] if gridded else [_own("token", reading, site)]
        if isinstance(reading.tokens, tuple):
            coordinates[_own("token", reading, site)] = list(reading.tokens)
        if site in reading.masks:
            value = value.masked_fill(~reading.masks[site].cpu()[..., None], torch.nan)
    channel = _own("channel", reading, site)
    kind, *numbers = (None,) if reading.reduce is None else parse(reading.reduce)
    if kind == "topk":
        axes += [_own("rank", reading, site), "of_rank"]
        coordinates["of_rank"] = ["|mean|", "channel"]
    else:
        axes.append(channel)
        coordinates[channel] = list(reading.channels[site] or range(value.shape[len(axes) - 1]))
        if kind == "histogram":
            axes.append("bin")
        elif value.ndim > len(axes):
            axes.append("quantile")
            coordinates["quantile"] = numbers
    return xarray.DataArray(value.numpy(), dims=axes, coords=coordinates, attrs={"reduce": reading.reduce or "none"})


def _own(axis: str, reading: Reading, site: str) -> str:
    """The name of an axis: with the site's where sites of the read differ in it."""
    if axis == "channel" and len({(reading.channels[one], reading[one].shape[-1]) for one in reading}) == 1:
        return axis
    if axis != "channel" and len({reading[one].shape for one in reading}) == 1:
        return axis
    return f"{axis} of {site}"
