"""DiTLens: a diffusers pipeline, its family's names, and runs over it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens import families
from dit_lens.core.execution.assemble import assemble
from dit_lens.core.execution.engine import Engine
from dit_lens.core.plan.batches import run_in_batches
from dit_lens.core.plan.compile import Plan, compile_plan
from dit_lens.core.plan.cost import Cost, cost_of, reads_container
from dit_lens.core.plan.replay import record_answers, replay_answers
from dit_lens.core.plan.selection import Batch
from dit_lens.core.request.call import Call, needs_weights, prepare_call
from dit_lens.core.request.ops import Apply, Op, Read, from_json, to_json
from dit_lens.core.request.text_tokens import TextTokens
from dit_lens.core.request.timeline import Timeline, make_timeline
from dit_lens.core.runs.files import check_pipeline, read_json
from dit_lens.core.runs.html import _table
from dit_lens.core.runs.provenance import describe, plain, unsaved
from dit_lens.core.runs.run import Tape
from dit_lens.core.trace import Trace
from dit_lens.errors import PromptError, SiteError, StoreError
from dit_lens.families.checks import Check, check
from dit_lens.families.sites import Site, match

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.execution.blocks import Blocks
    from dit_lens.core.execution.remote import RemoteEngine
    from dit_lens.core.request.ops import Branch, Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.families import Guidance
    from dit_lens.instruments.attention_patterns import Attention
    from dit_lens.instruments.gradients import Gradients, Through
    from dit_lens.instruments.text_embeddings import Released
    from dit_lens.instruments.x0_lens import X0

DEFAULTS_FILE = "dit_lens.json"


class DiTLens:
    """Looks inside a Diffusion Transformer while it draws: read, zero or swap named channels.

    >>> lens = DiTLens.toy()
    >>> run = lens.run(
    ...     "a big red circle left on a plain blue background",
    ...     [Read("blocks.*.img", reduce="|mean|")],
    ...     seed=0,
    ...     num_inference_steps=2,
    ... )
    >>> run["blocks.3.img"].shape  # [step, row, channel]
    torch.Size([2, 1, 128])

    pipe: a diffusers pipeline with a transformer, on any device; LoRA and quantisation are yours to set up.
    defaults: arguments for every call (a toy stores its own). Raises FamilyError when no family describes the pipeline
    or when its structure differs from what the family says.
    """

    def __init__(self, pipe: DiffusionPipeline, *, defaults: Mapping[str, Any] | None = None):
        self.pipe = pipe
        self._describe()
        stored = _stored_defaults(pipe)
        self.defaults: dict[str, Any] = dict(stored.get("call", {}) if defaults is None else defaults)
        self.vocabulary: list[str] | None = stored.get("vocabulary")
        self.engine: Engine | RemoteEngine = Engine(pipe)

    def _describe(self) -> None:
        self.family = families.find(self.pipe)
        self.anatomy = families.Anatomy(self.family, self.pipe.transformer)
        self.checks: list[Check] = check(self.anatomy)

    def _follow(self) -> Engine | RemoteEngine:
        """Looks again at a pipeline whose modules were exchanged: by LoRA, or another transformer."""
        if self.engine.stale:
            self._describe()
            self.engine.follow()
        return self.engine

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> DiTLens:
        """Loads a pipeline folder or repository with ``DiffusionPipeline.from_pretrained`` and looks inside it.

        options: passed to diffusers unchanged (``dtype=``, ``revision=``, ``device_map=`` ...).
        """
        from diffusers import DiffusionPipeline

        check_pipeline(Path(path))
        try:
            pipe = DiffusionPipeline.from_pretrained(str(path), **options)
        except (OSError, ValueError) as problem:
            raise StoreError(f"{path} could not be loaded as a diffusers pipeline: {problem}") from problem
        return cls(pipe)

    @classmethod
    def toy(cls, name: str = "flux", *, untrained: bool = False, **options: Any) -> DiTLens:
        """A small trained text-to-image DiT that comes with the library: no download, no GPU.

        It draws scenes such as "a big red circle left on a checkered blue background"; ``lens.vocabulary`` lists its
        words. A checkout of the repository has two more of the first, "flux-seed1" and "flux-seed2", trained from other
        seeds.

        untrained: its twin before training, with the same encoders and autoencoder: what both show was not learnt.
        """
        from dit_lens import toys

        with toys.quiet_loading():
            lens = cls.from_pretrained(toys.path(name), **options)
            if untrained:
                lens.pipe.transformer = toys.untrained(name).to(lens.pipe.device, lens.pipe.transformer.dtype)
        return lens

    @classmethod
    def remote(cls, model: str | Path, *, host: str | None = None, revision: str | None = None) -> DiTLens:
        """A lens on a model that an nnsight server holds: no weights are loaded or downloaded here.

        >>> from dit_lens import toys
        >>> lens = DiTLens.remote(toys.path("flux"), host="http://localhost:8001")
        >>> lens.cost("a big red circle left on a plain blue background", Read("blocks.*.img", reduce="|mean|")).bytes
        49152

        Names, checks, plans, costs and errors are made here from the model's configuration; a run is sent to the
        server, and comes back as it would have been made here: images, reads, receipt. What has to have the weights
        at hand (gradients, ``read_x0``, ``read_pattern``, ``encode``) is refused.

        model: a repository, or a folder that the server knows by the same name. host: the server's address, such as
        "http://localhost:8001"; ``nnsight.CONFIG.API.HOST`` by default, whose key is used as well. Raises StoreError
        where there is no such pipeline, ExecutionError where an address is none.
        """
        from dit_lens.core.execution.remote import RemoteEngine, pipeline_without_weights

        hollowed = pipeline_without_weights(model, revision)
        lens = cls(hollowed.pipeline)
        lens.engine = RemoteEngine(hollowed, host)
        return lens

    def to(self, *args: Any, **kwargs: Any) -> DiTLens:
        """Moves the pipeline, as ``pipe.to`` does, and returns the lens."""
        needs_weights(self.pipe, "moving a pipeline needs")
        self.pipe.to(*args, **kwargs)
        return self

    # What there is

    def sites(self, pattern: Pattern = "*") -> list[str]:
        """The names a pattern means on this model, in the order they are computed; "*" lists them all.

        >>> DiTLens.toy().sites("double[0:2].{img,txt}")
        ['blocks.0.txt', 'blocks.0.img', 'blocks.1.txt', 'blocks.1.img']
        """
        self._follow()
        found: Iterable[Site] = (
            self.anatomy.sites
            if pattern == "*"
            else match(pattern, self.anatomy.sites, self.anatomy.stacks, self.anatomy.why_not)
        )
        return [site.name for site in found]

    def heads(self, site: str) -> list[range]:
        """The channels of every head at ``attn.q``, ``attn.k``, ``attn.v`` or ``attn.z`` of a block, head by head.

        >>> lens = DiTLens.toy()
        >>> lens.heads("blocks.3.img.attn.z")
        [range(0, 32), range(32, 64), range(64, 96), range(96, 128)]
        >>> from dit_lens import Zero
        >>> silent = Zero("blocks.3.img.attn.z", channels=lens.heads("blocks.3.img.attn.z")[2])

        Where queries share keys and values, ``attn.k`` and ``attn.v`` have fewer heads. Raises SiteError elsewhere.
        """
        names = self.sites(site)
        if len(names) != 1:
            raise SiteError(f"{site!r} means {len(names)} sites. Ask for the heads of one, such as {names[0]!r}.")
        return self.anatomy.heads(self.anatomy.site(names[0]))

    def to_str_tokens(self, prompt: str) -> list[str]:
        """The text stream's tokens as strings, in order; padding shows as the tokenizer's own mark."""
        return self._text.names(prompt)

    # Running

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

        >>> from dit_lens import Zero
        >>> prompt = "a big red circle left on a plain blue background"
        >>> run = DiTLens.toy().run(prompt, [Zero("blocks[4:6].img", channels=[3, 17])], seed=0, num_inference_steps=2)
        >>> run.receipt.entries[0].channels
        (3, 17)

        prompt: one or several; or pass ``prompt_embeds=``. ops: in the order in which they act at one site.
        seed: an integer gives every prompt the same noise (image j of a prompt gets seed + j); a list is per image.
        batch_size: prompts that go through the pipeline together; all by default. call: the pipeline's own arguments.
        record: keeps what the transformer answers, for prefix=: a recorded run of the same call without edits, from
        which everything before the first op is taken instead of computed. The images are the same, bit for bit.

        Every mistake in the arguments or ops raises before the first denoising step. A batch that runs out of GPU
        memory is started again with half the prompts; a warning says which batch_size worked.
        """
        ops = [ops] if isinstance(ops, Op) else list(ops)
        prepared, when, plan = self._plan(prompt, ops, seed=seed, num_inference_steps=num_inference_steps, **call)
        place = reads_container(cost_of(plan, ops, self.anatomy, self.pipe.transformer.dtype))
        if record:
            plan = record_answers(plan, ops)
        if prefix is not None:
            plan = replay_answers(plan, prefix.tape, prepared, self.pipe, self.family)

        def draw(part: Call, piece: Plan) -> tuple[dict[str, Any], Any]:
            """The bar of the pipeline shows for a run in one batch only."""
            with nullcontext() if part.rows == prepared.rows else self.quiet():
                return self.engine.generate(piece.program, piece.given, part.keywords(), place())

        stores, outputs = zip(*run_in_batches(prepared, plan, batch_size, draw), strict=True)
        provenance = {**describe(self.pipe, self.family), **self.engine.provenance}
        run = assemble(ops, plan, when, stores, outputs, self._spec(prepared, ops), provenance)
        if record:
            run.tape = Tape(prepared, self.pipe.transformer, stores[0]["tape"])
        return run

    def run_spec(self, spec: Mapping[str, Any]) -> Run:
        """Runs what a saved run's ``spec`` describes."""
        if unsaved(spec):
            raise PromptError(
                "this run was made with values that JSON cannot keep, so it cannot be repeated from its spec: "
                f"{', '.join(_unkept(spec))}. Call lens.run again with them."
            )
        call = {name: value for name, value in spec["call"].items() if name != "num_inference_steps"}
        ops = [from_json(op) for op in spec["ops"]]
        steps = spec["call"]["num_inference_steps"]
        return self.run(spec["prompt"], ops, seed=spec["seed"], num_inference_steps=steps, **call)

    def trace(self, prompt: str | Sequence[str] | None = None, **call: Any) -> Trace:
        """The same as :meth:`run`, written as a ``with`` block that collects ops; it runs when the block ends.

        >>> with DiTLens.toy().trace(
        ...     "a big red circle left on a plain blue background", seed=0, num_inference_steps=2
        ... ) as t:
        ...     h = t.read("blocks.-1.img", channels=[5])
        >>> h["blocks.7.img"].grid().shape  # [step, row, h, w, channel]
        torch.Size([2, 1, 16, 16, 1])
        """
        return Trace(self, prompt, call)

    def cost(self, prompt: str | Sequence[str] | None = None, ops: Sequence[Op] | Op = (), **call: Any) -> Cost:
        """How many bytes the reads of a run would keep; nothing is run. Takes what :meth:`run` takes."""
        ops = [ops] if isinstance(ops, Op) else list(ops)
        call.pop("batch_size", None)
        *_, plan = self._plan(prompt, ops, **call)
        return cost_of(plan, ops, self.anatomy, self.pipe.transformer.dtype)

    def run_with_cache(
        self, prompt: str | Sequence[str], names_filter: Pattern = "blocks.*.img", **call: Any
    ) -> tuple[list[Any], Run]:
        """Images, and a run that holds the sites of ``names_filter``: the form TransformerLens users know."""
        run = self.run(prompt, [Read(names_filter)], **call)
        return run.images, run

    def run_with_hooks(
        self,
        prompt: str | Sequence[str],
        fwd_hooks: Sequence[tuple[str, Callable[[Tensor, Any], Tensor | None]]],
        **call: Any,
    ) -> Run:
        """Runs with functions ``fn(tensor, hook)`` at sites; what a function returns replaces the tensor.

        ``hook`` has ``name``, ``step``, ``timestep``, ``sigma`` and ``branch``. The same as ``Apply(site, fn=fn)``.
        """
        return self.run(prompt, [Apply(name, fn=fn) for name, fn in fwd_hooks], **call)

    # Memory

    def encode(
        self,
        prompts: str | Sequence[str],
        *,
        release: bool = False,
        device: str | torch.device | None = None,
        **call: Any,
    ) -> dict[str, Any]:
        """The text embeddings of prompts, as arguments for :meth:`run`: the same images, without the text encoders.

        >>> lens = DiTLens.toy()
        >>> texts = lens.encode("a big red circle left on a plain blue background", release=True)
        >>> lens.run(**texts, seed=0, num_inference_steps=2).images[0].size
        (64, 64)

        release: whether the encoders are given up afterwards, as by :meth:`release_encoders`. device: where they work,
        such as "cuda" while the pipeline is still on the CPU. call: the arguments of the run; those that concern text
        count. Words of a prompt (``tokens="circle"``) cannot be found in a run of embeddings.
        """
        from dit_lens.instruments.text_embeddings import encode_prompts

        texts = encode_prompts(
            self.pipe, prompts, device=device, defaults=self.defaults, vocabulary=self.vocabulary, **call
        )
        if release:
            self.release_encoders()
        return texts

    def release_encoders(self) -> Released:
        """Takes the text encoders out of the pipeline; what it returns says how much memory that gave back.

        >>> DiTLens.toy().release_encoders()
        released text_encoder, text_encoder_2: ... on cpu
        """
        from dit_lens.instruments.text_embeddings import release

        released = release(self.pipe)
        self.engine = Engine(self.pipe)  # the old one holds on to the encoders
        return released

    # Massive activations

    def massive_channels(
        self,
        prompt: str | Sequence[str],
        k: int | None = None,
        *,
        share: float | None = None,
        mad: float | None = None,
        score: str = "|mean|",
        site: Pattern = "blocks.*.img",
        steps: Steps = None,
        **call: Any,
    ) -> ChannelSet:
        """The k channels of each site with the largest score, averaged over prompts and steps (arXiv 2605.13974).

        >>> massive = DiTLens.toy().massive_channels(
        ...     "a big red circle left on a plain blue background", k=4, seed=0, num_inference_steps=2
        ... )
        >>> len(massive["blocks.3.img"])
        4

        k: 12 by default. Instead of k, share: as few as hold this share of the squared energy; or mad: those whose
        score lies that many median absolute deviations above the median, so that a site may have none.
        score: any reduction that gives one number per channel: "|mean|" (the paper's), "mean|x|", "rms", "max",
        "p99.9". steps: which denoising steps count; all by default. Conditional branch only.
        """
        from dit_lens.analysis.channels import rule_of

        ops = [Read(site, reduce=score, steps=steps, name="score"), Read(site, reduce="rms", steps=steps, name="rms")]
        widths = {name: self.anatomy.channels(self.anatomy.site(name)) for name in self.sites(site)}
        rule = rule_of(widths, k, share, mad)
        run = self.run(prompt, ops, **call)
        scores = {name: value.float().mean((0, 1)) for name, value in run["score"].items()}
        energy = {name: value.float().square().mean((0, 1)) for name, value in run["rms"].items()}
        return rule(scores, energy, score=score)

    def subject_mask(
        self,
        prompt: str,
        channels: ChannelSet | None = None,
        *,
        k: int = 12,
        block: int | None = None,
        steps: Steps = -1,
        **call: Any,
    ) -> np.ndarray:
        """Where the subject is, bool [h, w] on the token grid: K-means (K = 2) of one block's massive channels.

        block: by default the one after two thirds of the depth. steps: the step whose activations are clustered.
        """
        from dit_lens.analysis.clusters import segment

        channels = self.massive_channels(prompt, k, **call) if channels is None else channels
        name = self.mask_site(block)
        run = self.run(prompt, [Read(name, channels=channels, steps=steps)], **call)
        return segment(run[name][-1, 0].float().numpy(), run.grid).mask

    def mask_site(self, block: int | None = None) -> str:
        """The site whose clusters are taken for the subject: after two thirds of the depth, unless a block is named."""
        (name,) = self.sites(f"blocks.{(2 * self.anatomy.depth) // 3 if block is None else block}.img")
        return name

    def read_x0(
        self, prompt: str | Sequence[str] | None, site: Pattern | None = None, *, steps: Steps = None, **call: Any
    ) -> X0:
        """The image each block would draw if it were the last: the logit lens, for diffusion.

        >>> lens = DiTLens.toy()
        >>> prompt = "a big red circle left on a plain blue background"
        >>> found = lens.read_x0(prompt, "blocks[6:8].img", seed=0, num_inference_steps=2)
        >>> list(found.images), found.images["x0"][-1][0].size
        (['blocks.6.img.x0', 'blocks.7.img.x0', 'x0'], (64, 64))

        Image tokens go through the model's own final norm and projection, with the call's own conditioning; from the
        prediction follow clean latents (x - sigma v for a flow), which the autoencoder draws. "x0" is the model's own,
        equal to the last block's. Conditional branch only, so guidance does not show. ``.figure()`` is the sheet.

        site: blocks, with or without ``.x0``; some evenly spaced ones by default. steps: four evenly spaced by default.
        Raises SiteError or OpError, before any denoising, where a family or scheduler has no x0.
        """
        from dit_lens.instruments.x0_lens import read_x0

        return read_x0(self, prompt, site, steps=steps, **call)

    def read_pattern(
        self,
        prompt: str | Sequence[str] | None,
        block: int | Sequence[int],
        *,
        heads: int | Sequence[int],
        ops: Sequence[Op] | Op = (),
        steps: Steps = -1,
        branch: str = "cond",
        **call: Any,
    ) -> Attention:
        """How image and text tokens of chosen blocks and heads attend to each other.

        >>> found = DiTLens.toy().read_pattern(
        ...     "a big red circle left on a plain blue background", 5, heads=[0, 2], seed=0, num_inference_steps=2
        ... )
        >>> found.between(5, "img", "txt").shape  # [step, row, head, image token, text token]
        torch.Size([1, 1, 2, 256, 16])

        Computed from the q and k that attention is called with, after norms and rotary embedding; every row sums to 1.
        A head of n tokens keeps 4 n^2 bytes for each step and image. block: numbers, as in ``blocks.{i}``. ops: edits
        under which the pattern is read. steps: the last by default. Raises SiteError before any denoising where a block
        forms no pattern (linear attention).
        """
        from dit_lens.instruments.attention_patterns import read_pattern

        return read_pattern(self, prompt, block, heads=heads, ops=ops, steps=steps, branch=branch, **call)

    def gradients(
        self,
        prompt: str | Sequence[str] | None,
        site: Pattern,
        *,
        metric: Callable[[Tensor], Tensor],
        through: Through = "run",
        steps: Steps = None,
        branch: Branch = "cond",
        reduce: Callable[[Tensor, Tensor], Tensor] | None = None,
        **call: Any,
    ) -> Gradients:
        """The gradient of a number with respect to every tensor that passes through sites.

        >>> found = DiTLens.toy().gradients(
        ...     "a big red circle left on a plain blue background",
        ...     "blocks[2:4].img",
        ...     metric=lambda latents: latents.square().mean(),
        ...     seed=0,
        ...     num_inference_steps=2,
        ... )
        >>> found["blocks.3.img"].shape, found.value.shape  # [step, row, token, channel]
        (torch.Size([2, 1, 256, 128]), torch.Size([]))

        metric: what the images come to, as a torch tensor of one number. through: "run", a metric of the final
        latents, in the pipeline's own form, through all steps that follow; or "step", a metric of what the transformer
        predicts at a step ([b, n, d], before guidance), through that step alone; ``value`` is then one number a step.
        branch: the rows whose tensors count. reduce: fn(tensor [b, n, d], its gradient) -> what is kept of both.

        Sites are those that Apply can write. The graph keeps what autograd needs of every block from the first site
        on: of one step through "step", of all steps from the first of ``steps`` through "run". Where that does not fit,
        ``pipe.transformer.enable_gradient_checkpointing()`` keeps only what enters each block, and computes it twice.
        Other arguments are those of :meth:`run`.
        """
        from dit_lens.instruments.gradients import gradients

        return gradients(
            self, prompt, site, metric=metric, through=through, steps=steps, branch=branch, reduce=reduce, **call
        )

    def planned(self, prompt: str | Sequence[str] | None = None, **call: Any) -> tuple[Timeline, Plan]:
        """The steps and branches of a run, and its empty plan; nothing is run."""
        call.pop("batch_size", None)
        _, when, plan = self._plan(prompt, (), **call)
        return when, plan

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
        from dit_lens.core.execution.blocks import Blocks

        model = self._follow().model
        return Blocks(self.anatomy, model)

    @contextmanager
    def quiet(self) -> Generator[None]:
        """Without the pipeline's own progress bar, which is put back as it was."""
        attributes, name = vars(self.pipe), "_progress_bar_config"
        before = {name: attributes[name]} if name in attributes else {}
        self.pipe.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            attributes.pop(name, None)
            attributes.update(before)

    def _plan(
        self,
        prompt: str | Sequence[str] | None,
        ops: Sequence[Op],
        *,
        seed: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        **call: Any,
    ) -> tuple[Call, Timeline, Plan]:
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
        )
        grid = self.anatomy.planned_grid(self.pipe, prepared.arguments)
        when = make_timeline(self.pipe, self.family, prepared.arguments, None if grid is None else grid[0] * grid[1])
        batch = Batch(prepared.rows, grid, self._text.count(prepared), partial(self._text.find, prepared))
        return prepared, when, compile_plan(ops, self.anatomy, when, batch)

    def _spec(self, call: Call, ops: Sequence[Op]) -> dict[str, Any]:
        described = [
            {"unsaved": repr(op)} if isinstance(op, Apply) or _from_unsaved_run(op) else to_json(op) for op in ops
        ]
        seed = None if call.seeds is None else list(call.seeds)
        prompt = None if call.prompts is None else list(call.prompts)
        return {"prompt": prompt, "seed": seed, "call": plain(call.arguments), "ops": described}

    @property
    def _text(self) -> TextTokens:
        return TextTokens(self.pipe, self.family, self.defaults)

    def __repr__(self) -> str:

        return lens_text(self)

    def _repr_html_(self) -> str:

        return lens_html(self)


def _stored_defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    """A toy's own file, beside its model_index.json; empty for any other pipeline."""
    folder = Path(str(getattr(pipe, "name_or_path", "") or ""))
    file = folder / DEFAULTS_FILE
    return read_json(file, "the defaults of a toy") if str(folder) not in ("", ".") and file.is_file() else {}


def _unkept(spec: Mapping[str, Any]) -> list[str]:
    """What of a spec was not kept, by name."""
    arguments = [f"{name}=" for name, value in spec["call"].items() if unsaved(value)]
    return [*arguments, *(f"ops[{i}]" for i, op in enumerate(spec["ops"]) if unsaved(op))]


def _from_unsaved_run(op: Op) -> bool:
    return any(getattr(getattr(op, name, None), "folder", "") is None for name in ("source", "mean"))


STREAM_WORDS = {"img": "img (the image's tokens)", "txt": "txt (the prompt's)"}


def lens_lines(lens: DiTLens) -> list[tuple[str, str]]:
    """What a person wants to know of a lens, as (heading, text)."""
    anatomy, family = lens.anatomy, lens.family
    stacks = [f"{name} {blocks.start}-{blocks.stop - 1}" for name, blocks in anatomy.stacks.items() if len(blocks)]
    grid = anatomy.planned_grid(lens.pipe, lens.defaults)
    embedded = family.embedded is not None and bool(lens.pipe.transformer.config[family.embedded])
    guidance = guidance_text(family.guidance_of(lens.pipe))
    streams = [stream for stream in STREAM_WORDS if any(site.stream == stream for site in anatomy.sites)]
    inside = list(dict.fromkeys(site.point.split(".")[0] for site in anatomy.sites if site.block is not None))
    size = sum(parameter.numel() for parameter in lens.pipe.transformer.parameters())
    return [
        ("family", f"{family.name} ({type(lens.pipe.transformer).__name__}, {size / 1e6:.4g} M parameters)"),
        ("blocks", f"{anatomy.depth}: {', '.join(stacks)}"),
        ("width", f"{anatomy.width} channels; a predicted token has {anatomy.out_width}"),
        ("streams", ", ".join(STREAM_WORDS[stream] for stream in streams)),
        (
            "sites",
            f"blocks.0-{anatomy.depth - 1}.{{{','.join(streams)}}}[.{'|'.join(inside)}], final.img, velocity, x0",
        ),
        ("grid", f"{grid[0]} x {grid[1]} image tokens by default" if grid else "known when it runs"),
        ("guidance", ("a guidance scale is embedded; " if embedded else "") + guidance),
        ("checks", f"{', '.join(check.name for check in lens.checks)} passed"),
        ("on", lens.engine.place),
    ]


def guidance_text(guidance: Guidance | None) -> str:
    """How the branches run, in words."""
    if guidance is None:
        return "one conditional call per step"
    calls = ", then ".join(" and ".join(call) + (" rows" if len(call) > 1 else "") for call in guidance.calls)
    when = "always" if guidance.scale is None else f"{guidance.scale} > {guidance.above:g}"
    return f"{when}{' with a negative prompt' if guidance.negative else ''} runs {calls}"


def lens_text(lens: DiTLens) -> str:
    """A lens as a terminal shows it."""
    return "\n".join(
        [f"DiTLens on {type(lens.pipe).__name__}", *(f"  {head:<9}{text}" for head, text in lens_lines(lens))]
    )


def lens_html(lens: DiTLens) -> str:
    """A lens as a notebook shows it."""
    return f"<b>DiTLens</b> on {type(lens.pipe).__name__}{_table(lens_lines(lens))}"
