"""Patterns of attention: softmax of q and k, checked by what they make of v."""

import pytest
import torch

from dit_lens import AttentionMask, DiTLens, Read, Zero
from dit_lens.errors import OpError, PromptError, SiteError
from tests import pipelines
from tests.zoo.truth import ENTRIES, zoo_of

HEAD = 16


def call_of(zoo):
    call = dict(zoo.call)
    return {"prompt": call.pop("prompt", None), "seed": 3, **call}


def head(tensor, number):
    return tensor[..., number * HEAD : (number + 1) * HEAD].as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    ("name", "block", "text_first"),
    [
        ("flux", 0, True),
        ("flux", 3, True),
        ("klein", 3, True),
        ("qwen", 1, True),
        ("sd3", 1, False),
        ("zimage", 3, None),
    ],
)
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_the_pattern_times_v_is_z(name, block, text_first, branch):
    zoo = zoo_of(name)
    call = {**call_of(zoo), "num_inference_steps": 3}
    found = zoo.lens.read_pattern(block=block, heads=[1], steps=[0, 2], branch=branch, **call)
    sites = [f"blocks.{block}.{stream}.attn.{part}" for stream in ("img", "txt") for part in "vz"]
    run = zoo.run([Read(sites, branch=branch, steps=[0, 2])], steps=3)
    v = {stream: head(run[f"blocks.{block}.{stream}.attn.v"], 1) for stream in ("img", "txt")}
    z = head(run[f"blocks.{block}.img.attn.z"], 1)
    assert found[block].shape[:3] == (2, zoo.rows, 1)
    torch.testing.assert_close(found[block].sum(-1), torch.ones(found[block].shape[:-1]))
    if text_first is None:  # padding lies between image and text
        return
    keys = torch.cat([v["txt"], v["img"]] if text_first else [v["img"], v["txt"]], 2)
    queries = found.between(block, "img", "img"), found.between(block, "img", "txt")
    assert queries[0].shape[-2:] == (zoo.count, zoo.count)
    rows = torch.cat([queries[1], queries[0]] if text_first else list(queries), -1)
    torch.testing.assert_close((rows[:, :, 0] @ keys), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ENTRIES if not name.startswith("sana")])
def test_every_family_has_patterns(name):
    zoo = zoo_of(name)
    block = zoo.lens.anatomy.depth - 1
    found = zoo.lens.read_pattern(block=block, heads=0, **call_of(zoo))
    pattern = found[block]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    assert found.between(block, "img", "img").shape[-2:] == (zoo.count, zoo.count)


def test_the_image_is_the_same_and_no_hook_stays():
    zoo = zoo_of("flux")
    found = zoo.lens.read_pattern(block=[0, -1], heads=[0], **call_of(zoo))
    assert torch.equal(zoo.drawn(found.run), zoo.plain().drawn)
    assert list(found.tensors) == [0, 4]
    assert torch.equal(found[-1], found[4])
    assert torch.equal(found[-5], found[0])
    assert torch.equal(found.between(-1, "img", "txt"), found.between(4, "img", "txt"))
    assert torch.equal(found.incoming(-1, "txt"), found.incoming(4, "txt"))
    for gone in (-2, -6, 5):
        with pytest.raises(SiteError, match=rf"block {gone} was not read; there are 0, 4\."):
            found[gone]
    assert not any(module._forward_pre_hooks for module in zoo.lens.pipe.transformer.modules())  # noqa: SLF001


def test_refusals():
    zoo = zoo_of("flux")
    with pytest.raises(SiteError, match="block 9 does not exist: there are 5"):
        zoo.lens.read_pattern(block=9, heads=0, **call_of(zoo))
    with pytest.raises(OpError, match="head 7 does not exist: block 0 has 2, 0 to 1"):
        zoo.lens.read_pattern(block=0, heads=7, **call_of(zoo))
    with pytest.raises(SiteError, match=r"attn\.pattern.*lens\.read_pattern"):
        zoo.run([Read("blocks.0.attn.pattern")])
    sana = zoo_of("sana")
    with pytest.raises(SiteError, match="its attention is linear and forms none"):
        sana.lens.read_pattern(block=0, heads=0, **call_of(sana))
    dit = zoo_of("dit")
    with pytest.raises(OpError, match="image tokens only"):
        dit.lens.read_pattern(block=0, heads=0, **call_of(dit)).between(0, "img", "txt")


def test_reference_tokens_belong_to_neither_stream():
    """Kontext holds them after the image; klein with a cache lets them attend to themselves first."""
    from diffusers import FluxKontextPipeline
    from PIL import Image

    pipe = FluxKontextPipeline(**pipelines.flux().components)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "max_area": 32 * 48, "_auto_resize": False}
    call = {"image": Image.new("RGB", (48, 32), "red"), **size, "num_inference_steps": 2}
    text, count = pipelines.LENGTH, 8 * 12
    found = DiTLens(pipe).read_pattern("red", 1, heads=[0], seed=0, max_sequence_length=text, **call)
    whole = found[1]
    assert whole.shape[-1] == text + 2 * count
    assert torch.equal(found.between(1, "img", "img"), whole[..., text : text + count, text : text + count])
    assert torch.equal(found.between(1, "img", "txt"), whole[..., text : text + count, :text])
    zoo = zoo_of("klein-kv")
    found = zoo.lens.read_pattern(block=3, heads=0, steps=0, **call_of(zoo))
    with pytest.raises(OpError, match=r"attends in parts.*fewer than the image and its references, 40"):
        found.between(3, "img", "img")


def test_streams_are_those_of_a_read():
    zoo = zoo_of("zimage")
    run = zoo.run([Read("blocks.3.txt")])
    found = zoo.lens.read_pattern(block=3, heads=0, **call_of(zoo))
    assert found.between(3, "img", "txt").shape[-1] == run["blocks.3.txt"].shape[2] == 32
    ragged = zoo_of("lumina2-ragged")
    block = ragged.lens.anatomy.depth - 1
    found = ragged.lens.read_pattern(block=block, heads=0, **call_of(ragged))
    part = found.between(block, "img", "img")
    for row, start in enumerate([7, 6]):
        assert torch.equal(part[0, row], found[block][0, row, :, start : start + 24, start : start + 24])
    with pytest.raises(OpError, match="7, 6 text tokens"):
        found.between(block, "img", "txt")


def test_patterns_under_an_edit_and_what_is_refused():
    zoo = zoo_of("flux")
    call = call_of(zoo)
    plain = zoo.lens.read_pattern(block=3, heads=0, **call)
    edited = zoo.lens.read_pattern(block=3, heads=0, ops=Zero("blocks.0.img"), **call)
    assert not torch.equal(plain[3], edited[3])
    with pytest.raises(PromptError, match="read from one batch"):
        zoo.lens.read_pattern(block=3, heads=0, batch_size=1, **call)
    with pytest.raises(OpError, match="a pattern is of one branch"):
        zoo.lens.read_pattern(block=3, heads=0, branch="both", **call)
    with pytest.raises(OpError, match="not a number or a list of numbers"):
        zoo.lens.read_pattern(block=3, heads=[], **call)


@pytest.mark.parametrize(
    ("name", "block", "text_first"), [("flux", 0, True), ("klein", 3, True), ("qwen", 1, True), ("sd3", 1, False)]
)
def test_the_pattern_under_knocked_out_edges_times_v_is_z(name, block, text_first):
    """Edges of some heads, tokens and rows, by several ops; one token reads nothing, and heads are out of order."""
    zoo = zoo_of(name)
    at = f"blocks.{block}"
    ops = [
        AttentionMask(f"{at}.img", keys="txt", key_tokens=[0, 2], heads=[1], tokens=[0, 3, 4]),
        AttentionMask(f"{at}.img", keys="img", key_tokens=[1, 5], rows=-1),
        AttentionMask(f"{at}.img", keys="img", tokens=2),
        AttentionMask(f"{at}.img", keys="txt", tokens=2),
    ]
    call = {**call_of(zoo), "num_inference_steps": 2}
    for branch in ("cond", "uncond"):
        found = zoo.lens.read_pattern(block=block, heads=[-1, 0], ops=ops, steps=None, branch=branch, **call)
        assert found.heads == (1, 0)
        run = zoo.run(
            [*ops, Read([f"{at}.{stream}.attn.{part}" for stream in ("img", "txt") for part in "vz"], branch=branch)],
            steps=2,
        )
        texts, images = found.between(block, "img", "txt"), found.between(block, "img", "img")
        whole = torch.cat([texts, images] if text_first else [images, texts], -1)
        for i, number in enumerate(found.heads):
            v, t = (head(run[f"{at}.{stream}.attn.v"], number) for stream in ("img", "txt"))
            z = head(run[f"{at}.img.attn.z"], number)
            values = torch.cat([t, v] if text_first else [v, t], 2)
            torch.testing.assert_close(whole[:, :, i] @ values, z, rtol=1e-4, atol=1e-5)
        assert not texts[:, :, 0][..., [0, 3, 4], :][..., [0, 2]].any()
        assert texts[:, :, 1][..., [0, 3, 4], :][..., [0, 2]].all()
        assert not images[:, -1][..., [1, 5]].any()
        assert not whole[..., 2, :].any()


def test_edges_of_cross_attention_leave_the_pattern_of_the_image():
    zoo = zoo_of("pixart-sigma")
    call = {**call_of(zoo), "num_inference_steps": 1}
    plain, cut = (
        zoo.lens.read_pattern(block=0, heads=[0], ops=ops, **call)[0]
        for ops in ((), AttentionMask("blocks.0.img", keys="txt", key_tokens=[0]))
    )
    assert torch.equal(plain, cut)


def test_heads_are_counted_from_the_end_and_checked_before_the_run(monkeypatch):
    zoo = zoo_of("flux")
    call = call_of(zoo)
    last, first = (zoo.lens.read_pattern(block=3, heads=[number], **call) for number in (-1, -2))
    assert (last.heads, first.heads) == ((1,), (0,))
    monkeypatch.setattr(type(zoo.lens), "run", None)
    for wrong in (2, -3):
        with pytest.raises(OpError, match=f"head {wrong} does not exist: block 3 has 2, 0 to 1"):
            zoo.lens.read_pattern(block=3, heads=[0, wrong], **call)
