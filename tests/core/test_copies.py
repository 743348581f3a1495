"""What can be copied is: reads with their grid, and lenses with their pipelines; the rest says what to do instead."""

import copy
import pickle

import pytest
import torch

import dit_lens as dl
from tests import pipelines

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "seed": 1}
SITE = "blocks.3.img"


@pytest.fixture(scope="module")
def run(cfg_lens):
    return cfg_lens.run("red", dl.Read(SITE), **CALL)


def test_a_copy_of_a_read_knows_its_grid(run):
    value = run[SITE]
    for found in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value)), copy.deepcopy(run)[SITE]):
        assert torch.equal(found, value)
        assert torch.equal(found.grid(), value.grid())
    both = copy.deepcopy([value, value])
    assert both[0] is both[1]
    assert both[0].data_ptr() != value.data_ptr()


def test_a_copy_of_a_lens_draws_on_a_copy_of_the_pipeline(cfg_lens, run):
    other = copy.deepcopy(cfg_lens)
    assert other.pipe is not cfg_lens.pipe
    with torch.no_grad():
        other.pipe.transformer.proj_out.weight.mul_(2)
    assert not dl.compare(run, other.run("red", dl.Read(SITE), **CALL)).identical
    assert dl.compare(run, copy.copy(cfg_lens).run("red", dl.Read(SITE), **CALL)).identical


def test_a_lens_has_no_pickle(cfg_lens):
    with pytest.raises(dl.errors.ExecutionError, match=r"a lens has no pickle.*save_pretrained"):
        pickle.dumps(cfg_lens)
