"""Queries and keys as attention compares them, on every family, against a mode of torch around the plain pipeline."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_lens import Add, AttentionMask, DiTLens, Read, Swap
from dit_lens.errors import SiteError
from dit_lens.families.layout import PlanMismatchError, check_whole
from dit_lens.families.locations import ImageTokens
from tests import pipelines
from tests.zoo.truth import ENTRIES, zoo_of

# Where image tokens come before the text in attention, by the sources; elsewhere they are the last.
IMAGE_FIRST = {"hidream", "joy_image", "sd3", "sd35", "hunyuan_image", "hunyuan_video", "zimage", "ernie", "nucleus"}
IN_PARTS = {"klein-kv", "qwen21"}  # a cache holds tokens
LINEAR = {"sana", "sana-sprint"}
OTHERS = {"lumina2-ragged", "qwen-edit"}  # of other lengths, and with references, not followed here
NAMES = [name for name in ENTRIES if name not in IN_PARTS | LINEAR | OTHERS]


class FirstCalls(TorchFunctionMode):
    """Keeps what the first attention in one block is given, and adds to the first head of its image tokens.

    tokens: which of the queries, and which of the keys, are the image's.
    shared: how many heads share a key.
    """

    def __init__(self, tokens, shared):
        super().__init__()
        self.tokens, self.shared, self.inside, self.kept = tokens, shared, False, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention and self.inside:
            self.inside = False
            query, key, *rest = args or (kwargs["query"], kwargs["key"])
            self.kept.append((query, key))
            query, key = query.clone(), key.clone()
            query[:, 0, self.tokens(query), 1] += 0.5
            repeated = self.shared if key.shape[1] == query.shape[1] else 1
            key[:, :repeated, self.tokens(key), 2] += 0.25
            if args:
                args = (query, key, *rest)
            else:
                kwargs = {**kwargs, "query": query, "key": key}
        return func(*args, **(kwargs or {}))

    def begin(self, *_):
        self.inside = True


@pytest.mark.parametrize("name", NAMES)
def test_they_are_read_and_written_as_attention_is_given_them(name):
    zoo = zoo_of(name)
    lens, count, branch = zoo.lens, zoo.count, zoo.branches[-1]
    block = max(site.block for site in lens.anatomy.sites if site.point == "attn.q_rot" and site.stream == "img")
    at = f"blocks.{block}.img.attn"
    run = zoo.run(
        [
            Read([f"{at}.q_rot", f"{at}.k_rot"], branch=branch),
            Add(f"{at}.q_rot", value=0.5, channels=[1]),
            Add(f"{at}.k_rot", value=0.25, channels=[2]),
        ]
    )
    first = name in IMAGE_FIRST
    shared = len(lens.heads(f"{at}.q_rot")) // len(lens.heads(f"{at}.k_rot"))
    mode = FirstCalls(lambda x: slice(0, count) if first or x.shape[2] == count else slice(-count, None), shared)
    handle = zoo.blocks[block][0].register_forward_pre_hook(mode.begin)
    with mode:
        plain = zoo.plain_of(zoo.call)
    handle.remove()
    assert torch.equal(zoo.drawn(run), plain.drawn)
    assert not torch.equal(zoo.drawn(run), zoo.plain().drawn)
    for site, which in (("q_rot", 0), ("k_rot", 1)):
        for step, found in enumerate(run[f"{at}.{site}"].as_subclass(torch.Tensor)):
            call, rows = zoo.place(step, branch)
            kept = mode.kept[call][which][rows.start : rows.stop, :: shared if which else 1]
            assert torch.equal(found, kept[:, :, mode.tokens(kept)].transpose(1, 2).flatten(2)), (site, step)


def test_queries_and_keys_of_another_row_are_its_pattern():
    """With them, image tokens of row 1 put out what row 0's pattern makes of the values of row 1."""
    zoo = zoo_of("flux")
    rotated = ["blocks.1.*.attn.q_rot", "blocks.1.*.attn.k_rot"]
    run = zoo.run(
        [
            Read(rotated, branch="cond"),
            Swap(rotated, source="row:0", rows=1),
            Read(["blocks.1.*.attn.v", "blocks.1.*.attn.z"], branch="cond"),
        ]
    )
    heads = [
        torch.cat([run[f"blocks.1.{stream}.attn.{part}"][0] for stream in ("txt", "img")], 1).unflatten(2, (2, 16))
        for part in ("q_rot", "k_rot", "v")
    ]
    query, key, value = (one.transpose(1, 2).as_subclass(torch.Tensor) for one in heads)
    made = scaled_dot_product_attention(query[:1].expand_as(query), key[:1].expand_as(key), value)
    wanted = made.transpose(1, 2).flatten(2)[:, -zoo.count :]
    torch.testing.assert_close(run["blocks.1.img.attn.z"][0].as_subclass(torch.Tensor), wanted)


def test_each_row_has_its_own_in_batches():
    lens = DiTLens(pipelines.flux(), defaults=pipelines.CALL)
    ops = [Add("blocks.2.img.attn.q_rot", value=2.0, rows=1), Read("blocks.*.{img,txt}.attn.k_rot")]
    together, alone = (lens.run(["red", "a red fox"], ops, seed=0, batch_size=size) for size in (2, 1))
    assert set(together) == set(alone)
    for site in together:
        torch.testing.assert_close(together[site], alone[site])
    assert [entry.rows for entry in alone.receipt.entries] == [entry.rows for entry in together.receipt.entries]


@pytest.mark.parametrize("name", sorted(IN_PARTS))
def test_attention_to_a_cache_is_told_before_the_run(name):
    for op in (Read("blocks.0.img.attn.k_rot"), AttentionMask("blocks.0.img", keys="txt")):
        with pytest.raises(SiteError, match=r"its pipeline keeps tokens in a cache"):
            zoo_of(name).run([op])


def test_attention_in_parts_is_told():
    with pytest.raises(PlanMismatchError, match=r"7 tokens in this forward pass, fewer than the image.* 24"):
        check_whole(7, {"layout": "text_first", "name": "blocks.0.img.attn.k_rot"}, ImageTokens((4, 6), 24, 0, 24, []))


def test_linear_attention_has_none():
    with pytest.raises(SiteError, match=r"have no attn\.q_rot: its attention is linear"):
        zoo_of("sana").run([Read("blocks.0.img.attn.q_rot")])


def test_the_mode_is_left_when_a_run_fails():
    zoo = zoo_of("flux")
    module = zoo.lens.pipe.transformer.transformer_blocks[1].attn.to_out[0]
    handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zoo.run([Read("blocks.1.img.attn.q_rot")])
    handle.remove()
    assert torch.overrides._len_torch_function_stack() == 0  # noqa: SLF001 torch offers no public way
    assert torch.equal(zoo.drawn(zoo.run([])), zoo.plain().drawn)
