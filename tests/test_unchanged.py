"""A lens leaves pipeline, classes and process as they were, and what a call changes as the plain pipeline leaves it:
after success, an error in a function of the user's, Ctrl-C, and where memory runs out.
"""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import dit_lens as dl
from dit_lens import Apply, Read, Scale, Swap
from dit_lens.errors import ExecutionError, SiteError
from dit_lens.instruments.gradients import attribution
from tests import held, pipelines
from tests.zoo.truth import ENTRIES, STACKS

NAMES = [name for number, name in enumerate(ENTRIES) if number % 3 != 1]  # 31 pipelines
FAILURES = {
    "error": (ValueError("of the user's"), ValueError),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
    "memory": (torch.OutOfMemoryError("full"), ExecutionError),
}
FLUX = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "output_type": "latent"}

NNSIGHT = ["class builtins.object.save"]  # a method of every object, which comes with nnsight's import


class Trouble:
    """A hook on the last block, which raises an error when it is called for the second time."""

    def __init__(self, pipe, error: BaseException | None = None):
        *_, path = STACKS[type(pipe.transformer).__name__]
        self.error, self.count = error, 0
        self.handle = pipe.transformer.get_submodule(path)[-1].register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1
        if self.error is not None and self.count == 2:
            raise self.error


def start_anew():
    """The random numbers of the process start at the same place."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 the one of the process


def draw_plainly(entry, pipe, error=None):
    """What a run of the plain pipeline leaves, and what else it changes: some modules count or keep things."""
    start_anew()
    trouble = Trouble(pipe, error)
    before = held.held(pipe)
    with pytest.raises(type(error)) if error is not None else nullcontext():
        pipe(**entry.call(1), generator=[torch.Generator().manual_seed(3)])
    changed = held.changed(before, held.held(pipe))
    trouble.handle.remove()
    return held.left(pipe), changed


def draw_with_lens(entry, lens, ops, error=None, raised=None):
    """The same of a run with ops."""
    start_anew()
    trouble = Trouble(lens.pipe, error)
    before = held.held(lens.pipe)
    call = entry.call(1)
    prompt = call.pop("prompt", None)
    with pytest.raises(raised) if raised is not None else nullcontext():
        lens.run(prompt, ops, seed=[3], **call)
    changed = held.changed(before, held.held(lens.pipe))
    trouble.handle.remove()
    return held.left(lens.pipe), changed


@pytest.mark.parametrize(("name", "failure"), zip(NAMES, itertools.cycle(FAILURES)))
def test_runs_leave_what_the_plain_pipeline_leaves(name, failure):
    entry = ENTRIES[name]
    pipe, twin = entry.build(), entry.build()
    for one in (pipe, twin):  # the first call makes what modules keep
        one(**entry.call(1))
    before, left = held.held(pipe), held.left(pipe)
    lens = dl.DiTLens(pipe, defaults={})
    assert held.changed(before, held.held(pipe)) in ([], NNSIGHT)
    assert held.changed(left, held.left(pipe)) == []

    site = lens.sites("blocks.*.img")[-1]
    ops = [Scale(site, factor=1.0), Read(site, steps=0)]
    error, raised = FAILURES[failure]
    compare(draw_plainly(entry, twin), draw_with_lens(entry, lens, ops))
    compare(draw_plainly(entry, twin, error), draw_with_lens(entry, lens, ops, error, raised))
    compare(draw_plainly(entry, twin), draw_with_lens(entry, lens, ops))


def compare(plainly, with_lens):
    """A lens changes nothing that the plain pipeline does not change, and that to the same."""
    (left, changed), (left_by_lens, changed_by_lens) = plainly, with_lens
    assert set(changed_by_lens) <= set(changed)
    assert held.changed(left, left_by_lens) == []


@pytest.fixture(scope="module")
def lens():
    lens = dl.DiTLens(pipelines.flux(), defaults=FLUX)
    lens.run("a red fox", seed=0, num_inference_steps=2)
    return lens


def interrupt(*_):
    raise KeyboardInterrupt


def fail(*_):
    raise ValueError


def score(x):
    return x.float().square().mean()


def trace(lens, error=None):
    with lens.trace("a red fox", seed=0) as t:
        t.scale("blocks.3.img", factor=2.0)
        t.read("blocks.4.img")
        if error is not None:
            raise error


def draw_quietly(lens):
    with lens.quiet():
        lens.run("a red fox", seed=0)


def replay(lens):
    recorded = lens.run("a red fox", seed=0, record=True)
    lens.run("a red fox", [Scale("blocks.3.img", factor=2.0, steps=1)], seed=0, prefix=recorded)


def trace_nnsight(lens):
    call = {**FLUX, "negative_prompt": ["bad"], "generator": [torch.Generator().manual_seed(0)]}
    with lens.nnsight.generate(["a red fox"], **call) as tracer:
        for _ in tracer.iter[:4]:
            lens.blocks[3].img = lens.blocks[3].img * 2


NOISY, ONE = dl.sigma(1.0, 0.6), {"seed": 0}
CALLS = {
    "sites": lambda lens: (lens.sites(), lens.heads("blocks.3.img.attn.z"), lens.to_str_tokens("a red fox")),
    "outline": lambda lens: lens.outline("a red fox").sigmas,
    "cost": lambda lens: lens.cost("a red fox", [Read("blocks.*.img", steps=NOISY)]),
    "run by noise": lambda lens: lens.run("a red fox", [Scale("velocity", steps=NOISY)], **ONE),
    "run in batches": lambda lens: lens.run(["a", "b"], [Read("blocks.3.img")], batch_size=1, **ONE),
    "run of images": lambda lens: lens.run("a red fox", output_type="pil", **ONE),
    "lockstep": lambda lens: lens.run(["a", "b"], [Swap("blocks.3.img", source="row:0", rows=1)], **ONE),
    "trace": trace,
    "nnsight's own trace": trace_nnsight,
    "quiet": draw_quietly,
    "record and prefix": replay,
    "rerun": lambda lens: lens.rerun(lens.run("a red fox", **ONE)),
    "gradients": lambda lens: lens.gradients("a red fox", "blocks.3.img", metric=score, **ONE),
    "gradients of steps": lambda lens: lens.gradients("a", "blocks.3.img", metric=score, through="step", **ONE),
    "attribution": lambda lens: attribution(lens, "a red fox", "the", "blocks.3.img", **ONE),
    "attention": lambda lens: lens.read_pattern("a red fox", [0, 3], heads=[0, 1], **ONE),
    "x0": lambda lens: lens.read_x0("a red fox", **ONE),
    "massive channels": lambda lens: lens.massive_channels(["a red fox"], **ONE),
    "embeddings": lambda lens: lens.encode(["a red fox"]),
}
FAILING = {
    "site": (SiteError, lambda lens: lens.run("a red fox", [Read("blocks.99.img")], **ONE)),
    "apply": (ValueError, lambda lens: lens.run("a", [Apply("blocks.3.img", fn=fail)], **ONE)),
    "apply interrupted": (KeyboardInterrupt, lambda lens: lens.run("a", [Apply("blocks.3.img", fn=interrupt)], **ONE)),
    "callback": (KeyboardInterrupt, lambda lens: lens.run("a", callback_on_step_end=interrupt, **ONE)),
    "trace": (KeyboardInterrupt, lambda lens: trace(lens, KeyboardInterrupt())),
    "metric": (KeyboardInterrupt, lambda lens: lens.gradients("a", "blocks.3.img", metric=interrupt, **ONE)),
    "metric of steps": (
        ValueError,
        lambda lens: lens.gradients("a", "blocks.3.img", metric=fail, through="step", **ONE),
    ),
}


@pytest.mark.parametrize(
    ("raised", "call"),
    [(None, call) for call in CALLS.values()] + list(FAILING.values()),
    ids=[*CALLS, *(f"{name} fails" for name in FAILING)],
)
def test_calls_leave_pipeline_and_process_as_they_were(lens, raised, call):
    """Attributes of the pipeline and its scheduler, which any call sets, stay those that there are."""
    start_anew()
    before, numbers, names = held.held(lens.pipe), held.random_numbers(), held.left(lens.pipe).keys()
    with pytest.raises(raised) if raised is not None else nullcontext():
        call(lens)
    assert held.changed(before, held.held(lens.pipe)) == []
    assert held.changed(numbers, held.random_numbers()) == []
    assert held.left(lens.pipe).keys() == names


@pytest.mark.parametrize("name", ["gradients", "attention", "x0"])
@pytest.mark.parametrize("failure", ["Ctrl-C", "memory"])
def test_instruments_that_are_interrupted_leave_all_as_it_was(lens, name, failure):
    error, raised = FAILURES[failure]
    trouble = Trouble(lens.pipe, error)
    before = held.held(lens.pipe) | held.random_numbers()
    with pytest.raises(raised):
        CALLS[name](lens)
    assert held.changed(before, held.held(lens.pipe) | held.random_numbers()) == []
    trouble.handle.remove()
