"""One suite of statements for every family, against plain torch hooks on a table written for the tests alone."""

from __future__ import annotations

import pytest
import torch

import dit_lens as dl
from dit_lens import Read, Swap, Zero
from tests.zoo import truth
from tests.zoo.truth import ENTRIES


@pytest.fixture(scope="module", params=ENTRIES)
def zoo(request):
    """A lens over a tiny pipeline, and the pipeline's own run under plain hooks."""
    return truth.zoo_of(request.param)


def test_what_is_known_before_a_run(zoo):
    lens, entry = zoo.lens, zoo.entry
    assert lens.anatomy.depth == entry.blocks
    assert {check.name for check in lens.checks} >= {"structure", "sizes", "chain", "final", "grid", "write"}
    assert lens.family.transformer == entry.transformer
    assert entry.transformer in repr(lens)


def test_reads_equal_plain_hooks(zoo):
    sites = [site for site in zoo.lens.sites("blocks.*.*") if zoo.comparable(site)]
    run = zoo.run([Read(sites, branch=branch, name=branch) for branch in zoo.branches])
    assert run.grid == zoo.entry.grid
    plain = zoo.plain()
    for branch in zoo.branches:
        for site in sites:
            found = run[branch][site].as_subclass(torch.Tensor)
            wanted = torch.stack([zoo.tokens(plain, step, branch, site) for step in range(len(found))])
            assert torch.equal(found, wanted), (site, branch)
    assert torch.equal(zoo.drawn(run), plain.drawn)


def test_an_edit_touches_what_it_names(zoo):
    """Two channels of two tokens in one branch of the second of three steps: later calls see no other difference."""
    site, three = zoo.sites_of_image[len(zoo.sites_of_image) // 2], {**zoo.call, "num_inference_steps": 3}
    branch = zoo.branches[-1]
    run = zoo.run([Zero(site, channels=[1, 5], tokens=[0, 7], steps=1, branch=branch, rows=0)], steps=3)
    edit = zoo.zeroing(site, step=1, branch=branch, row=0, tokens=[0, 7], channels=[1, 5])
    assert torch.equal(zoo.drawn(run), zoo.plain_of(three, edit).drawn)
    assert not torch.equal(zoo.drawn(run), zoo.plain_of(three).drawn)
    (entry,) = run.receipt.entries
    assert (entry.site, entry.branch, entry.steps, entry.rows, entry.elements) == (site, branch, (1,), (0,), 4)
    assert entry.after == (0.0,)


def test_the_last_block_the_final_norm_and_the_prediction(zoo):
    last = zoo.sites_of_image[-1]
    run = zoo.run([Read(last), Read("final.img"), Read("velocity")])
    assert torch.equal(run[last].as_subclass(torch.Tensor), run["final.img"].as_subclass(torch.Tensor))
    assert run["velocity"].shape[2:] == (zoo.count, zoo.lens.anatomy.out_width)
    assert run["velocity"].grid().shape[2:-1] == zoo.entry.grid


def test_swapping_a_row_with_itself_is_the_identity(zoo):
    run = zoo.run([Swap("blocks.*.img", source="row:0", rows=0), Swap("velocity", source="row:0", rows=0)])
    assert torch.equal(zoo.drawn(run), zoo.plain().drawn)


def test_all_that_a_row_is_made_of_makes_it_the_other_row(zoo):
    """Every channel of the image stream, and what modulates the final norm, where text enters again in some models."""
    if zoo.rows == 1:
        pytest.skip("its pipeline draws one image at a time")
    source, target = zoo.plain().drawn[:2]
    assert not torch.equal(source, target)
    within = 1e-5 if zoo.entry.name == "cosmos2" else 0.0  # whose sums depend on the place of a row
    mod = [site for site in zoo.lens.sites() if site == "final.img.mod"]
    swapped = zoo.drawn(zoo.run([Swap(["blocks.*.img", *mod], source="row:0", rows=1)]))
    assert torch.equal(swapped[0], source)
    assert torch.allclose(swapped[1], source, rtol=0, atol=within)
    without = zoo.drawn(zoo.run([Swap("blocks.*.img", source="row:0", rows=1)]))
    assert torch.allclose(without[1], source, rtol=0, atol=within) == (
        zoo.entry.transformer not in truth.TEXT_IN_THE_FINAL_NORM
    )


def test_a_stored_read_put_back_is_the_identity(zoo):
    site = zoo.sites_of_image[0]
    run = zoo.run([Read(site, branch="both" if len(zoo.branches) > 1 else None)])
    again = zoo.run([Swap(site, source=run)])
    assert torch.equal(zoo.drawn(again), zoo.plain().drawn)


def test_the_lens_leaves_the_pipeline_as_it_was(zoo):
    with pytest.raises(RuntimeError, match="stop"):
        zoo.run([dl.Apply(zoo.sites_of_image[0], fn=truth.stop)])
    assert torch.equal(zoo.plain().drawn, zoo.plain().drawn)
    assert not any(module._forward_hooks for module in zoo.pipe.transformer.modules())  # noqa: SLF001


def test_only_the_conditional_rows_follow_the_prompt(zoo):
    """Which branch is which, without a word from the library: at the first step, before guidance mixes them."""
    changed = truth.with_another_prompt(zoo.call)
    before, after = zoo.plain(), zoo.plain_of(changed)
    last = len(zoo.blocks) - 1
    for branch in zoo.branches:
        call, rows = zoo.place(0, branch)
        one, two = (zoo.select(found.outputs[call, last], last, "img", rows, branch) for found in (before, after))
        assert torch.equal(one, two) == (branch == "uncond")
