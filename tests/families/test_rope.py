"""Rotary position embedding taken out of a block of every family, against a block that turns nothing."""

from __future__ import annotations

import inspect

import pytest
import torch

from dit_lens import Read, Rope, Zero
from dit_lens.errors import OpError, SiteError
from dit_lens.ops import from_json, to_json
from tests.families.test_queries_and_keys import NAMES
from tests.zoo.truth import zoo_of

WITHOUT = ("aura_flow", "sd3", "sd35", "cogview3", "cogview3-dpm", "pixart-sigma", "pixart-alpha", "dit")
WITH = [name for name in NAMES if name not in WITHOUT]
ARGUMENTS = {
    "image_rotary_emb",
    "rotary_emb",
    "rotary_pos_emb",
    "freqs_cis",
    "rope",
    "query_rotary_emb",
    "key_rotary_emb",
}
APART = {"lumina", "hunyuan_dit"}  # whose cross-attention is given the rotation, too
ROUNDED = {"kandinsky5"}  # which rotates in bfloat16


def rotate_by_nothing(value, *, text):
    """Cosines and sines, complex numbers, matrices or angles, of which no token is turned.

    text: of a pair for image and text, whether the second is meant, too.
    """
    if isinstance(value, tuple | list):
        first, second = value
        if isinstance(first, tuple) or first.is_complex():
            return rotate_by_nothing(first, text=text), rotate_by_nothing(second, text=text) if text else second
        return torch.ones_like(first), torch.zeros_like(second)
    if value is None or value.is_complex():
        return None if value is None else torch.ones_like(value)
    if value.shape[-2:] == (2, 2):
        return torch.eye(2).expand_as(value).to(value)
    return torch.zeros_like(value)


@pytest.mark.parametrize("name", WITH)
def test_a_block_without_rotation_draws_as_one_that_is_rotated_by_nothing(name):
    zoo = zoo_of(name)
    block = max(site.block for site in zoo.lens.anatomy.sites if site.point == "attn.q_rot" and site.stream == "img")
    streams = {site.stream for site in zoo.lens.anatomy.sites if (site.block, site.point) == (block, "attn.q_rot")}
    run = zoo.run([Rope([f"blocks.{block}.{stream}" for stream in sorted(streams)])])
    module = zoo.blocks[block][0].attn1 if name in APART else zoo.blocks[block][0]
    names = list(inspect.signature(module.forward).parameters)

    def turn_nothing(module, args, kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        turned = {one: rotate_by_nothing(given[one], text="txt" in streams) for one in ARGUMENTS & given.keys()}
        return tuple(turned.pop(one, arg) for one, arg in zip(names, args, strict=False)), kwargs | turned

    handle = module.register_forward_pre_hook(turn_nothing, with_kwargs=True)
    plain = zoo.plain_of(zoo.call)
    handle.remove()
    near = {"rtol": 0.01, "atol": 0.01} if name in ROUNDED else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(zoo.drawn(run), plain.drawn, **near)
    assert not torch.allclose(zoo.drawn(run), zoo.plain().drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_where_there_is_none_it_is_refused(name):
    with pytest.raises(SiteError, match=r"has no rotary position embedding: the .* are given none"):
        zoo_of(name).run([Rope("blocks.*.img")])


def test_it_is_json_and_a_method_of_a_trace_by_rows_tokens_steps_and_branches():
    zoo = zoo_of("flux")
    op = Rope("blocks[1:3].img", tokens=[3, 5], rows=1, steps=0, branch="cond")
    run = zoo.run([op, Read("blocks.1.img.attn.q_rot", branch="both")])
    plain = zoo.run([Read("blocks.1.img.attn.q_rot", branch="both")])
    moved = (run["blocks.1.img.attn.q_rot"] != plain["blocks.1.img.attn.q_rot"]).any(-1)  # [step, branch, row, token]
    assert moved[0].nonzero().tolist() == [[0, 1, 3], [0, 1, 5]]
    entries = [(entry.site, entry.steps, entry.branch, entry.rows, entry.tokens) for entry in run.receipt.entries]
    sites = [f"blocks.{block}.img.attn.{part}_rot" for block in (1, 2) for part in "qk"]
    assert entries == [(site, (0,), "cond", (1,), (3, 5)) for site in sites]
    assert to_json(from_json(to_json(op))) == to_json(op)
    assert torch.equal(zoo.drawn(zoo.run([from_json(to_json(op))])), zoo.drawn(zoo.run([op])))


def test_what_is_written_to_the_projection_before_counts():
    zoo = zoo_of("flux")
    run = zoo.run([Zero("blocks.1.img.attn.q"), Rope("blocks.1.img"), Read("blocks.1.img.attn.q_rot")])
    assert not run["blocks.1.img.attn.q_rot"].any()


@pytest.mark.parametrize(
    ("op", "says"),
    [
        (Rope("blocks.1.img", channels=[0]), "takes no channels="),
        (Rope("blocks.1.img.attn.q"), "Rope is for blocks"),
        (Rope("velocity"), "Rope is for blocks"),
    ],
)
def test_what_no_model_has_is_refused(op, says):
    with pytest.raises(OpError, match=says):
        zoo_of("flux").run([op])
