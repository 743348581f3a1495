"""What code finds by its name when it runs, beside what a class defines: functions of modules, and modes of torch.

A kernel of attention is put in the place of ``torch.nn.functional.scaled_dot_product_attention``, or of the function
that a model's file imported; no class changes by that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dit_lens.core.runs.values import PLAIN, is_installed, is_own, refers_to

TORCH = ("torch", "torch.nn.functional")
# Where functions are looked up by names of backends: module, object in it, its mapping.
REGISTRIES = (
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry", "_backends"),
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", "_global_mapping"),
)


def find_named(kinds: Iterable[type], *, portable: bool) -> dict[str, Any]:
    """What the methods of classes find by name in packages, in torch, and in what is active around them.

    kinds: the classes.
    portable: only what may be a user's, and is there in every process: functions and classes.
    """
    kinds = list(kinds)
    found = {f"{name}.{key}": value for name in _modules_of(kinds) for key, value in _named_in(name, portable)}
    for module, registry, mapping in REGISTRIES:
        entries = getattr(getattr(sys.modules.get(module), registry, None), mapping, {})
        found |= {f"{module}.{registry}[{key}]": value for key, value in entries.items()}
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    own = [
        mode for mode in modes if type(mode).__module__.partition(".")[0] != "torch"
    ]  # torch's set a device, or look
    return found | {f"mode of torch {i}, a {type(mode).__name__}": mode for i, mode in enumerate(own)}


def find_referred(functions: dict[str, Any]) -> dict[str, Any]:
    """What a user's own functions refer to: what can be called, and plain values; for comparisons in a process."""
    found = {}
    for name, function in functions.items():
        inner = getattr(function, "__func__", function)
        if isinstance(inner, FunctionType) and is_own(inner):
            found |= {f"{key} of {name}": value for key, value in refers_to(inner).items() if _is_named(value)}
    return found


def _modules_of(kinds: list[type]) -> list[str]:
    """The modules of packages in which classes are written, those whose functions they import, and torch's."""
    written = dict.fromkeys(kind.__module__ for kind in kinds if is_installed(kind.__module__))
    packages = {name.partition(".")[0] for name in written} - {"torch", *sys.stdlib_module_names}
    imported = {
        value.__module__: None
        for name in written
        for value in vars(sys.modules[name]).values()
        if isinstance(value, FunctionType) and (value.__module__ or "").partition(".")[0] in packages
    }
    return [name for name in {**written, **imported, **dict.fromkeys(TORCH)} if name in sys.modules]


def _named_in(module: str, portable: bool) -> Iterator[tuple[str, Any]]:
    for key, value in vars(sys.modules[module]).items():
        if not key.startswith("__") and _is_named(value) and (not portable or _may_be_own(value)):
            yield key, value


def _is_named(value: Any) -> bool:
    return callable(value) or isinstance(value, PLAIN)


def _may_be_own(value: Any) -> bool:
    """Whether something in a module of a package may be of another origin, which whoever reads functions decides."""
    if isinstance(value, FunctionType | MethodType):
        return True
    return (
        callable(value)
        and not isinstance(value, BuiltinFunctionType)
        and not is_installed((value if isinstance(value, type) else type(value)).__module__)
    )
