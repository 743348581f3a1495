"""The plan, carried out inside one nnsight trace.

Torch and plain data only: this module, ``layout`` and ``reduce`` travel to a server by source.

A program is a dict of plain data::

    denoiser   path of the transformer in the model      rows   images of one branch
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

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dit_lens.core.execution.edits import index, new_values
from dit_lens.core.request.reduce import reduce_tokens
from dit_lens.families.layout import (
    PlanMismatchError,
    argument,
    check_grid,
    find_image_tokens,
    from_tokens,
    pack,
    replace_tensor,
    select_stream,
    select_tensor,
    stream_tokens,
    to_tokens,
)
from dit_lens.families.tensors import apply_to_part, compute_gate, read_out


def execute(model: Any, tracer: Any, program: dict[str, Any], given: dict[str, Any], store: dict[str, Any]) -> None:
    """Carries out ``program``; ``store`` receives reads, what was touched, the clock and the grid."""
    indices: dict = {}
    for number in tracer.iter[: len(program["calls"])]:
        call = program["calls"][number]
        arguments = model.get(program["denoiser"]).inputs
        moment = read_clock(arguments, program, store["clock"], call)
        image = find_image_tokens(arguments, program["grid"])
        check_grid(image.grid, program["expected"])
        if number in program["replayed"]:
            model.get(program["denoiser"]).skip(replayed_answer(given["tape"][number], arguments))
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
            at_module(model.get(module), side, parts, now)
        if program["record"]:
            store["tape"].append(model.get(program["denoiser"]).output)


def replayed_answer(recorded: Any, arguments: tuple[tuple, dict]) -> Any:
    """A recorded answer where the call is made: a tape that came from a server lies in main memory."""
    device = next(value.device for value in tree_leaves(arguments) if isinstance(value, Tensor) and value.ndim > 1)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), recorded)


def at_module(envoy: Any, side: str, parts: list[dict[str, Any]], now: SimpleNamespace) -> None:
    """Does everything that is to be done at one input or output of one module."""
    value = envoy.output if side == "output" else envoy.inputs
    changed = value
    for part in parts:
        tensor = select_tensor(changed, side, part)
        if "keep" in part:
            now.gates[part["keep"]] = compute_gate(tensor, part, envoy)
        elif "hold" in part:
            now.held[part["hold"]] = stream_tokens(tensor, part, now.image)
        elif part["table"] is not None:
            keep_computed(compute_gate(tensor, part, envoy), part, now)
        elif "readout" in part:
            keep_computed(
                read_out(now.model, envoy, changed, part, now.held, now.image, now.program["readout"]), part, now
            )
        elif part["half"] is not None:
            apply_actions(apply_to_part(envoy, tensor, part), part, now)
        else:
            edited = apply_actions(tensor, part, now)
            changed = changed if edited is None else replace_tensor(changed, side, part, edited)
    if changed is not value:
        if side == "output":
            envoy.output = changed
        else:
            envoy.inputs = changed


def read_clock(
    arguments: tuple[tuple, dict], program: dict[str, Any], clock: list[tuple], call: dict[str, Any]
) -> SimpleNamespace:
    """Notes the time of a call, and fails when it is not the call the plan expects."""
    time = program["time"]
    value = argument(arguments, time["argument"], time["position"])
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


def apply_actions(value: Any, part: dict[str, Any], now: SimpleNamespace) -> Any | None:
    """Runs a part's actions in order; returns the edited value, or None when it was only read."""
    tensor = to_tokens(value, part)
    check_rows(tensor, part, now)
    edited, gate = None, now.gates.get(part["gate"])
    for action in part["actions"]:
        if edited is None and action["kind"] != "Read":
            edited = tensor.clone()
        current = tensor if edited is None else edited
        block = branch_rows(action, now)
        whole, place = select_stream(current, part, now.image, block)
        check_tokens(whole, action, part)
        stream = whole if part["span"] is None else whole[..., part["span"][0] : part["span"][1]]
        factor = None if gate is None else select_stream(gate.expand_as(current), part, now.image, block)[0]
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
            store_read(predict_x0(stream, now, block), action, part, now)
        else:
            store_read(stream if factor is None else stream * factor, action, part, now)
    return None if edited is None else from_tokens(edited, value, part)


def keep_computed(computed: Tensor, part: dict[str, Any], now: SimpleNamespace) -> None:
    """Keeps what is computed on the way and cannot be written: modulations from tables, and the x0 of a block."""
    check_rows(computed, part, now)
    for action in part["actions"]:
        block = branch_rows(action, now)
        stream = computed[block.start : block.stop]
        store_read(predict_x0(stream, now, block) if "readout" in part else stream, action, part, now)


def check_tokens(stream: Tensor, action: dict[str, Any], part: dict[str, Any]) -> None:
    """Fails where a token is asked for that only the run could tell not to exist."""
    highest = action["highest"]
    if highest is not None and highest >= stream.shape[1]:
        raise PlanMismatchError(
            f"token {highest} does not exist at {part['site']}, which has {stream.shape[1]}, 0 to {stream.shape[1] - 1}"
        )


def store_read(stream: Tensor, action: dict[str, Any], part: dict[str, Any], now: SimpleNamespace) -> None:
    """Stores what a read has chosen."""
    branch = now.moment.branches[action["block"]]
    key = (action["op"], part["site"], now.moment.step, branch, action["group"])
    now.store["reads"][key] = read(stream, action, now.indices)


def branch_rows(action: dict[str, Any], now: SimpleNamespace) -> range:
    """The rows of a call that belong to an action's branch."""
    rows = now.program["rows"]
    return range(action["block"] * rows, (action["block"] + 1) * rows)


def check_rows(tensor: Tensor, part: dict[str, Any], now: SimpleNamespace) -> None:
    """Fails where a call has other rows than the plan's images times its branches."""
    rows = now.program["rows"] * len(now.moment.branches)
    if tensor.shape[0] != rows:
        raise PlanMismatchError(f"the plan expects {rows} rows at {part['site']}, but the call has {tensor.shape[0]}")


def predict_x0(predicted: Tensor, now: SimpleNamespace, rows: range) -> Tensor:
    """The clean latents that a prediction means: x - sigma v of a flow, (x - sigma e) / sqrt(1 - sigma^2) of noise."""
    rule, time, sigma = now.program["grid"], now.program["time"], now.moment.sigma
    latents = pack(argument(now.arguments, rule["latents"], rule["latents_position"]), rule["axes"], rule["patch"])
    layout = {"layout": "text_first" if rule["rule"] == "marks" else "own", "stream": "img"}
    noisy = select_stream(latents, layout, now.image, rows)[0]
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
