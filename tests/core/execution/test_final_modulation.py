"""What modulates the final norm: ``final.img.mod``, read and edited, against plain torch hooks."""

import pytest
import torch

from dit_lens import Read, Scale, Swap, Zero
from dit_lens.errors import OpError, SiteError
from dit_lens.ops import from_json, to_json
from tests.zoo.truth import zoo_of

EVERYTHING = ["blocks.*.img", "final.img.mod"]


def hooked(zoo, change):
    """The pipeline's own run, the second argument of norm_out changed by plain hooks; what it was given."""
    seen = []

    def hook(_module, args, kwargs):
        name = "conditioning_embedding"
        at = kwargs[name] if name in kwargs else args[1]
        seen.append(at.clone())
        new = change(at.clone())
        return (args, {**kwargs, name: new}) if name in kwargs else ((args[0], new, *args[2:]), kwargs)

    handle = zoo.pipe.transformer.norm_out.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return zoo.plain_of(zoo.call).drawn, torch.stack(seen)
    finally:
        handle.remove()


def from_first_row(at):
    at[1] = at[0]
    return at


@pytest.mark.parametrize("name", ["flux-embedded", "hunyuan_video"])
def test_reads_and_edits_equal_plain_hooks(name):
    """One pass of each step, so that its rows are those of the one branch."""
    zoo = zoo_of(name)
    drawn, seen = hooked(zoo, from_first_row)
    run = zoo.run([Read("final.img.mod", name="before"), Swap("final.img.mod", source="row:0", rows=1)])
    assert torch.equal(run["before"]["final.img.mod"].as_subclass(torch.Tensor)[:, :, 0], seen)
    assert torch.equal(zoo.drawn(run), drawn)
    drawn, _ = hooked(zoo, lambda at: at * 0.5)
    assert torch.equal(zoo.drawn(zoo.run([Scale("final.img.mod", factor=0.5)])), drawn)


def test_its_receipt_and_its_json():
    zoo = zoo_of("flux-embedded")
    swap = Swap(EVERYTHING, source="row:0", rows=1, steps=[0])
    run = zoo.run([from_json(to_json(swap))])
    assert torch.equal(zoo.drawn(run), zoo.drawn(zoo.run([swap])))
    (entry,) = [one for one in run.receipt.entries if one.site == "final.img.mod"]
    assert (entry.rows, entry.steps, entry.elements) == ((1,), (0,), zoo.lens.anatomy.width)


def test_one_row_for_all_stays_one_unless_rows_differ():
    """Without guidance PRX has one time, and so one modulation, for all rows; edits of some rows lay it out."""
    zoo = zoo_of("prx-unguided")
    assert torch.equal(zoo.drawn(zoo.run([Swap("final.img.mod", source="row:0", rows=1)])), zoo.plain().drawn)
    assert torch.allclose(zoo.drawn(zoo.run([Scale("final.img.mod", factor=1.0)])), zoo.plain().drawn, atol=1e-5)
    one = zoo.drawn(zoo.run([Zero("final.img.mod", rows=1)]))
    both = zoo.drawn(zoo.run([Zero("final.img.mod")]))
    assert torch.allclose(one[0], zoo.plain().drawn[0], atol=1e-5)
    assert torch.allclose(one[1], both[1], atol=1e-5)
    assert not torch.allclose(one[1], zoo.plain().drawn[1], atol=1e-2)


def test_a_model_without_it_says_why():
    zoo = zoo_of("pixart-sigma")
    with pytest.raises(SiteError, match=r"'final.img.mod': PixArt has none: .* of the time alone"):
        zoo.run([Swap(EVERYTHING, source="row:0", rows=1)])
    with pytest.raises(OpError, match="one vector for each image, not tokens"):
        zoo_of("flux-embedded").run([Zero("final.img.mod", tokens=[0])])
