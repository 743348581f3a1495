"""What enters and leaves attention and MLP: by algebra on every family, and against plain hooks named by hand."""

from __future__ import annotations

import inspect

import pytest
import torch

from dit_lens import Add, Read, Scale, Swap, Zero
from dit_lens.errors import OpError, SiteError
from tests.zoo.parts import TOKENS
from tests.zoo.truth import ENTRIES, zoo_of

TEXT = 7
PROJECTED = {"attn.q": "attn.in", "attn.k": "attn.in", "attn.v": "attn.in", "mlp.pre": "mlp.in"}
# A cache empties the text, and rows of other lengths fit no one tensor.
IMAGE_ONLY = {"qwen21", "lumina2-ragged"}


def values(run, key):
    return run[key].as_subclass(torch.Tensor)


def ends_of(zoo, point):
    """The sites of a point in the first and the last block of each stack."""
    chosen = {index for blocks in zoo.lens.anatomy.stacks.values() for index in (blocks[0], blocks[-1])}
    sites = [site for site in zoo.lens.anatomy.sites if site.point == point and site.block in chosen]
    return [site.name for site in sites if site.stream == "img" or zoo.entry.name not in IMAGE_ONLY]


@pytest.mark.parametrize("name", ENTRIES)
def test_what_enters_attention_and_mlp_is_all_that_their_projections_read(name):
    """Of zeros, which are the product of an edit, every projection makes its bias, in both streams."""
    zoo = zoo_of(name)
    sites = {point: ends_of(zoo, point) for point in (*PROJECTED, "attn.in", "mlp.in")}
    assert sites["attn.in"]
    run = zoo.run([Zero([*sites["attn.in"], *sites["mlp.in"]]), Read([site for p in PROJECTED for site in sites[p]])])
    for point, of in PROJECTED.items():
        for site in sites[point]:
            location = zoo.lens.anatomy.locate(zoo.lens.anatomy.site(site))
            if site.replace(point, of) not in sites[of] or location.axes != "tokens":
                continue
            bias = zoo.pipe.transformer.get_submodule(location.module.removeprefix("transformer.")).bias
            start, stop = location.span or (0, None)
            found = values(run, site)
            wanted = torch.zeros(found.shape[-1]) if bias is None else bias[start:stop]
            assert torch.equal(found, wanted.expand_as(found)), site


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_module_gives_times_its_gate_is_what_it_adds(name):
    """Twice as much before the gate is twice as much after it; zeros before it are zeros after it."""
    zoo = zoo_of(name)
    pairs = {
        site.replace("_out", ".o"): site
        for point in ("attn_out", "mlp_out", "cross_out")
        for site in ends_of(zoo, point)
        if zoo.lens.anatomy.locate(zoo.lens.anatomy.site(site)).half is None
    }
    if not pairs:
        pytest.skip("its row does not know what it adds")
    before, after = next(iter(pairs.items()))
    plain, doubled = (zoo.run([*ops, Read(after)]) for ops in ([], [Scale(before, factor=2)]))
    assert torch.equal(values(doubled, after)[0], 2 * values(plain, after)[0])
    assert torch.equal(zoo.drawn(zoo.run([Zero(list(pairs))])), zoo.drawn(zoo.run([Zero(list(pairs.values()))])))


# Entry -> site -> module, argument or place in its output, and which of its tokens.
ALL, IMAGE, WORDS = slice(None), slice(TEXT, None), slice(0, TEXT)
ENDS = {
    "flux": {
        "blocks.1.img.attn.in": ("transformer_blocks.1.attn", "hidden_states", ALL),
        "blocks.1.txt.attn.in": ("transformer_blocks.1.attn", "encoder_hidden_states", ALL),
        "blocks.0.txt.attn.o": ("transformer_blocks.0.attn", 1, ALL),
        "blocks.0.txt.mlp.in": ("transformer_blocks.0.ff_context", "hidden_states", ALL),
        "blocks.1.img.mlp.o": ("transformer_blocks.1.ff", None, ALL),
        "blocks.3.img.attn.in": ("single_transformer_blocks.1.attn", "hidden_states", IMAGE),
        "blocks.3.txt.mlp.in": ("single_transformer_blocks.1.proj_mlp", "input", WORDS),
    },
    "klein": {
        "blocks.1.img.attn.o": ("transformer_blocks.1.attn", 0, ALL),
        "blocks.3.txt.attn.in": ("single_transformer_blocks.1.attn", "hidden_states", WORDS),
    },
    "sd3": {"blocks.2.txt.attn.in": ("transformer_blocks.2.attn", "encoder_hidden_states", ALL)},
    "qwen": {"blocks.1.txt.mlp.o": ("transformer_blocks.1.txt_mlp", None, ALL)},
    "hidream": {"blocks.0.txt.attn.in": ("double_stream_blocks.0.block.attn1", "norm_encoder_hidden_states", ALL)},
    "cogvideox": {"blocks.1.txt.attn.in": ("transformer_blocks.1.attn1", "encoder_hidden_states", ALL)},
    "hunyuan_dit": {"blocks.1.img.attn.o": ("blocks.1.attn1", None, ALL)},
    "aura_flow": {"blocks.0.txt.attn.o": ("joint_transformer_blocks.0.attn", 1, ALL)},
    "ernie": {
        "blocks.1.img.attn.o": ("layers.1.self_attention", None, slice(0, 24)),
        "blocks.0.img.mlp.in": ("layers.0.mlp", "x", slice(0, 24)),
    },
    "lumina": {"blocks.1.img.attn.in": ("layers.1.attn1", "hidden_states", ALL)},
    "wan": {"blocks.1.img.cross.o": ("blocks.1.attn2", None, ALL)},
    "kandinsky5": {"blocks.2.img.mlp.in": ("visual_transformer_blocks.0.feed_forward", "x", ALL)},
}
CASES = [(name, site) for name, sites in ENDS.items() for site in sites]


@pytest.mark.parametrize(("name", "site"), CASES)
def test_reads_and_writes_are_those_of_plain_hooks(name, site):
    zoo = zoo_of(name)
    path, key, tokens = ENDS[name][site]
    branch = zoo.branches[-1]
    run = zoo.run([Read(site, branch=branch), Add(site, value=0.5, channels=[3], branch="both")])
    module, seen = zoo.pipe.transformer.get_submodule(path), []

    def change(whole):
        first = zoo.entry.name == "ernie" and len(whole) == zoo.count + TOKENS  # [token, row, channel]
        x = (whole.transpose(0, 1) if first else whole).clone()
        seen.append(x[:, tokens].clone())
        x[:, tokens, 3] += 0.5
        return x.transpose(0, 1) if first else x

    def enter(_, args, kwargs):
        old = kwargs[key] if key in kwargs else args[list(inspect.signature(module.forward).parameters).index(key)]
        new = change(old)
        args = tuple(new if one is old else one for one in args)
        return args, {name: new if one is old else one for name, one in kwargs.items()}

    def leave(_, args, output):
        if key is None:
            return change(output)
        return tuple(change(one) if i == key else one for i, one in enumerate(output))

    if isinstance(key, str):
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        handle = module.register_forward_hook(leave)
    plain = zoo.plain_of(zoo.call)
    handle.remove()
    assert torch.equal(zoo.drawn(run), plain.drawn)
    assert not torch.equal(zoo.drawn(run), zoo.plain().drawn)
    for step, found in enumerate(values(run, site)):
        call, rows = zoo.place(step, branch)
        assert torch.equal(found, seen[call][rows.start : rows.stop]), step


# Entry -> its blocks of image tokens, and the cross-attention in them with its projections of q, k, v and the output.
USUAL = ("attn2", "to_q", "to_k", "to_v", "to_out.0")
CROSSED = {
    "pixart-sigma": ("transformer_blocks", *USUAL),
    "sana": ("transformer_blocks", *USUAL),
    "hunyuan_dit": ("blocks", *USUAL),
    "cosmos2": ("transformer_blocks", *USUAL),
    "wan": ("blocks", *USUAL),
    "ltx": ("transformer_blocks", *USUAL),
    "kandinsky5": ("visual_transformer_blocks", "cross_attention", "to_query", "to_key", "to_value", "out_layer"),
}


@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_reads_a_text(name):
    """Queries, keys, values and outputs are those of plain hooks; values of zero put out zeros."""
    zoo = zoo_of(name)
    stack, module, *projections, out = CROSSED[name]
    block = zoo.lens.anatomy.depth - 1
    sites = [f"blocks.{block}.{stream}.cross.{part}" for stream, part in zip(("img", "txt", "txt"), "qkv", strict=True)]
    branch = zoo.branches[-1]
    run = zoo.run([Read([*sites, f"blocks.{block}.img.{{cross.z,cross.o}}"], branch=branch)])
    seen = {part: [] for part in "qkvzo"}
    inner = zoo.pipe.transformer.get_submodule(stack)[-1].get_submodule(module)
    handles = [
        inner.get_submodule(path).register_forward_hook(lambda _, __, output, kept=seen[part]: kept.append(output))
        for part, path in zip("qkv", projections, strict=True)
    ]
    handles.append(inner.get_submodule(out).register_forward_pre_hook(lambda _, args: seen["z"].append(args[0])))
    handles.append(inner.register_forward_hook(lambda _, __, output: seen["o"].append(output)))
    zoo.plain_of(zoo.call)
    for handle in handles:
        handle.remove()
    for part, kept in seen.items():
        (site,) = [site for site in run.keys() if site.endswith(f".{part}")]  # noqa: SIM118
        for step, found in enumerate(values(run, site)):
            call, rows = zoo.place(step, branch)
            assert torch.equal(found, kept[call][rows.start : rows.stop]), (part, step)
    silent = zoo.run([Zero(sites[2]), Read(f"blocks.{block}.img.cross.z")])
    assert not values(silent, f"blocks.{block}.img.cross.z").any()
    assert [len(head) for head in zoo.lens.heads(sites[1])] == [len(head) for head in zoo.lens.heads(sites[0])]


def test_keys_and_values_of_cross_attention_are_of_the_text():
    with pytest.raises(SiteError, match=r"made of the text: name the txt stream"):
        zoo_of("sana").run([Read("blocks.0.img.cross.k")])
    with pytest.raises(SiteError, match=r"block 0 \(block\) holds no txt tokens"):
        zoo_of("sana").run([Read("blocks.0.txt.attn.k")])


def test_one_tensor_of_two_names_is_edited_once():
    """FLUX.2's single blocks make queries and neurons by one projection of one tensor."""
    zoo = zoo_of("klein")
    both = zoo.run([Add(["blocks.3.img.attn.in", "blocks.3.img.mlp.in"], value=0.5)])
    assert torch.equal(zoo.drawn(both), zoo.drawn(zoo.run([Add("blocks.3.img.mlp.in", value=0.5)])))


def test_what_is_before_the_gate_is_named_where_a_write_after_it_is_refused():
    zoo = zoo_of("flux")
    write = Swap("blocks.0.img.attn_out", source="row:0", rows=1)
    with pytest.raises(OpError, match=r"or write blocks\.0\.img\.attn\.o, which the gate multiplies"):
        zoo.run([write])
    zoo.run([Swap("blocks.0.img.attn.o", source="row:0", rows=1)])
    with pytest.raises(OpError, match=r"one projection adds up what attention and MLP write"):
        zoo.run([Add("blocks.3.img.attn.o", value=1.0)])
    with pytest.raises(SiteError, match=r"returns no txt tokens"):
        zoo_of("sd3").run([Read("blocks.2.txt.attn.o")])
    with pytest.raises(SiteError, match=r"two modules read it"):
        zoo_of("prx").run([Read("blocks.0.img.mlp.in")])
