"""A transformer whose blocks are on two devices: every name and edit acts on the device where its tensor is."""

import pytest
import torch

from dit_lens import Add, Apply, DiTLens, Read, Scale, Swap, Zero
from tests.two_devices import Far, TwoDevices, spread
from tests.zoo.truth import ENTRIES

SEEN = []


def triple(tensor, hook):
    SEEN.append(isinstance(tensor, Far))
    return tensor * 3


EDITS = [
    Zero("blocks.*.img", channels=[1]),
    Add("blocks.*.img", value=2.0, channels=[0, 2], tokens=[0, 3]),
    Swap("blocks.*.img", source="row:0", rows=1, channels=[3]),
    Apply("blocks.*.img", fn=triple, channels=[4]),
]


GATED = {"flux2": "mlp.post", "pixart-sigma": "attn_out"}


# Gates that are computed before all blocks, and gates from a table of each block.
@pytest.mark.parametrize("name", ["flux2", "pixart-sigma"])
def test_reads_and_edits_of_blocks_on_two_devices(name):
    entry = ENTRIES[name]
    lens = DiTLens(entry.build(), defaults=entry.call(2))
    everything = [Read(site, name=site) for site in lens.sites()]
    gates = [Scale(f"blocks.{block}.img.{GATED[name]}", factor=0.5) for block in (0, lens.anatomy.depth - 1)]
    edits = [*EDITS, *gates, Read("blocks.*.img", reduce="rms"), Read("velocity", name="after")]
    wanted = [lens.run(ops=ops, seed=0) for ops in (everything, edits)]
    spread(lens.pipe.transformer, [lens.anatomy.blocks(stack) for stack in lens.anatomy.family.stacks])
    SEEN.clear()
    with TwoDevices():
        found = [lens.run(ops=ops, seed=0) for ops in (everything, edits)]
    assert set(SEEN) == {True, False}
    for one, other in zip(wanted, found, strict=True):
        for first, second in zip(one.readings, other.readings, strict=True):
            for site in first:  # attention of such tensors is computed by another kernel
                assert torch.allclose(first[site], second[site], rtol=1e-3, atol=1e-3), site
        for first, second in zip(one.receipt.entries, other.receipt.entries, strict=True):
            assert first.before == pytest.approx(second.before, rel=1e-3)
            assert first.after == pytest.approx(second.after, rel=1e-3)
