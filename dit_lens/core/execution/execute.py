"""The program, carried out inside one nnsight trace.

Torch and plain data only: this module travels to a server by source, with what it uses of its neighbours.
Edits replace a module's value by a changed copy and never write into the live tensor.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dit_lens.core.execution.attending import Attending
from dit_lens.core.execution.clock import Clock, Moment
from dit_lens.core.execution.comparisons import check_recorded, check_rows, check_sizes, match_rows, sum_arguments
from dit_lens.core.request.dictionaries.encode import encode, find_level, place_parts
from dit_lens.core.request.ops import EDITS, Edit
from dit_lens.core.request.reduce import reduce_tokens
from dit_lens.families.layout import (
    ImageFinder,
    PlanMismatchError,
    argument,
    check_grid,
    check_text,
    check_whole,
    count_rows,
    find_text_masks,
    from_tokens,
    list_text_arguments,
    mask_text,
    pack,
    replace_tensor,
    select_stream,
    select_tensor,
    stream_tokens,
    to_tokens,
    write_back,
)
from dit_lens.families.levels import spread_level
from dit_lens.families.tensors import apply_to_part, compute_gate, put_back, read_out, take
from dit_lens.families.transfers import Transfers

if TYPE_CHECKING:
    from dit_lens.core.plan.program import Action, Forward, Part, Program, Store, Visit
    from dit_lens.families.locations import ImageTokens


class Hook:
    """Where and when an applied function is called: at which module, and for which rows of its tensors."""

    def __init__(self, name: str, moment: Moment, branch: str, module: Any, rows: list[int]):
        self.name, self.branch, self.module, self.rows = name, branch, module, rows
        self.step, self._moment = moment.step, moment

    @property
    def timestep(self) -> float:
        """As the transformer is given it."""
        return self._moment.timestep

    @property
    def sigma(self) -> float:
        """The noise level that it means."""
        return self._moment.sigma


class Context:
    """What is known during one forward pass.

    model: nnsight's, whose ``get(path)`` gives a module.
    program, payload, store: as in :func:`execute`.
    transfers: what goes between devices in this run.
    arguments: of the forward pass, (args, kwargs).
    moment: its step, branches and time.
    image: where its image tokens are.
    modes: modes of torch, which are left whatever happens.
    attending: that which waits for the call of attention in a module; None where none is entered.
    call: the arguments of the attention that was called last, where one was waited for.
    text: which of its text tokens take part in attention; None until that is asked for.
    gates: gates kept for later parts, by key.
    held: tokens kept for the readout or for a later edit, by site, and what shift and scale are made from, as "shift".
    """

    def __init__(
        self,
        model: Any,
        program: Program,
        payload: dict[str, Any],
        store: Store,
        transfers: Transfers,
        arguments: tuple[tuple, dict],
        moment: Moment,
        image: ImageTokens,
    ):
        self.model, self.program, self.payload, self.store = model, program, payload, store
        self.transfers, self.indices = transfers, transfers.indices
        self.arguments, self.moment, self.image = arguments, moment, image
        self.modes = ExitStack()
        self.attending: Attending | None = None
        self.call: dict[str, Any] = {}
        self.text: list[Tensor] | None = None
        self.gates: dict[str | None, Tensor] = {}
        self.held: dict[str, Tensor] = {}

    @property
    def rows(self) -> int:
        """Of the forward pass: images times branches."""
        return self.program["rows"] * len(self.moment.branches)


def execute(model: Any, tracer: Any, program: Program, payload: dict[str, Any], store: Store) -> None:
    """Carries out a program.

    model: nnsight's.
    tracer: of the open trace.
    program: what to do.
    payload: the tensors and functions it refers to by key.
    store: receives reads, what was touched, the clock and the grid.
    """
    denoiser, first, clock = program["denoiser"], {}, Clock(program, store["clock"])
    images = ImageFinder(program["grid"])
    transfers = Transfers(patient=type(store["reads"]) is not dict)  # files take values at once
    for number in tracer.iter[: len(program["forwards"])]:
        forward = program["forwards"][number]
        arguments = model.get(denoiser).inputs
        if number == 0:  # the pipeline has set its scheduler up
            clock.follow(model.pipeline.scheduler)
        moment = clock.note(arguments, forward)
        image = images.find(arguments)
        check_grid(image.grid, program["expected_grid"])
        if forward["visits"]:
            check_rows(count_rows(arguments, program["grid"]), program["rows"], forward)
        text = list_text_arguments(arguments, program["text"])
        began = first.setdefault(tuple(forward["branches"]), text)
        if is_by_words(forward):
            check_text(text, began, f"step {forward['step']} ({' and '.join(forward['branches'])})")
        if program["record"]:
            store["given"].append(sum_arguments(arguments))
        if program["replayed"] and number <= program["replayed"].stop:  # the next pass follows from those before it
            check_recorded(sum_arguments(arguments), payload["given"][number], forward)
        if number in program["replayed"]:
            model.get(denoiser).skip(move_answer(payload["answers"][number], arguments))
        store["grid"][:] = image.grid
        context = Context(model, program, payload, store, transfers, arguments, moment, image)
        with context.modes:
            for visit in forward["visits"]:
                at_module(model.get(visit["module"]), visit, context)
        if program["record"]:
            store["answers"].append(model.get(denoiser).output)
    clock.settle()
    transfers.wait()


def is_by_words(forward: Forward) -> bool:
    """Whether ops chose tokens of a forward pass by words."""
    parts = [part for visit in forward["visits"] for part in visit["parts"]]
    parts += [inner for part in parts for inner in part.get("inside", ())]
    return any(action["text_tokens"] is not None for part in parts for action in part["actions"])


def move_answer(recorded: Any, arguments: tuple[tuple, dict]) -> Any:
    """Moves a recorded answer to the device of the forward pass: a recording from a server lies in main memory."""
    device = next(value.device for value in tree_leaves(arguments) if isinstance(value, Tensor) and value.ndim > 1)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), recorded)


def at_module(envoy: Any, visit: Visit, context: Context) -> None:
    """Does everything that is to be done at one input or output of one module."""
    side = visit["side"]
    value = envoy.output if side == "output" else envoy.inputs
    changed = value
    for part in visit["parts"]:
        if part["role"] in ("attend", "attended"):
            at_attention(envoy, part, context)
            continue
        location = part["location"]
        tensor = select_tensor(changed, side, location)
        if part["role"] == "gate":
            context.gates[part["name"]] = compute_gate(tensor, location, envoy)
        elif part["role"] == "hold":
            tokens, span = stream_tokens(tensor, location, context.image), location["span"]
            context.held[part["name"]] = tokens if span is None else tokens[..., span[0] : span[1]]
        elif part["role"] == "readout":
            keep_computed(read_out_held(envoy, changed, part, context), part, context)
        elif location["table"] is not None:
            keep_computed(compute_gate(tensor, location, envoy), part, context)
        elif location["half"] is not None:
            apply_actions(apply_to_part(envoy, tensor, location), part, context, envoy)
        else:
            edited = apply_actions(tensor, part, context, envoy)
            changed = changed if edited is None else replace_tensor(changed, side, location, edited)
    if changed is not value:
        if side == "output":
            envoy.output = changed
        else:
            envoy.inputs = changed


def at_attention(envoy: Any, part: Part, context: Context) -> None:
    """Waits for the call of attention in a module that is entered, or ends that where it is left.

    envoy: the module.
    part: of the role "attend", with what is to be done at the call, or "attended".
    context: of the forward pass.
    """
    if part["role"] == "attended":
        if context.attending is not None:
            context.modes.pop_all().close()
            context.attending.check(part["name"])
            context.attending = None
        return
    inside = part.get("inside", [])

    def change(slot: str, tokens: Tensor, given: dict[str, Any]) -> Tensor | None:
        context.call, edited = (given if slot == "result" else {}), None
        for one in inside:
            if one["location"]["slot"] == slot:
                check_whole(tokens.shape[1], one["location"], context.image)
                new = apply_actions(tokens if edited is None else edited, one, context, envoy)
                edited = edited if new is None else new
        return edited

    context.attending = Attending(change, {one["location"]["slot"]: one["channels"] for one in inside})
    context.modes.enter_context(context.attending)


def read_out_held(envoy: Any, inputs: tuple[tuple, dict], part: Part, context: Context) -> Tensor:
    """What the final norm and what follows make of tokens that were held.

    envoy: the final norm.
    inputs: its arguments, (args, kwargs).
    part: the readout.
    context: of the forward pass.
    """
    rule = context.program["readout"]
    if rule is None:
        raise PlanMismatchError(f"the program has no rule to read {part['name']} out")
    tokens, conditioning = context.held[part["name"]], context.held.get("shift")
    return read_out(context.model, envoy, inputs, part["location"], tokens, conditioning, context.image, rule)


def apply_actions(value: Any, part: Part, context: Context, envoy: Any) -> Any | None:
    """Carries out a part's actions in order; returns the edited value, or None when it was only read."""
    location = part["location"]
    tensor = match_rows(to_tokens(value, location), part, context.rows)
    edited, gate = None, context.gates.get(part["gate"])
    if gate is not None:
        gate = gate.to(tensor.device)  # what makes it may lie on another one than what it multiplies
    for action in part["actions"]:
        if edited is None and action["kind"] != "Read":
            edited = tensor.clone()
        current = tensor if edited is None else edited
        rows = branch_rows(action, context)
        whole, index = select_stream(current, location, context.image, rows)
        there = None if index is None else index[1]
        span = location["span"]
        stream = whole if span is None else whole[..., span[0] : span[1]]
        factor = None if gate is None else select_stream(gate.expand_as(current), location, context.image, rows)[0]
        if action["kind"] != "Read":
            check_sizes(stream, action, part, (context.moment.step, there))
            chosen = list(rows) if action["rows"] is None else [rows[row] for row in action["rows"]]
            branch, module = context.moment.branches[action["branch_index"]], envoy._module  # noqa: SLF001 torch's own
            hook = Hook(part["name"], context.moment, branch, module, chosen)
            mask = find_mask(stream, action, part, context)
            context.store["touched"].append(edit(stream, action, hook, factor, mask, context))
            if index is not None:
                write_back(current, whole, index)
        elif location["x0"]:
            store_read(predict_x0(stream, rows, context), action, part, context)
        else:
            store_read(stream if factor is None else stream * factor, action, part, context, there)
    if edited is None:
        return None
    if location["once"] and all(action["kind"] in ("Read", "CopyRow") for action in part["actions"]):
        edited = edited[: len(to_tokens(value, location))]  # where one row is all, it stays so
    return from_tokens(edited, value, location)


def keep_computed(computed: Tensor, part: Part, context: Context) -> None:
    """Stores reads of what is computed on the way and cannot be written: modulations from tables, x0 of a block."""
    computed = match_rows(computed, part, context.rows)
    for action in part["actions"]:
        rows = branch_rows(action, context)
        stream = computed[rows.start : rows.stop]
        value = predict_x0(stream, rows, context) if part["role"] == "readout" else stream
        store_read(value, action, part, context)


def branch_rows(action: Action, context: Context) -> range:
    """The rows of a forward pass that belong to an action's branch."""
    rows = context.program["rows"]
    return range(action["branch_index"] * rows, (action["branch_index"] + 1) * rows)


def find_mask(stream: Tensor, action: Action, part: Part, context: Context) -> Tensor | None:
    """Which of the chosen tokens take part in attention, bool [row, token]; None where all do.

    stream: the tokens of one branch.
    action: what it chooses of them.
    part: whose site it is.
    context: of the forward pass.
    """
    location = part["location"]
    if location["stream"] != "txt" or location["layout"] == "whole" or location["table"] is not None:
        return None
    if context.text is None:
        context.text = find_text_masks(context.arguments, context.program["text"])
    mask = mask_text(context.text, branch_rows(action, context), stream.shape[1])
    if mask is None:
        return None
    mask = mask if action["rows"] is None else mask[action["rows"]]
    mask = mask if action["tokens"] is None else mask[:, action["tokens"]]
    return None if mask.all() else mask


def store_read(stream: Tensor, action: Action, part: Part, context: Context, there: Tensor | None = None) -> None:
    """Stores what a read has chosen: reduced where it is, then in main memory. What is masked is no data.

    stream: the tokens of one branch.
    action: what to keep of them.
    part: whose site it is.
    context: of the forward pass.
    there: which of them a row has, where rows have other numbers of text tokens.
    """
    check_sizes(stream, action, part, (context.moment.step, there))
    chosen = take(stream, action["rows"], action["tokens"], action["channels"], context.indices).detach()
    if "key" in action:
        chosen = read_features(chosen, action["key"], context)
    reduce, mask = action.get("reduce"), find_mask(stream, action, part, context)
    if reduce is not None and not chosen.shape[1]:
        raise PlanMismatchError(f"{part['name']} has no tokens to reduce at step {context.moment.step}")
    bring = context.transfers.bring
    kept = bring(chosen, copy=True) if reduce is None else bring(reduce_tokens(chosen, reduce, mask))
    branch = context.moment.branches[action["branch_index"]]
    key = (action["op"], part["name"], context.moment.step, branch, action["group"])
    context.store["reads"][key] = kept
    if reduce is None and mask is not None:
        context.store["masks"][key] = mask


def read_features(tokens: Tensor, key: str, context: Context) -> Tensor:
    """How much of a dictionary's features is in tokens. key: of the dictionary in the payload."""
    parts = place_parts(context.payload[key], key, tokens.device, context.indices)
    level = find_level(context.arguments, context.program["time"]) if parts["time"] else None
    return encode(parts, tokens, level)[0]


def predict_x0(predicted: Tensor, rows: range, context: Context) -> Tensor:
    """The clean latents that a prediction means.

    Flow matching (arXiv 2210.02747): x_sigma = (1 - sigma) x0 + sigma noise and v = noise - x0, so x0 = x - sigma v.
    Noise (DDPM, arXiv 2006.11239, eq. 15, with sigma = sqrt(1 - alpha bar)): x0 = (x - sigma e) / sqrt(1 - sigma^2).
    v (arXiv 2202.00512, appendix D): x0 = sqrt(1 - sigma^2) x - sigma v.
    """
    grid, time = context.program["grid"], context.program["time"]
    latents = pack(argument(context.arguments, grid["latents"], grid["latents_position"]), grid["axes"], grid["patch"])
    layout: Any = {"layout": grid["layout"], "stream": "img"}
    noisy = select_stream(latents, layout, context.image, rows)[0]
    width = min(noisy.shape[-1], predicted.shape[-1])  # a learned variance is left out
    noisy, predicted = noisy[..., :width].float(), predicted[..., :width].float() * time["sign"]
    if time["kind"] == "flow":
        value = argument(context.arguments, time["argument"], time["position"])
        return noisy - spread_level(value, context.moment.sigma, noisy, rows, time) * predicted
    sigma = context.moment.sigma
    signal = (1 - sigma**2) ** 0.5
    if time["kind"] == "v_prediction":
        return signal * noisy - sigma * predicted
    return (noisy - sigma * predicted) / signal


def edit(
    stream: Tensor, action: Action, hook: Hook, gate: Tensor | None, mask: Tensor | None, context: Context
) -> tuple:
    """Changes the chosen elements of ``stream`` (a view of the copy) and says what was touched, norms as gated.

    stream: the tokens of one branch.
    action: what to do with them.
    hook: where and when.
    gate: what the tensor is multiplied by before it is added, in the shape of ``stream``; None for nothing.
    mask: which of the chosen tokens take part in attention; None: all.
    context: of the forward pass.
    """
    where = (action["rows"], action["tokens"], action["channels"], context.indices)
    old = take(stream, *where)
    given = Edit(old, stream, action, hook, context.payload, context.indices, mask, context.held)
    given.call, given.image = context.call, context.image
    given.inputs, given.grid, given.time = context.arguments, context.program["grid"], context.program["time"]
    new = EDITS[action["kind"]](given)
    factor = None if gate is None else take(gate, *where)
    before = measure_norm(old, factor)
    if new is not None:
        if action.get("strength", 1.0) != 1.0:
            new = torch.lerp(old, new, action["strength"])
        put_back(stream, new, *where)
        old = new
    after = measure_norm(old, factor)
    return (action["op"], hook.name, hook.step, hook.branch, tuple(old.shape), action["group"], before, after)


def measure_norm(tensor: Tensor, factor: Tensor | None) -> Tensor:
    """The norm of a tensor as it is added to the residual.

    tensor: what a module gives.
    factor: what it is multiplied by before it is added; None for nothing.
    """
    plain = tensor.detach()
    if factor is not None:
        plain = plain * factor
    elif not plain.is_contiguous():  # sums of another order would round otherwise
        plain = plain * 1.0
    return torch.linalg.vector_norm(plain, dtype=torch.promote_types(plain.dtype, torch.float32))
