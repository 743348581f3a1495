"""The plan, carried out inside one nnsight trace.

Torch and plain data only: this module and ``reduce`` travel to a server by source.

A program is a dict of plain data::

    denoiser   path of the transformer in the model      rows   pictures of one branch
    time       {argument, position, offset, scale, levels, kind, sign}: a call's time, its noise, what is predicted
    grid       {rule, argument, position, latents ...}: how image tokens are found in a call's arguments
    expected   [h, w] where the grid is known beforehand
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

from dit_lens.reduce import reduce_tokens


class PlanMismatchError(RuntimeError):
    """The pipeline did something else than the plan expects."""


def execute(model: Any, tracer: Any, program: dict[str, Any], given: dict[str, Any], store: dict[str, Any]) -> None:
    """Carries out ``program``; ``store`` receives reads, what was touched, the clock and the grid."""
    indices: dict = {}
    for number in tracer.iter[: len(program["calls"])]:
        call = program["calls"][number]
        arguments = model.get(program["denoiser"]).inputs
        moment = observe(arguments, program, store["clock"], call)
        image = image_tokens(arguments, program["grid"])
        check_grid(image.grid, program["expected"])
        store["grid"][:] = image.grid
        gates: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        for module, side, parts in call["visits"]:
            envoy = model.get(module)
            value = envoy.output if side == "output" else envoy.inputs
            changed = value
            for part in parts:
                tensor = fetch(changed, side, part)
                if "keep" in part:
                    gates[part["keep"]] = gate_of(tensor, part, envoy._module)
                    continue
                if "hold" in part:
                    held[part["hold"]] = tokens_of(tensor, part, image)
                    continue
                if "readout" in part:
                    tensor = read_out(model, envoy, changed, part, held, image, program["readout"])
                gate = (
                    clean_from(arguments, program, moment)
                    if "readout" in part or part["x0"]
                    else gates.get(part["gate"])
                )
                edited = work(tensor, part, gate, image, moment, program, given, store, indices)
                if edited is not None:
                    changed = replaced(changed, side, part, edited)
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


def image_tokens(arguments: tuple[tuple, dict], rule: dict[str, Any]) -> SimpleNamespace:
    """Where the image tokens of a transformer call are.

    grid: (h, w), or (f, h, w) of a video. count: tokens of the target. first: its place among ``total`` image tokens,
    references and padding included. starts: of every row, where text is ragged.
    """
    value = named(arguments, rule["argument"], rule["position"])
    latents = named(arguments, rule["latents"], rule["latents_position"])
    if rule["rule"] in ("ids", "positions", "marks"):
        ids = value[0] if value.ndim == 3 else value
        if rule["rule"] == "positions":
            ids = ids[-latents.shape[1] :]
        if rule["rule"] == "marks":
            marks = named(arguments, "indicator", None)[0]
            ids = ids[marks == rule["marked"]]
        target = ids[:, 0] == ids[:, 0].amin()
        places = ids[target][:, 1:3]
        grid = [int(extent) + 1 for extent in places.amax(0) - places.amin(0)]
        first, total = int(target.to(torch.uint8).argmax()), len(ids)
    elif rule["rule"] == "shapes":
        shapes = value[0] if isinstance(value[0], list) else [value[0]]
        f, *grid = shapes[0 if rule["target"] == "first" else -1]
        grid = [f, *grid] if f > 1 else grid
        first, total = 0, prod(grid) if rule["target"] == "last" else sum(map(prod, shapes))
    elif rule["rule"] == "counts":
        grid = [named(arguments, name, None) for name in ("num_frames", "height", "width")]
        first, total = 0, prod(grid)
    else:
        grid, pictures = grid_of(value, rule["rule"], rule["patch"])
        first, total = 0, prod(grid) * pictures
    if rule["pad"] == "square":
        total = max(total, rule["largest"]) if grid[0] != grid[1] else total
    else:
        total = -(-total // rule["pad"]) * rule["pad"]
    starts = None if rule["mask"] is None else named(arguments, rule["mask"], None).sum(1).tolist()
    return SimpleNamespace(grid=tuple(grid), count=prod(grid), first=first, total=total, starts=starts)


def check_grid(grid: tuple[int, ...], expected: list[int] | None) -> None:
    """Fails where the pipeline drew another size than the plan was made for."""
    if expected is not None and list(grid) != expected:
        raise PlanMismatchError(
            f"the plan expects a grid of {' x '.join(map(str, expected))} image tokens, but the pipeline made "
            f"{' x '.join(map(str, grid))}"
        )


def grid_of(latents: Any, axes: str, patch: list[int]) -> tuple[list[int], int]:
    """The grid of a picture with these axes (see :func:`packed`), and how many pictures a row holds."""
    shape = (
        dict(zip("cfhw", latents[0].shape, strict=True))
        if axes == "list"
        else dict(zip(axes, latents.shape, strict=True))
    )
    frames, h, w = (shape.get(axis, 1) // side for axis, side in zip("fhw", patch, strict=True))
    return [frames, h, w] if frames > 1 else [h, w], shape.get("i", 1)


def packed(value: Any, axes: str, patch: list[int]) -> Tensor:
    """A picture as tokens [row, token, channel]: its patches row by row, each (channel, y, x)."""
    if axes == "tokens":
        return value
    x = torch.stack(list(value)) if axes == "list" else value
    x = arranged(x, "bcfhw" if axes == "list" else axes)
    b, i, c, f, h, w = x.shape
    pf, ph, pw = patch
    x = x.reshape(b, i, c, f // pf, pf, h // ph, ph, w // pw, pw).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(b, -1, c * pf * ph * pw)


def unpacked(tokens: Tensor, like: Any, axes: str, patch: list[int]) -> Any:
    """The inverse of :func:`packed`, in the form of ``like``."""
    if axes == "tokens":
        return tokens
    form = torch.stack(list(like)) if axes == "list" else like
    letters = "bcfhw" if axes == "list" else axes
    b, i, c, f, h, w = arranged(form, letters).shape
    pf, ph, pw = patch
    x = tokens.reshape(b, i, f // pf, h // ph, w // pw, c, pf, ph, pw).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    x = x.reshape(b, i, c, f, h, w)
    order = ["bicfhw".index(letter) for letter in letters]
    x = x.permute(*order, *(axis for axis in range(6) if axis not in order)).reshape(form.shape)
    return list(x) if axes == "list" else x


def arranged(x: Tensor, axes: str) -> Tensor:
    """Axes in the order bicfhw, missing ones of size 1."""
    for letter in "bicfhw":
        if letter not in axes:
            x, axes = x.unsqueeze(-1), axes + letter
    return x.permute(*(axes.index(letter) for letter in "bicfhw"))


def named(arguments: tuple[tuple, dict], name: str, position: Any) -> Any:
    """An argument of a call by name, or by position where it was passed so."""
    args, kwargs = arguments
    return kwargs[name] if name in kwargs else args[position]


def fetch(value: Any, side: str, part: dict[str, Any]) -> Any:
    """The tensor of one part, out of a module's input or output."""
    if side == "input":
        return named(value, part["slot"], part["position"])
    return value if part["slot"] is None else value[part["slot"]]


def replaced(value: Any, side: str, part: dict[str, Any], tensor: Any) -> Any:
    """A copy of a module's input or output with one tensor exchanged."""
    if side == "input":
        args, kwargs = value
        if part["slot"] in kwargs:
            return args, {**kwargs, part["slot"]: tensor}
        return (*args[: part["position"]], tensor, *args[part["position"] + 1 :]), kwargs
    if part["slot"] is None:
        return tensor
    if isinstance(value, dict):  # the output class of a model, whose fields are counted
        return type(value)(**{**value, list(value)[part["slot"]]: tensor})
    return type(value)((*value[: part["slot"]], tensor, *value[part["slot"] + 1 :]))


def gate_of(value: Tensor, part: dict[str, Any], module: Any) -> Tensor:
    """What a tensor is multiplied by before it is added to the residual: [row, 1 or token, channel]."""
    if part["table"] is not None:
        name, number = part["table"]
        table = getattr(module, name)
        value = value.reshape(len(value), len(table), -1)[:, number : number + 1] + table[number]
    value = value.unsqueeze(1) if value.ndim == 2 else value
    if part["span"] is not None:
        value = value[..., part["span"][0] : part["span"][1]]
    return value.tanh() if part["tanh"] else value


def work(
    value: Any,
    part: dict[str, Any],
    gate: Tensor | SimpleNamespace | None,
    image: SimpleNamespace,
    moment: SimpleNamespace,
    program: dict[str, Any],
    given: dict[str, Any],
    store: dict[str, Any],
    indices: dict,
) -> Any | None:
    """Runs a part's actions in order; returns the edited value, or None when it was only read."""
    tensor = value if "readout" in part else opened(value, part)
    rows = program["rows"]
    if tensor.shape[0] != rows * len(moment.branches):
        raise PlanMismatchError(
            f"the plan expects {rows * len(moment.branches)} rows at {part['site']}, but the call has {tensor.shape[0]}"
        )
    edited = None
    for action in part["actions"]:
        if edited is None and action["kind"] != "Read":
            edited = tensor.clone()
        current = tensor if edited is None else edited
        block = range(action["block"] * rows, (action["block"] + 1) * rows)
        branch = moment.branches[action["block"]]
        whole, place = (
            (current[block.start : block.stop], None) if "readout" in part else stream_of(current, part, image, block)
        )
        stream = whole if part["span"] is None else whole[..., part["span"][0] : part["span"][1]]
        if isinstance(gate, SimpleNamespace):
            stream = clean(stream, gate, image, block)
        factor = stream_of(gate.expand_as(current), part, image, block)[0] if isinstance(gate, Tensor) else None
        if action["kind"] == "Read":
            key = (action["op"], part["site"], moment.step, branch, action["group"])
            store["reads"][key] = read(stream if factor is None else stream * factor, action, indices)
        else:
            hook = SimpleNamespace(
                name=part["site"], step=moment.step, timestep=moment.timestep, sigma=moment.sigma, branch=branch
            )
            store["touched"].append(edit(stream, action, hook, given, indices, factor))
            if place is not None:
                current[place] = whole
    return None if edited is None else closed(edited, value, part)


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

    Modules are called by ``forward``, so that no hook fires a second time; weights that are offloaded come with it.
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
    x = envoy._module.forward(*args, **kwargs)
    if "shift" in held:
        shift, scale = shift_of(model, held["shift"], rule)
        x = x * (1 + scale) + shift
    for module in rule["modules"]:
        x = model.get(module)._module.forward(x)
    x = x if isinstance(x, Tensor) else x[0]
    if x.ndim != 3:  # a module that puts the picture together itself
        return packed(x, rule["axes"], rule["patch"])
    x = stream_of(x.transpose(0, 1) if part["turned"] else x, part, image, rows)[0]
    if rule["order"] == "yxc":
        patch = prod(rule["patch"])
        x = x.unflatten(-1, (patch, -1)).transpose(-1, -2).flatten(-2)
    return x


def shift_of(model: Any, value: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale that the transformer applies itself, [row, 1, channel] each."""
    if rule["table"] is not None:
        table = getattr(model.get("transformer")._module, rule["table"])
        return (table[None] + value).chunk(2, dim=1)
    both = model.get(rule["projection"])._module.forward(torch.nn.functional.silu(value))
    return both.chunk(2, dim=-1)


def clean_from(arguments: tuple[tuple, dict], program: dict[str, Any], moment: SimpleNamespace) -> SimpleNamespace:
    """What is needed to estimate clean latents from the prediction of this call."""
    rule, time = program["grid"], program["time"]
    latents = named(arguments, rule["latents"], rule["latents_position"])
    return SimpleNamespace(
        tokens=packed(latents, rule["axes"], rule["patch"]),
        layout={"layout": "text_first" if rule["rule"] == "marks" else "own", "stream": "img"},
        kind=time["kind"],
        sign=time["sign"],
        sigma=moment.sigma,
    )


def clean(predicted: Tensor, call: SimpleNamespace, image: SimpleNamespace, rows: range) -> Tensor:
    """The clean latents that a prediction means: x - sigma v of a flow, (x - sigma e) / sqrt(1 - sigma^2) of noise."""
    noisy = stream_of(call.tokens, call.layout, image, rows)[0]
    width = min(noisy.shape[-1], predicted.shape[-1])
    noisy, predicted = noisy[..., :width].float(), predicted[..., :width].float() * call.sign
    if call.kind == "flow":
        return noisy - call.sigma * predicted
    kept = (1 - call.sigma**2) ** 0.5
    if call.kind == "v_prediction":
        return kept * noisy - call.sigma * predicted
    return (noisy - call.sigma * predicted) / kept


def opened(value: Any, part: dict[str, Any]) -> Tensor:
    """A part's value as [row, token, channel]."""
    tensor = packed(value, part["axes"], part["patch"])
    tensor = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
    return tensor.transpose(0, 1) if part["turned"] else tensor


def tokens_of(value: Any, part: dict[str, Any], image: SimpleNamespace) -> Tensor:
    """The tokens of a part's stream in every row of a call."""
    tensor = opened(value, part)
    return stream_of(tensor, part, image, range(len(tensor)))[0]


def closed(tensor: Tensor, value: Any, part: dict[str, Any]) -> Any:
    """The inverse of :func:`opened`."""
    tensor = tensor.transpose(0, 1) if part["turned"] else tensor
    tensor = tensor.squeeze(1) if getattr(value, "ndim", 0) == 2 else tensor
    return unpacked(tensor, value, part["axes"], part["patch"])


def stream_of(tensor: Tensor, part: dict[str, Any], image: SimpleNamespace, rows: range) -> tuple[Tensor, tuple | None]:
    """The rows and tokens of one stream: a view, or (where rows differ) a copy and the place it was taken from."""
    some = tensor[rows.start : rows.stop]
    length, layout, picture = tensor.shape[1], part["layout"], part["stream"] == "img"
    if layout == "whole":
        start, count = 0, length
    elif layout == "own":
        start, count = (min(image.first, length - image.count), image.count) if picture else (0, length)
    elif layout == "text_first":
        start, count = (length - image.total + image.first, image.count) if picture else (0, length - image.total)
    elif layout == "image_first":
        start, count = (image.first, image.count) if picture else (image.total, length - image.total)
    else:
        starts = [int(image.starts[row]) for row in rows]
        if len(set(starts)) > 1:
            if not picture:
                raise PlanMismatchError(
                    f"the prompts have {', '.join(map(str, starts))} text tokens at {part['site']}, which fit no one "
                    "tensor; run them with batch_size=1"
                )
            places = torch.tensor(starts, device=tensor.device)[:, None] + torch.arange(
                image.count, device=tensor.device
            )
            place = (torch.arange(rows.start, rows.stop, device=tensor.device)[:, None], places)
            return tensor[place], place
        start, count = (starts[0], image.count) if picture else (0, starts[0])
    return some.narrow(1, start, count), None


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
    before = torch.linalg.vector_norm(old * factor, dtype=torch.float32)
    if new is not None:
        if action.get("strength", 1.0) != 1.0:
            new = torch.lerp(old, new, action["strength"])
        stream[where] = new
        old = new
    after = torch.linalg.vector_norm(old * factor, dtype=torch.float32)
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
