"""Tensors of several names: a single block has one modulation, which ``img.mod.gate`` and ``txt.mod.gate`` name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.core.runs.run import Run
from dit_lens.errors import OpError

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Op
    from dit_lens.families import Anatomy
    from dit_lens.families.locations import TensorLocation
    from dit_lens.families.sites import Site


def name_once(op: Op, channels: dict[Site, list[int] | None], anatomy: Anatomy) -> dict[Site, list[int] | None]:
    """The sites of an edit and their channels, without second names of a tensor: an op acts once on each element.

    Raises OpError where the op means something else by each name.
    """
    of_tensor: dict[TensorLocation, list[Site]] = {}
    for site in channels:
        of_tensor.setdefault(without_name(anatomy.locate(site)), []).append(site)
    kept = dict(channels)
    for first, *others in of_tensor.values():
        for other in others:
            if channels[other] != channels[first] or _differ(op, first.name, other.name):
                raise OpError(
                    f"{type(op).__name__}: {first} and {other} are two names of one tensor, and its channels or "
                    "values differ between them. Name one of them, or write two ops, which act one after the other."
                )
            del kept[other]
    return kept


def without_name(location: TensorLocation) -> TensorLocation:
    """A location, the same for all names of one tensor: without tokens, it is of no stream."""
    return replace(location, stream="") if location.layout == "whole" else location


def _differ(op: Op, one: str, other: str) -> bool:
    """Whether an op has values of its own for two sites, which are not the same. A run's are what it read there."""
    given = [getattr(op, name, None) for name in ("value", "source", "mean")]
    pairs = [
        (values[one], values[other])
        for values in given
        if isinstance(values, Mapping) and not isinstance(values, Run) and one in values and other in values
    ]
    return not all(itertools.starmap(_same, pairs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and bool(np.array_equal(a, b))
