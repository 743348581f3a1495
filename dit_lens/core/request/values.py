"""Values of a pipeline call as Python's own, and what is wrong with those that no pipeline can use."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dit_lens.arguments.numbers import LARGEST, as_plain, list_entries, to_number
from dit_lens.errors import OpError, PromptError, nearest, show

COUNTS = (
    "num_inference_steps",
    "height",
    "width",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_frames",
    "max_sequence_length",
)
MOST_STEPS = 10_000  # models are trained with about 1000 noise levels
SCHEDULES = ("sigmas", "timesteps")
FUNCTIONS = ("callback", "callback_on_step_end")
MAPPINGS = {"dict", "Dict", "Mapping"}


def copy_of(value: Any) -> Any:
    """The same value, in which nothing can be changed through the original; functions and generators are shared.

    Images are shared too: pipelines make new ones of them.
    """
    import torch

    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(copy_of(one) for one in value)
    if type(value) is dict:
        return {name: copy_of(one) for name, one in value.items()}
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if type(value).__module__ == "numpy" and hasattr(value, "copy") else value


def allow_none(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A callback of steps that may return None, which changes nothing; pipelines want a mapping of what it changed.

    diffusers' own callback objects are left as they are: pipelines look at their class.
    """
    if hasattr(callback, "tensor_inputs"):
        return callback

    @functools.wraps(callback)
    def call(*args: Any, **kwargs: Any) -> Any:
        changed = callback(*args, **kwargs)
        return {} if changed is None else changed

    return call


def check_device(device: Any) -> Any:
    """A device of torch as it was given; OpError where this machine has none of that name."""
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError) as problem:
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        why = str(problem).splitlines()[0][:120] if str(problem) else type(problem).__name__
        raise OpError(f"device {show(device)} is not there ({why}).{nearest(device, known)}") from problem
    return device


def check_count(name: str, value: Any) -> int:
    """A whole number of at least 1 as an int; PromptError for anything else."""
    value = as_plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PromptError(f"{name}={show(value)} must be a whole number of at least 1.")
    if value >= LARGEST:
        raise PromptError(f"{name}={show(value)} is more than anything can draw. Give a number below 2**63.")
    return value


def check_steps(name: str, count: int) -> int:
    """How many steps run; PromptError for more than can be planned: every forward pass is laid out before the first.

    name: of the argument that says so.
    """
    if count > MOST_STEPS:
        raise PromptError(
            f"{name}= asks for {count:,} steps, more than can be planned: models know about 1000 noise levels. Give "
            f"{MOST_STEPS:,} at most."
        )
    return count


def list_values(value: Any) -> list[Any]:
    """The values of a list, range, array or other iterable; those of numpy and torch as Python's own."""
    try:
        return value.tolist() if hasattr(value, "tolist") else list(value)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise PromptError(f"{show(value)} lists no values that can be read ({problem}).") from problem


def is_several(value: Any) -> bool:
    """Whether a value lists others in an order: no word, mapping or set, and no single number of numpy or torch."""
    if isinstance(value, str | bytes | Mapping | set | frozenset) or getattr(value, "ndim", None) == 0:
        return False
    return isinstance(value, Iterable)


def check_text(name: str, text: Any) -> str:
    """A text as a string; PromptError for anything else, and for one that no tokenizer can read."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a string; one is {text!r} ({type(text).__name__}).")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise PromptError(
            f"{name} must be text; {text!r} holds half of a character ({problem.reason}, at {problem.start}). Write "
            "the character itself, or leave it out."
        ) from problem
    return str(text)


def check_values(signature: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline, numbers and words as Python's own; PromptError where one can mean nothing.

    signature: of the pipeline's call.
    arguments: by name, without the prompt.
    """
    return {name: _check_value(name, as_plain(value), signature.get(name)) for name, value in arguments.items()}


def _check_value(name: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    if value is None:
        return None
    if name in COUNTS:
        return check_count(name, value)
    if name in FUNCTIONS and not callable(value):
        raise PromptError(f"{name}={value!r} is not a function.")
    if name == "generator":
        return _check_generators(value)
    if name in SCHEDULES:
        return _check_schedule(name, value)
    kinds = set() if parameter is None else _kinds_of(parameter)
    if kinds & MAPPINGS and kinds <= {*MAPPINGS, "str", "Any"} and not isinstance(value, Mapping):
        raise PromptError(f"{name}={show(value)} must be a mapping from names to values.")
    if kinds == {"bool"} and not (isinstance(value, int) and value in (0, 1)):
        raise PromptError(f"{name}={value!r} must be True or False.")
    if kinds and kinds <= {"int", "float"}:
        _check_number(name, value)
    value = _to_tensor(name, value) if any("Tensor" in kind for kind in kinds) and "ndarray" not in kinds else value
    _check_contents(name, value)
    return value


def _to_tensor(name: str, value: Any) -> Any:
    """A numpy array as a tensor; anything else as it is. Pipelines that know tensors only fail at arrays."""
    if type(value).__module__ != "numpy" or not hasattr(value, "dtype"):
        return value
    import numpy as np
    import torch

    try:
        return torch.as_tensor(np.array(value))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise PromptError(f"{name}= holds {value.dtype}, which is no number. Give an array of numbers.") from problem


def _kinds_of(parameter: inspect.Parameter) -> set[str]:
    """The names in the annotation of a parameter, or the class of its default."""
    if parameter.annotation is parameter.empty:
        default = None if parameter.default is parameter.empty else parameter.default
        return set() if default is None else {type(default).__name__}
    words = set(re.findall(r"\w+", str(parameter.annotation)))
    return words - {"class", "Optional", "typing", "Union", "None", "NoneType"}


def _check_number(name: str, value: Any) -> None:
    if not _is_finite(value):
        raise PromptError(f"{name}={show(value)} must be a finite number.")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold: Python's whole numbers go on beyond it."""
    return isinstance(value, int | float) and to_number(value) is not None


def _check_schedule(name: str, value: Any) -> Any:
    several = list_entries(value.tolist() if hasattr(value, "tolist") else value) if is_several(value) else []
    if several is None:
        raise PromptError(f"{name}={show(value)} does not end, or lists more than can be planned.")
    check_steps(name, len(several))
    if not several or not all(_is_finite(as_plain(one)) for one in several):
        raise PromptError(f"{name}={show(value)} must list finite numbers, one for each step.")
    return value if isinstance(value, list) else several


def _check_generators(value: Any) -> Any:
    import torch

    some = list(value) if isinstance(value, list | tuple) else [value]
    if not some or not all(isinstance(one, torch.Generator) for one in some):
        raise PromptError(f"generator={show(value)} must be a torch.Generator, or a list of one for each image.")
    return some if isinstance(value, list | tuple) else value


def _check_contents(name: str, value: Any) -> None:
    """PromptError for text no tokenizer can read, and for tensors that nothing can be computed from, at any depth.

    Masks may hold the infinity that attention adds.
    """
    if isinstance(value, list | tuple | Mapping):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_contents(name, one)
        return
    if isinstance(value, str):
        check_text(f"{name}=", value)
    if not hasattr(value, "dtype") or not hasattr(value, "any"):
        return
    if getattr(value, "is_meta", False) or getattr(value, "is_sparse", False):
        raise PromptError(
            f"{name}= is a tensor without plain values ({value.layout}, {value.device}). Give a dense one."
        )
    if "complex" in str(value.dtype):
        raise PromptError(f"{name}= holds complex numbers, of which a model would take the real part only.")
    value = value.float() if "float8" in str(value.dtype) else value
    unequal: Any = value != value  # noqa: PLR0124 only NaN differs from itself
    if bool(unequal.any()):
        raise PromptError(f"{name}= holds NaN, so that everything computed from it would.")
    infinite: Any = (value == math.inf) | (value == -math.inf)
    if "mask" not in name and bool(infinite.any()):
        raise PromptError(f"{name}= holds infinite numbers, so that everything computed from it would be none.")
