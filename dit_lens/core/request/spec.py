"""The spec of a run: prompt, seed, call and ops as plain data, from which it can be run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.call import Call, prepare_call
from dit_lens.core.request.ops import Op, from_json, to_json
from dit_lens.core.request.timeline import plan_forwards
from dit_lens.core.runs.provenance import holds_unsaved, to_plain_data
from dit_lens.errors import OpError, PromptError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families import Family

PARTS = ("prompt", "seed", "call", "ops")
OTHERS = ("prompt", "ops", "seed", "batch_size", "record", "prefix")  # what a run takes beside the pipeline's arguments


def make_spec(call: Call, ops: Sequence[Op]) -> dict[str, Any]:
    """What was asked of a run; of what JSON cannot keep, a word that says what it was."""
    return {
        "prompt": None if call.prompts is None else list(call.prompts),
        "seed": None if call.seeds is None else list(call.seeds),
        "call": to_plain_data(call.arguments),
        "ops": [_describe(op) for op in ops],
    }


def read_spec(spec: Any) -> tuple[list[Op], dict[str, Any]]:
    """The ops of a spec, and its prompt, seed and call as arguments; PromptError if it is not a spec, or not whole."""
    if not isinstance(spec, Mapping):
        raise PromptError(f"run_spec takes the spec of a run, a mapping; it was given {type(spec).__name__}.")
    if missing := [name for name in PARTS if name not in spec]:
        raise PromptError(f"this is not the spec of a run: it has no {', '.join(missing)}. Pass run.spec.")
    if not isinstance(spec["call"], Mapping) or not isinstance(spec["ops"], list | tuple):
        raise PromptError("this is not the spec of a run: call is a mapping there, and ops a list. Pass run.spec.")
    if holds_unsaved(spec):
        raise PromptError(
            "this run was made with values that JSON cannot keep, so it cannot be repeated from its spec: "
            f"{', '.join(list_unkept(spec))}. Call lens.run again with them."
        )
    if odd := [name for name in spec["call"] if not isinstance(name, str) or name in OTHERS]:
        raise PromptError(f"this is not the spec of a run: its call holds {odd[0]!r}. Pass run.spec.")
    ops = [from_json(op) for op in spec["ops"]]
    return ops, {"prompt": spec["prompt"], "seed": spec["seed"], **spec["call"]}


def prepare_asked(
    pipe: DiffusionPipeline, family: Family, asked: Mapping[str, Any]
) -> tuple[Call, Sequence[Sequence[str]]]:
    """The checked call of a run of which "prompt" and "call" of its spec are known, and its forward passes of a step.

    pipe, family: of the run.
    """
    _, options = read_spec({"seed": 0, "ops": [], **asked})
    call = prepare_call(
        pipe,
        options.pop("prompt"),
        seed=options.pop("seed"),
        num_inference_steps=None,
        defaults={},
        vocabulary=None,
        call=options,
        family=family,
    )
    return call, plan_forwards(pipe, family.pipeline(type(pipe)).guidance, call.arguments)


def _describe(op: Op) -> dict[str, Any]:
    """An op as JSON keeps it; where it cannot, what it was."""
    try:
        return to_json(op)
    except OpError:
        return {"unsaved": repr(op)}


def list_unkept(spec: Mapping[str, Any]) -> list[str]:
    """What of a spec JSON could not keep, by name."""
    arguments = [f"{name}=" for name, value in spec["call"].items() if holds_unsaved(value)]
    return [*arguments, *(f"ops[{i}]" for i, op in enumerate(spec["ops"]) if holds_unsaved(op))]
