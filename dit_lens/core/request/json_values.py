"""The values of ops as JSON: tensors, arrays, slices, spans of the run, and references to saved runs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.numbers import to_int, to_number
from dit_lens.core.request.dictionaries import formats
from dit_lens.core.request.directions import Directions
from dit_lens.core.request.indices import is_span, list_indices, list_items
from dit_lens.core.request.token_set import TokenSet
from dit_lens.core.runs.reading import Reading, find_reading
from dit_lens.core.runs.run import Run
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class SigmaInterval:
    """Steps whose noise level lies in (low, high]: written ``dit_lens.sigma(1.0, 0.3)``, from noisy to clean."""

    high: float
    low: float

    def __post_init__(self) -> None:
        for name in ("high", "low"):
            level = getattr(self, name)
            number = to_number(level)
            if number is None:
                raise OpError(
                    f"the noise level {level!r} of sigma(high, low) is not a number, such as sigma(1.0, 0.3)."
                )
            if type(level) not in (int, float):
                object.__setattr__(self, name, number)
        if not 0 <= self.low < self.high:
            raise OpError(
                f"sigma({self.high}, {self.low}) is empty. Noise falls during a run, so write the larger level first: "
                "sigma(1.0, 0.3)."
            )


def to_plain(value: Any) -> Any:
    """A value as JSON can keep it; OpError if it cannot."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, SigmaInterval):
        return {"sigma": [value.high, value.low]}
    if isinstance(value, TokenSet):
        return {"token_set": value.to_json()}
    if isinstance(value, Directions):
        return {"directions": {site: to_plain(vector) for site, vector in value.items()}, "family": value.family}
    if isinstance(value, slice):
        return {"slice": [to_plain(end) for end in (value.start, value.stop, value.step)]}
    if is_span(value):
        return {"fraction": [to_number(end) for end in value]}
    if isinstance(value, Mapping) or hasattr(value, "reference"):
        return _plain_source(value)
    return _plain_numbers(value)


def _plain_source(value: Any) -> dict[str, Any]:
    """What names its parts: a read, a Run or a Dictionary (by where it is stored), or any mapping."""
    if (reading := find_reading(value)) is not None:
        masks = {f"mask/{site}": mask for site, mask in reading.masks.items()}
        tensors = {name: to_plain(tensor) for name, tensor in (reading.tensors | masks).items()}
        asked = {} if reading.call is None else {"call": dict(reading.call)}
        levels = {} if reading.levels is None else {"levels": list(reading.levels)}
        family = {} if reading.family is None else {"family": reading.family}
        return {"reading": reading.to_json(), "tensors": tensors, **asked, **levels, **family}
    if hasattr(value, "reference"):
        return value.reference()
    return {"mapping": {str(key): to_plain(item) for key, item in value.items()}}


def _plain_numbers(value: Any) -> Any:
    """A tensor, an array, a number, or several."""
    import numpy as np

    if hasattr(value, "as_subclass"):
        return _plain_tensor(value)
    if isinstance(value, np.ndarray):
        return {"array": to_plain(value.tolist())}
    if (number := to_int(value)) is not None or (number := _to_float(value)) is not None:
        return number
    if isinstance(value, set | frozenset):  # which ascends wherever an op names its entries
        return [to_plain(item) for item in list_indices(value, type(value).__name__)]
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [to_plain(item) for item in list_items(value, type(value).__name__)]
    raise OpError(f"a value of an op is a {type(value).__name__}, which has no JSON form.")


def _to_float(value: Any) -> float | None:
    """A number as a float, those that are not finite included, as they are told elsewhere."""
    return value if type(value) is float else to_number(value)


def _plain_tensor(value: Tensor) -> dict[str, Any]:
    import torch

    try:
        raw = value.detach().cpu().contiguous().as_subclass(torch.Tensor)
        data = base64.b64encode(raw.reshape(-1).view(torch.uint8).numpy().tobytes()).decode("ascii")
    except (RuntimeError, TypeError) as problem:  # sparse, or without values
        raise OpError(f"a tensor of an op has no JSON form ({problem}).") from problem
    return {"tensor": data, "dtype": str(raw.dtype).removeprefix("torch."), "shape": list(raw.shape)}


def from_plain(value: Any) -> Any:
    """The value that :func:`to_plain` wrote."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    for form, read in _FORMS.items():
        if form in value:
            return read(value)
    raise OpError(f"no op was ever written with a value like {value!r}; was the JSON changed by hand?")


def _read_mapping(value: dict[str, Any]) -> dict[str, Any]:
    return {key: from_plain(item) for key, item in value["mapping"].items()}


def _read_directions(value: dict[str, Any]) -> Directions:
    return Directions({site: from_plain(vector) for site, vector in value["directions"].items()}, str(value["family"]))


def _read_reading(value: dict[str, Any]) -> Reading:
    tensors = {site: from_plain(item) for site, item in value["tensors"].items()}
    levels = value.get("levels")
    levels = None if levels is None else tuple(map(float, levels))
    reading = Reading.from_json(value["reading"], tensors)
    return replace(reading, call=value.get("call"), levels=levels, family=value.get("family"))


def _read_array(value: dict[str, Any]) -> np.ndarray:
    import numpy as np

    array = np.asarray(value["array"])
    if array.dtype.kind not in "biuf":
        raise OpError(f"an array of {array.dtype} is not a value of an op.")
    return array


def _read_tensor(value: dict[str, Any]) -> Tensor:
    import torch

    dtype = getattr(torch, value["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise OpError(f"{value['dtype']!r} is not a type of tensors.")
    data = bytearray(base64.b64decode(value["tensor"]))
    if not data:
        return torch.empty(0, dtype=dtype).reshape(value["shape"])
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(value["shape"])


_FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sigma": lambda value: SigmaInterval(*value["sigma"]),
    "token_set": lambda value: TokenSet.from_json(value["token_set"]),
    "slice": lambda value: slice(*value["slice"]),
    "fraction": lambda value: tuple(value["fraction"]),
    "directions": _read_directions,
    "dictionary": formats.load_reference,
    "reading": _read_reading,
    "mapping": _read_mapping,
    "array": _read_array,
    "run": lambda value: Run.load(value["run"]),
    "tensor": _read_tensor,
}
