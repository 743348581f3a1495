"""Carries out tasks that clients name, with this library's own functions on a lens of the server's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map_only

from dit_lens.core.execution import identity  # noqa: F401 its task
from dit_lens.core.execution.at_weights import TASKS, describe_release
from dit_lens.core.runs.provenance import fingerprint
from dit_lens.errors import ExecutionError, nearest
from dit_lens.lens import DiTLens
from dit_lens.studies.shared import server_cells  # noqa: F401 its task

_LENSES: WeakKeyDictionary[Any, DiTLens] = WeakKeyDictionary()


def describe_server(pipe: Any) -> dict[str, Any]:
    """What a lens is told of a server: that it has this library, and which weights it holds."""
    return {
        **describe_release(),
        "weights": fingerprint(pipe.transformer),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def carry_out(model: Any, task: str, asked: Mapping[str, Any]) -> Any:
    """What a task returns, in main memory and without any graph.

    model: nnsight's, of the server.
    task: its name.
    asked: "defaults" and "vocabulary" of the client's lens, "args" and "kwargs" of the task, "code" of its release.
    """
    if asked.get("code", code := describe_release()["code"]) != code:
        raise ExecutionError(f"this server has another dit_lens than the one that sent {task}. Send it again.")
    if task not in TASKS:
        raise ExecutionError(f"there is no task {task!r}.{nearest(task, TASKS)}")
    pipe = model.pipeline
    if pipe not in _LENSES:
        _LENSES[pipe] = DiTLens(pipe)
    lens = copy.copy(_LENSES[pipe])
    lens.defaults, lens.vocabulary = dict(asked["defaults"]), asked["vocabulary"]
    device = pipe._execution_device  # noqa: SLF001 diffusers offers no public way
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (asked["args"], asked["kwargs"]))
    found = TASKS[task](lens, *args, **kwargs)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), found)
