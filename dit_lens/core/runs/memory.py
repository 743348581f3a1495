"""What functions and objects of a user write themselves as they run: a memory of their own, not a choice of the caller.

A judge that keeps scores it has computed, or loads its model when it is first called, is the same judge afterwards.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

FILLING = {"append", "add", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
MAKING = ("__init__", "__new__", "__post_init__", "__setstate__")  # methods that set what was chosen


def list_filled(function: FunctionType) -> set[str]:
    """What a function writes of what it refers to, by the names of ``refers_to``.

    Global and outer names that it assigns, containers under such names or in a default that it fills, and attributes of
    its own. Without its source, as of a function made by ``exec``, only names that it assigns are known.

    >>> exec("def judge(image): global model; model = 1", space := {})
    >>> list_filled(space["judge"])
    {'model'}
    """
    code = function.__code__
    found = set(_list_assigned(code, code)) | {path[0] for path in _list_changed(code) if len(path) == 1}
    found |= {f".{path[1]}" for path in _list_changed(code) if len(path) > 1 and path[0] == function.__name__}
    given = code.co_varnames[: code.co_argcount]
    defaults = given[len(given) - len(function.__defaults__ or ()) :]
    found |= {f"default {i}" for i, name in enumerate(defaults) if name in found}
    return found | {f"default {name}" for name in function.__kwdefaults__ or () if name in found}


def list_kept(kinds: Iterable[type], called: Iterable[str] = ()) -> set[str]:
    """The attributes that an object writes of itself as it is called; those that only a setter writes are a choice.

    kinds: its class and parents, as far as a user wrote them.
    called: names of methods that are called beside ``__call__`` and ``forward``.
    """
    codes, found = defaultdict(list), set()
    for kind in kinds:
        for name, value in vars(kind).items():
            inner = value.func if isinstance(value, functools.cached_property) else getattr(value, "fget", value)
            if isinstance(inner, FunctionType) and name not in MAKING:
                codes[name].append(inspect.unwrap(inner).__code__)
            if isinstance(value, functools.cached_property):
                found.add(name)
    waiting, reached = {"__call__", "forward", *called}, set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for code in codes.get(name, ()):
            waiting |= set(code.co_names) - reached
            found |= {path[1] for path in _list_changed(code) if len(path) > 1 and path[0] in code.co_varnames[:1]}
    return found


def _list_assigned(code: CodeType, outer: CodeType) -> Iterator[str]:
    """Global names, and names from around ``outer``, that code assigns."""
    for step in dis.get_instructions(code):
        if step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and step.argval in outer.co_freevars):
            yield step.argval
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _list_assigned(one, outer)


@functools.cache
def _list_changed(code: CodeType) -> frozenset[tuple[str, ...]]:
    """Containers that code fills, as (name,) or (name, attribute), and attributes that it assigns."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError):
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            path = _path(node)
            found.add(path if isinstance(node, ast.Subscript) or len(path) > 1 else ())
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLING:
            found.add(_path(node.func.value))
    return frozenset(found - {()})


def _path(node: ast.expr) -> tuple[str, ...]:
    """The name, and its first attribute, that an expression begins with; empty where it begins otherwise."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        node = node.value
    return (node.id, *names[::-1][:1]) if isinstance(node, ast.Name) else ()
