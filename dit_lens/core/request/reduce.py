"""Reductions over image tokens: [b, n, d] in, a few numbers per channel out, computed where the tensor is.

This module travels by source to servers that lack dit_lens: torch and the standard library only, plain functions,
plain data. Letters: b batch row, n image token, d channel.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# What each reduction is called with; the right column is what errors show.
_FORMS = {
    "mean": "mean",
    "|mean|": "|mean|",
    "mean|x|": "mean|x|",
    "rms": "rms",
    "max": "max",
    "quantile": "quantile(q, ...) with every q in [0, 1], or p99.9 for quantile(0.999)",
    "histogram": "histogram(low, high, bins) with low < high and a whole number bins of 1 to 16777216",
    "topk": "topk(k) with a whole number k >= 1",
}
REDUCTIONS = tuple(_FORMS)

# Quantiles and histograms work on this many elements at a time, so that their scratch memory stays under 100 MB.
CHUNK = 2**22

MOST_BINS = 2**24  # float32 counts no further one by one
LARGEST = 1e38  # of the numbers in a reduction: twice as much is still a float32


def reduce_tokens(x: Tensor, spec: str | Sequence[Any], mask: Tensor | None = None) -> Tensor:
    """Reduces the tokens of every row and channel.

    >>> x = torch.tensor([[[1.0, -4.0], [3.0, 0.0]]])  # b=1, n=2, d=2
    >>> reduce_tokens(x, ["mean"])
    tensor([[ 2., -2.]])
    >>> reduce_tokens(x, ["quantile", 0.0, 0.5]).tolist()  # of |x|, [b, d, q]
    [[[1.0, 2.0], [0.0, 2.0]]]
    >>> reduce_tokens(x, ["histogram", -4, 4, 2]).tolist()  # [b, d, bins]
    [[[0.0, 2.0], [1.0, 1.0]]]
    >>> reduce_tokens(x, ["topk", 1]).tolist()  # [b, k, (|mean|, channel)]
    [[[2.0, 0.0]]]

    Returns float32 on the device of ``x``, accumulated in float32 (float64 input in float64):

        mean, |mean|        mean over tokens; its absolute value (the score of arXiv 2605.13974)      [b, d]
        mean|x|, rms, max   mean of |x|; root of the mean square; largest |x|                         [b, d]
        quantile q          of |x|, interpolated linearly as numpy does; NaN where a token is NaN     [b, d]
        quantile q1 q2 ...  the same for several                                                      [b, d, q]
        histogram l h bins  counts of x in equal bins from l to h; what lies outside is counted       [b, d, bins]
                            in the nearest end bin, so that counts sum to n (NaN is not counted)
        topk k              |mean| and channel of the k channels with the largest |mean|              [b, k, 2]

    x: [b, n, d], floating point, at least one token. spec: ``[name, *numbers]`` or the text that ``parse`` reads.
    mask: bool [b, n], the tokens that count in each row; None: all. A row without any gives NaN, or counts of 0.
    Raises ValueError for a spec that does not exist or a tensor that does not fit.
    """
    name, *args = parse(spec)
    if x.ndim != 3 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(
            f"reduce={name!r} takes floating-point activations [b, n, d] with at least one token, "
            f"and got {x.dtype} {list(x.shape)}. Select image tokens before reducing."
        )
    if mask is not None:
        return torch.cat([reduce_tokens(_counting(x[i : i + 1], mask[i]), [name, *args]) for i in range(len(x))])
    tokens = x.shape[1]
    if name in ("mean", "|mean|"):
        mean = _mean(x)
        return mean if name == "mean" else mean.abs()
    if name == "mean|x|":
        return _norm(x, 1) / tokens
    if name == "rms":
        return _norm(x, 2) / math.sqrt(tokens)
    if name == "max":
        return _norm(x, math.inf)
    if name == "quantile":
        return _quantile(x, args)
    if name == "histogram":
        return _histogram(x, *args)
    return _topk(x, *args)


def parse(spec: str | Sequence[Any]) -> list[Any]:
    """The plain form of a reduction, checked.

    >>> parse("mean|x|"), parse("p99.9"), parse("quantile(0.5, 0.9)")
    (['mean|x|'], ['quantile', 0.999], ['quantile', 0.5, 0.9])
    >>> parse("histogram(-10, 10, 64)"), parse(["topk", 12])
    (['histogram', -10.0, 10.0, 64], ['topk', 12])
    >>> parse("meen")
    Traceback (most recent call last):
    ValueError: 'meen' is not a valid reduction. Nearest: 'mean'. There are: mean, |mean|, mean|x|, rms, max, ...

    Returns ``[name, *numbers]``, which JSON keeps. spec: text, or a list to be checked.
    Raises ValueError for an unknown name or numbers that do not fit it.
    """
    parts: Any = spec if isinstance(spec, list | tuple) and spec else [spec]
    name, args = _split(spec) if isinstance(spec, str) else (parts[0], list(parts[1:]))
    if not isinstance(name, str) or name not in _FORMS:
        close = difflib.get_close_matches(str(name), REDUCTIONS, n=1, cutoff=0.5)
        nearest = f" Nearest: {close[0]!r}." if close else ""
        raise ValueError(f"{name!r} is not a valid reduction.{nearest} There are: {', '.join(_FORMS.values())}.")
    numbers = all(isinstance(arg, int | float) and abs(arg) < LARGEST for arg in args)
    if name == "quantile" and numbers and args and all(0 <= q <= 1 for q in args):
        return [name, *map(float, args)]
    if name == "histogram" and numbers and len(args) == 3 and args[0] < args[1] and _is_count(args[2], MOST_BINS):
        return [name, float(args[0]), float(args[1]), args[2]]
    if name == "topk" and numbers and len(args) == 1 and _is_count(args[0]):
        return [name, args[0]]
    if name not in ("quantile", "histogram", "topk") and not args:
        return [name]
    given = ", ".join(map(str, args)) or "no numbers"
    raise ValueError(f"The reduction {name!r} cannot take {given}. Write {_FORMS[name]}.")


def _split(text: str) -> tuple[str, list[Any]]:
    text = text.strip()
    if percent := re.fullmatch(r"p(\d+(?:\.\d+)?)", text):
        # "99.9e-2" is read as the double nearest to 0.999; 99.9 / 100 is not that double.
        return "quantile", [float(percent[1] + "e-2")]
    call = re.fullmatch(r"([^()]*)\((.*)\)", text)
    if call is None:
        return text, []
    return call[1].strip(), [_number(word.strip()) for word in call[2].split(",")]


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word  # parse says what is wrong with it, with the form to write instead


def _is_count(value: object, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _counting(row: Tensor, mask: Tensor) -> Tensor:
    """The tokens of a row that count; one of NaN where none does."""
    if not mask.any():
        return torch.full_like(row[:, :1], math.nan)
    return row[:, mask.nonzero()[:, 0].to(row.device)]  # numbers, for which nothing waits as for a mask on the device


def _mean(x: Tensor) -> Tensor:
    return x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


def _norm(x: Tensor, order: float) -> Tensor:
    # The kernel casts element by element, where x.abs() or x.square() would copy x. It refuses to narrow float64.
    return torch.linalg.vector_norm(x, order, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


def _channel_chunks(x: Tensor) -> Iterator[Tensor]:
    rows, tokens, _ = x.shape
    yield from x.split(max(1, CHUNK // max(1, rows * tokens)), dim=2)


def _quantile(x: Tensor, qs: Sequence[float]) -> Tensor:
    last = x.shape[1] - 1
    below = [math.floor(q * last) for q in qs]
    weights = [q * last - i for q, i in zip(qs, below, strict=True)]
    parts = []
    for part in _channel_chunks(x):
        # Only the tail that holds the lowest q is ordered: six values for p99.9 of 4,096 tokens. NaN comes first.
        largest = part.abs().topk(last + 1 - min(below), dim=1).values.float()  # [b, tail, d]
        values = [
            torch.lerp(largest[:, last - i], largest[:, max(last - i - 1, 0)], weight)
            for i, weight in zip(below, weights, strict=True)
        ]
        parts.append(torch.stack(values, -1).masked_fill(largest[:, 0, :, None].isnan(), math.nan))
    result = torch.cat(parts, 1)  # [b, d, q]
    return result[..., 0] if len(qs) == 1 else result


def _histogram(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    # Without the two outer edges every value falls into some bin, which is the clipping.
    edges = torch.linspace(low, high, bins + 1, device=x.device, dtype=torch.float32)[1:-1].contiguous()
    parts = []
    for part in _channel_chunks(x):
        values = part.transpose(1, 2).to(torch.float32).contiguous()  # [b, d, n]
        index = torch.bucketize(values, edges, right=True)
        counts = values.new_zeros(*values.shape[:2], bins)
        parts.append(counts.scatter_add_(2, index, (~values.isnan()).float()))
    return torch.cat(parts, 1)


def _topk(x: Tensor, k: int) -> Tensor:
    if k > x.shape[2]:
        raise ValueError(f"topk({k}) was asked of {x.shape[2]} channels. Take k of at most {x.shape[2]}.")
    # A stable sort, unlike torch.topk, gives ties to the lower channel on every device.
    scores, order = _mean(x).abs().sort(dim=1, descending=True, stable=True)
    return torch.stack([scores[:, :k], order[:, :k].float()], -1)  # [b, k, 2]
