"""An argument that a call sets itself, or has already by its place, is told as what it is, before anything runs."""

from __future__ import annotations

import pytest

import dit_lens as dl
from dit_lens.errors import CallError
from dit_lens.instruments.gradients import attribution
from tests import pipelines

PROMPT = "a cat"


@pytest.fixture(scope="module")
def lens():
    return dl.DiTLens(pipelines.flux(), defaults={**pipelines.CALL, "num_inference_steps": 1})


CALLS = {
    "run": lambda lens, **how: lens.run(PROMPT, **how),
    "outline": lambda lens, **how: lens.outline(PROMPT, **how),
    "cost": lambda lens, **how: lens.cost(PROMPT, **how),
    "trace": lambda lens, **how: lens.trace(PROMPT, **how),
    "run_with_cache": lambda lens, **how: lens.run_with_cache(PROMPT, **how),
    "run_with_hooks": lambda lens, **how: lens.run_with_hooks(PROMPT, [], **how),
    "to_str_tokens": lambda lens, **how: lens.to_str_tokens(PROMPT, **how),
    "encode": lambda lens, **how: lens.encode(PROMPT, **how),
    "massive_channels": lambda lens, **how: lens.massive_channels(PROMPT, 2, **how),
    "relevance": lambda lens, **how: lens.massive_channels(PROMPT, 2, score="relevance", **how),
    "subject_mask": lambda lens, **how: lens.subject_mask(PROMPT, k=2, **how),
    "read_x0": lambda lens, **how: lens.read_x0(PROMPT, **how),
    "read_pattern": lambda lens, **how: lens.read_pattern(PROMPT, 0, heads=0, **how),
    "gradients": lambda lens, **how: lens.gradients(PROMPT, "blocks.1.img", metric=lambda x: x.sum(), **how),
    "attribution": lambda lens, **how: attribution(lens, PROMPT, "a dog", **how),
    "atlas": lambda lens, **how: dl.atlas(lens, "atlas.html", [PROMPT], **how),
}
OPS = ("run", "outline", "cost", "trace", "run_with_cache", "run_with_hooks", "to_str_tokens", "encode", "read_pattern")


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_nobody_could_take(lens, monkeypatch, name):
    monkeypatch.setattr(lens.engine, "generate", lambda *_, **__: pytest.fail("it draws"))
    call = CALLS[name]
    with pytest.raises(CallError, match="no argument 'self'"):
        call(lens, self=1)
    with pytest.raises(CallError, match=r"given prompt twice, by its place and as prompt=|no argument 'prompt'"):
        call(lens, height=32, prompt="a dog")
    if name not in OPS:
        with pytest.raises(CallError, match="no argument 'ops': it sets this itself"):
            call(lens, ops=[])


@pytest.mark.parametrize("name", ["subject_mask", "attribution"])
def test_what_counts_rows_as_prompts_draws_one_image_of_each(lens, monkeypatch, name):
    monkeypatch.setattr(lens.engine, "generate", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises(dl.errors.DitLensError, match="one"):
        CALLS[name](lens, num_images_per_prompt=2)
