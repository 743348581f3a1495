"""Runs on the same weights take turns; a run inside a run is an error, never a hang."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dit_lens import Apply, DiTLens, Read, Zero
from dit_lens.errors import ExecutionError
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
