"""The tensor of a read is a source as the read itself is; sets have no order that values could follow."""

import pytest
import torch

from dit_lens import Add, MeanAblate, Read, Resample, Swap
from dit_lens.errors import OpError
from dit_lens.ops import to_json
from tests import pipelines

SITE = "blocks.2.img"
CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "seed": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def source(cfg_lens):
    return cfg_lens.run(["red", "a blue one"], Read(SITE, branch="both"), **{**CALL, "seed": 1})


@pytest.mark.parametrize("chosen", [{}, {"channels": [3, 1], "rows": [1], "tokens": [4, 3]}, {"branch": "uncond"}])
def test_a_tensor_of_both_branches_goes_branch_by_branch(cfg_lens, source, chosen):
    def swap(given):
        return cfg_lens.run(["xyz", "q"], Swap(SITE, source=given, **chosen), **CALL).latents

    plain = source[SITE].as_subclass(torch.Tensor)
    assert torch.equal(swap(source), swap(source[SITE]))
    assert torch.equal(swap(source), swap({SITE: plain}))
    assert not torch.equal(swap(source), swap(plain.flip(1)))


def test_other_tensors_of_five_axes_are_told(cfg_lens):
    with pytest.raises(OpError, match=r"of both branches \[step, 2, row, token, channel\]; this one has 5"):
        cfg_lens.cost("xyz", Swap(SITE, source=torch.zeros(2, 3, 1, 96, 32)), **CALL)


def test_a_mean_of_several_rows_is_told(cfg_lens):
    means = cfg_lens.run(["red", "a blue one"], Read(SITE, reduce="mean", name="m"), **CALL)["m"]
    ops = [MeanAblate(SITE, mean={SITE: means[SITE][:, :1]}), MeanAblate(SITE, mean={SITE: means[SITE][:, 0]})]
    one, other = (cfg_lens.run(["xyz", "q"], op, **CALL).latents for op in ops)
    assert torch.equal(one, other)
    with pytest.raises(OpError, match=r"a mean is \[channel\] or \[step, channel\].* whose rows are averaged"):
        cfg_lens.cost(["xyz", "q"], MeanAblate(SITE, mean={SITE: means[SITE]}), **CALL)


SETS = {
    "channels of a vector": lambda: Add(SITE, value=[1.0, 2.0], channels={5, 3}),
    "channels by site": lambda: Add(SITE, value=[1.0, 2.0], channels={SITE: frozenset({5, 3})}),
    "channels of a source": lambda: Swap(SITE, source=torch.randn(2), channels={5, 3}),
    "channels of a mean": lambda: MeanAblate(SITE, mean={SITE: torch.randn(2)}, channels={5, 3}),
    "tokens": lambda: Resample(SITE, source={SITE: torch.randn(2, 32)}, tokens={9, 40}),
    "rows": lambda: Swap(SITE, source=torch.randn(2, 96, 32), rows={0, 2}),
}


@pytest.mark.parametrize("name", SETS)
def test_a_value_for_each_entry_of_a_set_is_told(cfg_lens, name):
    with pytest.raises(OpError, match=rf"{name.split()[0]}= is a set .*which has no order.*in a list"):
        cfg_lens.cost(["a", "b", "c"], SETS[name](), **CALL)


def test_sets_ascend_in_a_read_and_in_json():
    names = {5, 40, 3, 1024}
    assert to_json(Read(SITE, channels=names))["channels"] == sorted(names)
    assert to_json(Read(SITE, channels={SITE: names}))["channels"]["mapping"][SITE] == sorted(names)


def test_one_value_for_a_set_and_values_for_all_are_meant(cfg_lens):
    ops = [
        Add(SITE, value=1.0, channels={5, 3}),
        Swap(SITE, source=torch.randn(32), channels={5, 3}),
        Add(SITE, value=[1.0, 2.0], channels=[5, 3]),
    ]
    assert cfg_lens.cost(["a", "b"], ops, **CALL)
