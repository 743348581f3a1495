"""What comes between a run and its pipeline: other threads, schedulers that write to themselves, refusals, ends."""

import copy
import threading
import warnings

import diffusers
import pytest
import torch

from dit_lens import DiTLens, Read, Zero
from dit_lens.errors import ExecutionError, PromptError
from tests import pipelines
from tests.zoo import truth

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


def aside(function):
    """What a function raised in a thread of its own."""
    raised = []

    def run():
        try:
            function()
        except Exception as problem:  # noqa: BLE001 it is looked at
            raised.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def test_a_plain_call_by_another_thread_fails_in_both(lens):
    raised = []

    def call(pipe, step, time, tensors):
        raised.extend(raised or aside(lambda: pipe("blue", **CALL)))

    with pytest.raises(ExecutionError, match="called by another thread in the middle of this run"):
        lens.run("red", seed=1, callback_on_step_end=call, **CALL)
    assert isinstance(raised[0], ExecutionError)
    assert "in use by a run of a lens in another thread" in str(raised[0])
    assert lens.run("red", seed=1, **CALL).images  # and the next run is none the worse


def test_another_thread_may_use_what_no_run_is_disturbed_by(lens):
    found, alone = [], lens.run("red", Read("blocks.1.img"), seed=1, **CALL)
    encoder = lens.pipe.text_encoder_2
    given = torch.arange(6)[None]
    wanted = encoder(given)[0]

    def call(pipe, step, time, tensors):
        assert not aside(lambda: found.append(encoder(given)[0]))

    run = lens.run("red", Read("blocks.1.img"), seed=1, callback_on_step_end=call, **CALL)
    assert torch.equal(run["blocks.1.img"], alone["blocks.1.img"])
    assert [torch.equal(one, wanted) for one in found] == [True, True]


def test_a_run_that_ends_early_is_told_once(lens):
    def stop(pipe, step, time, tensors):
        pipe._interrupt = True  # noqa: SLF001 diffusers offers no public way

    with warnings.catch_warnings(action="error"), pytest.raises(ExecutionError, match=r"expects 4 forward .* made 2"):
        lens.run("red", Read("blocks.1.img"), seed=1, callback_on_step_end=stop, **CALL)
    with pytest.warns(UserWarning, match="was never reached"):
        trace_too_long(lens.nnsight)


def trace_too_long(model):
    """A trace of a user's own, which nnsight tells what it lacks."""
    with model.generate("red", **CALL) as tracer:
        for _ in tracer.iter[:9]:
            model.transformer.output.save()


def test_a_scheduler_that_writes_to_its_configuration_is_as_it_was():
    zoo = truth.zoo_of("pixart-sigma")
    pipe, before = zoo.lens.pipe, zoo.lens.pipe.scheduler
    try:
        pipe.scheduler = diffusers.DPMSolverSinglestepScheduler()
        call, kept = {**zoo.call, "num_inference_steps": 3, "seed": 1}, dict(pipe.scheduler.config)
        plain = copy.deepcopy(pipe.scheduler)
        plain.set_timesteps(3)
        assert dict(plain.config) != kept  # as a plain pipeline leaves it
        recorded = zoo.lens.run(**call, record=True)
        assert dict(pipe.scheduler.config) == kept
        edit = Zero("blocks.1.img", channels=[3], steps=[2])
        edited, whole = zoo.lens.run(ops=edit, **call, prefix=recorded), zoo.lens.run(ops=edit, **call)
        assert torch.equal(zoo.drawn(edited), zoo.drawn(whole))
    finally:
        pipe.scheduler = before


def test_what_the_pipeline_refuses_is_said_before_words_are_looked_up():
    pipe = pipelines.flux()
    pipe.scheduler = diffusers.DDIMScheduler()  # takes no sigmas, and the pipeline gives them
    with pytest.raises(PromptError, match=r"FluxPipeline cannot be called like this: .*does not support custom"):
        DiTLens(pipe).run("red", Zero("blocks.1.txt", tokens="red"), seed=1, **CALL)
