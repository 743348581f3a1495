"""Edges of attention that are knocked out, by laws of softmax on every family, and in words, batches and JSON."""

import pytest
import torch

import dit_lens as dl
from dit_lens import AttentionMask, Read, Swap, TokenSet, Zero
from dit_lens.errors import OpError, SiteError
from tests import pipelines
from tests.zoo.truth import ENTRIES, zoo_of

IN_PARTS = {"klein-kv", "qwen21"}  # a cache holds tokens
# Where attn.z is not what attention puts out: a gate or another attention comes between; or where padding and
# references are read as well, which are tokens of neither stream.
OTHERS = {"krea2", "lumina", "lumina2-ragged", "qwen-edit", "hidream", "zimage"}
CROSSED = ["pixart-sigma", "sana", "hunyuan_dit", "cosmos2", "kandinsky5", "wan", "ltx"]


def plain(value):
    return value.as_subclass(torch.Tensor)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in {*IN_PARTS, *OTHERS, "sana", "sana-sprint"}])
def test_who_reads_one_key_gets_its_value(name):
    """All other image tokens and all text knocked out by two ops, tokens 2 and 5 of the image read token 3 alone."""
    zoo = zoo_of(name)
    block = zoo.lens.anatomy.depth - 1
    at = f"blocks.{block}.img"
    where = {"tokens": [2, 5], "branch": "cond"}
    others = [token for token in range(zoo.count) if token != 3]
    joint = zoo.lens.anatomy.find_call(block, "img", "img")[1] != "own"
    ops = [AttentionMask(at, keys="txt", **where)] if joint else []
    ops.append(AttentionMask(at, keys="img", key_tokens=others, **where))
    before, run = (zoo.run([*some, Read([f"{at}.attn.v", f"{at}.attn.z"])]) for some in ([], ops))
    z, v = plain(run[f"{at}.attn.z"]), plain(run[f"{at}.attn.v"])
    found, one = z[0][:, [2, 5]], v[0][:, 3:4]
    size = len(zoo.lens.heads(f"{at}.attn.v")[0]) if name not in ("ernie", "hidream") else 16
    shared = z.shape[-1] // v.shape[-1]
    wanted = one.unflatten(-1, (-1, size)).repeat_interleave(shared, 2).flatten(2).expand_as(found)
    torch.testing.assert_close(found, wanted)
    rest = [token for token in range(zoo.count) if token not in (2, 5)]
    assert torch.equal(z[0][:, rest], plain(before[f"{at}.attn.z"])[0][:, rest])


@pytest.mark.parametrize("name", CROSSED)
def test_who_reads_no_text_gets_zeros(name):
    zoo = zoo_of(name)
    block = zoo.lens.anatomy.depth - 1
    at = f"blocks.{block}.img"
    run = zoo.run([AttentionMask(at, keys="txt", tokens=[0, 1]), Read([f"{at}.cross.z"])])
    z = plain(run[f"blocks.{block}.img.cross.z"])
    assert not z[:, :, :2].any()
    assert z[:, :, 2:].any()
    assert {entry.site for entry in run.receipt.entries} == {f"blocks.{block}.img.cross.pattern"}


@pytest.fixture(scope="module")
def lens():
    return dl.DiTLens(pipelines.flux(), defaults={**pipelines.CALL, "output_type": "latent"})


PROMPTS = ["red", "a red fox"]


def test_words_heads_batches_json_and_the_with_form(lens):
    op = AttentionMask("blocks[1:4].img", keys="txt", key_tokens="red", heads=[1])
    run = lens.run(PROMPTS, [op], seed=0)
    text = lens.outline(PROMPTS).text()
    each = [
        AttentionMask("blocks[1:4].img", keys="txt", key_tokens=text.find("cond", row, "red"), heads=1, rows=row)
        for row in (0, 1)
    ]
    again = lens.run(PROMPTS, each, seed=0)
    assert torch.equal(run.latents, again.latents)
    assert not torch.equal(run.latents, lens.run(PROMPTS, seed=0).latents)
    with lens.trace(PROMPTS, seed=0) as trace:
        trace.attention_mask("blocks[1:4].img", keys="txt", key_tokens=["red"], heads=[1])
    assert torch.equal(run.latents, trace.run.latents)
    assert torch.equal(lens.run_spec(run.spec).latents, run.latents)
    alone = lens.run(PROMPTS, [op], seed=0, batch_size=1)
    torch.testing.assert_close(alone.latents, run.latents)
    assert run.receipt.entries[0].site == "blocks.1.img.attn.pattern"


def test_rows_without_the_word_have_no_part_in_it(lens):
    """Nor branches: the receipt names the rows and keys of each, and counts no others."""
    prompts = ["a fox", "red", "red fox", "red"]
    op = AttentionMask("blocks.3.img", keys="txt", key_tokens="red", tokens=[1, 4])
    plain, run = (lens.run(prompts, ops, seed=0, true_cfg_scale=2.0, negative_prompt="red") for ops in ([], [op]))
    moved = [not torch.equal(one, other) for one, other in zip(plain.latents, run.latents, strict=True)]
    text = lens.outline(prompts, true_cfg_scale=2.0, negative_prompt="red").text()
    told = {(entry.branch, entry.rows): (entry.keys, entry.elements) for entry in run.receipt.entries}
    keys = f"txt {text.find('cond', 1, 'red')[0]}-{text.find('cond', 1, 'red')[-1]}"
    width = len(lens.heads("blocks.3.img.attn.z")) * len(lens.heads("blocks.3.img.attn.z")[0])
    assert told == {("cond", (1, 2, 3)): (keys, 3 * 2 * width), ("uncond", (0, 1, 2, 3)): (keys, 4 * 2 * width)}
    assert moved == [True] * 4  # by the negative prompt
    only = lens.run(prompts, op, seed=0)
    assert [entry.rows for entry in only.receipt.entries] == [(1, 2, 3)]
    assert torch.equal(only.latents[0], lens.run(prompts, seed=0).latents[0])


def test_regions_and_tokens_that_are_others_at_each_step(lens):
    h, w = lens.outline("red").grid
    left = torch.zeros(h, w, dtype=torch.bool)
    left[:, : w // 2] = True
    region = lens.run("red", AttentionMask("blocks.2.img", mask=left, keys="img", key_mask=~left), seed=0)
    (entry,) = region.receipt.entries
    assert entry.keys == "img " + ", ".join(f"{w * y + w // 2}-{w * (y + 1) - 1}" for y in range(h))
    assert f", without {entry.keys}, |x|" in str(entry)
    assert region.receipt == type(region.receipt).from_json(region.receipt.to_json())
    tokens = [int(one) for one in left.flatten().nonzero()]
    others = [int(one) for one in (~left).flatten().nonzero()]
    same = lens.run("red", AttentionMask("blocks.2.img", tokens=tokens, keys="img", key_tokens=others), seed=0)
    assert torch.equal(region.latents, same.latents)
    steps = lens.outline("red").steps
    found = TokenSet({"blocks.2.img": [[step] for step in range(steps)]})
    sinks = lens.run("red", AttentionMask("blocks.2.img", keys="img", key_tokens=found), seed=0)
    by_hand = [AttentionMask("blocks.2.img", keys="img", key_tokens=[step], steps=step) for step in range(steps)]
    assert torch.equal(sinks.latents, lens.run("red", by_hand, seed=0).latents)


@pytest.mark.parametrize(
    ("op", "kind", "says"),
    [
        (AttentionMask("blocks.1.img", keys="image"), OpError, "keys='image' is no stream of tokens"),
        (AttentionMask("blocks.1.img", keys="txt", channels=[1]), OpError, r"takes heads= in place of channels="),
        (AttentionMask("blocks.1.img", keys="txt", heads=[9]), OpError, "head 9 does not exist"),
        (AttentionMask("blocks.1.img", keys="txt", key_tokens="fox"), OpError, "in no prompt of the chosen rows"),
        (AttentionMask("blocks.1.img", keys="img", key_tokens="red"), OpError, "names words, which only text has"),
        (AttentionMask("blocks.1.img", keys="txt", key_tokens=[]), OpError, r"key_tokens=\[\] chooses no key"),
        (AttentionMask("blocks.1.img", keys="txt", heads=[]), OpError, r"heads=\[\] chooses no head"),
        (AttentionMask("blocks.1.img", keys="txt", tokens=[]), OpError, r"tokens=\[\] chooses no token"),
        (AttentionMask("blocks.1.img", keys="img", key_tokens=[999]), OpError, "token 999 does not exist"),
        (AttentionMask("blocks.1.img", keys="txt", key_mask=[[True]]), OpError, r"use it with keys='img'"),
        (AttentionMask("blocks.1.img.attn.z", keys="txt"), OpError, "AttentionMask is for blocks"),
        (AttentionMask("velocity", keys="txt"), OpError, "AttentionMask is for blocks"),
        (Read("blocks.1.img.attn.pattern"), SiteError, "read_pattern"),
        (Zero("blocks.1.img.cross.pattern"), SiteError, "read_pattern"),
    ],
)
def test_what_is_refused_before_the_run(lens, op, kind, says):
    with pytest.raises(kind, match=says):
        lens.run("red", [op], seed=0)


def test_linear_attention_has_no_edges():
    with pytest.raises(SiteError, match=r"blocks\.0\.img reads no img tokens by attention: .* linear"):
        zoo_of("sana").run([AttentionMask("blocks.0.img", keys="img", key_tokens=[0])])


def test_a_pattern_from_another_row_comes_before_what_is_knocked_out_of_it():
    zoo = zoo_of("flux")
    rotated = Swap(["blocks.1.*.attn.q_rot", "blocks.1.*.attn.k_rot"], source="row:0", rows=1)
    alone, both = (
        zoo.run([*ops, Read("blocks.1.img.attn.z")])
        for ops in ([rotated], [AttentionMask("blocks.1.img", keys="txt", rows=1), rotated])
    )
    assert not torch.equal(plain(alone["blocks.1.img.attn.z"])[0, 1], plain(both["blocks.1.img.attn.z"])[0, 1])
    assert torch.equal(plain(alone["blocks.1.img.attn.z"])[0, 0], plain(both["blocks.1.img.attn.z"])[0, 0])
