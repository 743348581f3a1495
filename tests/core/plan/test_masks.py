"""mask= where only the pipeline knows its grid: videos, and images whose size it chooses."""

import pytest
import torch

from dit_lens import Read, Zero
from dit_lens.errors import OpError
from tests.zoo import truth

SITE = "blocks.1.img"


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox", "sana"])
@pytest.mark.parametrize("frames", [True, False])
def test_masks_on_a_grid_that_the_pipeline_makes(name, frames):
    zoo = truth.zoo_of(name)
    call = {**zoo.call, "seed": truth.SEED}
    grid = zoo.lens.run(**call).grid
    mask = torch.rand(grid if frames else grid[-2:], generator=torch.Generator().manual_seed(3)) > 0.5
    run = zoo.lens.run(ops=[Zero(SITE, mask=mask), Read(SITE)], **call)
    found = run[SITE].grid()  # [step, row, (frame,) h, w, channel]
    chosen = mask.expand(grid)
    assert not found[:, :, chosen].any()
    assert found[:, :, ~chosen].any(-1).all()
    assert all(entry.elements % int(chosen.sum()) == 0 for entry in run.receipt.entries)
    with pytest.raises(OpError, match=rf"the mask is 1 x 1, but this run has a grid of {' x '.join(map(str, grid))}"):
        zoo.lens.cost(ops=Zero(SITE, mask=[[True]]), **call)
