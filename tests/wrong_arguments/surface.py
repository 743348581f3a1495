"""The public surface, found in the library itself: every function, class and method that a user can call."""

import inspect
import typing

import dit_lens as dl


def find_calls():
    """name -> what is called: functions, classes, and their public methods, under the names that users write."""
    found = {}
    for name in dl.__all__:
        value = getattr(dl, name)
        if not inspect.ismodule(value):
            _add(found, name, value)
            continue
        names = getattr(value, "__all__", None) or [
            own
            for own in vars(value)
            if not own.startswith("_") and getattr(getattr(value, own), "__module__", "") == value.__name__
        ]
        for own in names:
            _add(found, f"{name}.{own}", getattr(value, own))
    seen, kept = set(), {}
    for name, call in sorted(found.items(), key=lambda item: (item[0].count("."), item[0])):
        key = getattr(call, "__func__", call)
        if id(key) not in seen:
            seen.add(id(key))
            kept[name] = call
    return kept


def _add(found, name, value):
    if typing.get_origin(value) is not None or not callable(value):
        return
    if inspect.isclass(value) and issubclass(value, BaseException):
        return
    found[name] = value
    if not inspect.isclass(value):
        return
    for base in value.__mro__:
        if not base.__module__.startswith("dit_lens"):
            continue
        for own, member in vars(base).items():
            plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if (
                not own.startswith("_")
                and inspect.isfunction(plain)
                and plain.__module__ != "dit_lens.arguments.saving"  # which refuses whatever it is given
                and inspect.signature(plain).parameters.keys() - {"self", "cls"}
            ):
                found.setdefault(f"{name}.{own}", getattr(value, own))
