"""Fingerprints of values that JSON cannot hold, such as a judge: equal for equal values, in every process.

A function is what it does: its code, its defaults, and what it refers to, by value. What belongs to an installed
package counts by its name.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from dit_lens.core.runs.provenance import checksum, describe_adapters, describe_scheduler, digest, find_modules
from dit_lens.core.session import Session

DEEPEST = 40  # references within references that are followed
MOST = 300_000  # values that are looked at
LONGEST = 40  # characters of a value that stands for itself
PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis), torch.dtype, torch.device)

# Where packages are installed; what lies elsewhere is the user's own.
_INSTALLED = ("site-packages", "dist-packages")

Parts = dict[str, str]


def fingerprint_values(settings: Mapping[str, Any]) -> tuple[dict[str, Parts], list[str]]:
    """The fingerprints of what JSON cannot hold of settings, and what of it has no value that can be compared.

    >>> def above(limit):
    ...     return lambda image, prompt: {"bright": float(image.getextrema()[1] > limit)}
    >>> found, unknown = fingerprint_values({"k": 4, "judge": above(0.5)})
    >>> found["judge"]["limit"], unknown
    ('0.5', [])

    Returns name of the setting -> part -> its fingerprint, or the value itself where that is short; and names.

    settings: by argument.
    """
    found: dict[str, Parts] = {}
    unknown: list[str] = []
    for name, value in _find_values(settings):
        reader = _Reader()
        found[name] = reader.parts(value)
        unknown += [f"{name} ({what})" for what in dict.fromkeys(reader.unknown)]
    return found, unknown


def describe_state(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What decides a pipeline's answers, by value: every weight, adapters and their strengths, the scheduler.

    A component whose weights are not at hand has None.
    """
    modules = find_modules(pipe)
    return {
        "weights": {name: checksum(module, computed=False) for name, module in modules.items()},
        "adapters": describe_adapters(modules),
        "scheduler": describe_scheduler(pipe),
    }


def _find_values(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """What is not plain in nested mappings and lists, by where it is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _find_values(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _find_values(item, f"{name}[{i}]")
    elif not isinstance(value, (*PLAIN, np.generic, np.ndarray)):
        yield name, value


class _Reader:
    """Reads one value and all it refers to. ``unknown`` lists the types of what cannot be compared."""

    def __init__(self) -> None:
        self.unknown: list[str] = []
        self._open: dict[int, int] = {}  # id of a value that is being read -> its depth; values inside refer to it
        self._count = 0

    def parts(self, value: Any) -> Parts:
        """Part -> fingerprint. Of a function: its code, its defaults, and what it refers to by name."""
        if isinstance(value, functools.partial):
            given = {f"argument {i}": one for i, one in enumerate(value.args)} | value.keywords
            return {**self.parts(value.func), **{name: self.read(one) for name, one in given.items()}}
        if isinstance(value, MethodType):
            return {**self.parts(value.__func__), "self": self.read(value.__self__)}
        if isinstance(value, FunctionType):
            self._open.setdefault(id(value), len(self._open))
            inside = {name: self.read(one) for name, one in _refers_to(value).items()}
            return {"function": _name(value), "code": self._code(value), **inside}
        return {"value": self.read(value)}

    def read(self, value: Any) -> str:
        """One text for a value."""
        if isinstance(value, PLAIN):
            text = repr(value)
            return text if len(text) <= LONGEST else f"{type(value).__name__} {_digest(text)}"
        self._count += 1
        if id(value) in self._open:  # a value that holds itself
            return f"<{self._open[id(value)]}>"
        if len(self._open) > DEEPEST or self._count > MOST:
            self.unknown.append("nested too deep, or too large")
            return "..."
        self._open[id(value)] = len(self._open)
        try:
            return self._read(value)
        finally:
            del self._open[id(value)]

    def _read(self, value: Any) -> str:
        kind = type(value).__name__
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, FunctionType | MethodType | functools.partial):
            return f"{_name(value)} {_digest(self.parts(value))}"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, dict | MappingProxyType):
            return f"{kind} {_digest([(self.read(key), self.read(item)) for key, item in value.items()])}"
        if isinstance(value, list | tuple):
            return f"{kind} {_digest([self.read(item) for item in value])}"
        if isinstance(value, set | frozenset):
            return f"{kind} {_digest(sorted(self.read(item) for item in value))}"
        if (found := _read_data(value)) is not None:
            return f"{kind} {found}"
        if isinstance(value, torch.nn.Module):
            return f"{kind} {_digest([self.read(type(value)), str(value), value.training, checksum(value)])}"
        if isinstance(value, Session | DiffusionPipeline):
            pipe = value.pipe if isinstance(value, Session) else value
            return f"{kind} {_digest(describe_state(pipe))}"
        return self._object(value)

    def _object(self, value: Any) -> str:
        """An object by its class and what pickle would keep of it."""
        if isinstance(value, BuiltinFunctionType) or type(value).__name__ in ("ufunc", "builtin_function_or_method"):
            owner = getattr(value, "__self__", None)
            of = "" if owner is None or isinstance(owner, ModuleType) else f" of {self.read(owner)}"
            return _name(value) + of
        try:
            kept = value.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 a class may refuse in any way
            self.unknown.append(f"{type(value).__module__}.{type(value).__qualname__}")
            return _name(type(value))
        if isinstance(kept, str):  # the name of something global
            return f"{type(value).__module__}.{kept}"
        # What follows the state are iterators over the items of lists and dictionaries.
        fields = [*kept[:3], *(list(more) if more is not None else None for more in kept[3:5])]
        return f"{type(value).__name__} {_digest([self.read(type(value)), *map(self.read, fields)])}"

    def _class(self, value: type) -> str:
        """A class by its name; a user's own by what is defined in it as well."""
        if _installed(value.__module__):
            return _name(value)
        own = {name: one for name, one in vars(value).items() if not (name.startswith("__") and not callable(one))}
        inside = {name: self.read(_unwrap(one)) for name, one in own.items()}
        return f"{_name(value)} {_digest([[self.read(base) for base in value.__bases__], inside])}"

    def _code(self, function: FunctionType) -> str:
        if _installed(function.__module__):
            return "of its package"
        version = ".".join(map(str, sys.version_info[:2]))
        return f"python{version} {_digest(self._instructions(function.__code__))}"

    def _instructions(self, code: CodeType) -> list[Any]:
        """What runs: the instructions with what they name, without lines and comments."""
        constants = [self._instructions(c) if isinstance(c, CodeType) else self.read(c) for c in code.co_consts]
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        return [code.co_code.hex(), constants, names, code.co_argcount, code.co_kwonlyargcount, code.co_flags]


def _refers_to(function: FunctionType) -> dict[str, Any]:
    """Name -> value of the defaults, closure and globals that a function uses."""
    found: dict[str, Any] = {}
    for i, value in enumerate(function.__defaults__ or ()):
        found[f"default {i}"] = value
    found |= {f"default {name}": value for name, value in (function.__kwdefaults__ or {}).items()}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            found[name] = None
    if not _installed(function.__module__):
        known = function.__globals__
        found |= {name: known[name] for name in sorted(_global_names(function.__code__)) if name in known}
    return found


def _global_names(code: CodeType) -> set[str]:
    """The names that code, and the functions inside it, look up in their module."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_global_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _read_data(value: Any) -> str | None:
    """The digest of an array of numbers with its form, or the text of a value that stands for itself; else None."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta":
            return str(tuple(value.shape))
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return _digest([str(value.dtype), tuple(value.shape), sha256(raw).hexdigest()])
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return _digest([str(value.dtype), value.shape, sha256(np.ascontiguousarray(value).tobytes()).hexdigest()])
    if isinstance(value, Image):
        return _digest([value.mode, value.size, sha256(value.tobytes()).hexdigest()])
    if isinstance(value, Path | enum.Enum):
        return str(value)
    return None


def _unwrap(value: Any) -> Any:
    """The function of a static method, class method or property."""
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, functools.cached_property):
        return value.func
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _installed(module: str | None) -> bool:
    """Whether a module is Python's own or an installed package's, or this library's."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == "dit_lens":
        return top != "__main__"
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return any(folder in Path(file).parts for folder in _INSTALLED)


def _name(value: Callable[..., Any] | type) -> str:
    if isinstance(value, functools.partial):
        return _name(value.func)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__name__)
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if module and _installed(module) else name


def _digest(value: Any) -> str:
    return digest(repr(value).encode())
