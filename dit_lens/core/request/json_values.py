"""The values of ops as JSON: tensors, arrays, slices, spans of the run, and references to saved runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.runs.run import Run
from dit_lens.errors import OpError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SigmaInterval:
    """Steps whose noise level lies in (low, high]: written ``dit_lens.sigma(1.0, 0.3)``, from noisy to clean."""

    high: float
    low: float


def to_plain(value: Any) -> Any:
    """A value as JSON can keep it."""
    import numpy as np

    if isinstance(value, SigmaInterval):
        return {"sigma": [value.high, value.low]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple) and any(isinstance(end, float) for end in value):
        return {"fraction": list(value)}
    if hasattr(value, "reference"):  # a Run names itself
        return value.reference()
    if isinstance(value, Mapping):
        return {"mapping": {str(key): to_plain(item) for key, item in value.items()}}
    if type(value).__module__.startswith("torch") or hasattr(value, "as_subclass"):
        return _plain_tensor(value)
    if isinstance(value, np.ndarray):
        return {"array": to_plain(value.tolist())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def _plain_tensor(value: Tensor) -> dict[str, Any]:
    import torch

    raw = value.detach().cpu().contiguous().as_subclass(torch.Tensor)
    data = base64.b64encode(raw.reshape(-1).view(torch.uint8).numpy().tobytes()).decode("ascii")
    return {"tensor": data, "dtype": str(raw.dtype).removeprefix("torch."), "shape": list(raw.shape)}


def from_plain(value: Any) -> Any:
    """The value that :func:`to_plain` wrote."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "sigma" in value:
        return SigmaInterval(*value["sigma"])
    if "slice" in value:
        return slice(*value["slice"])
    if "fraction" in value:
        return tuple(value["fraction"])
    if "mapping" in value:
        return {key: from_plain(item) for key, item in value["mapping"].items()}
    if "array" in value:
        import numpy as np

        array = np.asarray(value["array"])
        if array.dtype.kind not in "biuf":
            raise OpError(f"an array of {array.dtype} is not a value of an op.")
        return array
    if "run" in value:
        return Run.load(value["run"])
    if "tensor" in value:
        import torch

        dtype = getattr(torch, value["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise OpError(f"{value['dtype']!r} is not a type of tensors.")
        flat = torch.frombuffer(bytearray(base64.b64decode(value["tensor"])), dtype=torch.uint8)
        return flat.view(dtype).reshape(value["shape"])
    raise OpError(f"no op was ever written with a value like {value!r}; was the JSON changed by hand?")
