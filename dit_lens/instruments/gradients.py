"""Gradients of a number with respect to what passes through sites, and what they say of a swap before it is made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dit_lens.arguments.checks import checked
from dit_lens.arguments.functions import name_of, told_end
from dit_lens.arguments.mappings import NamedMapping
from dit_lens.arguments.saving import saved_by
from dit_lens.arguments.signatures import sets
from dit_lens.core.execution.assemble import output_images
from dit_lens.core.execution.at_weights import Probe
from dit_lens.core.plan.batches import graph_too_large
from dit_lens.core.request.division import refuse_several_images
from dit_lens.core.request.ops import Apply
from dit_lens.errors import ExecutionError, FamilyError, OpError, PromptError, SiteError, check_choice, nearest, show
from dit_lens.families.sources import find_without_gradient

if TYPE_CHECKING:
    from torch import nn

    from dit_lens.core.execution.engine import Engine
    from dit_lens.core.request.ops import Branch, Op, Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.core.session import Session

Through = Literal["run", "step"]
THROUGH = ("run", "step")
# fn(x [m, ...], source [...], target [...]) -> [m], of latents or of predictions
PairMetric = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Gradients(NamedMapping[Tensor]):
    """What :meth:`dit_lens.DiTLens.gradients` found: a mapping site -> [s, b, n, d].

    value: the metric, one number; through one step [s], one for each.
    tensors: site -> gradient.
    steps: their indices.
    run: the run itself.
    """

    value: Tensor
    tensors: dict[str, Tensor] = field(repr=False)
    steps: tuple[int, ...]
    run: Run = field(repr=False)

    save = saved_by("Its run has, found.run.save(folder); its numbers are found.tensors, site -> tensor.")

    def __getitem__(self, site: str) -> Tensor:
        if not isinstance(site, str) or site not in self.tensors:
            raise SiteError(f"no gradient was taken at {show(site)}.{nearest(site, self.tensors)}")
        return self.tensors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True)
class Attribution:
    """What a swap of each channel, or each token, would do to the metric, to first order.

    channels: site -> [s, d], summed over tokens.
    tokens: site -> [s, n], summed over channels.
    steps: their indices.
    """

    channels: dict[str, Tensor] = field(repr=False)
    tokens: dict[str, Tensor] = field(repr=False)
    steps: tuple[int, ...]


def gradients(
    lens: Session,
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
    """See :meth:`dit_lens.DiTLens.gradients`."""
    return take_gradients(
        lens, prompt, site, (), metric=metric, through=through, steps=steps, branch=branch, reduce=reduce, **call
    )


def take_gradients(
    lens: Session,
    prompt: str | Sequence[str] | None,
    site: Pattern,
    beside: Sequence[Op],
    *,
    metric: Callable[[Tensor], Tensor],
    through: Through = "run",
    steps: Steps = None,
    branch: Branch = "cond",
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None,
    **call: Any,
) -> Gradients:
    """The gradients of a run under edits. beside: the edits. Others: as in :meth:`dit_lens.DiTLens.gradients`."""
    check_choice(through, THROUGH, "value of through")
    if not isinstance(branch, str) or branch not in ("cond", "uncond"):
        raise OpError(f"branch={show(branch)}: gradients are of one branch, 'cond' or 'uncond'.")
    if odd := [name for name in ("batch_size", "record", "prefix") if name in call]:
        raise PromptError(f"{odd[0]}= has no meaning here: the graph is that of one batch. Leave it out.")
    if call.pop("output_type", "latent") != "latent":
        raise PromptError("output_type= must be 'latent' here: images have no gradient. Leave it out.")
    check_differentiable(lens)
    if through == "run":
        check_latents(lens)
    lens.engine.check_weights("gradients need")
    graph = Graph(metric, reduce, through)
    # An op acts once on a tensor of two names, and here each name has a gradient.
    ops: list[Op] = [*beside, *(Apply(one, fn=graph.keep, steps=steps, branch=branch) for one in lens.sites(site))]
    if through == "step":
        ops.append(Apply("velocity", fn=graph.close, steps=steps, branch=branch))
    with lens.engine.within(graph):
        run = lens.run(prompt, ops, output_type="latent", **call)
    if through == "run" and run.latents is not None:
        run.latents = run.latents.detach()
    value = torch.stack(graph.values) if through == "step" else graph.values[0]
    sites = dict.fromkeys(site for site, _ in graph.taken)
    taken = tuple(sorted({step for _, step in graph.taken}))
    return Gradients(value, {s: torch.stack([graph.taken[s, step] for step in taken]) for s in sites}, taken, run)


@checked
@sets("ops", "prompt", "reduce")
def attribution(
    lens: Session,
    source: str,
    target: str,
    site: Pattern = "blocks.*.img",
    *,
    metric: PairMetric | None = None,
    through: Through = "run",
    steps: Steps = None,
    branch: Branch = "cond",
    **call: Any,
) -> Attribution:
    """Attribution patching: (x_source - x_target) d metric / d x at the target, for every element at once.

    >>> from dit_lens import DiTLens
    >>> found = attribution(
    ...     DiTLens.toy(),
    ...     "a big red circle left on a plain blue background",
    ...     "a small white cross right on a plain green background",
    ...     seed=0,
    ...     num_inference_steps=2,
    ... )
    >>> found.channels["blocks.3.img"].shape, found.tokens["blocks.3.img"].shape
    (torch.Size([2, 128]), torch.Size([2, 256]))

    The sum over chosen elements estimates what swapping them would add to the metric; one run and one backward pass
    stand for a run for every swap. It is of first order, and sums over steps or over blocks in series count twice what
    reaches the later ones through the earlier ones.

    Source: Nanda 2023, "Attribution patching"; Syed, Rager & Conmy, arXiv 2310.10348.

    source, target: prompts; what is attributed is the way from the target to the source.
    site: pattern of sites that a swap can write.
    metric: fn(x [m, ...], source [...], target [...]) -> [m]; :func:`nearness` by default. Through the run x is the
      final latents, through one step what the transformer predicts there.
    through, steps, branch, call: as in :meth:`dit_lens.DiTLens.gradients`.
    """
    refuse_several_images({**lens.defaults, **call}, "source and target are one row each")
    measure = nearness if metric is None else metric
    found = gradients(
        lens,
        [source, target],
        site,
        metric=lambda x: measure_rows(measure, x[1:2], x[0].detach(), x[1].detach()).sum(),
        through=through,
        steps=steps,
        branch=branch,
        reduce=_sum_marginals,
        **call,
    )
    width = {name: lens.anatomy.channels(lens.anatomy.site(name)) for name in found}
    return Attribution(
        {name: value[:, : width[name]] for name, value in found.items()},
        {name: value[:, width[name] :] for name, value in found.items()},
        found.steps,
    )


def nearness(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """How far x has come from the target to the source, 1 - |x - source| / |target - source|.

    >>> source, target = torch.zeros(2), torch.tensor([0.0, 4.0])
    >>> nearness(torch.tensor([[0.0, 4.0], [0.0, 1.0], [0.0, 0.0]]), source, target)
    tensor([0.0000, 0.7500, 1.0000])

    Returns [m]: 0 is the target, 1 the source; what leads away from both is negative.

    x: [m, ...].
    source, target: [...].
    """
    apart = torch.linalg.vector_norm(target - source)
    return 1 - torch.linalg.vector_norm((x - source).flatten(1), dim=1) / apart


def measure_rows(metric: PairMetric, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """What a metric says of every row, [m]; OpError if it says something else."""
    found = metric(x, source, target)
    if not isinstance(found, Tensor) or found.is_complex() or found.numel() != len(x):
        raise OpError(
            f"metric= must return a tensor of one real number per row, [{len(x)}]; {name_of(metric)} returned "
            f"{show(found)}."
        )
    return found


def _sum_marginals(value: Tensor, gradient: Tensor) -> Tensor:
    """Rows are source and target: their difference times the gradient, over tokens and over channels: [d + n]."""
    product = (value[0].float() - value[1].float()) * gradient[1].float()
    return torch.cat([product.sum(0), product.sum(1)])


@dataclass(eq=False)
class Graph(Probe):
    """The tensors that passed through the sites, and their gradients once a metric has closed the graph.

    metric, reduce, through: as in :meth:`dit_lens.DiTLens.gradients`.
    taken: (site, step) -> gradient.
    values: the metric.
    """

    metric: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor] | None
    through: Through
    taken: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)
    values: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.open: dict[tuple[str, int], Tensor] = {}  # (site, step) -> [b, n, d]

    @contextmanager
    def around(self, engine: Engine) -> Generator[None]:
        """Whatever mode the caller is in, such as torch.inference_mode: here a graph is needed."""
        detached = _detach_outputs(engine.pipe.transformer) if self.through == "step" else nullcontext()
        with torch.inference_mode(mode=False), torch.enable_grad(), engine.differentiable(), detached:
            yield

    def finish(self, output: Any) -> None:
        """Through the run the metric is of the final latents."""
        if self.through == "run":
            try:
                self.close(output_images(output).cpu())
            except torch.OutOfMemoryError as full:
                raise graph_too_large(full) from full

    def keep(self, tensor: Tensor, hook: Any) -> Tensor:
        """What goes on in the run is this very tensor; the first one is where the graph begins."""
        if not tensor.requires_grad:
            tensor.requires_grad_()
        self.open[hook.name, hook.step] = tensor
        return tensor

    def close(self, outcome: Tensor, hook: Any = None) -> None:  # noqa: ARG002 an Apply passes it
        """Takes the gradients of the metric at all open tensors, and lets go of the graph."""
        with told_end("metric="):
            value = self.metric(outcome)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            raise OpError(
                f"metric= must return a real tensor of one number, and returned {show(value)}. Sum over images."
            )
        if not value.requires_grad:
            raise ExecutionError(
                "the metric does not depend on the sites through torch: it was detached, or this pipeline or scheduler "
                "leaves torch on the way. Try through='step'."
            )
        keys, tensors = zip(*self.open.items(), strict=True)
        self.open = {}
        taken = torch.autograd.grad(value.sum(), tensors, materialize_grads=True)
        for key, tensor, gradient in zip(keys, tensors, taken, strict=True):
            with told_end("reduce="):
                kept = gradient if self.reduce is None else self.reduce(tensor.detach(), gradient)
            if not isinstance(kept, Tensor):
                raise OpError(f"reduce= must return a tensor, and returned {show(kept)} for {key[0]}.")
            self.taken[key] = kept.cpu()
        self.values.append(value.detach().reshape(()).cpu())


@contextmanager
def _detach_outputs(transformer: nn.Module) -> Generator[None]:
    """Detaches what the transformer returns, so that no graph outlives its step."""
    handle = transformer.register_forward_hook(lambda *call: tree_map_only(Tensor, Tensor.detach, call[-1]))
    try:
        yield
    finally:
        handle.remove()


def check_differentiable(lens: Session) -> None:
    """Raises an error if gradients would be impossible or wrong.

    ExecutionError: weights that are inference tensors. FamilyError: code under ``torch.no_grad`` inside the model,
    which would leave the graph unseen; the live modules are looked at, which an adapter or a quantisation may have
    exchanged, beside what the row of the family declares.
    """
    if any(weight.is_inference() for weight in lens.pipe.transformer.parameters()):
        raise ExecutionError(
            "the weights were made inside torch.inference_mode, so that torch cannot take gradients through them. Load "
            "the pipeline outside of it."
        )
    methods = sorted({*lens.family.without_gradient, *find_without_gradient(lens.pipe.transformer)})
    if methods:
        raise FamilyError(
            f"gradients through {type(lens.pipe.transformer).__name__} would be wrong: {', '.join(methods)} runs "
            "under torch.no_grad inside the model. Patch instead: studies.patching(..., attribute=())."
        )


def check_latents(lens: Session) -> None:
    """Raises FamilyError if a pipeline does not return its final latents."""
    if lens.family.pipeline(type(lens.pipe)).returns_latents is None:
        name = type(lens.pipe).__name__
        raise FamilyError(f"{name} does not return latents. Take gradients with through='step'.")
