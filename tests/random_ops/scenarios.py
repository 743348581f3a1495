"""Pipelines to try, a run of one of them, and the runs that ops take values from."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from diffusers import DDPMScheduler

import dit_lens as dl
from dit_lens import Read
from tests import pipelines
from tests.random_ops import wirings
from tests.random_ops.places import Wiring
from tests.zoo.truth import ENTRIES

FLUX_SIZE = {"height": 16, "width": 28, "max_sequence_length": pipelines.LENGTH}
PROMPTS = ["red", "a red fox", "the red, red fox", "Red? fox!"]
NEGATIVE = ["bad", "ugly art", "x"]
SOURCE_ROWS = 3


@dataclass(frozen=True)
class Subject:
    """One pipeline to try. guided, unguided: the branches of each transformer call of a step."""

    build: Callable
    wiring: Wiring
    guided: tuple
    unguided: tuple = (("cond",),)
    scale: tuple = ()
    levels: Callable = lambda steps: [1 - step / steps for step in range(steps)]
    level: float = 1e-6
    strided: bool = False
    rounding: float = 1e-5

    @property
    def editable(self) -> list[str]:
        """Sites with tokens that take any edit."""
        return [site for site, place in self.wiring.places.items() if place.writes == "any" and not place.vector]

    @property
    def readable(self) -> list[str]:
        """All sites that are tried."""
        return [site for site, place in self.wiring.places.items() if place.writes != "untried"]

    @property
    def watched(self) -> list[str]:
        """What enters, leaves and is added to blocks, and what follows them."""
        inner = re.compile(r"mod\.|attn\.|mlp\.")
        return [site for site in self.readable if not inner.search(site)]


def ends(steps: int) -> list[float]:
    """Noise levels from 1 to 0.001, as a scheduler sets them by itself."""
    return np.linspace(1, 0.001, steps).tolist()


def noised(steps: int) -> list[float]:
    """Noise levels of a scheduler that has a table of them."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(steps)
    return [float((1 - scheduler.alphas_cumprod[time]) ** 0.5) for time in scheduler.timesteps]


SPLIT, BOTH = (("cond",), ("uncond",)), (("uncond", "cond"),)


def zoo(name: str, wiring: Wiring, guided: tuple, scale: tuple = ("guidance_scale", 1.0), **more) -> Subject:
    """A pipeline of the zoo."""
    return Subject(ENTRIES[name].build, wiring, guided, scale=scale, **more)


SUBJECTS = {
    "flux": Subject(pipelines.flux, wirings.flux(), SPLIT),
    "flux-embedded": Subject(lambda: pipelines.flux(embedded=True), wirings.flux(), SPLIT),
    # x0 is kept in float32, but lens.cost(prompt, [Read("x0")]) counts it in the precision of the pipeline.
    "flux-half": Subject(
        lambda: pipelines.flux(dtype=torch.bfloat16),
        wirings.without_x0(wirings.flux()),
        SPLIT,
        level=2e-3,
        rounding=0.02,
    ),
    "sd3": zoo("sd3", wirings.sd3(), BOTH, levels=ends),
    "qwen": zoo("qwen", wirings.qwen(), SPLIT, ("true_cfg_scale", 1.0)),
    "klein": zoo("klein", wirings.klein(), SPLIT),
    # The scheduler rounds times down to integers, from which a run computes noise levels and x0: at the last of three
    # steps with 0.332, where the scheduler goes on from 0.333.
    "sana": zoo("sana", wirings.without_x0(wirings.sana()), BOTH, level=2e-3, strided=True),
    "zimage": zoo("zimage", wirings.zimage(), (("cond", "uncond"),), ("guidance_scale", 0.0)),
    "wan": zoo("wan", wirings.wan(), SPLIT, levels=ends),
    "ernie": zoo("ernie", wirings.ernie(), BOTH, strided=True),
    "hunyuan_dit": zoo("hunyuan_dit", wirings.hunyuan_dit(), BOTH, levels=noised),
    "lumina2-ragged": zoo("lumina2-ragged", wirings.lumina(), SPLIT),
}


@cache
def lens_of(name: str) -> dl.DiTLens:
    return dl.DiTLens(SUBJECTS[name].build(), defaults={})


@cache
def pipe_of(name: str):
    return SUBJECTS[name].build()


@dataclass
class Scenario:
    """One run.

    name: of the pipeline.
    prompts: how many, or their texts.
    each: images per prompt.
    guided: whether there is an unconditional branch.
    steps: of denoising.
    seed: as the lens takes it.
    batch: prompts at a time; None for all.
    recorded: whether what precedes the first op is replayed from a run without ops.
    way: how ops are given: "ops", "json" or "trace".
    saved: whether the run is saved and loaded, and one with texts drawn again from its spec.
    told: whether what the lens says beforehand is compared with the run.
    ops: what is to be done.
    """

    name: str
    prompts: int | list[str]
    each: int
    guided: bool
    steps: int
    seed: int | list[int]
    batch: int | None = None
    recorded: bool = False
    way: str = "ops"
    saved: bool = False
    told: bool = False
    ops: list = field(default_factory=list)

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.name]

    @property
    def count(self) -> int:
        return self.prompts if isinstance(self.prompts, int) else len(self.prompts)

    @property
    def rows(self) -> int:
        return self.count * self.each

    @property
    def texts(self) -> list[str] | None:
        return None if isinstance(self.prompts, int) else self.prompts

    @property
    def forwards(self) -> tuple:
        return self.subject.guided if self.guided else self.subject.unguided

    @property
    def branches(self) -> list[str]:
        return [branch for call in self.forwards for branch in call]

    @property
    def seeds(self) -> list[int]:
        """One for each image: image j of a prompt has seed + j."""
        if isinstance(self.seed, list):
            return self.seed
        return [self.seed + j for _ in range(self.count) for j in range(self.each)]

    def call(self, prompts: range | None = None) -> dict:
        """The arguments of the plain pipeline for some of the prompts."""
        prompts = range(self.count) if prompts is None else prompts
        if self.texts is not None:
            call = {**FLUX_SIZE, "prompt": [self.texts[i] for i in prompts], "num_inference_steps": self.steps}
            if self.name == "flux-embedded":
                call["guidance_scale"] = 3.0
            if self.guided:
                call |= {"true_cfg_scale": 2.5, "negative_prompt": [NEGATIVE[i % 3] for i in prompts]}
            return call | ({"num_images_per_prompt": self.each} if self.each > 1 else {})
        call = ENTRIES[self.name].call(self.count) | {"num_inference_steps": self.steps}
        call |= {} if self.guided else dict([self.subject.scale])
        span = slice(prompts.start, prompts.stop)
        del call["output_type"]
        return {key: value[span] if isinstance(value, list | torch.Tensor) else value for key, value in call.items()}

    def batches(self) -> list[tuple[dict, list[int]]]:
        size = self.batch or self.count
        spans = [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]
        return [(self.call(span), self.seeds[span.start * self.each : span.stop * self.each]) for span in spans]

    def asked(self, **options) -> tuple:
        """The prompt and keywords of the lens."""
        call = self.call() | {"seed": self.seed, "output_type": "latent"} | options
        return call.pop("prompt", None), call

    def run(self, ops=(), **options) -> dl.Run:
        prompt, call = self.asked(**options)
        return lens_of(self.name).run(prompt, ops, **call)


@cache
def sources(name: str, steps: int) -> list[dl.Run]:
    """Runs to take values from: whole and narrow, of one and of several rows, of one branch and both, and means."""
    sites = SUBJECTS[name].editable
    few = {"channels": [3, 0, 2], "tokens": [5, 0, 3], "steps": [0, -1]}
    wanted = {
        (SOURCE_ROWS, True): [
            {"branch": "both"},
            {"branch": "uncond", **few},
            {"branch": "both", "rows": 1, "channels": [1, 3], "steps": -1},
            {"branch": "both", "rows": [1, 2], "tokens": [5]},
            {"branch": "both", "reduce": "mean"},
            {"reduce": "mean", "rows": [0, 1], "channels": [2, 3, 1], "steps": [-1]},
            {"branch": "uncond", "reduce": "mean", "rows": [2, 0]},
        ],
        (1, True): [{}],
        (2, False): [{}],
    }
    found = []
    for (rows, guided), choices in wanted.items():
        prompts = ["fox", "a red", "the"][:rows] if name.startswith("flux") else rows
        reads = [Read(sites, name=f"{i}", **choice) for i, choice in enumerate(choices)]
        run = Scenario(name, prompts, 1, guided, steps, 11).run(reads)
        found += [replace(run, readings=[reading]) for reading in run.readings]
    return found


class Applied:
    """A function for Apply that notes what it is called with."""

    def __init__(self, name: str, calls: list):
        self.name, self.calls = name, calls

    def __call__(self, tensor, hook):
        self.calls.append((self.name, hook.name, hook.step, hook.branch, hook.timestep, hook.sigma, tensor.clone()))
        return FUNCTIONS[self.name](tensor, hook)

    def __repr__(self):
        return self.name


FUNCTIONS = {
    "negate": lambda x, hook: -x,
    "write in place and return nothing": lambda x, hook: [x.zero_()][1:] or None,
    "odd steps": lambda x, hook: x * 2 if hook.step % 2 else None,
    "count": lambda x, hook: x + torch.arange(x.numel()).reshape(x.shape) / max(x.numel(), 1) + hook.step,
    "reverse tokens": lambda x, hook: x.flip(1),
    "reverse rows in double": lambda x, hook: x.flip(0).double(),
    "by branch": lambda x, hook: x * 0.5 if hook.branch == "cond" else -x,
}


def values(seed: int, shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
