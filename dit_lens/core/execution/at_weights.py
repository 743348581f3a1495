"""What has to be done where the weights are: on this machine, or on a server that has this library (dit-lens serve).

A task is a function of a lens. On a lens whose model is here it is called. On one whose model is on a server, its name
and arguments go there, where the name is looked up among the tasks that are known, and the function is called with the
server's own lens on its own pipeline.

A probe stands around one run, where the run is made, and finds something there. It can be made again from its
arguments. So it goes to a server as its name and arguments, and what it found comes back.

What travels is plain data, tensors, images and functions of the user's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from dit_lens.errors import ExecutionError, nearest

METHOD = "method of the probe"  # in place of a method of a probe, which does not travel by itself

TASKS: dict[str, Callable[..., Any]] = {}
PROBES: dict[str, type[Probe]] = {}

Given = ParamSpec("Given")
Returned = TypeVar("Returned")
Lens = TypeVar("Lens", bound=Any)


@functools.cache
def describe_release() -> dict[str, str]:
    """This library's version, and a digest of its code: names mean the same where both are the same."""
    root, code = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return {"dit_lens": version("dit-lens"), "code": code.hexdigest()[:16]}


def at_weights(task: Callable[Concatenate[Lens, Given], Returned]) -> Callable[Concatenate[Lens, Given], Returned]:
    """Makes a function of a lens a task: it is carried out where the lens's model is.

    Its arguments and what it returns are plain data, tensors and images.
    """
    name: str = getattr(task, "__name__", "")
    TASKS[name] = task

    @functools.wraps(task)
    def carry_out(lens: Lens, /, *args: Given.args, **kwargs: Given.kwargs) -> Returned:
        if lens.engine.server is None:
            return task(lens, *args, **kwargs)
        return lens.engine.carry_out(name, lens, {"args": args, "kwargs": kwargs})

    return carry_out


class Probe:
    """Stands around one run where it is made. Subclasses are dataclasses.

    Their fields are arguments, plain data and functions of the user's; those with ``init=False`` are what is found.
    Their methods can be given to ``Apply``.
    """

    plans: ClassVar[bool] = False  # whether it stands around the planning of the run as well, which is done here

    def __init_subclass__(cls) -> None:
        PROBES[cls.__name__] = cls

    @contextmanager
    def around(self, engine: Any) -> Generator[None]:  # noqa: ARG002 for subclasses
        """What is changed and followed while the run is made. engine: the :class:`Engine` that makes it."""
        yield

    def finish(self, output: Any) -> None:
        """Called after the run. output: what the pipeline returned."""

    def arguments(self) -> dict[str, Any]:
        """What it can be made again from."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}  # ty: ignore[invalid-argument-type]

    def found(self) -> dict[str, Any]:
        """What it found."""
        return {field.name: getattr(self, field.name) for field in fields(self) if not field.init}  # ty: ignore[invalid-argument-type]

    def take(self, found: Mapping[str, Any]) -> None:
        """Receives what its twin on a server found."""
        for name, value in found.items():
            setattr(self, name, value)


def name_methods(probe: Probe, payload: Mapping[str, Any]) -> dict[str, Any]:
    """A payload in which the names of a probe's methods stand for them."""
    return {
        key: {METHOD: value.__func__.__name__} if getattr(value, "__self__", None) is probe else value
        for key, value in payload.items()
    }


def make_run(
    lens: Any,
    probe: tuple[str, dict[str, Any]] | None,
    program: Any,
    payload: dict[str, Any],
    call: dict[str, Any],
) -> dict[str, Any]:
    """Makes a run: what was stored, what the pipeline drew, and what a probe found.

    probe: the name and arguments of the probe it is made within.
    program, payload, call: as of :meth:`Engine.generate`; names of methods stand for those of the probe.
    """
    from dit_lens.core.execution.assemble import output_images

    if probe is None:
        store, output = lens.engine.generate(program, payload, call, {})
        return {"store": store, "results": [(output_images(output),)]}
    name, arguments = probe
    if name not in PROBES:
        raise ExecutionError(f"there is no probe {name!r}.{nearest(name, PROBES)}")
    made = PROBES[name](**arguments)
    given = {
        key: getattr(made, value[METHOD]) if isinstance(value, dict) and METHOD in value else value
        for key, value in payload.items()
    }
    with lens.engine.within(made):
        store, output = lens.engine.generate(program, given, call, {})
    return {"store": store, "results": [(output_images(output),)], "found": made.found()}


TASKS["make_run"] = make_run
