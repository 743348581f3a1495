"""A model that lives on an nnsight server: the same plans, sent there instead of carried out here.

The pipeline of such a lens is built from its configuration alone, without weights. What travels is the program, plain
data, and the source of the executor, so that the server needs nnsight and diffusers but not this library.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._pytree import tree_leaves

from dit_lens import errors
from dit_lens.core.execution.answers import find_advice, find_origin, shorten_answer
from dit_lens.core.execution.at_weights import Probe, describe_release, name_methods
from dit_lens.core.execution.read_text import read_grid, read_stream_text
from dit_lens.core.execution.turns import Turn
from dit_lens.core.runs.files import check_pipeline
from dit_lens.errors import DitLensError, ExecutionError, OpError, PromptError, StoreError
from dit_lens.families.arguments import belongs_to_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from nnsight.modeling.diffusion import DiffusionModel

    from dit_lens.core.execution.connection import Connection
    from dit_lens.core.execution.later import Later
    from dit_lens.core.plan.program import Program, Store
    from dit_lens.core.request.call import Call
    from dit_lens.core.request.text_tokens import StreamText
    from dit_lens.families import Anatomy
    from dit_lens.families.locations import TimeRule


def pipeline_without_weights(path: str | Path, revision: str | None = None) -> DiffusionModel:
    """Nnsight's model of a pipeline whose weights are not loaded. Raises StoreError if there is no such pipeline."""
    from diffusers import DiffusionPipeline
    from nnsight.modeling.diffusion import DiffusionModel

    check_pipeline(Path(path))
    try:
        config = DiffusionPipeline.load_config(str(path), revision=revision)
        model = DiffusionModel(str(path), revision=revision)
    except (OSError, ValueError) as problem:
        raise StoreError(f"{path} could not be read as a diffusers pipeline: {problem}") from problem
    flags = {name: value for name, value in config.items() if not name.startswith("_") and not isinstance(value, list)}
    # nnsight builds a pipeline from its parts and leaves out the rest, such as whether guidance is distilled.
    cast("DiffusionPipeline", model.pipeline).register_to_config(_name_or_path=str(path), **flags)
    return model


TIMEOUT = 3600.0  # seconds


class RemoteEngine:
    """Sends programs to an nnsight server, one at a time; stands where a lens has an Engine.

    model: from :func:`pipeline_without_weights`. host: the server's address; nnsight's own setting by default.
    timeout: seconds to wait for a run. token: what lets in; nnsight's own setting by default.
    """

    stale = False

    def __init__(
        self, model: DiffusionModel, host: str | None = None, timeout: float = TIMEOUT, token: str | None = None
    ):
        from nnsight import CONFIG

        from dit_lens.core.execution.connection import check_host, check_timeout, check_token

        self.model, self.turn = model, Turn(lambda: [model], lambda: [model])
        self.timeout = check_timeout(timeout)
        self.host = check_host(CONFIG.API.HOST if host is None else host)
        self.key, self.token = _key(model), check_token(token)
        self._probe: Probe | None = None
        self._about: dict[str, Any] | None = None

    @property
    def server(self) -> dict[str, str]:
        """Which model of which server this is: all that is known of it, as servers do not tell their weights."""
        return {"host": self.host, "key": self.key}

    @property
    def device_name(self) -> str:
        """Where the model is."""
        return f"nnsight server {self.host}"

    @property
    def provenance(self) -> dict[str, Any]:
        """What is known of the machine that a run was made on."""
        told = self._about or {"dtype": "the server's", "threads": None, "weights": None}
        known = {name: told[name] for name in ("dtype", "threads", "weights")}
        return {"device": self.device_name, **known, "server": self.server}

    def follow(self) -> None:
        """Modules do not come or go here."""

    def generate(
        self, program: Program, payload: dict[str, Any], call: dict[str, Any], reads: dict
    ) -> tuple[Store, Any]:
        """As :meth:`Engine.generate`; every failure on the way or there is an ExecutionError.

        program, payload: what to do, and the tensors and functions it refers to.
        call: the keyword arguments of the pipeline.
        reads: receives what is read.
        """
        if self._probe is None and (self._about or {}).get("code") != describe_release()["code"]:
            backend = self.backend()
            store, results = self._send(program, payload, call, backend)
            self._about = backend.about  # where it has this very library, later runs need not bring it
            return self.unpack(program, store, results, reads)
        answer = self._make_run(program, payload, call)
        return self.unpack(program, answer["store"], answer["results"], reads)

    def _make_run(self, program: Program, payload: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        """Has the server make a run with its own copy of this library, within the probe if there is one."""
        _check_prompts(call)
        probe, named = self._probe, None
        if probe is not None:
            payload, named = name_methods(probe, payload), (type(probe).__name__, probe.arguments())
        given = {"args": (named, program, payload, call), "kwargs": {}}
        answer = self._ask("make_run", {"defaults": {}, "vocabulary": None, **given})
        if probe is not None:
            probe.take(answer["found"])
        return answer

    def submit(self, program: Program, payload: dict[str, Any], call: dict[str, Any]) -> tuple[str, bool]:
        """Sends a program without waiting for it.

        Returns the job's name, and whether the server is one that keeps and ends jobs by their names.

        program, payload, call: as of :meth:`generate`.
        """
        from dit_lens.core.execution.later import SentError

        later = self.later()
        try:
            self._send(program, payload, call, later)
        except SentError as sent:
            return sent.response.id, later.ends
        raise AssertionError  # it is left by that error alone

    def later(self) -> Later:
        """What asks the server after jobs."""
        from dit_lens.core.execution.later import Later

        return Later(self.key, self.host, self.timeout, self.token)

    def _send(
        self, program: Program, payload: dict[str, Any], call: dict[str, Any], backend: Connection
    ) -> tuple[Store, list[Any]]:
        from dit_lens.core.execution.engine import run_traced

        _check_prompts(call)
        with self.turn.run(), self.translate_errors():
            _register()
            _check_functions([*call.values(), *payload.values()])
            return run_traced(self.model.generate, self.model, program, payload, {**call, "backend": backend}, {})

    def unpack(self, program: Program, store: Store, results: list[Any], reads: dict) -> tuple[Store, Any]:
        """What a server saved, as an Engine returns it; reads receives what was read. Checks that all of it ran."""
        from dit_lens.core.execution.engine import check_finished

        check_finished(program, len(store["clock"]), results)
        for key in list(store["reads"]):
            reads[key] = store["reads"].pop(key)
        return {**store, "reads": reads}, results[0]

    def measure_sigmas(self, call: Call, time: TimeRule) -> None:  # noqa: ARG002 as an Engine's
        """The pipeline cannot be asked from here."""
        return

    def read_text(self, anatomy: Anatomy, call: Call, forwards: Sequence[Sequence[str]]) -> StreamText:
        """The text in the text stream of a call: tokenizers are here.

        anatomy: of the transformer.
        forwards: the branches of each forward pass of a step.
        """
        return read_stream_text(self.model.pipeline, anatomy, call, forwards)

    def read_grid(self, anatomy: Anatomy, call: Call) -> tuple[int, ...] | None:
        """The image tokens of a call, by its pipeline. anatomy: of the transformer."""
        return read_grid(self.model.pipeline, anatomy, call)

    def state(self) -> dict[str, Any]:
        """What decides the transformer's answers beside the call: the server's model, as far as its name tells."""
        return {"server": self.server}

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline, without weights."""
        return cast("DiffusionPipeline", self.model.pipeline)

    @property
    def reaches_weights(self) -> bool:
        """Whether more can be done with the model than runs: whether the server has this very library."""
        return self._why_runs_only() == ""

    def check_weights(self, what: str) -> None:
        """Raises ExecutionError if the server makes runs only. what: what needs weights, with its verb."""
        if why := self._why_runs_only():
            raise ExecutionError(
                f"{what} the model's weights on this machine, and this model is on a server that {why}, or load the "
                "model here, with DiTLens.from_pretrained; runs, traces and the studies made of them work on any "
                "nnsight server."
            )

    def _why_runs_only(self) -> str:
        """What a server lacks to do more than runs, and what to do; empty if nothing.

        Names mean the same where the code is the same.
        """
        there, here = self.ask_about(), describe_release()
        if there is None:
            return f"has no dit_lens ({self.host}). Start that server with dit-lens serve"
        if there.get("code") == here["code"]:
            return ""
        versions = [f"{one.get('dit_lens')} ({one.get('code')})" for one in (there, here)]
        return f"has another dit_lens ({self.host}: {versions[0]}; here: {versions[1]}). Install one release on both"

    def ask_about(self) -> dict[str, Any] | None:
        """What the server tells of itself; None if it has no dit_lens. A server that has it is asked once."""
        if self._about is None:
            self._about = self.later().ask_about()
        return self._about

    @contextmanager
    def within(self, probe: Probe) -> Generator[None]:
        """The run inside is made within a probe, on the server."""
        self.check_weights(f"{type(probe).__name__} needs")
        with self.turn.hold(), probe.around(cast("Any", self)) if probe.plans else nullcontext():
            outer, self._probe = self._probe, probe
            try:
                yield
            finally:
                self._probe = outer

    def carry_out(self, task: str, lens: Any, given: Mapping[str, Any]) -> Any:
        """What a task returns that the server carries out.

        task: its name.
        lens: whose defaults count.
        given: "args" and "kwargs" of the task.
        """
        self.check_weights(f"{task} needs")
        return self._ask(task, {"defaults": lens.defaults, "vocabulary": lens.vocabulary, **given})

    def submit_task(self, task: str, lens: Any, args: tuple[Any, ...]) -> str:
        """Sends a task without waiting for it; returns the name of its job.

        task: its name.
        lens: whose defaults count.
        args: of the task.
        """
        from dit_lens.core.execution.later import SentError

        self.check_weights(f"{task} needs")
        asked = {"defaults": lens.defaults, "vocabulary": lens.vocabulary, "args": args, "kwargs": {}}
        try:
            self._ask(task, asked, self.later())
        except SentError as sent:
            return sent.response.id
        raise AssertionError  # it is left by that error alone

    def collect_task(self, name: str) -> Any:
        """What a task returned, once its job is done. name: of the job."""
        with self.translate_errors(ours=True):
            return self.later().wait(name, True, time.monotonic() + self.timeout)["found"]

    def _ask(self, task: str, asked: dict[str, Any], backend: Connection | None = None) -> Any:
        """Has the server carry out a task. asked: as of ``server.tasks.carry_out``."""
        with self.turn.run(), self.translate_errors(ours=True):
            _register()
            _check_functions(tree_leaves(asked))
            asked = {**asked, "code": describe_release()["code"]}
            if backend is not None:
                return _send_task(self.model, task, asked, backend)
            backend = self.backend()
            backend.code = asked["code"]
            try:
                return _send_task(self.model, task, asked, backend)
            finally:
                self._about = backend.about

    def backend(self) -> Connection:
        """What sends a request to the server, whose state shows where a progress bar would."""
        from dit_lens.core.execution.connection import Connection

        connection = Connection(self.key, self.host, self.timeout, self.token)
        bar = getattr(self.model.pipeline, "_progress_bar_config", {})
        connection.display.enabled &= not bar.get("disable", False)  # the job's state shows where a bar would
        return connection

    @contextmanager
    def translate_errors(self, *, ours: bool = False) -> Generator[None]:
        """What a person can do about a job that failed on the server. Memory that ran out there is told as of here.

        ours: whether errors of this library, raised there by its own functions, are told as they are.
        """
        from nnsight.intervention.backends.remote import RemoteError

        try:
            yield
        except RemoteError as failure:
            gist = shorten_answer(str(failure))
            if re.search(r"OutOfMemoryError|out of memory", gist):
                raise torch.OutOfMemoryError(f"on the nnsight server {self.host}: {gist}") from failure
            if ours and (told := re.fullmatch(r"dit_lens\.errors\.(\w+): (.*)", gist, re.DOTALL)):
                kind = getattr(errors, told[1], None)
                if isinstance(kind, type) and issubclass(kind, DitLensError):
                    raise kind(f"{told[2]}.") from failure
            advice = find_advice(gist, self.key)
            raise ExecutionError(
                f"the nnsight server {self.host} answered: {gist}. {advice}{' ' * bool(advice)}"
                f"Nothing was kept of this run.{find_origin(str(failure))}"
            ) from failure


def _key(model: DiffusionModel) -> str:
    """How a server knows a model; a local folder, as of a server that its user runs, keeps its name."""
    from httpx import HTTPError

    if Path(str(model.repo_id)).is_dir():
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        return f"{name}:{json.dumps({'repo_id': model.repo_id, 'revision': model.revision})}"
    try:
        return model.to_model_key()
    except (OSError, HTTPError) as problem:
        raise StoreError(
            f"the Hugging Face hub did not tell the name of {model.repo_id}, by which a server knows it: {problem}"
        ) from problem


def _send_task(model: DiffusionModel, task: str, asked: dict[str, Any], backend: Connection) -> Any:
    """Sends one call of a function of this library, which is imported there."""
    import nnsight

    with model.session(backend=backend):
        found = _carry_out(model, task, asked)
        nnsight.save(found)
    return found


def _carry_out(model: Any, task: str, asked: dict[str, Any]) -> Any:
    """Goes to the server by its source, and finds its library there."""
    return importlib.import_module("dit_lens.server.tasks").carry_out(model, task, asked)


def _register() -> None:
    """Has this library's functions travel by source: those of the executor, and those that studies apply."""
    import nnsight

    nnsight.register("dit_lens")


def _check_prompts(call: Mapping[str, Any]) -> None:
    """PromptError for a call in which nnsight would not find how many images there are."""
    embeddings = call.get("prompt_embeds")
    if call.get("prompt") is not None or (isinstance(embeddings, torch.Tensor) and embeddings.ndim == 3):
        return
    given = [f"{name}=" for name, value in call.items() if belongs_to_prompts(name) and value is not None]
    raise PromptError(
        "a model on a server is given prompts, or prompt_embeds= as one tensor [b, n, d]: nnsight lays out a batch by "
        f"them. Pass prompts{' instead of ' * bool(given)}{', '.join(given)}."
    )


def _check_functions(values: Iterable[Any]) -> None:
    """OpError for a function that cannot be sent."""
    from nnsight.intervention.serialization import dumps

    for function in filter(callable, values):
        try:
            dumps(function)
        except (TypeError, ValueError, AttributeError, OSError, pickle.PicklingError) as problem:
            raise OpError(
                f"{function!r} cannot be sent to a server: {problem}. A function travels by its source, with what it "
                "refers to; let it refer to modules, functions, tensors and plain data only."
            ) from problem
