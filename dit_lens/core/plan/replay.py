"""What a run need not compute again: everything before its first edit, where a run without edits has recorded it.

The transformer's answers are put in the place of its calls, so the pipeline and its scheduler go through the same steps
with the same numbers, whatever the scheduler remembers of them. A recording is as large as the latents times the calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from dit_lens.core.request.ops import Op, Read
from dit_lens.core.runs.run import Recording
from dit_lens.core.runs.state import capture_settings, capture_state, list_differences
from dit_lens.errors import OpError
from dit_lens.families.tensors import sum_bits

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.core.plan.compile import Plan
    from dit_lens.core.plan.program import Program, Store
    from dit_lens.core.request.call import Call
    from dit_lens.families import Family

MOST_TOLD = 4  # differences in a message


def record_answers(plan: Plan, ops: Sequence[Op], call: Call) -> Plan:
    """The plan of a run that keeps what the transformer answers; OpError if it edits, or cannot be repeated."""
    edits = [op for op in ops if not isinstance(op, Read)]
    if edits:
        raise OpError(f"record=True keeps a run without edits; this one has {edits[0]!r}. Record the run before it.")
    _refuse_callbacks(call)
    return replace(plan, program={**plan.program, "record": True})


def replay_answers(
    plan: Plan,
    recording: Recording | None,
    call: Call,
    state: Mapping[str, Any],
    pipe: DiffusionPipeline,
    family: Family,
) -> Plan:
    """The plan of a run that takes what precedes its first op from a recording.

    Raises OpError if the recording is of another run, or of a model that was changed since.

    plan: of the run that is to be drawn.
    recording: of a run without edits.
    call: of the run that is to be drawn; the recorded one must be equal.
    state: what else decides the answers now, as the engine says.
    pipe, family: the pipeline, and the family of its transformer.
    """
    if recording is None:
        raise OpError("prefix= needs a run that was recorded in this session. Make it with lens.run(..., record=True).")
    if recording.transformer is not pipe.transformer:
        raise OpError("the run of prefix= was made with another transformer. Record it again with this lens.")
    _refuse_callbacks(call)
    before, now = recording.call, call_values(call)
    if odd := [name for name in {**before, **now} if not _same(before.get(name), now.get(name))]:
        raise OpError(
            f"the run of prefix= was called with other {', '.join(odd)}. Its prompts, seeds and arguments must be this "
            "run's own."
        )
    if odd := [name for name in list_differences(recording.state, state) if name not in recording.passing]:
        raise OpError(
            f"the {' and '.join(odd[:MOST_TOLD])} changed since the run of prefix= was recorded. Record it again."
        )
    if sum_answers(recording.answers) != recording.sums:
        raise OpError("the answers that the run of prefix= recorded were changed since. Record it again.")
    forwards = plan.program["forwards"]
    first = next((number for number, forward in enumerate(forwards) if forward["visits"]), len(forwards))
    # A pipeline whose first step fills a cache has to compute it, or later steps would find the cache empty.
    filling = sum(forward["step"] == 0 for forward in forwards) if family.pipeline(type(pipe)).caches else 0
    program: Program = {**plan.program, "replayed": range(filling, first)}
    recorded = {"answers": recording.answers, "given": recording.given}
    return replace(plan, program=program, payload={**plan.payload, **recorded})


def call_values(call: Call) -> dict[str, Any]:
    """Copies of what decides the answers of the transformer: the prompts, seeds and arguments of a call."""
    return {
        name: _copy(value) for name, value in {**call.arguments, "prompts": call.prompts, "seeds": call.seeds}.items()
    }


def model_state(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What else decides them, as :func:`capture_state` says. OpError where weights are not at hand."""
    state = capture_state(pipe)
    if absent := [name for name, value in state["weights"].items() if value is None]:
        raise OpError(
            f"record= and prefix= compare the weights before and after, and those of {', '.join(absent)} are not at "
            "hand: they are offloaded, or on a server. Run without them."
        )
    return state


def make_recording(
    call: Mapping[str, Any], state: Mapping[str, Any], pipe: DiffusionPipeline, store: Store
) -> Recording:
    """What ``prefix=`` needs of a run that ended just now.

    call, state: what it was called with, and what else decided the answers, before it.
    store: what the executor left of it.
    """
    answers, given = store["answers"], tree_map_only(torch.Tensor, torch.Tensor.cpu, store["given"])
    # What the run changed by itself, such as what an autoencoder remembers, differs from then on.
    passing = list_differences(state, capture_settings(pipe))
    return Recording(dict(call), dict(state), pipe.transformer, answers, given, sum_answers(answers), passing)


def sum_answers(answers: Any) -> list[str]:
    """A text for every tensor of some answers that any change of its bits changes."""
    if isinstance(answers, torch.Tensor):
        return [f"{answers.dtype} {list(answers.shape)} {sum_bits(answers.detach()).tolist()}"]
    if isinstance(answers, Mapping):
        return [text for value in answers.values() for text in sum_answers(value)]
    if isinstance(answers, list | tuple):
        return [text for value in answers for text in sum_answers(value)]
    return [repr(answers)]


def _refuse_callbacks(call: Call) -> None:
    """A callback may keep a state of its own, or change what the transformer is given."""
    if functions := [f"{name}=" for name, value in call.arguments.items() if callable(value)]:
        raise OpError(f"{', '.join(functions)} cannot be followed by record= and prefix=. Leave either out.")


def _copy(value: Any) -> Any:
    """A value that does not change with the original. A generator becomes the state it is in."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value.copy() if hasattr(value, "copy") else value  # images and arrays


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return bool(a is b or a == b)
