"""What a run has read is put into steps of its noise level only; tensors may be meant anywhere."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_lens import DiTLens, MeanAblate, Read, Resample, Run, Swap
from dit_lens.errors import ExecutionError
from dit_lens.ops import from_json, to_json
from tests import pipelines

SITE = "blocks.2.img"
CALL = {**pipelines.CALL, "num_inference_steps": 3, "output_type": "latent"}
TOLD = r"{} at blocks\.2\.img takes step {} from a run in which that was at a noise level of {}, and it is at {} here"


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


@pytest.fixture(scope="module")
def source(lens):
    return lens.run(["red", "blue"], [Read(SITE), Read(SITE, reduce="mean", name="means")], seed=1, **CALL)


@pytest.fixture
def shifted(lens):
    before = lens.pipe.scheduler
    lens.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    yield lens
    lens.pipe.scheduler = before


def entered(lens, function):
    """How many blocks were called."""
    calls = []
    handle = lens.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        function()
    finally:
        handle.remove()
        assert not calls


FORMS = {
    "a run": lambda source: Swap(SITE, source=source),
    "a read": lambda source: Resample(SITE, source=source.reading(SITE), steps=[1, 2]),
    "a read of JSON": lambda source: from_json(to_json(Swap(SITE, source=source.reading(SITE)))),
    "means": lambda source: MeanAblate(SITE, mean=source["means"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_levels_are_told_before_a_block_runs(shifted, source, name):
    op = FORMS[name](source)
    kind, level = type(op).__name__, f"{source.sigmas[1]:.4g}"
    with pytest.raises(ExecutionError, match=TOLD.format(kind, 1, level, r"0\.9\d*")):
        entered(shifted, lambda: shifted.run(["xyz", "q"], op, seed=2, **CALL))


def test_a_source_that_was_saved_is_told_as_well(shifted, source, tmp_path):
    loaded = Run.load(source.save(tmp_path / "run"))
    with pytest.raises(ExecutionError, match=r"give the tensors themselves: source=\{site: run\[site\]\}"):
        shifted.run(["xyz", "q"], Swap(SITE, source=loaded), seed=2, **CALL)


def test_tensors_are_meant_and_equal_levels_are_the_same_run(lens, source):
    """Steps of equal levels of another schedule are taken, and so are all of a tensor."""
    swapped = lens.run(["xyz", "q"], Swap(SITE, source=source), seed=2, **CALL).latents
    before = lens.pipe.scheduler
    lens.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    try:
        first = Swap(SITE, source=source, steps=0)  # at 1, whatever the shift
        assert lens.run(["xyz", "q"], first, seed=2, **CALL).latents is not None
        given = lens.run(["xyz", "q"], Swap(SITE, source={SITE: source[SITE]}), seed=2, **CALL).latents
    finally:
        lens.pipe.scheduler = before
    assert given.shape == swapped.shape
    assert not torch.equal(given, swapped)
