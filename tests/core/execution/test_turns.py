"""Runs on the same weights take turns; a run inside a run is an error, never a hang."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from dit_lens import Apply, DiTLens, Read, Zero
from dit_lens.core.execution import turns
from dit_lens.errors import ExecutionError
from dit_lens.instruments.inversion import invert
from tests import pipelines

PROMPT = "red"
CALL = {"seed": 3, "output_type": "latent"}


def test_a_run_inside_a_run_is_an_error(cfg_lens):
    def nested(tensor, hook):
        cfg_lens.run(PROMPT, **CALL)

    with pytest.raises(ExecutionError, match="inside another run"):
        cfg_lens.run(PROMPT, Apply("blocks.1.img", fn=nested), **CALL)
    assert cfg_lens.run(PROMPT, **CALL).latents is not None  # the turn was given back


def test_a_run_inside_a_callback_is_an_error(cfg_lens):
    def nested(pipe, step, timestep, values):
        cfg_lens.run(PROMPT, **CALL)
        return values

    with pytest.raises(ExecutionError, match="inside another run"):
        cfg_lens.run(PROMPT, callback_on_step_end=nested, **CALL)


def test_the_pipeline_called_inside_a_run_is_an_error(cfg_lens):
    def draw(tensor, hook):
        cfg_lens.pipe("red", **pipelines.CALL)

    alone = cfg_lens.run(PROMPT, **CALL)
    with pytest.raises(ExecutionError, match="the pipeline, or a module of it, was called inside a run"):
        cfg_lens.run(PROMPT, Apply("blocks.1.img", fn=draw), **CALL)
    assert torch.equal(cfg_lens.run(PROMPT, **CALL).latents, alone.latents)


def test_another_lens_on_the_same_weights_inside_a_run_is_an_error(cfg_lens):
    other = DiTLens(cfg_lens.pipe, defaults=cfg_lens.defaults)
    with pytest.raises(ExecutionError, match="inside another run"):
        cfg_lens.run(PROMPT, Apply("blocks.1.img", fn=lambda *_: other.run(PROMPT, **CALL) and None), **CALL)


def test_threads_on_the_same_weights_do_not_cross():
    pipe = pipelines.flux()
    lenses = [DiTLens(pipe, defaults=dict(pipelines.TRUE_CFG)) for _ in range(2)]
    ops = [[Read("blocks.*.img", reduce="mean")], [Zero("blocks.2.img"), Read("blocks.*.img", reduce="mean")]]
    alone = [lens.run(PROMPT, some, **CALL) for lens, some in zip(lenses, ops, strict=True)]
    gradients = lenses[0].gradients(PROMPT, "blocks.1.img", metric=lambda latents: latents.mean(), seed=3)

    def work(number):
        runs = []
        for turn in range(4):
            runs.append(lenses[number].run(PROMPT, ops[number], **CALL))
            if number == 0 and turn % 2:
                again = lenses[0].gradients(PROMPT, "blocks.1.img", metric=lambda latents: latents.mean(), seed=3)
                assert torch.equal(again["blocks.1.img"], gradients["blocks.1.img"])
        return runs

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(work, number) for number in (0, 1)]
        found = [job.result(timeout=120) for job in jobs]
    for number in (0, 1):
        for run in found[number]:
            assert torch.equal(run.latents, alone[number].latents)
            assert not run.latents.requires_grad
            for site, value in alone[number].items():
                assert torch.equal(run[site], value)


def of_gradients(lens):
    lens.gradients(PROMPT, "blocks.1.img", metric=lambda latents: latents.mean(), seed=3)


def of_steps(lens):
    lens.gradients(PROMPT, "blocks.1.img", metric=lambda x: x.mean(), through="step", seed=3)


def of_patterns(lens):
    lens.read_pattern(PROMPT, 1, heads=0, seed=3)


def of_inversion(lens):
    invert(lens, [Image.new("RGB", (48, 32))], "red")


@pytest.mark.parametrize("work", [of_gradients, of_steps, of_patterns, of_inversion])
def test_what_is_changed_around_a_run_is_seen_by_no_other_thread(work, monkeypatch):
    """The other thread asks for its run while everything is changed and no run is on: it waits, and sees nothing."""
    pipe = pipelines.flux()
    lens, other = (DiTLens(pipe, defaults=dict(pipelines.CALL)) for _ in range(2))
    scheduler, alone = pipe.scheduler, other.run(PROMPT, **CALL)
    seen, threads = [], []

    def look(tensor, hook):
        free = all(weight.requires_grad for weight in pipe.transformer.parameters())
        hooks = sum(len(module._forward_hooks) for module in pipe.transformer.modules())  # noqa: SLF001
        seen.append((pipe.scheduler is scheduler, free, hooks, torch.is_grad_enabled()))

    def drawn():
        return other.outline(PROMPT, **CALL).sigmas, other.run(PROMPT, Apply("blocks.1.img", fn=look), **CALL)

    other.run(PROMPT, Apply("blocks.1.img", fn=look), **CALL)
    before = seen.pop()
    seen.clear()
    run = lens.run

    def then_another(*args, **call):
        found = run(*args, **call)
        if not threads:
            threads.append(pool.submit(drawn))
            with pytest.raises(TimeoutError):
                threads[0].result(timeout=0.5)
        return found

    monkeypatch.setattr(lens, "run", then_another)
    with ThreadPoolExecutor(1) as pool:
        work(lens)
        sigmas, found = threads[0].result(timeout=120)
    assert torch.equal(found.latents, alone.latents)
    assert sigmas == other.outline(PROMPT, **CALL).sigmas
    assert set(seen) == {before}


def test_encoders_are_moved_by_one_thread_at_a_time(monkeypatch):
    pipe = pipelines.flux()
    lens, other = (DiTLens(pipe, defaults=dict(pipelines.CALL)) for _ in range(2))
    threads = []

    def poke(*_):
        if not threads:
            threads.append(pool.submit(other.run, PROMPT, **CALL))
            with pytest.raises(TimeoutError):
                threads[0].result(timeout=0.5)

    with ThreadPoolExecutor(1) as pool:
        handle = pipe.text_encoder.register_forward_hook(poke)
        lens.encode("blue")
        handle.remove()
        assert threads[0].result(timeout=120).latents is not None


def test_the_bar_comes_back_whichever_thread_ends_last():
    pipe = pipelines.flux()
    before = vars(pipe).get("_progress_bar_config")
    first, second = (DiTLens(pipe).quiet() for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert vars(pipe)["_progress_bar_config"]["disable"]
    second.__exit__(None, None, None)
    assert vars(pipe).get("_progress_bar_config") == before


def test_pipelines_that_share_a_scheduler_do_not_cross():
    pipes = [pipelines.flux(seed=seed) for seed in (0, 1)]
    pipes[1].scheduler = pipes[0].scheduler
    lenses = [DiTLens(pipe, defaults=dict(pipelines.CALL)) for pipe in pipes]
    steps = 3, 5
    alone = [lens.run(PROMPT, num_inference_steps=n, **CALL).latents for lens, n in zip(lenses, steps, strict=True)]

    def work(number):
        return [lenses[number].run(PROMPT, num_inference_steps=steps[number], **CALL).latents for _ in range(6)]

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(work, number) for number in (0, 1)]
        found = [job.result(timeout=120) for job in jobs]
    for number in (0, 1):
        assert all(torch.equal(latents, alone[number]) for latents in found[number])


def test_a_run_inside_a_run_that_shares_the_scheduler_is_an_error():
    pipes = [pipelines.flux(seed=seed) for seed in (0, 1)]
    pipes[1].scheduler = pipes[0].scheduler
    first, second = (DiTLens(pipe, defaults=dict(pipelines.CALL)) for pipe in pipes)
    with pytest.raises(ExecutionError, match="inside another run"):
        first.run(PROMPT, Apply("blocks.1.img", fn=lambda *_: second.run(PROMPT, **CALL) and None), **CALL)


def test_a_run_that_is_waited_for_inside_a_run_gives_up(monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 1.0)
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))
    problems = []

    def draw():
        try:
            lens.run(PROMPT, **CALL)
        except ExecutionError as problem:
            problems.append(str(problem))

    def wait(tensor, hook):
        if not problems:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()

    alone = lens.run(PROMPT, **CALL)
    found = lens.run(PROMPT, Apply("blocks.1.img", fn=wait), **CALL)
    assert torch.equal(found.latents, alone.latents)
    assert len(problems) == 1
    assert "waits for another thread, in a function of Apply" in problems[0]
    assert torch.equal(lens.run(PROMPT, **CALL).latents, alone.latents)


def test_two_threads_never_wait_for_each_other():
    """Each holds its pipeline, and asks for that of the other."""
    lenses = [DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL)) for _ in range(2)]
    both, ended = threading.Barrier(2), []

    def work(number):
        with lenses[number].engine.turn.hold():
            both.wait()
            try:
                lenses[1 - number].run(PROMPT, **CALL)
            except ExecutionError as problem:
                ended.append(str(problem))

    with ThreadPoolExecutor(2) as threads:
        for job in [threads.submit(work, number) for number in (0, 1)]:
            job.result(timeout=60)
    assert len(ended) == 1
    assert "two threads wait for each other" in ended[0]
