"""Values of another site of the same forward pass: against plain hooks, and what is refused before a run."""

import pytest
import torch

from dit_lens import DiTLens, Read, Skip, Swap, Zero
from dit_lens.errors import OpError, SiteError
from tests import pipelines
from tests.zoo.truth import zoo_of

CALL = {**pipelines.CALL, "seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


def drawn_without(pipe, blocks):
    """Latents of the plain pipeline when these blocks return what they are given."""
    every = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    hooks = [
        every[block].register_forward_hook(
            lambda _, args, kwargs, output: (kwargs["encoder_hidden_states"], kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in blocks
    ]
    call = {key: value for key, value in CALL.items() if key != "seed"}
    try:
        return pipe(prompt="red", generator=torch.Generator().manual_seed(3), **call).images
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("blocks", [[2], [1, 2], [0, 4], [3, 4]])
def test_skipped_blocks_return_what_they_are_given(lens, blocks):
    ops = [Skip(f"blocks.{block}.*") for block in blocks]
    run = lens.run("red", ops, **CALL)
    assert torch.equal(run.latents, drawn_without(lens.pipe, blocks))
    assert {entry.kind for entry in run.receipt.entries} == {"Skip"}


@pytest.mark.parametrize("name", ["flux2", "klein", "sd3", "qwen", "zimage", "sana", "wan", "pixart-sigma"])
def test_a_skipped_block_changes_nothing_of_what_enters_it(name):
    zoo = zoo_of(name)
    block = zoo.lens.anatomy.depth // 2
    sites = [site for site in zoo.lens.sites(f"blocks.{block}.*") if site.count(".") == 2]
    before = [
        Read(f"{site}.resid_pre", branch=branch, name=f"{site}{branch}") for site in sites for branch in zoo.branches
    ]
    after = [Read(site, branch=branch, name=f"after{site}{branch}") for site in sites for branch in zoo.branches]
    run = zoo.run([Skip(sites), *before, *after])
    for site in sites:
        for branch in zoo.branches:
            assert torch.equal(run[f"after{site}{branch}"][site], run[f"{site}{branch}"][f"{site}.resid_pre"])


def test_values_come_after_the_edits_at_their_site(lens):
    run = lens.run(
        "red",
        [
            Zero("blocks.0.img.attn.v", channels=[3]),
            Swap("blocks.2.img.attn.z", source="site:blocks.0.img.attn.v", tokens=[1, 4], strength=1.0),
            Read("blocks.0.img.attn.v"),
            Read("blocks.2.img.attn.z"),
        ],
        **CALL,
    )
    v, z = run["blocks.0.img.attn.v"], run["blocks.2.img.attn.z"]
    assert torch.equal(z[:, :, [1, 4]], v[:, :, [1, 4]])
    assert not bool(v[..., 3].any())
    assert not torch.equal(z[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("source", ["blocks.-5.img", "double.0.img", "double.-2.img"])
def test_a_source_is_named_as_sites_are(lens, source):
    named, plain = (
        lens.run("red", [Swap("blocks.-1.img", source=f"site:{one}"), Read("blocks.4.img")], **CALL)
        for one in (source, "blocks.0.img")
    )
    assert torch.equal(named["blocks.4.img"], plain["blocks.4.img"])


@pytest.mark.parametrize(
    ("op", "kind", "told"),
    [
        (Swap("blocks.1.img", source="site:blocks.2.img"), OpError, "is not computed before"),
        (Swap("blocks.1.img", source="site:blocks.1.img"), OpError, "is not computed before"),
        (Swap("blocks.1.img.resid_pre", source="site:blocks.1.img"), OpError, "is not computed before"),
        (Swap("blocks.1.img", source="site:blocks.0.txt"), OpError, "tokens of the same stream, img"),
        (Swap("final.img", source="site:blocks.0.img"), OpError, "only tokens of a block"),
        (Swap("blocks.1.img", source="site:velocity"), OpError, "tokens of the same stream"),
        (Swap("blocks.1.img", source="site:blocks.0.img.attn_out"), OpError, "multiplied by a gate"),
        (Swap("blocks.1.img", source="site:blocks.0.img.mlp.post"), OpError, "channels, and 32 are asked for"),
        (Swap("blocks.1.img", source="site:blocks.9.img"), SiteError, "'blocks.9.img' asks for block 9"),
        (Swap("blocks.1.img", source="site:blocks.-9.img"), SiteError, "asks for block -9, but blocks has 5"),
        (Swap("blocks.1.img", source="site:blocks.*.img"), SiteError, "means 5 sites. Name one of them"),
        (Swap("blocks.4.img", source="site:blocks.-1.img"), OpError, "is not computed before"),
        (Swap("blocks.1.img", source="site:"), SiteError, "no site is called ''"),
        (Skip("blocks.1.img.attn.z"), OpError, "Skip is for the outputs of blocks"),
        (Skip("final.img"), OpError, "Skip is for the outputs of blocks"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(lens, op, kind, told, monkeypatch):
    monkeypatch.setattr(lens.engine, "generate", None)
    with pytest.raises(kind, match=told):
        lens.run("red", op, **CALL)
