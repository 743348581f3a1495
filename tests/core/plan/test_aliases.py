"""One tensor under two names: what is asked of both happens in the order of the ops."""

import itertools

import pytest
import torch

from dit_lens import Add, Read, Scale, Zero

NAMES = [f"blocks.3.{stream}.mod.gate" for stream in ("img", "txt")]  # a single block has one modulation


@pytest.mark.parametrize(("one", "other"), list(itertools.product(NAMES, NAMES)))
def test_reads_see_the_edits_before_them(cfg_lens, one, other):
    ops = [
        Read(one, name="before"),
        Scale(other, factor=3.0),
        Read(one, name="scaled"),
        Add(one, value=1.0),
        Read(other, name="added"),
        Zero(other, channels=[2]),
        Read(one, name="after"),
    ]
    run = cfg_lens.run("red", ops, seed=1, output_type="latent")
    before, scaled = run["before"][one], run["scaled"][one]
    assert torch.equal(scaled[0], 3 * before[0])
    assert torch.equal(run["added"][other][0], scaled[0] + 1)
    after = run["added"][other].clone()
    after[..., 2] = 0
    assert torch.equal(run["after"][one][0], after[0])


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_the_image_does_not_depend_on_the_names(cfg_lens, names):
    def draw(one, other):
        ops = [Scale(one, factor=2.0), Add(other, value=0.5), Scale(one, factor=0.25)]
        return cfg_lens.run("red", ops, seed=1, output_type="latent").latents

    assert torch.equal(draw(*names), draw(names[0], names[0]))
