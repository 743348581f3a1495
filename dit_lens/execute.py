"""The plan, carried out inside one nnsight trace.

Torch and plain data only: this module, ``layout`` and ``reduce`` travel to a server by source.

A program is a dict of plain data::

    denoiser   path of the transformer in the model      rows   pictures of one branch
    time       {argument, position, offset, scale, levels, kind, sign}: a call's time, its noise, what is predicted
    grid       {rule, argument, position, latents ...}: how image tokens are found in a call's arguments
    expected   [h, w] where the grid is known beforehand
    record     whether the transformer's outputs are kept      replayed   the range of calls that given["tape"] answers
    calls      for every transformer call {step, branches, visits}; its rows are ``rows`` times its branches, in order
    visit      [module, side, [part, ...]]               part   {slot, position, stream, layout, ..., site, actions},
               or {slot, ..., keep}: a gate that a later part multiplies its tensor by
               or {slot, ..., hold}: tokens that a later part reads out
    action     {op, kind, block, rows, tokens, channels, ...}: block counts the branches of the call; None means all

Edits replace a module's value by a changed copy and never write into the live tensor.
"""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dit_lens.layout import (
    PlanMismatchError,
    check_grid,
    closed,
    fetch,
    image_tokens,
    named,
    opened,
    packed,
    regrouped,
    replaced,
    stream_of,
    tokens_of,
)
from dit_lens.reduce import reduce_tokens


def execute(model: Any, tracer: Any, program: dict[str, Any], given: dict[str, Any], store: dict[str, Any]) -> None:
    """Carries out ``program``; ``store`` receives reads, what was touched, the clock and the grid."""
    indices: dict = {}
    for number in tracer.iter[: len(program["calls"])]:
        call = program["calls"][number]
        arguments = model.get(program["denoiser"]).inputs
        moment = observe(arguments, program, store["clock"], call)
        image = image_tokens(arguments, program["grid"])
        check_grid(image.grid, program["expected"])
        if number in program["replayed"]:
            model.get(program["denoiser"]).skip(answer(given["tape"][number], arguments))
        store["grid"][:] = image.grid
        now = SimpleNamespace(
            model=model,
            program=program,
            given=given,
            store=store,
            indices=indices,
            arguments=arguments,
            moment=moment,
            image=image,
            gates={},
            held={},
        )
        for module, side, parts in call["visits"]:
            visit(model.get(module), side, parts, now)
        if program["record"]:
            store["tape"].append(model.get(program["denoiser"]).output)


def answer(recorded: Any, arguments: tuple[tuple, dict]) -> Any:
    """A recorded answer where the call is made: a tape that came from a server lies in main memory."""
    device = next(value.device for value in tree_leaves(arguments) if isinstance(value, Tensor) and value.ndim > 1)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), recorded)


def visit(envoy: Any, side: str, parts: list[dict[str, Any]], now: SimpleNamespace) -> None:
    """Does everything that is to be done at one input or output of one module."""
    value = envoy.output if side == "output" else envoy.inputs
    changed = value
    for part in parts:
        tensor = fetch(changed, side, part)
        if "keep" in part:
            now.gates[part["keep"]] = gate_of(tensor, part, envoy)
        elif "hold" in part:
            now.held[part["hold"]] = tokens_of(tensor, part, now.image)
        elif part["table"] is not None:
            derive(gate_of(tensor, part, envoy), part, now)
        elif "readout" in part:
            derive(read_out(now.model, envoy, changed, part, now.held, now.image, now.program["readout"]), part, now)
        elif part["half"] is not None:
            work(half_of(envoy, tensor, part), part, now)
        else:
            edited = work(tensor, part, now)
            changed = changed if edited is None else replaced(changed, side, part, edited)
    if changed is not value:
        if side == "output":
            envoy.output = changed
        else:
            envoy.inputs = changed


def observe(
    arguments: tuple[tuple, dict], program: dict[str, Any], clock: list[tuple], call: dict[str, Any]
) -> SimpleNamespace:
    """Notes the time of a call, and fails when it is not the call the plan expects."""
    time = program["time"]
    value = named(arguments, time["argument"], time["position"])
    timestep = float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
    step, branches = call["step"], call["branches"]
    if clock:
        last_step, _, last, _ = clock[-1]
        exact = not isinstance(value, Tensor) or value.dtype not in (torch.float16, torch.bfloat16)
        repeated = step in program["repeats"]
        if (last_step == step and last != timestep) or (
            last_step != step and last == timestep and exact and not repeated
        ):
            raise PlanMismatchError(
                f"the plan expects call {len(clock)} to be step {step} ({' and '.join(branches)}), but its time "
                f"{timestep:.6g} follows {last:.6g}: the pipeline makes another number of transformer calls per step "
                "than the plan"
            )
    levels = time["levels"]
    sigma = time["offset"] + time["scale"] * timestep if levels is None else levels[round(timestep)]
    clock.append((step, branches[0], timestep, sigma))
    return SimpleNamespace(step=step, branches=branches, timestep=timestep, sigma=sigma)


def gate_of(value: Tensor, part: dict[str, Any], module: Any) -> Tensor:
    """What a tensor is multiplied by before it is added to the residual: [row, 1 or token, channel]."""
    if part["table"] is not None:
        name, number = part["table"]
        table = getattr(module, name)
        table = table.reshape(-1, table.shape[-1])
        value = value.reshape(len(value), len(table), -1)[:, number : number + 1] + table[number]
    value = value.unsqueeze(1) if value.ndim == 2 else value
    if part["span"] is not None:
        value = value[..., part["span"][0] : part["span"][1]]
    return value.tanh() if part["tanh"] else value


def half_of(module: Any, tensor: Tensor, part: dict[str, Any]) -> Tensor:
    """What a linear module makes of some channels of its input alone; its bias counts with the last of them."""
    start, stop = part["half"]
    alone = torch.zeros_like(tensor)
    alone[..., start:stop] = tensor[..., start:stop]
    made = module(alone)
    return made if stop is None else made - module(torch.zeros_like(tensor[:1, :1]))


def work(value: Any, part: dict[str, Any], now: SimpleNamespace) -> Any | None:
    """Runs a part's actions in order; returns the edited value, or None when it was only read."""
    tensor = opened(value, part)
    check_rows(tensor, part, now)
    edited, gate = None, now.gates.get(part["gate"])
    for action in part["actions"]:
        if edited is None and action["kind"] != "Read":
            edited = tensor.clone()
        current = tensor if edited is None else edited
        block = block_of(action, now)
        whole, place = stream_of(current, part, now.image, block)
        check_tokens(whole, action, part)
        stream = whole if part["span"] is None else whole[..., part["span"][0] : part["span"][1]]
        factor = None if gate is None else stream_of(gate.expand_as(current), part, now.image, block)[0]
        if action["kind"] != "Read":
            hook = SimpleNamespace(
                name=part["site"],
                step=now.moment.step,
                timestep=now.moment.timestep,
                sigma=now.moment.sigma,
                branch=now.moment.branches[action["block"]],
            )
            now.store["touched"].append(edit(stream, action, hook, now.given, now.indices, factor))
            if place is not None:
                current[place] = whole
        elif part["x0"]:
            keep(clean(stream, now, block), action, part, now)
        else:
            keep(stream if factor is None else stream * factor, action, part, now)
    return None if edited is None else closed(edited, value, part)


def derive(computed: Tensor, part: dict[str, Any], now: SimpleNamespace) -> None:
    """Keeps what is computed on the way and cannot be written: modulations from tables, and the x0 of a block."""
    check_rows(computed, part, now)
    for action in part["actions"]:
        block = block_of(action, now)
        stream = computed[block.start : block.stop]
        keep(clean(stream, now, block) if "readout" in part else stream, action, part, now)


def check_tokens(stream: Tensor, action: dict[str, Any], part: dict[str, Any]) -> None:
    """Fails where a token is asked for that only the run could tell not to exist."""
    highest = action["highest"]
    if highest is not None and highest >= stream.shape[1]:
        raise PlanMismatchError(
            f"token {highest} does not exist at {part['site']}, which has {stream.shape[1]}, 0 to {stream.shape[1] - 1}"
        )


def keep(stream: Tensor, action: dict[str, Any], part: dict[str, Any], now: SimpleNamespace) -> None:
    """Stores what a read has chosen."""
    branch = now.moment.branches[action["block"]]
    key = (action["op"], part["site"], now.moment.step, branch, action["group"])
    now.store["reads"][key] = read(stream, action, now.indices)


def block_of(action: dict[str, Any], now: SimpleNamespace) -> range:
    """The rows of a call that belong to an action's branch."""
    rows = now.program["rows"]
    return range(action["block"] * rows, (action["block"] + 1) * rows)


def check_rows(tensor: Tensor, part: dict[str, Any], now: SimpleNamespace) -> None:
    """Fails where a call has other rows than the plan's pictures times its branches."""
    rows = now.program["rows"] * len(now.moment.branches)
    if tensor.shape[0] != rows:
        raise PlanMismatchError(f"the plan expects {rows} rows at {part['site']}, but the call has {tensor.shape[0]}")


def read_out(
    model: Any,
    envoy: Any,
    inputs: tuple[tuple, dict],
    part: dict[str, Any],
    held: dict[str, Tensor],
    image: SimpleNamespace,
    rule: dict[str, Any],
) -> Tensor:
    """What the model would predict if a block were its last: the final norm and projection of the block's tokens.

    Calling nnsight's envoys runs their modules outside the order of the trace.
    """
    entering = fetch(inputs, "input", part)
    tokens = opened(entering, part).clone()
    rows = range(len(tokens))
    target, place = stream_of(tokens, part, image, rows)
    if place is None:
        target.copy_(held[part["readout"]])
    else:
        tokens[place] = held[part["readout"]]
    args, kwargs = replaced(inputs, "input", part, closed(tokens, entering, part))
    x = envoy(*args, **kwargs)
    modules = [model.get(module) for module in rule["modules"]]
    if rule["told"]:
        x = modules.pop(0)(x, temb=held["shift"].squeeze(1))
    elif "shift" in held:
        shift, scale = shift_of(model, held["shift"], rule)
        x = (x * (1 + scale) + shift).to(held[part["readout"]].dtype)
    for module in modules:
        x = module(x)
    x = x if isinstance(x, Tensor) else x[0]
    if x.ndim != 3:  # a module that puts the picture together itself
        return packed(x, rule["axes"], rule["patch"])
    x = stream_of(x.transpose(0, 1) if part["turned"] else x, part, image, rows)[0]
    if rule["order"] == "yxc":
        x = regrouped(x, prod(rule["patch"]))
    return x


def shift_of(model: Any, value: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale that the transformer applies itself, [row, 1 or token, channel] each."""
    if rule["table"] is not None:
        table = getattr(model.get("transformer"), rule["table"])
        return (table.reshape(2, 1, 1, -1) + value).unbind(0)
    both = model.get(rule["projection"])(torch.nn.functional.silu(value))
    return both.chunk(2, dim=-1)


def clean(predicted: Tensor, now: SimpleNamespace, rows: range) -> Tensor:
    """The clean latents that a prediction means: x - sigma v of a flow, (x - sigma e) / sqrt(1 - sigma^2) of noise."""
    rule, time, sigma = now.program["grid"], now.program["time"], now.moment.sigma
    latents = packed(named(now.arguments, rule["latents"], rule["latents_position"]), rule["axes"], rule["patch"])
    layout = {"layout": "text_first" if rule["rule"] == "marks" else "own", "stream": "img"}
    noisy = stream_of(latents, layout, now.image, rows)[0]
    width = min(noisy.shape[-1], predicted.shape[-1])
    noisy, predicted = noisy[..., :width].float(), predicted[..., :width].float() * time["sign"]
    if time["kind"] == "flow":
        return noisy - sigma * predicted
    kept = (1 - sigma**2) ** 0.5
    if time["kind"] == "v_prediction":
        return kept * noisy - sigma * predicted
    return (noisy - sigma * predicted) / kept


def read(stream: Tensor, action: dict[str, Any], indices: dict) -> Tensor:
    """The chosen elements, reduced where they are, in main memory."""
    chosen = stream[index(stream, action["rows"], action["tokens"], action["channels"], indices)].detach()
    if action["reduce"] is not None:
        return reduce_tokens(chosen, action["reduce"]).cpu()
    return chosen.to("cpu", copy=True)


def edit(
    stream: Tensor,
    action: dict[str, Any],
    hook: SimpleNamespace,
    given: dict[str, Any],
    indices: dict,
    gate: Tensor | None,
) -> tuple:
    """Changes the chosen elements of ``stream`` (a view of the copy) and says what was touched, as gated."""
    where = index(stream, action["rows"], action["tokens"], action["channels"], indices)
    old = stream[where]
    new = new_values(old, stream, action, hook, given, indices)
    factor = 1.0 if gate is None else gate[where]
    before = torch.linalg.vector_norm(old.detach() * factor, dtype=torch.float32)
    if new is not None:
        if action.get("strength", 1.0) != 1.0:
            new = torch.lerp(old, new, action["strength"])
        stream[where] = new
        old = new
    after = torch.linalg.vector_norm(old.detach() * factor, dtype=torch.float32)
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
