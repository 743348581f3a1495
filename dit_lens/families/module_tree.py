"""Modules of a live transformer by their paths: their arguments, and how wide they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dit_lens.errors import FamilyError, nearest, show

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import nn


def look_up(module: nn.Module, name: str) -> Any:
    """An attribute that hardly any module has, or None: torch takes long to say that there is none.

    >>> from torch import nn
    >>> look_up(nn.Sequential(nn.ReLU()), "0"), look_up(nn.ReLU(), "training"), look_up(nn.ReLU(), "processor")
    (ReLU(), True, None)
    """
    own = vars(module)
    there = name in own or name in own["_modules"] or name in own["_buffers"] or name in own["_parameters"]
    return getattr(module, name, None) if there or hasattr(type(module), name) else None


@lru_cache(1024)  # every site asks, and Python takes long to tell
def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a function, whose wrappers are looked through.

    >>> list(parameters_of(look_up))
    ['module', 'name']
    """
    return inspect.signature(function).parameters


class ModuleTree:
    """The modules of a transformer; FamilyError, with the name of the family, for what does not exist."""

    def __init__(self, transformer: ModelMixin, family: str):
        self.transformer, self.family = transformer, family

    def get(self, path: str) -> nn.Module:
        """The module at a path."""
        module = self.find(path)
        if module is None:
            parts = ", ".join(name for name, _ in self.transformer.named_children())
            raise FamilyError(
                f"{self.family}: {type(self.transformer).__name__} has no module {path!r}; it has {parts}."
            )
        return module

    def find(self, path: str) -> nn.Module | None:
        """The module at a path, through names and numbers in lists; None where there is none."""
        try:
            return self.transformer.get_submodule(path)
        except AttributeError:
            return None

    def find_parameter(self, path: str, asked: str | int) -> tuple[str, int | None]:
        """Name and position of an argument of a module's forward, whose wrappers are looked through.

        path: of the module.
        asked: the name or the position. A name that only ``**kwargs`` takes has no position.
        """
        parameters = list(parameters_of(type(self.get(path)).forward).values())[1:]
        names = [parameter.name for parameter in parameters]
        if isinstance(asked, int) and asked < len(names):
            return names[asked], asked
        if isinstance(asked, str) and asked in names:
            return asked, names.index(asked)
        if isinstance(asked, str) and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return asked, None
        raise FamilyError(
            f"{self.family}: {path or 'the transformer'} takes no argument {asked!r}; it takes {', '.join(names)}."
        )

    def measure(self, name: str) -> int:
        """A size from names joined by ``*``: attributes of the transformer, entries of its config, or numbers."""
        return math.prod(self._measure_one(part) for part in name.split("*"))

    def _measure_one(self, name: str) -> int:
        if name.isdecimal():
            return int(name)
        entry = name.removeprefix("config.")
        value = None if entry != name else vars(self.transformer).get(name)
        config = self.transformer.config
        value = read_entry(config, entry, self.family) if not isinstance(value, int | tuple | list) else value
        if value is None and entry == "out_channels":
            value = config["in_channels"]
        sizes = value if isinstance(value, tuple | list) else [value]
        if not all(isinstance(one, int) for one in sizes):
            raise FamilyError(f"{self.family}: {name!r} is to be a size, and is {show(value)} in this transformer.")
        return math.prod(sizes)


def read_entry(config: Mapping[str, Any], name: str, family: str) -> Any:
    """An entry of a transformer's config; FamilyError where a row names one that there is not."""
    if name not in config:
        raise FamilyError(f"{family}: the transformer's config has no entry {name!r}.{nearest(name, config)}")
    return config[name]


def class_names(value: Any) -> list[str]:
    """The names of a value's class and of all its parents, nearest first: a subclass is known by its parents' names.

    >>> class_names(True)
    ['bool', 'int', 'object']
    """
    return [base.__name__ for base in type(value).__mro__]


def count_heads(module: Any) -> int | None:
    """How many heads an attention says it has."""
    counts = (getattr(module, name, None) for name in ("heads", "num_heads"))
    return next((count for count in counts if isinstance(count, int)), None)


def measure_width(module: Any, side: str) -> int | None:
    """Channels that enter (side "input") or leave ("output") a module, where it says so."""
    names = ("in_features", "in_channels") if side == "input" else ("out_features", "out_channels")
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), None)
