"""The nnsight model around a pipeline, and the one function that opens a trace; nnsight's private names stay here."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import nnsight
from nnsight.modeling.diffusion import DiffusionModel, _PipelineModule

from dit_lens.errors import ExecutionError
from dit_lens.execute import execute
from dit_lens.layout import PlanMismatchError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Engine:
    """Stock nnsight models over a pipeline, used by one thread at a time.

    nnsight accepts only modules, and a pipeline is none: its own wrapper module goes in between. nnsight's model of
    pipelines counts prompts to lay out a batch; calls without any (embeddings, classes) go through the general one.
    """

    def __init__(self, pipe: DiffusionPipeline):
        self.model = DiffusionModel(_PipelineModule(pipe))
        self.model.pipeline = pipe
        self.promptless = nnsight.NNsight(_PipelineModule(pipe))
        self.lock = threading.Lock()

    def generate(
        self, program: dict[str, Any], given: dict[str, Any], call: dict[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """Runs the pipeline under a program; returns what was stored and the pipeline's own output."""
        with self.lock:
            try:
                model = self.model if call.get("prompt") is not None else self.promptless
                store, results = traced(model, program, given, call)
            except PlanMismatchError as mismatch:
                raise ExecutionError(f"{mismatch}. Nothing was kept of this run.") from mismatch
        if not results:
            raise ExecutionError(
                f"the plan expects {len(program['calls'])} calls of the transformer, but the pipeline made "
                f"{len(store['clock'])}. Was the run interrupted, or are steps skipped by a cache or a callback?"
            )
        return store, results[0]


def traced(
    model: Any, program: dict[str, Any], given: dict[str, Any], call: dict[str, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """One trace, one invoke, containers saved empty and filled inside: what holds for local and for remote runs."""
    with model.trace(**call) as tracer:
        store = {"reads": {}, "touched": [], "clock": [], "grid": []}
        nnsight.save(store)
        results = []
        nnsight.save(results)
        execute(model, tracer, program, given, store)
        results.append(tracer.result)
    return store, results
