"""Channels are ranked by one number each; any other reduction is told before the first forward pass."""

import pytest
import torch

import dit_lens as dl
from dit_lens import DiTLens, Read
from dit_lens.errors import OpError
from tests import pipelines

FEW = {"num_inference_steps": 1, "seed": 0}
DRAWING = {
    "massive_channels": lambda lens, score: lens.massive_channels("red", 2, score=score, **FEW),
    "steer": lambda lens, score: dl.steer(lens, "red", "blue", k=2, score=score, **FEW),
    "transfer": lambda lens, score: dl.studies.transfer(
        lens, [("red", "blue")], k=2, draws=1, score=score, num_inference_steps=1
    ),
    "disruption": lambda lens, score: dl.studies.disruption(
        lens, ["red"], k=2, draws=1, confounds=False, score=score, num_inference_steps=1
    ),
}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


@pytest.mark.parametrize("score", ["topk(3)", "quantile(0.1, 0.9)", "histogram(-1,1,1)", "meen", "p101"])
@pytest.mark.parametrize("name", DRAWING)
def test_scores_of_several_numbers_are_told_before_anything_is_drawn(lens, name, score):
    passes = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(OpError, match="score="):
        DRAWING[name](lens, score)
    handle.remove()
    assert not passes


@pytest.mark.parametrize("score", ["p99.9", "quantile(0.25)", "max"])
def test_any_reduction_of_one_number_ranks(lens, score):
    found = lens.massive_channels("red", 3, score=score, site="blocks.1.img", **FEW)
    values = lens.run("red", [Read("blocks.1.img")], **FEW)["blocks.1.img"][0, 0].double().abs()  # [n, d]
    share = {"p99.9": 0.999, "quantile(0.25)": 0.25, "max": 1.0}[score]
    ranked = torch.quantile(values, share, dim=0).topk(3).indices.tolist()
    assert list(found["blocks.1.img"]) == ranked
