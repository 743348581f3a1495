"""Names of the previous release, kept for one more: using one works, and warns of the name it has now."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

PUBLIC = {"Tap": "PointSpec", "views": "explorer_reads"}  # of dit_lens itself
# module of the previous release -> where it is; those that users import by a short name today are in dit_lens/__init__
OLD_MODULES = {
    "attention": "instruments.attention_patterns",
    "cli": "commands.cli",
    "decode": "instruments.latents",
    "demo": "commands.demo",
    "doctor": "commands.doctor",
    "encode": "instruments.text_embeddings",
    "gradients": "instruments.gradients",
    "page": "commands.page",
    "recommendation": "instruments.recommend",
    "run": "core.runs.run",
    "store": "core.runs.files",
    "x0": "instruments.x0_lens",
}


class OldName:
    """An attribute under its old name.

    new: the name it has now.
    """

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn_of_old_name(self.old, self.new, stacklevel=3)
        return getattr(instance, self.new)


def find_old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names have changed.

    module: its ``__name__``.
    names: old name -> new name, with the module in front if it is in another one.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        owner, _, new = names[name].rpartition(".")
        warn_of_old_name(f"{module}.{name}", f"{owner or module}.{new}", stacklevel=3)
        return getattr(importlib.import_module(owner or module), new)

    return find


def renamed_keywords(**names: str) -> Callable[[Function], Function]:
    """Lets a function take keywords under their old names: ``@renamed_keywords(pictures="images")``."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            renamed = {}
            for old in names.keys() & given.keys():
                warn_of_old_name(f"the keyword {old}=", f"{names[old]}=", stacklevel=3)
                renamed[names[old]] = given.pop(old)
            return function(*args, **renamed, **given)

        return call  # ty: ignore[invalid-explicit-return]

    return decorate


def retired_keywords(*names: str) -> Callable[[Function], Function]:
    """Lets a function take keywords that decide nothing any more; they are said to be without effect."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in [name for name in names if name in given]:
                given.pop(name)
                warnings.warn(
                    f"the keyword {name}= decides nothing any more; it goes with the next release.",
                    FutureWarning,
                    stacklevel=2,
                )
            return function(*args, **given)

        return call  # ty: ignore[invalid-explicit-return]

    return decorate


def warn_of_old_name(old: str, new: str, stacklevel: int = 2) -> None:
    """Says how something is called now."""
    warnings.warn(f"{old} is called {new} now; the old name goes with the next release.", FutureWarning, stacklevel)
