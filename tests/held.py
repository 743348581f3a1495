"""What a pipeline and the process hold, name by name, so that a test can list what something has changed.

Objects are compared by identity, so that an equal one in the place of another is found; what is written in place, such
as tensors and random numbers, by its value.
"""

import hashlib
import logging
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as every_module

# What Python itself keeps on a class once it was copied or inspected.
PYTHON = ("__slotnames__", "__annotations__")


@dataclass(frozen=True)
class Value:
    """Something that is compared by equality."""

    of: Any


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what came, went or is another."""
    same = {
        name
        for name in before.keys() & after.keys()
        if before[name] is after[name] or (isinstance(before[name], Value) and before[name] == after[name])
    }
    return sorted((before.keys() | after.keys()) - same)


def held(pipe) -> dict[str, Any]:
    """What no run may change: modules with their hooks and weights, their classes, and the process."""
    return held_by_modules(pipe) | held_by_classes(pipe) | held_by_process()


def held_by_modules(pipe) -> dict[str, Any]:
    """Components, the attributes of all their modules with what those hold (hooks among it), and weights."""
    found: dict[str, Any] = dict(pipe.components)
    for name, component in components(pipe).items():
        for path, part in parts_of(name, component):
            for attribute, value in vars(part).items():
                found[f"{path}.{attribute}"] = value
                entries = value.items() if isinstance(value, dict) else enumerate(value) if is_list(value) else ()
                found |= {f"{path}.{attribute}[{key}]": entry for key, entry in entries}
        if isinstance(component, torch.nn.Module):
            for path, tensor in [*component.named_parameters(name), *component.named_buffers(name)]:
                found[f"{path}, values"] = Value((tensor.requires_grad, tensor.grad is None, digest(tensor)))
    return found


def held_by_classes(pipe) -> dict[str, Any]:
    """The attributes of the classes of all objects, and of the classes that those are made from."""
    objects = [
        pipe,
        pipe.scheduler,
        *(part for name, one in components(pipe).items() for _, part in parts_of(name, one)),
    ]
    classes = {base for kind in {type(one) for one in objects} for base in kind.__mro__}
    return {
        f"class {kind.__module__}.{kind.__qualname__}.{name}": value
        for kind in classes
        for name, value in vars(kind).items()
        if name not in PYTHON
    }


def held_by_process() -> dict[str, Any]:
    """Modes, defaults and handlers of torch, Python and the libraries."""
    loggers = {name: logging.getLogger(name) for name in ("", "diffusers", "transformers", "torch", "nnsight")}
    return {
        "environment": Value(dict(os.environ)),
        "warnings": Value(list(warnings.filters)),
        "loggers": Value({name: (log.level, list(log.handlers), log.disabled) for name, log in loggers.items()}),
        "gradients": Value((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())),
        "defaults": Value((torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads())),
        "modes": Value(torch._C._len_torch_function_stack()),  # noqa: SLF001 there is no public way
        "backends": Value((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)),
        "autocast": Value((torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))),
        "hooks of every module": Value(
            [
                list(hooks)
                for name, hooks in vars(every_module).items()
                if "_global_" in name and isinstance(hooks, dict)
            ]
        ),
        "tracing": Value((sys.gettrace(), sys.getprofile(), sys.excepthook, signal.getsignal(signal.SIGINT))),
        "threads": Value(threading.active_count()),
    }


def left(pipe) -> dict[str, Any]:
    """What the call of a pipeline changes itself: its own attributes, those of its scheduler, and random numbers."""
    own = {f"pipe.{name}": Value(plain(value)) for name, value in vars(pipe).items()}
    own |= {f"scheduler.{name}": Value(plain(value)) for name, value in vars(pipe.scheduler).items()}
    return own | random_numbers()


def random_numbers() -> dict[str, Any]:
    """The state of every generator of the process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch's random numbers": Value([digest(state) for state in (torch.get_rng_state(), *cuda)]),
        "numpy's random numbers": Value(pickle.dumps(np.random.get_state())),  # noqa: NPY002 the one of the process
        "Python's random numbers": Value(random.getstate()),
    }


def components(pipe) -> dict[str, Any]:
    """All but the scheduler, which counts the steps of a call."""
    return {name: part for name, part in pipe.components.items() if name != "scheduler" and hasattr(part, "__dict__")}


def parts_of(name: str, component) -> list[tuple[str, Any]]:
    return list(component.named_modules(prefix=name)) if isinstance(component, torch.nn.Module) else [(name, component)]


def is_list(value) -> bool:
    return isinstance(value, list | tuple)


def plain(value) -> Any:
    """A value that equals that of another pipeline where both hold the same."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.requires_grad, digest(value))
    if isinstance(value, np.ndarray):
        return plain(torch.as_tensor(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if is_list(value):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else type(value).__qualname__


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=8).hexdigest()
