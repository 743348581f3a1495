"""Numbers, and lists of them, of whatever type they are: Python's own, numpy's or torch's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dit_lens.errors import OpError, PromptError, show

LARGEST = 2**63  # what 64 bits hold
MOST = 2**20  # of anything that is listed; an iterable that gives more does not end, as far as this library goes


def as_plain(value: Any) -> Any:
    """A number, truth value or word of numpy or torch as Python's own; anything else as it is.

    >>> import numpy as np, torch
    >>> as_plain(np.float32(0.5)), as_plain(torch.tensor(3)), as_plain(np.str_("a")), as_plain([1])
    (0.5, 3, 'a', [1])
    """
    single = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    try:
        plain = value.item() if single else value
    except (RuntimeError, TypeError, ValueError):  # a tensor without values
        return value
    return str(plain) if isinstance(plain, str) else plain


def to_int(value: Any) -> int | None:
    """A whole number as an int, of whatever type it is; None for anything else, booleans included.

    >>> import numpy as np, torch
    >>> to_int(3), to_int(np.int64(3)), to_int(torch.tensor(3)), to_int(True), to_int(3.0)
    (3, 3, 3, None, None)
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or not hasattr(value, "__index__"):
        return None
    try:
        return value.__index__()
    except (TypeError, ValueError, RuntimeError):  # several numbers, floats, or a tensor without values
        return None


def to_number(value: Any) -> float | None:
    """A finite real number as a float, of whatever type it is; None for anything else, words and booleans included.

    >>> import torch
    >>> to_number(2), to_number(torch.tensor(0.5)), to_number("2"), to_number(float("nan")), to_number(1j)
    (2.0, 0.5, None, None, None)
    """
    kind = str(getattr(value, "dtype", ""))
    if isinstance(value, bool) or "bool" in kind or "complex" in kind:
        return None
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        return None
    try:
        number = float(value)
    except (ArithmeticError, TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def list_entries(value: Any) -> list[Any] | None:
    """The entries of anything that lists some, one-shot iterables included; None for a text, a mapping, a number."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        return None
    try:
        found = list(itertools.islice(value, MOST + 1))
    except TypeError:  # a tensor of one number has no entries
        return None
    return found if len(found) <= MOST else None


def as_seed(seed: Any) -> int:
    """A seed as an int, of whatever type it is; PromptError for what is none."""
    plain = as_plain(seed)
    if isinstance(plain, bool) or not isinstance(plain, int) or not 0 <= plain < LARGEST:
        raise PromptError(f"seed {show(seed)} is not a whole number from 0 up to 2**63 - 1.")
    return plain


def check_number(name: str, value: float, low: float, high: float = math.inf, *, open_ends: bool = False) -> None:
    """Raises OpError if a number is not within bounds.

    name: of the argument.
    value: a number; NaN lies within no bounds.
    low, high: the bounds.
    open_ends: whether the bounds themselves are excluded.
    """
    fits = low < value < high if open_ends else low <= value <= high
    if not fits:
        if high == math.inf:
            allowed = f"above {low:,}" if open_ends else f"{low:,} or more"
        else:
            allowed = f"between {low:,} and {high:,}" if open_ends else f"from {low:,} to {high:,}"
        raise OpError(f"{name}={show(value)} is out of range. Choose a value {allowed}.")
