"""DiTLens: a diffusers pipeline, its family's names, runs over it, and what can be measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from dit_lens.arguments.checks import checked, checked_but
from dit_lens.arguments.signatures import sets
from dit_lens.core.execution.engine import Engine
from dit_lens.core.execution.remote import TIMEOUT, RemoteEngine, pipeline_without_weights
from dit_lens.core.execution.turns import in_turn
from dit_lens.core.jobs import Job, keep_job
from dit_lens.core.plan.batches import run_in_batches
from dit_lens.core.request.call import needs_weights
from dit_lens.core.request.spec import make_spec
from dit_lens.core.request.values import check_device
from dit_lens.core.runs.files import check_pipeline
from dit_lens.core.runs.html import table_html
from dit_lens.core.session import Session, list_ops
from dit_lens.errors import ExecutionError, OpError, StoreError, show
from dit_lens.instruments import activation_store, massive
from dit_lens.instruments.attention import Attention
from dit_lens.instruments.attention_patterns import read_pattern
from dit_lens.instruments.forward import encode_image, forward
from dit_lens.instruments.gradients import Gradients, Through, gradients
from dit_lens.instruments.picture import draw_model
from dit_lens.instruments.summary import summarise_lens
from dit_lens.instruments.text_embeddings import Released, encode_texts, release
from dit_lens.instruments.token_sets import find_token_set
from dit_lens.instruments.top_images import TopImages, find_top_images
from dit_lens.instruments.word_maps import WordMap, word_map
from dit_lens.instruments.x0_lens import X0, read_x0

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.plan.compile import Plan
    from dit_lens.core.request.call import Call
    from dit_lens.core.request.dictionaries import Dictionary
    from dit_lens.core.request.ops import Branch, Op, Pattern, Steps
    from dit_lens.core.request.token_set import TokenSet
    from dit_lens.core.runs.run import Run


class DiTLens(Session):
    """Looks inside a Diffusion Transformer while it draws: read, zero or swap named channels.

    >>> from dit_lens import DiTLens, Read
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
    defaults: arguments for every call (a toy stores its own).
    engine: what carries out runs; nnsight on this machine by default.

    Raises FamilyError when no family describes the pipeline, or when its structure differs from what the family says.
    """

    @classmethod
    @checked
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Loads a pipeline folder or repository with ``DiffusionPipeline.from_pretrained`` and looks inside it.

        path: the folder or repository, or a toy as on the command line: "toy:flux".
        options: passed to diffusers unchanged (``dtype=``, ``revision=``, ``device_map=`` ...).
        """
        from diffusers import DiffusionPipeline

        from dit_lens.toys import find_pipeline

        path = find_pipeline(path)
        check_pipeline(Path(path))
        try:
            pipe = DiffusionPipeline.from_pretrained(str(path), **options)
        except (OSError, ValueError) as problem:
            raise StoreError(f"{path} could not be loaded as a diffusers pipeline: {problem}") from problem
        return cls(pipe)

    @classmethod
    @checked
    def toy(cls, name: str = "flux", *, untrained: bool = False, **options: Any) -> DiTLens:
        """A small trained text-to-image DiT that comes with the library: no download, no GPU.

        It draws scenes such as "a big red circle left on a checkered blue background"; ``lens.vocabulary`` lists its
        words. Other seeds are found in a folder ``toys`` beside the package: "flux-seed1" where ``toys/flux-seed1``
        holds the pipeline that ``dit-lens train-toy flux --seed 1 --out DIR`` left in ``DIR/pipeline``.

        untrained: its twin before training, with the same encoders and autoencoder: whatever both show was not learned.
        """
        from dit_lens import toys

        with toys.quiet_loading():
            lens = cls.from_pretrained(toys.path(name), **options)
            if untrained:
                lens.pipe.transformer = toys.untrained(name).to(lens.pipe.device, lens.pipe.transformer.dtype)
        return lens

    @classmethod
    @checked_but("host", "timeout", "token")
    def remote(
        cls,
        model: str | Path,
        *,
        host: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        timeout: float = TIMEOUT,
    ) -> DiTLens:
        """A lens on a model that an nnsight server holds: no weights are loaded or downloaded here.

        >>> from dit_lens import DiTLens, Read, toys
        >>> lens = DiTLens.remote(toys.path("flux"), host="http://localhost:8001")
        >>> lens.cost("a big red circle left on a plain blue background", Read("blocks.*.img", reduce="|mean|")).bytes
        49152

        Names, checks, plans, costs and errors are made here from the model's configuration; a run is sent to the
        server, and comes back as it would have been made here: images, reads, receipt. What does more to the weights
        (gradients, ``read_x0``, ``read_pattern``, ``encode``) is carried out by a server of ``dit-lens serve``, and
        refused on any other.

        model: a repository, a toy as "toy:flux", or a folder that the server knows by the same name (its last part,
            with ``dit-lens serve``).
        host: the server's address, such as "http://localhost:8001"; ``nnsight.CONFIG.API.HOST`` by default.
        token: what lets in, as ``dit-lens serve`` printed it; ``nnsight.CONFIG.API.APIKEY`` by default.
        revision: of the repository.
        timeout: seconds to wait for a run, from sending it to its result; an hour by default.

        Raises StoreError if there is no such pipeline, ExecutionError if ``host`` is not a valid address.
        """
        from dit_lens.toys import find_pipeline

        stand_in = pipeline_without_weights(find_pipeline(model), revision)
        return cls(stand_in.pipeline, engine=RemoteEngine(stand_in, host, timeout, token))

    @in_turn
    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the pipeline, as ``pipe.to`` does, and returns the lens."""
        needs_weights(self.pipe, "moving a pipeline needs")
        for given in (*args, *(value for name, value in kwargs.items() if name == "device")):
            if isinstance(given, str | int) or type(given).__name__ == "device":
                check_device(given)
        self.pipe.to(*args, **kwargs)
        return self

    # Work that is collected later

    @checked
    @sets("record", "prefix")
    def submit(
        self,
        prompt: str | Sequence[str] | None = None,
        ops: Sequence[Op] | Op = (),
        *,
        batch_size: int | None = None,
        **call: Any,
    ) -> Job:
        """Sends a run to the server, and returns at once with what it can be collected by.

        ``job.status`` says where it is, ``job.result()`` waits for the run, ``job.cancel()`` ends it, and
        ``dit_lens.Job.load(job.id)`` is the job in another process of this machine.

        prompt, ops: as of :meth:`run`.
        batch_size: prompts that go through the pipeline together; each batch is a job of its own there.
        call: as of :meth:`run`, without ``record=`` and ``prefix=``.

        Every mistake in the arguments or ops raises before anything is sent. Raises ExecutionError on a lens whose
        model is on this machine.
        """
        return self.submit_many([{"prompt": prompt, "ops": ops, "batch_size": batch_size, **call}])[0]

    @checked
    def submit_many(self, runs: Sequence[Mapping[str, Any]]) -> list[Job]:
        """Sends several runs, each as :meth:`submit`; nothing is sent unless all of them can be.

        runs: the arguments of each, such as ``[{"prompt": "a dog", "ops": ops, "seed": 0}, ...]``.
        """
        engine = self.engine
        if isinstance(engine, Engine):
            raise ExecutionError(
                "submit sends work to a server, and the model of this lens is on this machine, where a run is made at "
                "once: lens.run(...). A lens on a server is made by DiTLens.remote."
            )
        if odd := [run for run in runs if not isinstance(run, Mapping)]:
            raise OpError(f"runs= takes the arguments of each run as a mapping; one is {show(odd[0])}.")
        planned = [(asked := {**run, "ops": list_ops(run.get("ops", ()))}, *self._plan_to_send(asked)) for run in runs]
        sent: list[Job] = []
        for asked, prepared, plan in planned:
            size = cast("int | None", asked.get("batch_size"))
            parts = run_in_batches(
                prepared, plan, size, lambda some, part: engine.submit(part.program, part.payload, some.keywords())
            )
            names, known = zip(*parts, strict=True)
            spec = make_spec(prepared, asked["ops"])
            sent.append(keep_job(self, names, asked, spec, known=known[0]))
        return sent

    def _plan_to_send(self, asked: Mapping[str, Any]) -> tuple[Call, Plan]:
        """The checked call and plan of a run. asked: its arguments."""
        call = dict(asked)
        if unfit := [name for name in ("record", "prefix") if call.pop(name, None)]:
            raise OpError(f"{unfit[0]}= needs a run that is waited for: lens.run(..., {unfit[0]}=...).")
        call.pop("batch_size", None)
        return self._plan(call.pop("prompt", None), call.pop("ops"), **call)

    # Memory

    @in_turn
    @checked
    @sets("pipe", "prompt", "defaults", "vocabulary")
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

        Words of a prompt (``tokens="circle"``) cannot be found in a run of embeddings.

        prompts: one or several.
        release: whether the encoders are given up afterwards, as by :meth:`release_encoders`.
        device: where they work, such as "cuda" while the pipeline is still on the CPU.
        call: the arguments of the run; those that concern text count.
        """
        if release:
            needs_weights(self.pipe, "releasing text encoders needs")
        texts = encode_texts(self, prompts, device=device, **call)
        if release:
            self.release_encoders()
        return texts

    @in_turn
    def release_encoders(self) -> Released:
        """Takes the text encoders out of the pipeline; what it returns says how much memory that gave back.

        >>> DiTLens.toy().release_encoders()
        released text_encoder, text_encoder_2: ... on cpu
        """
        released = release(self.pipe)
        self.engine = Engine(self.pipe)  # the old one holds on to the encoders
        return released

    # Massive activations

    @checked_but("k")
    @sets("ops", "metric", "through", "branch", "reduce")
    def massive_channels(
        self,
        prompt: str | Sequence[str] | None,
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

        prompt: one or several, over which scores are averaged, or None with embeddings.
        k: how many channels of each site; 12 by default.
        share: instead of k, as few as hold this share of the squared energy.
        mad: instead of k, those whose score lies this many median absolute deviations above the median, so that a site
            may have none.
        score: any reduction that gives one number per channel: "|mean|" (the paper's), "mean|x|", "rms", "max",
            "p99.9"; or "relevance", how much the prediction depends on a channel (gradient x activation).
        site: where channels are looked for.
        steps: which denoising steps count; all by default.
        call: as in :meth:`run`. Conditional branch only.
        """
        return massive.find_massive_channels(
            self, prompt, k, share=share, mad=mad, score=score, site=site, steps=steps, **call
        )

    @checked
    @sets("ops", "share", "mad", "score", "site")
    def subject_mask(
        self,
        prompt: str,
        channels: ChannelSet | Mapping[str, Sequence[int]] | None = None,
        *,
        k: int = 12,
        polarity: str = "distance",
        block: int | None = None,
        steps: Steps = -1,
        **call: Any,
    ) -> np.ndarray:
        """Where the subject is, bool [h, w] on the token grid, by the massive channels of image tokens.

        Warns of a mask that covers most of the image or of its border. How well masks fit: docs/how-to/draw-a-mask.

        prompt: one.
        channels: those to look at, as a set or site -> channels; by default the prompt's own massive ones.
        k: how many of them, where ``channels`` is not given.
        polarity: "distance": tokens that differ from those on the border, in all blocks together, as
            :func:`~dit_lens.analysis.subjects.distance_from_border` says; "border" or "heat": K-means (K = 2) in one
            block, of which the cluster that is not at the border, or the hotter one, is the subject.
        block: one block; by default all of them, or for K-means the one after two thirds of the depth.
        steps: the step whose activations are looked at.
        call: as in :meth:`run`.
        """
        return massive.find_subject_mask(
            self, prompt, channels, k=k, polarity=polarity, block=block, steps=steps, **call
        )

    @checked
    def mask_site(self, block: int | None = None) -> str:
        """The site whose clusters are taken for the subject: after two thirds of the depth, unless a block is named."""
        return massive.mask_site(self, block)

    @checked
    @sets("ops", "share", "mad", "score", "steps")
    def find_tokens(
        self,
        prompt: str,
        kind: str = "registers",
        *,
        over: float | None = None,
        k: int | None = None,
        without: int = 8,
        site: Pattern = "blocks.*.img",
        **call: Any,
    ) -> TokenSet:
        """The tokens that stand out in a run, at every site and step: registers or sinks, for any ``tokens=``.

        >>> from dit_lens import Zero
        >>> lens = DiTLens.toy()
        >>> prompt = "a big red circle left on a plain blue background"
        >>> tokens = lens.find_tokens(prompt, k=2, site="blocks.3.img", seed=0, num_inference_steps=2)
        >>> tokens
        TokenSet of registers: 1 site, 2 steps, 2 tokens
        >>> run = lens.run(prompt, Zero("blocks.3.img", tokens=tokens), seed=0, num_inference_steps=2)
        >>> [(entry.steps, len(entry.tokens)) for entry in run.receipt.entries if entry.branch == "cond"]
        [((0,), 2), ((1,), 2)]

        - registers: tokens of large norm, massive channels left out, which would hide them;
        - sinks: tokens that get much attention, mean over all heads and queries. Where patterns cannot be read (see
          :meth:`read_pattern`) this is refused.

        Warns where no token stands out; ``tokens.peaks`` tells by how much the strongest does.

        prompt: one.
        kind: "registers" or "sinks".
        over: how many times the median of the site and step a token has to reach: 5 for registers, 10 for sinks.
        k: instead, how many tokens of each site and step, the strongest ones.
        without: how many massive channels of each site are left out of the norm.
        site: outputs of blocks, of either stream.
        call: as in :meth:`run`. Conditional branch only, and all steps.
        """
        return find_token_set(self, prompt, kind, over=over, k=k, without=without, site=site, **call)

    # Other measurements

    @checked
    @sets("ops")
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

        prompt: one or several, or None with embeddings.
        site: blocks, with or without ``.x0``; some evenly spaced ones by default.
        steps: four evenly spaced ones by default.
        call: as in :meth:`run`.

        Raises SiteError or OpError, before any denoising, where a family or scheduler has no x0.
        """
        return read_x0(self, prompt, site, steps=steps, **call)

    @in_turn
    @checked
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
        A head of n tokens keeps 4 n^2 bytes for each step and image.

        prompt: one or several, or None with embeddings.
        block: numbers, as in ``blocks.{i}``.
        heads: numbers of heads, negative ones from the end.
        ops: edits under which the pattern is read.
        steps: the last by default.
        branch: "cond" or "uncond".
        call: as in :meth:`run`.

        Raises SiteError before any denoising where a block forms no pattern (linear attention).
        """
        return read_pattern(self, prompt, block, heads=heads, ops=ops, steps=steps, branch=branch, **call)

    @in_turn
    @checked
    @sets("latents", "sigmas", "timesteps", "num_inference_steps")
    def forward(
        self,
        images: Image | Sequence[Image],
        prompt: str | Sequence[str] | None = "",
        ops: Sequence[Op] | Op = (),
        *,
        sigma: float,
        seed: int = 0,
        **call: Any,
    ) -> Run:
        """One forward pass over images of one's own at a noise level: their activations, without drawing them.

        >>> from dit_lens import DiTLens, Read
        >>> lens = DiTLens.toy()
        >>> prompt = "a big red circle left on a plain blue background"
        >>> image = lens.run(prompt, seed=0).images[0]
        >>> run = lens.forward(image, prompt, Read("blocks.5.img"), sigma=0.26)
        >>> run["blocks.5.img"].shape, round(run.sigmas[0], 4)  # [step, row, token, channel]
        (torch.Size([1, 1, 256, 128]), 0.26)

        Latents of the images get noise, x = (1 - sigma) x0 + sigma noise, and pass once, at this very noise level:
        the scheduler's spacing and shift do not act. ``run.images`` are what the model takes the clean images for.
        Without guidance, unless the pipeline always guides. (DIFT, arXiv 2306.03881; DiTF, 2505.18584.)

        images: one or several, of the run's size.
        prompt: one for all or one each; "" says nothing; None with embeddings.
        ops: what is read, and edited.
        sigma: above 0 up to 1, noise alone; about 0.2 to 0.3 is usual for features.
        seed: of the noise, which is the same for every image.
        call: as in :meth:`run`.

        Raises FamilyError, before anything runs, for a sampler that is not Euler's method on a flow, or where a
        pipeline cannot start from latents.
        """
        return forward(self, images, prompt, ops, sigma=sigma, seed=seed, **call)

    @in_turn
    @checked
    @sets("latents")
    def encode_image(
        self, images: Image | Sequence[Image], prompt: str | Sequence[str] | None = "", **call: Any
    ) -> Tensor:
        """The clean latents of images, in the form in which the pipeline takes ``latents=``.

        >>> from PIL import Image
        >>> DiTLens.toy().encode_image(Image.new("RGB", (64, 64), "red")).shape
        torch.Size([1, 256, 16])

        The mode of the autoencoder's posterior. images, prompt, call: as in :meth:`forward`.
        """
        return encode_image(self, images, prompt, **call)

    @in_turn
    @checked
    def word_map(
        self,
        prompt: str | Sequence[str],
        words: str | Sequence[str],
        *,
        method: str = "attention",
        concepts: Sequence[str] = (),
        blocks: int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        ops: Sequence[Op] | Op = (),
        steps: Steps = None,
        **call: Any,
    ) -> WordMap:
        """Where words are in the image: for every image token, how much it has to do with each of them.

        >>> lens = DiTLens.toy()
        >>> prompt = "a big red circle left on a plain blue background"
        >>> found = lens.word_map(prompt, ["circle", "background"], seed=0, num_inference_steps=2)
        >>> found["circle"].shape  # [step, row, h, w]
        torch.Size([2, 1, 16, 16])
        >>> found.mask("circle").shape
        (16, 16)

        ``.figure()`` shows all words, ``.mask(word)`` cuts a map in two, ``.overlay(word)`` lays that over the image;
        ``.tensors[word]`` has every block. Conditional branch only.

        prompt: one or several.
        words: of the prompt, whole as they stand there, one or several tokens each; or a class of tokens, such as
            "pad" or "eos".
        method: "attention" (DAAM, arXiv 2210.04885; Seg4Diff, 2509.18096): the share of an image token's attention that
            goes to the word's tokens, in joint or in cross-attention, mean over heads. "concept" (ConceptAttention,
            2502.04320): what attention puts out for an image token, times what it puts out for the word, softmax over
            the words; at least two are compared.
        concepts: with "concept", words that need not be in the prompt. Each takes a further row of the batch: its text
            reads the image of row 0, which reads nothing of it, so the image stays as it is. Those rows' own images
            mean nothing.
        blocks: numbers, as in ``blocks.{i}``; by default all in which image tokens attend to text.
        heads: numbers of heads, negative ones from the end; all by default.
        ops: edits under which maps are read.
        steps: all by default.
        call: as in :meth:`run`.

        A map keeps 4 bytes per image token, word, block, step and row; no pattern of attention is formed.
        """
        return word_map(
            self,
            prompt,
            words,
            method=method,
            concepts=concepts,
            blocks=blocks,
            heads=heads,
            ops=ops,
            steps=steps,
            **call,
        )

    @checked
    @sets("ops")
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

        prompt: one or several, or None with embeddings.
        site: sites that Apply can write.
        metric: what the images come to, as a torch tensor of one number.
        through: "run", a metric of the final latents, in the pipeline's own form, through all steps that follow; or
            "step", a metric of what the transformer predicts at a step ([b, n, d], before guidance), through that step
            alone; ``value`` is then one number a step.
        steps: those at which gradients are kept; all by default.
        branch: the rows whose tensors count.
        reduce: fn(tensor [b, n, d], its gradient) -> what is kept of both.
        call: as in :meth:`run`.

        The graph keeps what autograd needs of every block from the first site
        on: of one step through "step", of all steps from the first of ``steps`` through "run". Where that does not fit,
        ``pipe.transformer.enable_gradient_checkpointing()`` keeps only what enters each block, and computes it twice.
        """
        return gradients(
            self, prompt, site, metric=metric, through=through, steps=steps, branch=branch, reduce=reduce, **call
        )

    # Dictionaries

    @checked
    @sets("ops", "seed")
    def export(
        self,
        sites: Pattern,
        prompts: str | Sequence[str],
        out: str | Path,
        *,
        tokens: int = 64,
        steps: Steps = None,
        seeds: int | Sequence[int] = 0,
        shard: int = 32_768,
        batch_size: int = 1,
        shuffle: int = 0,
        **call: Any,
    ) -> Path:
        """Writes activations of many images as safetensors files, from which other libraries train dictionaries.

        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> prompts = [f"a big {colour} circle left on a plain blue background" for colour in ("red", "green")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = DiTLens.toy().export("blocks.3.img", prompts, folder, num_inference_steps=2)
        ...     load_file(out / "blocks.3.img" / "00000.safetensors")["activations"].shape  # [token, channel]
        torch.Size([256, 128])

        Every site has a folder of shards, each with "activations" [token, channel] in the type that the model computes
        in, and beside it, as [token], the "prompt" (its index), "seed", "step", "sigma" and "token" that each is of.
        ``activations.json`` says what was asked. Images are drawn in random order, so that a shard is a random sample
        of them, and its tokens are shuffled; read shards in another order in each epoch. Conditional branch only; what
        the pipeline masks is left out. Other images need no more memory: one shard of every site is held at a time.
        The same call goes on where it was interrupted.

        sites: of tokens.
        prompts: one or several.
        out: the folder.
        tokens: how many of every image and step, chosen at random; all where there are fewer.
        steps: all by default.
        seeds: every prompt is drawn from each of them; each is named once, and so is a prompt.
        shard: tokens of a shard, about.
        batch_size: images that are drawn together, and share their choice of image tokens.
        shuffle: the seed of whatever is random here.
        call: as in :meth:`run`; latents are not decoded unless ``output_type`` says so.

        Raises StoreError where the folder holds another export or a damaged shard, or the disk is too small.
        """
        return activation_store.export(
            self,
            sites,
            prompts,
            Path(out),
            tokens=tokens,
            steps=steps,
            seeds=seeds,
            shard=shard,
            batch_size=batch_size,
            shuffle=shuffle,
            **call,
        )

    @checked
    @sets("ops", "seed")
    def top_images(
        self,
        dictionary: Dictionary,
        prompts: str | Sequence[str],
        site: str,
        *,
        features: int | Sequence[int],
        k: int = 8,
        steps: Steps = -1,
        seeds: int | Sequence[int] = 0,
        batch_size: int = 1,
        **call: Any,
    ) -> TopImages:
        """The images, and the places in them, in which features of a dictionary are strongest.

        >>> import torch
        >>> from dit_lens.dictionaries import Dictionary
        >>> channels = Dictionary(torch.eye(128), torch.zeros(128), torch.eye(128), torch.zeros(128))
        >>> prompts = [f"a big {colour} circle left on a plain blue background" for colour in ("red", "green")]
        >>> found = DiTLens.toy().top_images(channels, prompts, "blocks.3.img", features=[5], num_inference_steps=2)
        >>> len(found[5]), found[5][0].heat.shape  # images, and [h, w]
        (2, (16, 16))

        ``.figure()`` is a sheet of them, ``.table`` has their numbers. Which features are active at all tells
        ``ReadFeatures(site, dictionary, reduce="max")``.

        dictionary: from :func:`dit_lens.dictionaries.load`.
        prompts: those that are drawn.
        site: of image tokens.
        features: one or several, by number.
        k: how many images of each.
        steps: at which features are read; the last by default.
        seeds: every prompt is drawn from each of them; each is named once, and so is a prompt.
        batch_size: images that are drawn together.
        call: as in :meth:`run`. Conditional branch only.
        """
        return find_top_images(
            self,
            dictionary,
            prompts,
            site,
            features=features,
            k=k,
            steps=steps,
            seeds=seeds,
            batch_size=batch_size,
            **call,
        )

    def __repr__(self) -> str:
        lines = [f"  {head:<9}{text}" for head, text in summarise_lens(self)]
        return "\n".join([f"DiTLens on {type(self.pipe).__name__}", *lines])

    def _repr_html_(self) -> str:
        head = f"<b>DiTLens</b> on {type(self.pipe).__name__}"
        return f"<div>{head}{draw_model(self)}{table_html(summarise_lens(self))}</div>"
