"""The plan, carried out inside one nnsight trace.

Torch and plain data only: this module and ``reduce`` travel to a server by source.

A program is a dict of plain data::

    denoiser   path of the transformer in the model      branches   their names, in the order of calls within a step
    rows       pictures per call                         grid_rule  how image tokens are found in a call's arguments
    grid       [h, w] where it is known beforehand       calls      for every transformer call, a list of visits
    visit      [module, side, [part, ...]]               part       {slot, position, tokens, site, actions}
    action     {op, kind, rows, tokens, channels, ...}; an absent or None selection means all

Edits replace a module's value by a changed copy and never write into the live tensor.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_lens.reduce import reduce_tokens


class PlanMismatchError(RuntimeError):
    """The pipeline did something else than the plan expects."""


def execute(model: Any, tracer: Any, program: dict[str, Any], given: dict[str, Any], store: dict[str, Any]) -> None:
    """Carries out ``program``; ``store`` receives reads, what was touched, the clock and the grid."""
    branches, indices = program["branches"], {}
    for call in tracer.iter[: len(program["calls"])]:
        arguments = model.get(program["denoiser"]).inputs
        step, branch = divmod(call, len(branches))
        moment = observe(arguments, program, store["clock"], step, branches[branch])
        start, count, grid = image_tokens(arguments, program)
        store["grid"][:] = grid
        for module, side, parts in program["calls"][call]:
            envoy = model.get(module)
            value = envoy.output if side == "output" else envoy.inputs
            changed = value
            for part in parts:
                tensor = fetch(changed, side, part)
                edited = work(tensor, part, (start, count), moment, program, given, store, indices)
                if edited is not None:
                    changed = replaced(changed, side, part, edited)
            if changed is not value:
                if side == "output":
                    envoy.output = changed
                else:
                    envoy.inputs = changed


def observe(
    arguments: tuple[tuple, dict], program: dict[str, Any], clock: list[tuple], step: int, branch: str
) -> SimpleNamespace:
    """Notes the time of a call, and fails when it is not the call the plan expects."""
    value = named(arguments, "timestep", None)
    timestep = float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
    if clock:
        last_step, _, last = clock[-1]
        exact = not isinstance(value, Tensor) or value.dtype in (torch.float32, torch.float64)
        if (last_step == step and last != timestep) or (last_step != step and last == timestep and exact):
            raise PlanMismatchError(
                f"the plan expects call {len(clock)} to be step {step} ({branch}), but its timestep {timestep:.6g} "
                f"follows {last:.6g}: the pipeline makes another number of transformer calls per step than "
                f"{len(program['branches'])}"
            )
    clock.append((step, branch, timestep))
    return SimpleNamespace(step=step, branch=branch, timestep=timestep, sigma=timestep)


def image_tokens(arguments: tuple[tuple, dict], program: dict[str, Any]) -> tuple[int, int, tuple[int, int]]:
    """First image token, their number, and the grid (h, w), from the arguments of one transformer call."""
    if program["grid_rule"] == "img_ids":  # rows (reference, y, x); reference tokens have a first entry other than 0
        ids = named(arguments, "img_ids", None)
        ids = ids[0] if ids.ndim == 3 else ids
        target = ids[ids[:, 0] == 0]
        h, w = (int(extent) + 1 for extent in target[:, 1:3].amax(0))
        start, count = 0, target.shape[0]
    else:
        raise PlanMismatchError(f"unknown grid rule {program['grid_rule']!r}")
    if program["grid"] is not None and [h, w] != list(program["grid"]):
        raise PlanMismatchError(
            f"the plan expects a grid of {program['grid'][0]} x {program['grid'][1]} image tokens, but the pipeline "
            f"made {h} x {w}"
        )
    return start, count, (h, w)


def named(arguments: tuple[tuple, dict], name: str, position: Any) -> Any:
    """An argument of a call by name, or by position where it was passed so."""
    args, kwargs = arguments
    return kwargs[name] if name in kwargs else args[position]


def fetch(value: Any, side: str, part: dict[str, Any]) -> Any:
    """The tensor of one part, out of a module's input or output."""
    if side == "input":
        return named(value, part["slot"], part["position"])
    return value if part["slot"] is None else value[part["slot"]]


def replaced(value: Any, side: str, part: dict[str, Any], tensor: Tensor) -> Any:
    """A copy of a module's input or output with one tensor exchanged."""
    if side == "input":
        args, kwargs = value
        if part["slot"] in kwargs:
            return args, {**kwargs, part["slot"]: tensor}
        return (*args[: part["position"]], tensor, *args[part["position"] + 1 :]), kwargs
    if part["slot"] is None:
        return tensor
    return (*value[: part["slot"]], tensor, *value[part["slot"] + 1 :])


def work(
    tensor: Tensor,
    part: dict[str, Any],
    image: tuple[int, int],
    moment: SimpleNamespace,
    program: dict[str, Any],
    given: dict[str, Any],
    store: dict[str, Any],
    indices: dict,
) -> Tensor | None:
    """Runs a part's actions in order; returns the edited tensor, or None when it was only read."""
    if tensor.shape[0] != program["rows"]:
        raise PlanMismatchError(
            f"the plan expects {program['rows']} rows at {part['site']}, but the call has {tensor.shape[0]}"
        )
    edited = None
    for action in part["actions"]:
        if edited is None and action["kind"] != "Read":
            edited = tensor.clone()
        current = tensor if edited is None else edited
        stream = current.narrow(1, *image) if part["tokens"] == "image" else current
        if action["kind"] == "Read":
            key = (action["op"], part["site"], moment.step, moment.branch, action["group"])
            store["reads"][key] = read(stream, action, indices)
        else:
            hook = SimpleNamespace(name=part["site"], **vars(moment))
            store["touched"].append(edit(stream, action, hook, given, indices))
    return edited


def read(stream: Tensor, action: dict[str, Any], indices: dict) -> Tensor:
    """The chosen elements, reduced where they are, in main memory."""
    chosen = stream[index(stream, action["rows"], action["tokens"], action["channels"], indices)].detach()
    if action["reduce"] is not None:
        return reduce_tokens(chosen, action["reduce"]).cpu()
    return chosen.to("cpu", copy=True)


def edit(stream: Tensor, action: dict[str, Any], hook: SimpleNamespace, given: dict[str, Any], indices: dict) -> tuple:
    """Changes the chosen elements of ``stream`` (a view of the copy) and says what was touched."""
    where = index(stream, action["rows"], action["tokens"], action["channels"], indices)
    old = stream[where]
    new = new_values(old, stream, action, hook, given, indices)
    before = torch.linalg.vector_norm(old, dtype=torch.float32)
    if new is not None:
        if action.get("strength", 1.0) != 1.0:
            new = torch.lerp(old, new, action["strength"])
        stream[where] = new
        old = new
    after = torch.linalg.vector_norm(old, dtype=torch.float32)
    return (action["op"], hook.name, hook.step, hook.branch, tuple(old.shape), action["group"], before, after)


def new_values(
    old: Tensor, stream: Tensor, action: dict[str, Any], hook: SimpleNamespace, given: dict[str, Any], indices: dict
) -> Tensor | None:
    """What an action makes of the elements it chose; None leaves them as they are."""
    kind = action["kind"]
    if kind == "Zero":
        return torch.zeros_like(old)
    if kind == "Scale":
        return old * action["factor"]
    if kind == "Add":
        return old + given[action["key"]].to(old)
    if kind == "Put":
        return put(old, action, given[action["key"]])
    if kind == "CopyRow":
        return copy_row(old, stream, action, indices)
    if kind == "TokenMean":
        return token_mean(old, action["keep"])
    if kind == "Apply":
        return apply(old, given[action["key"]], hook)
    raise PlanMismatchError(f"unknown edit {kind!r}")


def put(old: Tensor, action: dict[str, Any], source: Tensor) -> Tensor:
    """Elements of a given tensor [step, row, token, channel], whose axes of size 1 stand for all."""
    source = source[min(action["at"], source.shape[0] - 1)]
    source = source if source.shape[0] == 1 else source[action["source_rows"]]
    return source.to(old).expand_as(old)


def copy_row(old: Tensor, stream: Tensor, action: dict[str, Any], indices: dict) -> Tensor:
    """The same tokens and channels of another row of the batch."""
    where = index(stream, action["source_rows"], action["tokens"], action["channels"], indices)
    return stream[where].expand_as(old).clone()


def token_mean(old: Tensor, keep: str) -> Tensor:
    """Each channel's mean over the chosen tokens, or what is left without it."""
    mean = old.mean(1, keepdim=True, dtype=torch.float32).to(old.dtype)
    return mean.expand_as(old) if keep == "mean" else old - mean


def apply(old: Tensor, fn: Any, hook: SimpleNamespace) -> Tensor | None:
    """What a function of the user's makes of a copy."""
    new = fn(old.clone(), hook)
    if new is None:
        return None
    if tuple(new.shape) != tuple(old.shape):
        raise PlanMismatchError(
            f"the function applied at {hook.name} returned shape {list(new.shape)} for {list(old.shape)}"
        )
    return new.to(old)


def index(
    x: Tensor, rows: list[int] | None, tokens: list[int] | None, channels: list[int] | None, indices: dict
) -> tuple:
    """An outer index over [row, token, channel]; None means all of an axis. Index tensors are made once per device."""
    lists = [rows, tokens, channels]
    if sum(chosen is not None for chosen in lists) <= 1:
        return tuple(slice(None) if chosen is None else on_device(chosen, x, indices) for chosen in lists)
    whole = [range(size) if chosen is None else chosen for chosen, size in zip(lists, x.shape, strict=True)]
    r, t, c = (on_device(chosen, x, indices) for chosen in whole)
    return r[:, None, None], t[None, :, None], c[None, None, :]


def on_device(chosen: list[int] | range, x: Tensor, indices: dict) -> Tensor:
    """Chosen indices as a tensor on the device of ``x``."""
    key = (chosen if isinstance(chosen, range) else id(chosen), x.device)
    if key not in indices:
        indices[key] = torch.as_tensor(list(chosen), dtype=torch.long, device=x.device)
    return indices[key]
