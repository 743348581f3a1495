"""Noise levels that are known before a run are those of the run, for every pipeline that tells them."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from dit_lens import Apply, DiTLens, Read, Zero, sigma
from dit_lens.errors import ExecutionError
from tests import pipelines, texts
from tests.zoo import truth

# Their times follow from the scheduler's in forms of their own; dl.sigma is refused before a run.
UNKNOWN = ("cosmos2", "omnigen", "sana-sprint")


@pytest.mark.parametrize("name", sorted(truth.ENTRIES))
def test_levels_before_a_run_are_those_of_the_run(name):
    zoo = truth.zoo_of(name)
    call = {**zoo.call, "seed": truth.SEED}
    before = (zoo.lens.pipe.scheduler, torch.random.get_rng_state(), len(zoo.lens.pipe.transformer._forward_pre_hooks))  # noqa: SLF001
    levels = zoo.lens.outline(**call).sigmas
    assert (levels is None) == (name in UNKNOWN)
    after = (zoo.lens.pipe.scheduler, torch.random.get_rng_state(), len(zoo.lens.pipe.transformer._forward_pre_hooks))  # noqa: SLF001
    assert before[0] is after[0]
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]
    run = zoo.lens.run(**call)
    assert levels is None or levels == pytest.approx(run.sigmas, abs=1e-5)
    again = zoo.lens.run(**call)
    assert torch.equal(zoo.drawn(run), zoo.drawn(again))


@pytest.mark.parametrize("steps", [1, 5, 28])
def test_sd3_with_its_own_shift(steps):
    zoo = truth.zoo_of("sd3")
    zoo.lens.pipe.scheduler.set_shift(3.0)
    try:
        call = {**zoo.call, "seed": truth.SEED, "num_inference_steps": steps}
        run = zoo.lens.run(**call, ops=Read("velocity", reduce="mean"))
        around = [sigma(level + 1e-4, level - 1e-4) for level in run.sigmas]
        found = zoo.lens.run(**call, ops=[Zero("blocks.0.img", channels=[0], steps=one) for one in around])
        assert sorted({(entry.op, entry.steps) for entry in found.receipt.entries}) == [(i, (i,)) for i in range(steps)]
    finally:
        zoo.lens.pipe.scheduler.set_shift(1.0)


def test_a_generator_is_left_as_it_was(cfg_lens):
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    assert cfg_lens.outline("red", generator=generator).sigmas is not None
    assert torch.equal(generator.get_state(), state)


def test_a_level_other_than_planned_is_told(monkeypatch):
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.EMBEDDED))
    levels = lens.outline("red").sigmas
    wrong = (levels[0], levels[1] + 0.01, *levels[2:])
    monkeypatch.setattr(lens.engine, "measure_sigmas", lambda call, time: lambda steps, skipped: wrong)
    with pytest.raises(ExecutionError, match=f"noise level of {wrong[1]:.6g}.*runs at {levels[1]:.6g}"):
        lens.run("red", Zero("blocks.1.img", steps=sigma(1.1, 0.2)), seed=1)
    assert lens.run("red", Zero("blocks.1.img", steps=[1]), seed=1).images  # no op chose its steps by noise


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def test_levels_of_a_scheduler_of_whole_times_are_its_own():
    """UniPC tells the transformer times without fractions, and goes by levels that have some."""
    pipe = texts.sd3()
    pipe.scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    lens, seen = DiTLens(pipe, defaults={}), []
    call = {**texts.SUBJECTS["sd3"].call, "num_inference_steps": 4, "seed": 0}
    chosen = Zero("blocks.0.img", channels=[0], steps=sigma(1.0, 0.75))
    run = lens.run("a cat", [chosen, Apply("blocks.1.img", fn=lambda _, hook: seen.append(hook.sigma))], **call)
    own = pipe.scheduler.sigmas[:4].tolist()
    assert [level > 0.75 for level in own] == [True, True, True, False]
    assert (run.sigmas, list(lens.outline("a cat", **call).sigmas)) == (own, own)
    assert {entry.steps for entry in run.receipt.entries if entry.op == 0} == {(0, 1, 2)}
    assert sorted(set(seen), reverse=True) == own


@pytest.mark.parametrize("kind", ["whole times", "half precision"])
def test_clean_latents_follow_from_the_levels_of_the_scheduler(kind):
    half = kind == "half precision"
    pipe = pipelines.flux(dtype=torch.bfloat16 if half else torch.float32)
    if not half:
        pipe.scheduler = UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True, time_shift_type="exponential")
    lens, call, seen = DiTLens(pipe, defaults={}), {**pipelines.CALL, "num_inference_steps": 28}, []
    handle = pipe.transformer.register_forward_hook(
        lambda _, __, given, answer: seen.append((given["hidden_states"].float(), answer[0].float())), with_kwargs=True
    )
    try:
        pipe("red", generator=[torch.Generator().manual_seed(0)], **call)
    finally:
        handle.remove()
    own = pipe.scheduler.sigmas[:28].tolist()
    run = lens.run("red", Read("x0"), seed=0, **call)
    assert run.sigmas == own == list(lens.outline("red", **call).sigmas)
    for x0, level, (noisy, predicted) in zip(run["x0"], own, seen, strict=True):
        assert torch.equal(x0.as_subclass(torch.Tensor), noisy - level * predicted)
