"""All sites of a model can be read in one run, and each is what it is alone."""

import numpy as np
import pytest
import torch

from dit_lens import Read
from tests.zoo import truth


@pytest.mark.parametrize("name", sorted(truth.ENTRIES))
def test_all_sites_in_one_run(name):
    zoo = truth.zoo_of(name)
    call = {**zoo.call, "seed": truth.SEED}
    # Text of another length in every row fits no one tensor, which is told.
    sites = [site for site in zoo.lens.sites() if "ragged" not in name or ".txt" not in site]
    together = zoo.lens.run(**call, ops=Read(sites, steps=0))
    assert list(together) == sites
    rng = np.random.default_rng(len(sites))
    for site in rng.choice(sites, size=3, replace=False):
        alone = zoo.lens.run(**call, ops=Read(str(site), steps=0))
        assert torch.equal(alone[str(site)], together[str(site)])
