"""Arguments of public calls, checked against their annotations before anything happens, and Python's own afterwards.

What can be meant works: integers, floats and truth values of numpy and torch wherever Python's do, arrays and one-shot
iterables wherever a list does.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dit_lens.arguments.functions import takes
from dit_lens.arguments.images import WORDS, to_image
from dit_lens.arguments.numbers import LARGEST, MOST, as_seed, list_entries, to_int, to_number
from dit_lens.arguments.paths import expand_user
from dit_lens.arguments.signatures import match_call, name_call
from dit_lens.errors import DitLensError, OpError, PromptError, StoreError, show

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

ERRORS: dict[str, type[DitLensError]] = {
    **dict.fromkeys(("prompt", "prompts", "seed", "seeds", "captions"), PromptError),
    **dict.fromkeys(("path", "folder", "out", "model"), StoreError),
}
CLASSES = [
    "Adapter",
    "Anatomy",
    "ChannelSet",
    "DataFrame",
    "DiTLens",
    "Dictionary",
    "DiffusionPipeline",
    "Engine",
    "Example",
    "Family",
    "Final",
    "Grid",
    "Guidance",
    "Latents",
    "Pipeline",
    "PointSpec",
    "Prediction",
    "Prompt",
    "Prompts",
    "Readout",
    "Receipt",
    "RemoteEngine",
    "Result",
    "Run",
    "RunningStats",
    "Session",
    "Setting",
    "Site",
    "Stack",
    "Thresholds",
    "Time",
    "Workers",
]
UNFIT = object()


@dataclass(frozen=True)
class Kind:
    """What an annotation asks for.

    name: in words, such as "a whole number".
    fit: value -> the value in Python's own form, or UNFIT.
    """

    name: str
    fit: Callable[[Any], Any]


def checked(function: F, but: Sequence[str] = ()) -> F:
    """A function whose arguments are checked against their annotations; a DitLensError names the one that is wrong.

    >>> import numpy as np
    >>> @checked
    ... def repeat(word: str, times: int = 2) -> str:
    ...     return word * times
    >>> repeat("ab", np.int64(3))
    'ababab'
    >>> repeat("ab", 1.5)
    Traceback (most recent call last):
    ...
    dit_lens.errors.OpError: repeat: times=1.5 cannot be used. Give a whole number.

    function: its annotations are strings, as ``from __future__ import annotations`` makes them; names that are not of
      this file's kinds are not checked.
    but: arguments that the function refuses itself, as it knows more of them; here they are only made Python's own.
    """
    signature = inspect.signature(function)
    kinds: dict[str, Kind | None] = {}  # by argument; read at the first call

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = bind(function, signature, args, kwargs)
        for name, value in given.arguments.items():
            if name not in kinds:
                kinds[name] = _kind_of(signature.parameters[name])
            kind = kinds[name]
            if kind is not None and value is not signature.parameters[name].default:
                given.arguments[name] = _fit(function, name, value, kind, refuse=name not in but)
        return function(*given.args, **given.kwargs)

    return call  # ty: ignore[invalid-explicit-return]


def bind(
    function: Callable[..., Any], signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Arguments by name, to be gone through as often as is needed: iterators, which are empty then, become lists.

    >>> def join(words, *more, by=" "):
    ...     return by.join(words)
    >>> bind(join, inspect.signature(join), (iter("ab"),), {}).arguments
    {'words': ['a', 'b']}

    function, signature: what is called, and what it takes.
    args, kwargs: what it was given.
    """
    given = match_call(function, signature, args, kwargs)
    for name, value in given.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.arguments[name] = {own: _list_iterator(own, one) for own, one in value.items()}
        elif signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            given.arguments[name] = tuple(_list_iterator(name, one) for one in value)
        else:
            given.arguments[name] = _list_iterator(name, value)
    return given


def checked_but(*names: str) -> Callable[[F], F]:
    """As :func:`checked`, but for some arguments, which the function refuses itself."""
    return functools.partial(checked, but=names)


def checked_fields(cls: C) -> C:
    """A dataclass whose fields are checked in the same way."""
    plain: Any = cls
    plain.__init__ = checked(plain.__init__)
    return cls


def _fit(function: Callable[..., Any], name: str, value: Any, kind: Kind, *, refuse: bool) -> Any:
    found = kind.fit(value)
    if found is UNFIT and not refuse:
        return value
    if found is UNFIT:
        where = name_call(function)
        raise ERRORS.get(name, OpError)(f"{where}: {name}={show(value)} cannot be used. Give {kind.name}.")
    return as_seed(found) if name == "seed" and isinstance(found, int) else found


def _list_iterator(name: str, value: Any) -> Any:
    found = list_entries(value) if isinstance(value, Iterator) else value
    if found is None and value is not None:
        raise ERRORS.get(name, OpError)(f"{name}= gives more than {MOST:,} values, or does not end. Give a list.")
    return found


def _kind_of(parameter: inspect.Parameter) -> Kind | None:
    """What a parameter takes; None where anything may be passed on."""
    annotation = parameter.annotation
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not isinstance(annotation, str):
        return None
    return _read(ast.parse(annotation, mode="eval").body)


def _read(node: ast.expr) -> Kind | None:
    """The kind that an annotation means; None for one that is not checked here."""
    if isinstance(node, ast.BinOp):
        left, right = _read(node.left), _read(node.right)
        return right if left is PLAIN["str"] and right is PLAIN["Path"] else _one_of(left, right)
    if isinstance(node, ast.Constant) and node.value is None:
        return Kind("None", lambda value: None if value is None else UNFIT)
    if isinstance(node, ast.Subscript):
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _read_generic(_last_name(node.value), inner)
    name = _last_name(node)
    if name in PLAIN:
        return PLAIN[name]
    if name in CLASSES:
        return Kind(f"a {name}", functools.partial(_fit_class, name))
    return None


def _read_generic(name: str, inner: list[ast.expr]) -> Kind | None:
    if name == "Literal":
        choices = [part.value for part in inner if isinstance(part, ast.Constant)]
        return Kind(
            "one of " + ", ".join(map(repr, choices)),
            lambda value: value if isinstance(value, str) and value in choices else UNFIT,
        )
    if name == "Callable":
        return _function_of(len(inner[0].elts)) if isinstance(inner[0], ast.List) else PLAIN["Callable"]
    if name == "tuple" and not any(isinstance(part, ast.Constant) and part.value is ... for part in inner):
        parts = [_read(part) for part in inner]
        named = ", ".join("anything" if part is None else part.name for part in parts)
        return Kind(f"({named})", functools.partial(_fit_tuple, parts))
    if name in ("Sequence", "Iterable", "list", "tuple", "set"):
        item = _read(inner[0])
        return Kind(
            "a list" if item is None else f"a list, each entry {item.name}", functools.partial(_fit_list, name, item)
        )
    if name in ("Mapping", "dict"):
        kinds = [_read(part) for part in inner]
        named = ["anything" if kind is None else kind.name for kind in kinds]
        return Kind(f"a mapping from {named[0]} to {named[1]}", functools.partial(_fit_mapping, *kinds))
    return None


def _function_of(count: int, values: str = "") -> Kind:
    """A function that can be called with so many values. values: what they are, in words."""
    named = values or f"{count} value{'s' * (count != 1)}"
    return Kind(f"a function of {named}", lambda value: value if callable(value) and takes(value, count) else UNFIT)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _one_of(one: Kind | None, other: Kind | None) -> Kind | None:
    if one is None or other is None:
        return None
    first, second = one.fit, other.fit

    def fit(value: Any) -> Any:
        found = first(value)
        return second(value) if found is UNFIT else found

    return Kind(f"{one.name} or {other.name}", fit)


def _fit_class(name: str, value: Any) -> Any:
    """By the name of a class: a check that imports nothing."""
    return value if any(name == kind.__name__ for kind in type(value).__mro__) else UNFIT


def _fit_int(value: Any) -> Any:
    found = to_int(value)
    return UNFIT if found is None or not -LARGEST <= found < LARGEST else found


def _fit_float(value: Any) -> Any:
    found = to_number(value)
    return UNFIT if found is None else found


def _fit_bool(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if getattr(value, "shape", None) == () and str(getattr(value, "dtype", "")).endswith("bool"):
        return bool(value)
    return bool(value) if isinstance(value, int) and value in (0, 1) else UNFIT


def _fit_str(value: Any) -> Any:
    return value if isinstance(value, str) else UNFIT


def _fit_path(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike):
        return UNFIT
    try:
        text = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):  # half a character has no bytes
        return UNFIT
    return expand_user(value) if text and b"\0" not in text else UNFIT


def _fit_tensor(value: Any) -> Any:
    """A tensor, also from an array or a list of numbers."""
    if isinstance(value, str | bytes | Mapping) or value is None:
        return UNFIT
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return UNFIT if value.is_meta or value.is_complex() else value.to_dense() if value.is_sparse else value
    try:
        array = np.asarray(value)
        return torch.as_tensor(array) if array.dtype.kind in "biuf" else UNFIT
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return UNFIT


def _fit_transfer(value: Any) -> Any:
    """By what it was made with."""
    settings = getattr(value, "settings", None)
    return value if isinstance(settings, Mapping) and {"k", "seeds", "strengths"} <= settings.keys() else UNFIT


def _fit_tuple(parts: Sequence[Kind | None], value: Any) -> Any:
    found = list_entries(value)
    if found is None or len(found) != len(parts):
        return UNFIT
    fitted = [_fit_entry(part, one) for part, one in zip(parts, found, strict=True)]
    return UNFIT if any(one is UNFIT for one in fitted) else tuple(fitted)


def _fit_list(kind: str, item: Kind | None, value: Any) -> Any:
    found = list_entries(value)
    if found is None:
        return UNFIT
    fitted = [_fit_entry(item, one) for one in found]
    if any(one is UNFIT for one in fitted):
        return UNFIT
    kept = tuple if kind == "tuple" else Sequence if kind == "Sequence" else Sequence | frozenset | set
    if isinstance(value, kept) and all(one is other for one, other in zip(found, fitted, strict=True)):
        return value
    return tuple(fitted) if kind == "tuple" or isinstance(value, tuple) else fitted


def _fit_mapping(names: Kind | None, items: Kind | None, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return UNFIT
    pairs = list(value.items())
    fitted = [(_fit_entry(names, name), _fit_entry(items, one)) for name, one in pairs]
    if any(name is UNFIT or one is UNFIT for name, one in fitted):
        return UNFIT
    same = all(name is key and one is item for (name, one), (key, item) in zip(fitted, pairs, strict=True))
    return value if same else dict(fitted)


def _fit_entry(kind: Kind | None, value: Any) -> Any:
    return value if kind is None else kind.fit(value)


TEXT = Kind("a string", _fit_str)
PLAIN = {
    "int": Kind("a whole number", _fit_int),
    "float": Kind("a finite number", _fit_float),
    "bool": Kind("True or False", _fit_bool),
    "str": TEXT,
    "Path": Kind("a path that a file can have", _fit_path),
    "Tensor": Kind("a tensor of real numbers", _fit_tensor),
    "TransferResult": Kind("the result of studies.transfer or transfer_image", _fit_transfer),
    "Image": Kind(WORDS, lambda value: UNFIT if (image := to_image(value)) is None else image),
    "type": Kind("a class", lambda value: value if isinstance(value, type) else UNFIT),
    **dict.fromkeys(("AblationKind", "ChannelsFrom", "How", "Over", "Through"), TEXT),
    "Attributes": _function_of(1, "a prompt"),
    "Judge": _function_of(2, "an image and a prompt"),
    "PairMetric": _function_of(3, "latents, and those of a source and of a target"),
    "Callable": Kind("a function", lambda value: value if callable(value) else UNFIT),
}
