"""The nnsight model around a pipeline, and the one function that opens a trace; nnsight's private names stay here."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import nnsight
import torch
from nnsight.modeling.diffusion import DiffusionModel, _PipelineModule

from dit_lens.arguments.functions import told_end
from dit_lens.core.execution.at_weights import Probe
from dit_lens.core.execution.execute import execute
from dit_lens.core.execution.forwards import Forwards, Taking
from dit_lens.core.execution.hooks import refuse_changes
from dit_lens.core.execution.order import refuse_another_order
from dit_lens.core.execution.read_text import read_grid, read_stream_text
from dit_lens.core.execution.refusals import tell_refusals
from dit_lens.core.execution.schedule import measure_sigmas
from dit_lens.core.execution.turns import Turn, turn_of
from dit_lens.core.plan.batches import graph_too_large
from dit_lens.core.plan.replay import model_state
from dit_lens.errors import ExecutionError
from dit_lens.families.calls import list_calls
from dit_lens.families.layout import PlanMismatchError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from dit_lens.core.plan.program import Program, Store
    from dit_lens.core.request.call import Call
    from dit_lens.core.request.text_tokens import StreamText
    from dit_lens.core.request.timeline import Measure
    from dit_lens.families import Anatomy
    from dit_lens.families.locations import TimeRule

NESTED = "cyclic parent chain"  # what greenlets say where nnsight is asked for a value while it waits for one


class _Pipeline(_PipelineModule):
    """A pipeline that hides its weights: nnsight would move arguments to wherever the first of them is offloaded."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002 as in torch
        return iter(())

    def forward(self, *args: Any, gradients: bool = False, **kwargs: Any) -> Any:
        """The pipeline's call; for gradients the function under its ``no_grad``."""
        with tell_refusals(self.pipeline, kwargs):
            if not gradients:
                return super().forward(*args, **kwargs)
            with torch.enable_grad():
                return _with_gradients(self.pipeline)(*args, **kwargs)


class Engine:
    """Stock nnsight models over a pipeline. Runs that share parts take turns, whichever lens they are of.

    nnsight accepts only modules, and a pipeline is not one: nnsight's own wrapper goes in between. nnsight's model of
    pipelines counts prompts to lay out a batch; calls without any (embeddings, classes) go through the general one.
    """

    server: dict[str, str] | None = None

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self._gradients = False
        self._probe: Probe | None = None
        self._modules, self._forwards = self._modules_now(), Forwards()
        with self.turn.hold(), self._wrapping():
            self.model = DiffusionModel(_Pipeline(pipe), interleaver=Taking(self._forwards))
            self.model.pipeline = pipe
            self.promptless = nnsight.NNsight(_Pipeline(pipe), interleaver=Taking(self._forwards))

    @property
    def turn(self) -> Turn:
        """Who may use the pipeline."""
        if self.pipe.transformer is None:
            raise ExecutionError("pipe.transformer is None. Put the transformer back, or load the pipeline again.")
        return turn_of(self.pipe)

    @property
    def stale(self) -> bool:
        """Whether modules came or went since wrapping (LoRA, another transformer)."""
        return self._modules_now() != self._modules

    def follow(self) -> None:
        """Wraps the modules there are now."""
        with self.turn.hold():
            self._modules = self._modules_now()
            with self._wrapping():
                for model in (self.model, self.promptless):
                    model._update(_Pipeline(self.pipe))

    @contextmanager
    def _wrapping(self) -> Generator[None]:
        """Nnsight wraps modules inside, and warns of what took its place in them."""
        with warnings.catch_warnings(action="ignore", category=UserWarning), self._forwards.wrapping(self._modules):
            yield

    @property
    def device_name(self) -> str:
        """Where the model is, and its precision."""
        return f"{self.pipe.device}, {str(self.pipe.transformer.dtype).removeprefix('torch.')}"

    @property
    def provenance(self) -> dict[str, Any]:
        """What a run's provenance says of the machine beyond what the pipeline tells: nothing, where both are here."""
        return {}

    @property
    def reaches_weights(self) -> bool:
        """Whether more can be done with the model than runs."""
        return self.server is None

    def check_weights(self, what: str) -> None:
        """As :meth:`RemoteEngine.check_weights`: weights are here."""

    @contextmanager
    def within(self, probe: Probe) -> Generator[None]:
        """The run inside is made within a probe."""
        with self.turn.hold(), probe.around(self):
            outer, self._probe = self._probe, probe
            try:
                yield
            finally:
                self._probe = outer

    @contextmanager
    def differentiable(self) -> Generator[None]:
        """Runs inside keep the graph of whatever comes to require gradients.

        Meanwhile weights require none, and a copy stands for the scheduler, which would remember tensors of the graph.
        """
        with self.turn.hold():
            scheduler, stand_in = self.pipe.scheduler, copy.deepcopy(self.pipe.scheduler)
            weights = [p for module in self._modules_now() for p in module.parameters(recurse=False) if p.requires_grad]
            try:
                for weight in weights:
                    weight.requires_grad_(False)
                self._gradients = True
                self.pipe.scheduler = stand_in
                yield
            except torch.OutOfMemoryError as full:  # of a backward pass, or of what is made of the gradients
                raise graph_too_large(full) from full
            finally:
                self._gradients = False
                self.pipe.scheduler = scheduler
                for weight in weights:
                    weight.requires_grad_(True)

    def measure_sigmas(self, call: Call, time: TimeRule) -> Measure | None:
        """What reads the noise levels of a call off the pipeline. time: how the transformer's time is read."""

        def measure(steps: int, skipped: int) -> tuple[float, ...] | None:
            with self.turn.run(), hide_progress_bar(self.pipe):
                return measure_sigmas(self.pipe, call.keywords(), time, steps, skipped)

        return measure

    def read_text(self, anatomy: Anatomy, call: Call, forwards: Sequence[Sequence[str]]) -> StreamText:
        """The text in the text stream of a call.

        anatomy: of the transformer.
        forwards: the branches of each forward pass of a step.
        """
        with self.turn.run(), hide_progress_bar(self.pipe):
            return read_stream_text(self.pipe, anatomy, call, forwards)

    def read_grid(self, anatomy: Anatomy, call: Call) -> tuple[int, ...] | None:
        """The image tokens of a call, by its pipeline. anatomy: of the transformer."""
        with self.turn.run(), hide_progress_bar(self.pipe):
            return read_grid(self.pipe, anatomy, call)

    def state(self) -> dict[str, Any]:
        """What decides the transformer's answers beside the call."""
        return model_state(self.pipe)

    def _modules_now(self) -> list[nn.Module]:
        """All of them, each once, as nnsight finds them in its wrapper."""
        parts = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        return list(dict.fromkeys(module for part in parts for module in part.modules()))

    def generate(
        self, program: Program, payload: dict[str, Any], call: dict[str, Any], reads: dict
    ) -> tuple[Store, Any]:
        """Runs the pipeline under a program; returns what was stored and the pipeline's own output.

        program, payload: what to do, and the tensors and functions it refers to.
        call: the keyword arguments of the pipeline.
        reads: an empty dictionary, or something like one, for what is read.
        """
        with self.turn.run(), told_end("a function of this run"):
            if self.stale:
                self.follow()
            try:
                model = self.model if call.get("prompt") is not None else self.promptless
                arguments = call | {"gradients": True} if self._gradients else call
                ordered = nullcontext() if self._gradients else refuse_another_order(self.pipe, program)
                alone = self._forwards.for_run(_list_visited(self.pipe, program))
                kept = _keep_configuration(self.pipe)
                watch = refuse_changes(self.pipe, program)
                with alone, kept, _count_forwards(self.pipe.transformer) as made, watch, ordered:
                    store, results = run_traced(model.trace, model, program, payload, arguments, reads)
            except torch.OutOfMemoryError as full:
                if not self._gradients:
                    raise
                raise graph_too_large(full) from full
            except PlanMismatchError as mismatch:
                raise ExecutionError(f"{mismatch}. Nothing was kept of this run.") from mismatch
            except ValueError as problem:
                if str(problem) != NESTED:
                    raise
                raise ExecutionError(
                    "the pipeline, or a module of it, was called inside a run, by a function of Apply. Finish the run, "
                    "and call it with what the run read; nothing was kept of this run."
                ) from problem
        check_finished(program, len(made), results)
        if self._probe is not None:
            self._probe.finish(results[0])
        return store, results[0]


def _list_visited(pipe: DiffusionPipeline, program: Program) -> set[nn.Module]:
    """The modules at which a program does something; at the transformer every program does."""
    paths = {visit["module"] for forward in program["forwards"] for visit in forward["visits"]}
    found = (path.removeprefix("transformer").removeprefix(".") for path in {program["denoiser"], *paths})
    return {pipe.transformer.get_submodule(path) for path in found}


def _with_gradients(pipe: DiffusionPipeline) -> Callable[..., Any]:
    """The call of a pipeline without its ``no_grad``, which may be that of a parent it passes its arguments on to."""
    kind, (parent, draw) = type(pipe), list_calls(type(pipe))[-1]
    if kind.__call__ is draw:
        return partial(inspect.unwrap(draw), pipe)
    # A class that comes between the two in the order of classes, so that super() finds it.
    between = type(parent.__name__, (parent,), {"__call__": inspect.unwrap(draw)})
    twin = copy.copy(pipe)
    twin.__class__ = type(kind.__name__, (kind, between), {})
    return twin


@contextmanager
def _count_forwards(transformer: nn.Module) -> Generator[list[None]]:
    """Yields a list that gets one entry for every forward pass."""
    made: list[None] = []
    handle = transformer.register_forward_pre_hook(lambda *_: made.append(None))
    try:
        yield made
    finally:
        handle.remove()


@contextmanager
def _keep_configuration(pipe: DiffusionPipeline) -> Generator[None]:
    """Schedulers may write to their own configuration as they are set up, which is for this run alone."""
    scheduler = pipe.scheduler
    before = vars(scheduler).get("_internal_dict")
    try:
        yield
    finally:
        if before is not None:
            vars(scheduler)["_internal_dict"] = before


_HIDDEN: WeakKeyDictionary[DiffusionPipeline, list[dict[str, Any]]] = WeakKeyDictionary()
_HIDING = threading.Lock()


@contextmanager
def hide_progress_bar(pipe: DiffusionPipeline) -> Generator[None]:
    """Hides the pipeline's own progress bar, and puts it back as it was when nothing hides it any more."""
    attributes, name = vars(pipe), "_progress_bar_config"
    with _HIDING:
        before = {name: attributes[name]} if name in attributes else {}
        _HIDDEN.setdefault(pipe, []).append(before)  # of several threads, the first saw the bar as it was
        pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        with _HIDING:
            kept = _HIDDEN[pipe]
            if len(kept) == 1:
                attributes.pop(name, None)
                attributes.update(kept[0])
            kept.pop()


def check_finished(program: Program, made: int, results: list[Any]) -> None:
    """ExecutionError for a run that did not make the forward passes that were planned. made: how many it made."""
    planned = len(program["forwards"])
    if not results or made != planned:
        raise ExecutionError(
            f"the plan expects {planned} forward passes of the transformer, but the pipeline made {made}. Was the run "
            "interrupted, are steps skipped by a cache or a callback, or does the pipeline draw more than once?"
        )


def run_traced(
    open_trace: Any, model: Any, program: Program, payload: dict[str, Any], call: dict[str, Any], reads: dict
) -> tuple[Store, list[Any]]:
    """Runs one trace with one invoke, containers saved empty and filled inside, for local and for remote runs.

    open_trace: the model's method that opens the trace.
    model: of nnsight.
    program, payload: what to do, and the tensors and functions it refers to.
    call: the keyword arguments of the pipeline.
    reads: receives what is read.
    """
    with open_trace(**call) as tracer:
        store: Store = {"reads": reads, "masks": {}, "touched": [], "clock": [], "grid": [], "answers": [], "given": []}
        nnsight.save(store)
        results = []
        nnsight.save(results)
        execute(model, tracer, program, payload, store)
        results.append(tracer.result)
    return store, results
