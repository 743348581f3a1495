"""Values that JSON cannot hold, such as a judge, as texts: equal for equal values, in every process.

A function is what it does: its code, its defaults and attributes, and what it refers to, by value, but for what it
writes itself. What belongs to an installed package counts by its name. What code looks up as it runs, such as files, is
noted as not known.
"""

from __future__ import annotations

import dis
import enum
import functools
import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from dit_lens.core.runs.memory import list_filled, list_kept
from dit_lens.core.runs.provenance import digest

DEEPEST = 40  # references within references that are followed
MOST = 300_000  # values that are looked at
LONGEST = 40  # characters of a value that stands for itself
PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis), torch.dtype, torch.device)

# Where packages are installed; what lies elsewhere is the user's own.
_INSTALLED = ("site-packages", "dist-packages")
_FOLDERS = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[2]))  # Python's own files, and this library's

# Names in code that stand for something outside of it.
_OUTSIDE = {
    **dict.fromkeys(("open", "read_text", "read_bytes"), "files"),
    **dict.fromkeys(("environ", "getenv"), "variables of the process"),
    **dict.fromkeys(
        ("globals", "vars", "eval", "exec", "__import__", "import_module"), "names that are made as it runs"
    ),
}

Parts = dict[str, str]


class Reader:
    """Reads one value and all it refers to. ``unknown`` lists the types of what cannot be compared.

    describe: gives the state of a model as data, and None for any other value.
    """

    def __init__(self, describe: Callable[[Any, Reader], Any]) -> None:
        self.unknown: list[str] = []
        self._describe = describe
        self._models: dict[int, tuple[Any, str]] = {}  # those that were read: each is read once, as that takes a while
        self._names: set[str] = set()  # that the functions which are being read mention
        self._open: dict[int, int] = {}  # id of a value that is being read -> its depth; values inside refer to it
        self._count = 0

    def parts(self, value: Any) -> Parts:
        """Part -> fingerprint. Of a function: its code, its defaults, and what it refers to by name."""
        if isinstance(value, functools.partial):
            given = {f"argument {i}": one for i, one in enumerate(value.args)} | value.keywords
            return {**self.parts(value.func), **{name: self.read(one) for name, one in given.items()}}
        if isinstance(value, functools._lru_cache_wrapper):  # noqa: SLF001 what functools.cache makes
            return self.parts(value.__wrapped__)
        if isinstance(value, MethodType):
            self._names |= {value.__func__.__name__}
            return {**self.parts(value.__func__), "self": self.read(value.__self__)}
        if isinstance(value, FunctionType):
            self._open.setdefault(id(value), len(self._open))
            return {"function": _name(value), "code": self._code(value), **self._references(value)}
        return {"value": self.read(value)}

    def _references(self, function: FunctionType) -> Parts:
        """What a function refers to; of a user's own module, what the code mentions."""
        outer = self._names
        if is_own(function):
            mentioned = set(list_mentioned(function.__code__))
            self._names = outer | mentioned
            self.unknown += [f"{_OUTSIDE[name]}, by {name}" for name in sorted(mentioned & _OUTSIDE.keys())]
        try:
            filled = list_filled(function) if is_own(function) else set()
            inside = {name: self.read(one) for name, one in refers_to(function).items() if name not in filled}
            if is_own(function):
                inside |= {f"import {name}": self._import(name, function) for name in _imports(function.__code__)}
            return inside
        finally:
            self._names = outer

    def _import(self, name: str, function: FunctionType) -> str:
        """A module that a function imports, as it does when it is called."""
        try:
            package = function.__globals__.get("__package__") if name.startswith(".") else None
            return self.read(importlib.import_module(name, package))
        except Exception:  # noqa: BLE001 a module may fail in any way; the function will tell
            self.unknown.append(f"the module {name}")
            return name

    def _module(self, value: ModuleType) -> str:
        if is_installed(value.__name__):
            return value.__name__
        inside = {name: vars(value)[name] for name in sorted(self._names & vars(value).keys())}
        return f"{value.__name__} {_digest({name: self.read(one) for name, one in inside.items()})}"

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
            return self._module(value)
        if isinstance(value, FunctionType | MethodType | functools.partial | functools._lru_cache_wrapper):  # noqa: SLF001
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
        if id(value) in self._models:
            return self._models[id(value)][1]
        if (state := self._describe(value, self)) is not None:
            text = f"{kind} {_digest([self.read(type(value)), state])}"
            self._models[id(value)] = value, text
            return text
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
        kept = (*kept[:2], _without_kept(kept[2:3], type(value), self._names), *kept[3:])
        fields = [*kept[:3], *(list(more) if more is not None else None for more in kept[3:5])]
        return f"{type(value).__name__} {_digest([self.read(type(value)), *map(self.read, fields)])}"

    def _class(self, value: type) -> str:
        """A class by its name; a user's own by what is defined in it as well."""
        if is_installed(value.__module__):
            return _name(value)
        own = {name: one for name, one in vars(value).items() if not (name.startswith("__") and not callable(one))}
        inside = {name: self.read(_unwrap(one)) for name, one in own.items()}
        return f"{_name(value)} {_digest([[self.read(base) for base in value.__bases__], inside])}"

    def _code(self, function: FunctionType) -> str:
        if not is_own(function):
            return "of its package"
        version = ".".join(map(str, sys.version_info[:2]))
        return f"python{version} {_digest(self._instructions(function.__code__))}"

    def _instructions(self, code: CodeType) -> list[Any]:
        """What runs: the instructions with what they name, without lines and comments."""
        constants = [self._instructions(c) if isinstance(c, CodeType) else self.read(c) for c in code.co_consts]
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        return [code.co_code.hex(), constants, names, code.co_argcount, code.co_kwonlyargcount, code.co_flags]


def _without_kept(state: tuple[Any, ...], kind: type, called: set[str]) -> Any:
    """The state of an object without what the methods of a user's own class write as they are called."""
    found = state[0] if state else None
    own = [base for base in kind.__mro__ if not is_installed(base.__module__)]
    if not own or not isinstance(found, dict):
        return found
    left_out = list_kept(own, called)
    return {name: one for name, one in found.items() if name not in left_out}


def refers_to(function: FunctionType) -> dict[str, Any]:
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
    if is_own(function):
        found |= {f".{name}": value for name, value in vars(function).items()}
        known = function.__globals__
        found |= {name: known[name] for name in sorted(_global_names(function.__code__)) if name in known}
    return found


def _global_names(code: CodeType) -> set[str]:
    """The names that code, and the functions inside it, look up in their module."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_global_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def list_mentioned(code: CodeType) -> Iterator[str]:
    """Every name in code, and every text that may be one, as for ``getattr``."""
    yield from code.co_names
    yield from (one for one in code.co_consts if isinstance(one, str) and one.isidentifier())
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from list_mentioned(one)


def _imports(code: CodeType) -> Iterator[str]:
    """The modules that code imports, with the dots of relative ones."""
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            yield "." * steps[i - 2].argval + step.argval
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _imports(one)


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


def is_own(function: FunctionType) -> bool:
    """Whether a function is the user's own: written outside of packages, even where it bears the name of one's."""
    file = function.__code__.co_filename
    return not is_installed(function.__module__) or not (file.startswith("<") or in_packages(file))


@cache
def in_packages(file: str) -> bool:
    """Whether a file of code belongs to Python, an installed package or this library."""
    return file.startswith(_FOLDERS) or any(folder in Path(file).parts for folder in _INSTALLED)


@cache
def is_installed(module: str | None) -> bool:
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
    return f"{module}.{name}" if module and is_installed(module) else name


def _digest(value: Any) -> str:
    return digest(repr(value).encode())
