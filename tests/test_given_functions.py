"""Functions that users give: those that cannot be called are told before the first forward pass; odd answers, by name.

Forward passes are counted by a plain hook.
"""

import functools

import numpy as np
import pytest
import torch

from dit_lens import Apply, DiTLens, studies
from dit_lens.errors import DitLensError, ExecutionError, OpError
from dit_lens.instruments import gradients
from tests import pipelines

PROMPTS, PAIRS = ["red", "blue"], [("red", "blue")]
FEW = {"k": 2, "draws": 1, "site": "blocks.3.img", "num_inference_steps": 1}
MASK = np.eye(8, dtype=bool)


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


# name -> (number of parameters, an answer that is right, what calls it)
TAKERS = {
    "judge": (
        2,
        {"fidelity": 1.0},
        lambda lens, fn: studies.disruption(lens, PROMPTS[:1], judge=fn, confounds=False, **FEW),
    ),
    "distances": (
        2,
        1.0,
        lambda lens, fn: studies.disruption(lens, PROMPTS[:1], distances=[fn], confounds=False, **FEW),
    ),
    "masks": (2, MASK, lambda lens, fn: studies.organisation(lens, PROMPTS, masks=fn, **FEW)),
    "metric": (1, None, lambda lens, fn: lens.gradients("red", "blocks.3.img", metric=fn, num_inference_steps=1)),
    "reduce": (
        2,
        torch.ones(2),
        lambda lens, fn: lens.gradients(
            "red", "blocks.3.img", metric=lambda x: x.sum(), reduce=fn, num_inference_steps=1
        ),
    ),
    "pair metric": (
        3,
        None,
        lambda lens, fn: gradients.attribution(lens, "red", "blue", metric=fn, num_inference_steps=1),
    ),
    "patching": (
        3,
        None,
        lambda lens, fn: studies.patching(lens, PAIRS, over="block x step", metric=fn, attribute=(), **FEW),
    ),
    "hook": (2, None, lambda lens, fn: lens.run("red", Apply("blocks.3.img", fn=fn), num_inference_steps=1)),
}


def functions(count):
    """Functions that cannot be called with so many values."""
    yield lambda: None
    yield lambda a, b, c, d, e: None
    yield functools.partial(lambda a, b, c, d, *, key: None)
    if count != 1:
        yield torch.nn.Identity()
        yield lambda a: None


@pytest.mark.parametrize("name", TAKERS)
def test_functions_that_cannot_be_called(lens, forwards, name):
    count, _, call = TAKERS[name]
    for function in functions(count):
        with pytest.raises(DitLensError):
            call(lens, function)
        assert not forwards


ODD = ["x", b"x", 1j, torch.tensor(1j), torch.tensor([1j, 1j]), [1], {"a": "x"}, {"\ud83d": 1.0}, {1: 2}, object()]


@pytest.mark.parametrize("name", TAKERS)
def test_odd_answers_are_told(lens, name):
    _, right, call = TAKERS[name]
    if name == "judge":
        call(lens, lambda *_: right)
    for odd in ODD:
        if name == "reduce" and isinstance(odd, torch.Tensor):
            continue  # it may reduce to any tensor
        with pytest.raises(OpError if name != "hook" else DitLensError):
            call(lens, lambda *_, odd=odd: odd)


def stop(*_, **__):
    """What next() does where nothing is left."""
    return next(iter([]))


ENDING = {
    "Apply": lambda lens: lens.run("red", [Apply("blocks.3.img", fn=stop)]),
    "Apply in a batch": lambda lens: lens.run(PROMPTS, [Apply("blocks.3.img", fn=stop)], batch_size=1),
    "callback": lambda lens: lens.run("red", callback_on_step_end=stop),
    "metric": lambda lens: lens.gradients("red", "blocks.3.img", metric=stop),
    "metric of a step": lambda lens: lens.gradients("red", "blocks.3.img", metric=stop, through="step"),
    "reduce": lambda lens: lens.gradients("red", "blocks.3.img", metric=lambda x: x.sum(), reduce=stop),
    "pair metric": lambda lens: gradients.attribution(lens, "red", "blue", metric=stop),
}


@pytest.mark.parametrize("taker", ENDING)
def test_an_iterator_that_ends_is_told(lens, taker):
    with pytest.raises(OpError, match="raised StopIteration") as told:
        ENDING[taker](lens)
    assert isinstance(told.value.__cause__, StopIteration)
    if "Apply" in taker:
        assert "raised by stop, applied at blocks.3.img, step 0" in str(told.value)
    assert lens.run("red").images  # nothing is left open


@pytest.mark.parametrize("through", ["run", "step"])
@pytest.mark.parametrize("where", ["metric", "reduce", "backward"])
def test_memory_that_runs_out_beside_the_run_is_told(lens, through, where, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    given = {"metric": lambda x: x.sum(), **({where: run_out} if where != "backward" else {})}
    if where == "backward":
        monkeypatch.setattr(torch.autograd, "grad", run_out)
    with pytest.raises(ExecutionError, match=r"memory ran out .* gradients keep the graph"):
        lens.gradients("red", "blocks.3.img", through=through, **given)
