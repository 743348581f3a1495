"""The names inside nnsight's own traces, and threads."""

import threading

import nnsight
import numpy as np
import pytest
import torch

from dit_lens import Read, Zero
from dit_lens.errors import SiteError
from tests import oracle, pipelines


def call():
    return {**pipelines.TRUE_CFG, "negative_prompt": ["bad"], "generator": oracle.generators([3])}


def test_accessors_read_and_assign(cfg_lens):
    with cfg_lens.nnsight.generate(["red"], **call()) as tracer:
        kept = nnsight.save([])
        for _ in tracer.iter[: 2 * pipelines.STEPS]:
            x = cfg_lens.blocks[-2].img
            x[..., [1, 4]] = 0
            cfg_lens.blocks[3].img = x
            kept.append(cfg_lens.blocks[4].img)
        result = nnsight.save(tracer.result)
    run = cfg_lens.run("red", [Zero("blocks.3.img", channels=[1, 4]), Read("blocks.4.img", branch="both")], seed=3)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(run.images[0]))
    for occurrence, value in enumerate(kept):
        assert torch.equal(value, run["blocks.4.img"][occurrence // 2, occurrence % 2])


def test_accessors_say_what_there_is(cfg_lens):
    assert len(cfg_lens.blocks) == 5
    assert repr(cfg_lens.blocks[2]) == "Block(2, single.0)"
    with pytest.raises(SiteError, match="there are 5, 0 to 4"):
        cfg_lens.blocks[5]
    with pytest.raises(AttributeError, match="Nearest: 'img'"):
        cfg_lens.blocks[0].imgs  # noqa: B018


def test_one_lens_serves_two_threads(cfg_lens):
    alone = {seed: cfg_lens.run("red", [Read("blocks.1.img")], seed=seed) for seed in (1, 2)}
    found = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: cfg_lens.run("red", [Read("blocks.1.img")], seed=s)}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, run in alone.items():
        assert torch.equal(found[seed]["blocks.1.img"], run["blocks.1.img"])


def test_a_joint_tensor_is_called_so():
    from tests.zoo.truth import zoo_of

    zoo = zoo_of("klein")
    with pytest.raises(AttributeError, match=r"block 3 has no stream 'img'.*joint"):
        zoo.lens.blocks[3].img  # noqa: B018
