"""Session: what turns ops into a Run on one pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from dit_lens import families
from dit_lens.arguments.numbers import as_plain
from dit_lens.arguments.saving import saved_by
from dit_lens.arguments.signatures import told
from dit_lens.core.execution.assemble import assemble
from dit_lens.core.execution.blocks import Blocks
from dit_lens.core.execution.engine import Engine, hide_progress_bar
from dit_lens.core.execution.turns import in_turn
from dit_lens.core.plan.batches import run_in_batches
from dit_lens.core.plan.compile import Plan, compile_plan
from dit_lens.core.plan.cost import Cost, cost_of
from dit_lens.core.plan.outline import Outline
from dit_lens.core.plan.replay import call_values, make_recording, record_answers, replay_answers
from dit_lens.core.plan.spill import reads_container
from dit_lens.core.plan.unseeded import random_state, refuse_unseeded, tell_draws
from dit_lens.core.request.call import Call, check_latents, needs_weights, prepare_call
from dit_lens.core.request.indices import list_items
from dit_lens.core.request.ops import Apply, Op, Read
from dit_lens.core.request.spec import make_spec, prepare_asked, read_spec
from dit_lens.core.request.text_tokens import StreamText
from dit_lens.core.request.timeline import Timeline, make_timeline
from dit_lens.core.request.values import copy_of
from dit_lens.core.runs.comparison import Comparison, compare
from dit_lens.core.runs.files import read_json, report_damage
from dit_lens.core.runs.provenance import describe
from dit_lens.core.runs.run import Run
from dit_lens.core.trace import Trace
from dit_lens.errors import DitLensError, ExecutionError, OpError, PromptError, SiteError, show
from dit_lens.families.checks import Check, check
from dit_lens.families.live import find_difference
from dit_lens.families.schedulers import find_noise
from dit_lens.families.sites import Site, match
from dit_lens.old_names import warn_of_old_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from dit_lens.core.execution.remote import RemoteEngine
    from dit_lens.core.plan.program import Store
    from dit_lens.core.request.ops import Pattern

DEFAULTS_FILE = "dit_lens.json"


class Session:
    """Runs over one pipeline: names, plans and executes ops; :class:`~dit_lens.DiTLens` adds loading and instruments.

    pipe: a diffusers pipeline with a transformer, on any device; LoRA and quantisation are yours to set up.
    defaults: arguments for every call (a toy stores its own).
    engine: what carries out programs; nnsight on this machine by default.

    Raises FamilyError when no family describes the pipeline, or when its structure differs from what the family says.
    """

    save = saved_by("Its pipeline has, lens.pipe.save_pretrained(folder), and a run, run.save(folder).")

    @told
    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        defaults: Mapping[str, Any] | None = None,
        engine: Engine | RemoteEngine | None = None,
    ):
        self.pipe = pipe
        self._describe()
        stored = _stored_defaults(pipe)
        if defaults is not None and not isinstance(defaults, Mapping):
            raise PromptError(f"defaults={show(defaults)} is not a mapping. Give arguments of the call by name.")
        self.defaults: dict[str, Any] = copy_of(dict(stored.get("call", {}) if defaults is None else defaults))
        self.vocabulary: list[str] | None = stored.get("vocabulary")
        self.engine: Engine | RemoteEngine = Engine(pipe) if engine is None else engine

    def __copy__(self) -> Self:
        """Another lens on the same pipeline, which shares all there is."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A lens on a copy of the pipeline."""
        needs_weights(self.pipe, "copying a lens needs")
        with self.engine.turn.hold():
            memo[id(self)] = other = type(self)(copy.deepcopy(self.pipe, memo), defaults=self.defaults)
        other.vocabulary = copy.copy(self.vocabulary)
        return other

    def __reduce__(self) -> NoReturn:
        raise ExecutionError(
            "a lens has no pickle: it holds a live model. Save its pipeline (lens.pipe.save_pretrained(folder)) and "
            "load that where it is needed: DiTLens.from_pretrained(folder). A run is saved by run.save(folder)."
        )

    def _describe(self) -> None:
        family = families.find(self.pipe)
        controlled = getattr(self.pipe, "controlnet", None) is not None
        anatomy = families.Anatomy(
            family,
            self.pipe.transformer,
            controlled=controlled,
            caching=family.pipeline(type(self.pipe)).caches,
        )
        self.checks: list[Check] = check(anatomy)
        self.family, self.anatomy = family, anatomy

    def _follow(self) -> Engine | RemoteEngine:
        """Looks again at a pipeline that is not as it was: by LoRA, another transformer, an adapter, a patch."""
        gone = self.engine.stale
        if gone or find_difference(self.anatomy, self.anatomy.tried) is not None:
            self._describe()
        if gone:
            self.engine.follow()
        return self.engine

    # What there is

    @told
    def sites(self, pattern: Pattern = "*") -> list[str]:
        """The names a pattern means on this model, in the order they are computed; "*" lists them all.

        >>> from dit_lens import DiTLens
        >>> DiTLens.toy().sites("double[0:2].{img,txt}")
        ['blocks.0.txt', 'blocks.0.img', 'blocks.1.txt', 'blocks.1.img']
        >>> DiTLens.toy().sites(lambda name: name.startswith("blocks.1.") and name.endswith(".attn_out"))
        ['blocks.1.txt.attn_out', 'blocks.1.img.attn_out']
        """
        self._follow()
        found: Iterable[Site] = (
            self.anatomy.sites
            if isinstance(pattern, str) and pattern == "*"
            else match(pattern, self.anatomy.sites, self.anatomy.stacks, self.anatomy.why_not)
        )
        return [site.name for site in found]

    @told
    def heads(self, site: Pattern) -> list[range]:
        """The channels of every head at ``attn.q``, ``attn.k``, ``attn.v`` or ``attn.z`` of a block, head by head.

        >>> from dit_lens import DiTLens, Zero
        >>> lens = DiTLens.toy()
        >>> lens.heads("blocks.3.img.attn.z")
        [range(0, 32), range(32, 64), range(64, 96), range(96, 128)]
        >>> silent = Zero("blocks.3.img.attn.z", channels=lens.heads("blocks.3.img.attn.z")[2])

        Where queries share keys and values, ``attn.k`` and ``attn.v`` have fewer heads. Raises SiteError elsewhere.
        """
        names = self.sites(site)
        if len(names) != 1:
            raise SiteError(f"{site!r} means {len(names)} sites. Ask for the heads of one, such as {names[0]!r}.")
        return self.anatomy.heads(self.anatomy.site(names[0]))

    @told
    def to_str_tokens(self, prompt: str, **call: Any) -> list[str]:
        """The text's tokens as strings, in order, with the pipeline's template and its padding.

        They are the tokens of the text stream; where text enters by cross-attention, those of ``txt.cross.k`` and of
        ``key_tokens=``. Where two encoders share tokens, theirs are joined by "+". Takes what :meth:`run` takes.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"to_str_tokens takes one prompt, a string; it was given {type(prompt).__name__}.")
        return self.outline(prompt, **call).text().strings()

    @told
    def outline(self, prompt: str | Sequence[str] | None = None, **call: Any) -> Outline:
        """The steps, branches, rows and token grid of a run; nothing is run. Takes what :meth:`run` takes."""
        return self._forecast(prompt, (), **_without_options(call, "ops")).outline

    def planned(self, prompt: str | Sequence[str] | None = None, **call: Any) -> tuple[Timeline, Plan]:
        """The old form of :meth:`outline`, for one more release."""
        warn_of_old_name("DiTLens.planned", "DiTLens.outline", stacklevel=3)
        plan = self._forecast(prompt, (), **_without_options(call, "ops"))
        return plan.outline.timeline, plan

    @told
    def cost(self, prompt: str | Sequence[str] | None = None, ops: Sequence[Op] | Op = (), **call: Any) -> Cost:
        """How many bytes the reads of a run would keep; nothing is run. Takes what :meth:`run` takes."""
        ops = list_ops(ops)
        plan = self._forecast(prompt, ops, **_without_options(call))
        return cost_of(plan, ops, self.anatomy, self.pipe.transformer.dtype)

    # Running

    @told
    @in_turn
    def run(
        self,
        prompt: str | Sequence[str] | None = None,
        ops: Sequence[Op] | Op = (),
        *,
        seed: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        record: bool = False,
        prefix: Run | None = None,
        **call: Any,
    ) -> Run:
        """Draws, and carries out ``ops`` on the way.

        >>> from dit_lens import DiTLens, Zero
        >>> prompt = "a big red circle left on a plain blue background"
        >>> run = DiTLens.toy().run(prompt, [Zero("blocks[4:6].img", channels=[3, 17])], seed=0, num_inference_steps=2)
        >>> run.receipt.entries[0].channels
        (3, 17)

        prompt: one or several; or pass ``prompt_embeds=``.
        ops: in the order in which they act at one site.
        seed: an integer gives every prompt the same noise (image j of a prompt gets seed + j); a list, range or array
            is per image. Where several images start from one, each seed says how that one is encoded for its image.
        num_inference_steps: denoising steps; the pipeline's own default if None.
        batch_size: prompts that go through the pipeline together; all by default.
        record: keeps what the transformer answers, for ``prefix=`` of later runs.
        prefix: a recorded run of the same call without edits, from which everything before the first op is taken
            instead of computed. The images are the same, bit for bit.
        call: the pipeline's own arguments. With output_type="latent" the run keeps latents; with any other it keeps
            images as PIL has them. Nothing that is passed in is changed, but for generators, which are used up.

        Every mistake in the arguments or ops raises before the first denoising step. A batch that runs out of GPU
        memory is started again with half the prompts; a warning says which batch_size worked.
        """
        ops, record = list_ops(ops), as_plain(record)
        if not isinstance(record, bool):
            raise PromptError(f"record={record!r} is neither True nor False.")
        if prefix is not None and not isinstance(prefix, Run):
            raise OpError(
                f"prefix= is a {type(prefix).__name__}. It takes a run that was recorded: lens.run(..., record=True)."
            )
        prepared, plan = self._plan(prompt, ops, seed=seed, num_inference_steps=num_inference_steps, **call)
        repeated = record or prefix is not None
        told = refuse_unseeded(self.pipe, repeated=repeated)
        container = reads_container(cost_of(plan, ops, self.anatomy, self.pipe.transformer.dtype))
        state = self.engine.state() if repeated else {}
        if record:
            plan = record_answers(plan, ops, prepared)
            called = call_values(prepared)
        if prefix is not None:
            plan = replay_answers(plan, prefix.recording, prepared, state, self.pipe, self.family)

        def draw(batch: Call, piece: Plan) -> tuple[Store, Any]:
            """The bar of the pipeline shows for a run in one batch only."""
            with nullcontext() if batch.rows == prepared.rows else self.quiet():
                return self.engine.generate(piece.program, piece.payload, batch.keywords(), container())

        random = random_state()
        stores, outputs = zip(*run_in_batches(prepared, plan, batch_size, draw), strict=True)
        if not told:
            tell_draws(self.pipe, random, ops, prepared, repeated=repeated)
        provenance = {**describe(self.pipe, self.family), **self.engine.provenance}
        run = assemble(ops, plan, stores, outputs, make_spec(prepared, ops), provenance)
        if record:
            run.recording = make_recording(called, state, self.pipe, stores[0])
        return run

    @told
    def trace(self, prompt: str | Sequence[str] | None = None, **call: Any) -> Trace:
        """The same as :meth:`run`, written as a ``with`` block that collects ops; it runs when the block ends.

        >>> from dit_lens import DiTLens
        >>> with DiTLens.toy().trace(
        ...     "a big red circle left on a plain blue background", seed=0, num_inference_steps=2
        ... ) as t:
        ...     h = t.read("blocks.-1.img", channels=[5])
        >>> h["blocks.7.img"].grid().shape  # [step, row, h, w, channel]
        torch.Size([2, 1, 16, 16, 1])
        """
        if "ops" in call:
            raise OpError("a trace collects its ops inside the with block. Leave ops= out, or call lens.run.")
        return Trace(partial(self.run, prompt, **call))

    @told
    def run_with_cache(
        self, prompt: str | Sequence[str] | None, names_filter: Pattern = "blocks.*.img", **call: Any
    ) -> tuple[list[Any], Run]:
        """Images, and a run that holds the sites of ``names_filter``: the form TransformerLens users know.

        >>> from dit_lens import DiTLens
        >>> prompt = "a big red circle left on a plain blue background"
        >>> images, run = DiTLens.toy().run_with_cache(
        ...     prompt, lambda name: name.endswith("3.img"), num_inference_steps=2
        ... )
        >>> list(run)
        ['blocks.3.img']

        prompt: one or several.
        names_filter: a pattern of sites, a function fn(name) that says whether a site is meant, or several of these.
        call: as in :meth:`run`; its ``ops`` act as well.
        """
        run = self.run(prompt, [*list_ops(call.pop("ops", ())), Read(names_filter)], **call)
        return run.images, run

    @told
    def run_with_hooks(
        self,
        prompt: str | Sequence[str] | None,
        fwd_hooks: Sequence[tuple[Pattern, Callable[[Tensor, Any], Tensor | None]]],
        **call: Any,
    ) -> Run:
        """Runs with functions ``fn(tensor, hook)`` at sites; what a function returns replaces the tensor.

        ``hook`` has ``name``, ``step``, ``timestep``, ``sigma`` and ``branch``. The same as ``Apply(site, fn=fn)``.

        prompt: one or several.
        fwd_hooks: pairs of a site, as ``names_filter`` of :meth:`run_with_cache`, and a function.
        call: as in :meth:`run`; its ``ops`` act after the functions.
        """
        hooks = [_to_apply(i, hook) for i, hook in enumerate(_list_given(fwd_hooks, "fwd_hooks"))]
        return self.run(prompt, [*hooks, *list_ops(call.pop("ops", ()))], **call)

    def run_spec(self, spec: Mapping[str, Any]) -> Run:
        """Runs what a saved run's ``spec`` describes."""
        ops, call = read_spec(spec)
        return self.run(ops=ops, **call)

    def rerun(self, run: Run) -> Comparison:
        """Runs the same prompt, seed, call and ops as a run, and compares both."""
        if not isinstance(run, Run):
            raise PromptError(f"rerun takes a Run; it was given {type(run).__name__}.")
        return compare(run, self.run_spec(run.spec))

    # nnsight underneath

    @property
    def nnsight(self) -> Any:
        """The stock nnsight model, for traces of your own.

        ``with lens.nnsight.generate(prompt, num_inference_steps=4):`` opens one, inside which ``lens.blocks[3].img``
        reads and assigns. Pass ``num_inference_steps``: nnsight's default is 1.
        """
        return self._follow().model

    @property
    def blocks(self) -> Blocks:
        """The blocks in execution order, for use inside nnsight's own traces: ``lens.blocks[3].img[..., 5] = 0``."""
        model = self._follow().model
        return Blocks(self.anatomy, model)

    @contextmanager
    def quiet(self) -> Generator[None]:
        """Hides the pipeline's own progress bar, and puts it back as it was."""
        with hide_progress_bar(self.pipe):
            yield

    @in_turn
    def _forecast(self, prompt: str | Sequence[str] | None, ops: Sequence[Op], **call: Any) -> Plan:
        """The plan of a run that is not drawn: no random seed is taken from the process for it."""
        with torch.random.fork_rng(devices=[]):
            return self._plan(prompt, ops, **call)[1]

    @in_turn
    def _plan(
        self,
        prompt: str | Sequence[str] | None,
        ops: Sequence[Op],
        *,
        seed: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        **call: Any,
    ) -> tuple[Call, Plan]:
        """The checked call of the pipeline, and the ops laid out for it."""
        families.refuse_unsafe(self.pipe)
        self._follow()
        prepared = prepare_call(
            self.pipe,
            prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            defaults=self.defaults,
            vocabulary=self.vocabulary,
            call=call,
            family=self.family,
        )
        grid = self.anatomy.plan_grid(self.pipe, prepared.arguments)
        check_latents(prepared, grid, self.family)
        tokens = None if grid is None else grid[0] * grid[1]
        time = self.family.pipeline(type(self.pipe)).time
        rule = self.anatomy.time_rule(time, find_noise(self.pipe.scheduler, time, type(self.pipe).__name__))
        measure = self.engine.measure_sigmas(prepared, rule)
        timeline = make_timeline(self.pipe, self.family, rule, prepared.arguments, tokens, measure)

        @cache
        def read_text(prompts: range | None = None) -> StreamText:
            some = prepared if prompts is None else prepared.for_prompts(prompts)
            return self.engine.read_text(self.anatomy, some, timeline.forwards)

        @cache
        def ask_grid() -> tuple[int, ...] | None:
            return self.engine.read_grid(self.anatomy, prepared)

        asked = make_spec(prepared, ())
        others: dict[str, StreamText] = {}

        def read_other_text(other: Mapping[str, Any]) -> StreamText:
            if all(other.get(name) == asked[name] for name in ("prompt", "call")):
                return read_text()
            if (key := repr(other)) not in others:
                others[key] = self._read_other_text(other)
            return others[key]

        outline = Outline(prepared.rows, grid, timeline, read_text, read_other_text, ask_grid, prepared.draws)
        return prepared, compile_plan(ops, self.anatomy, outline)

    def _read_other_text(self, asked: Mapping[str, Any]) -> StreamText:
        """What is in the text stream of another run. asked: "prompt" and "call" of its spec."""
        try:
            call, forwards = prepare_asked(self.pipe, self.family, asked)
        except DitLensError as problem:
            return StreamText(unknown=str(problem))
        return self.engine.read_text(self.anatomy, call, forwards)


def _stored_defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    """A toy's own file, beside its model_index.json; empty for any other pipeline."""
    folder = Path(str(getattr(pipe, "name_or_path", "") or ""))
    file = folder / DEFAULTS_FILE
    if str(folder) in ("", ".") or not file.is_file():
        return {}
    with report_damage(file, "Restore it from a copy, or train the toy again."):
        stored = dict(read_json(file, "the defaults of a toy"))
        words = stored.get("vocabulary")
        return {
            **stored,
            "call": dict(stored.get("call", {})),
            "vocabulary": None if words is None else [word.lower() for word in words],
        }


def _list_given(values: Any, name: str) -> list[Any]:
    """What was given as several, as a list; OpError if it is not several."""
    if isinstance(values, str | bytes | Mapping):
        raise OpError(f"{name}= takes a list; it was given {values!r}, a {type(values).__name__}.")
    return list_items(values, f"{name}=")


def list_ops(ops: Any) -> list[Op]:
    """One op, several or none (None) as a list; what is in it is checked when it is laid out."""
    if ops is None or isinstance(ops, Op):
        return [] if ops is None else [ops]
    return _list_given(ops, "ops")


def _to_apply(number: int, hook: Any) -> Apply:
    if not isinstance(hook, tuple | list) or len(hook) != 2:
        raise OpError(f"fwd_hooks[{number}] is {hook!r}. Give pairs (site, fn), such as ('blocks.3.img', fn).")
    return Apply(hook[0], fn=hook[1])


def _without_options(call: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The arguments of a call without what :meth:`Session.run` takes beside the pipeline's."""
    return {name: value for name, value in call.items() if name not in ("batch_size", "record", "prefix", *others)}
