"""Points inside blocks, against plain hooks on modules named here by hand."""

from __future__ import annotations

import pytest
import torch

from dit_lens import Read, Scale, Swap, Zero
from dit_lens.errors import OpError, SiteError
from tests.zoo.parts import TOKENS
from tests.zoo.truth import ENTRIES, Zoo, zoo_of

# Entry -> site -> module, side, which of its tokens, and which of its channels.
WIDTH = 32
TEXT = 7
ALL = slice(None)
JOINT_IMAGE, JOINT_TEXT = slice(TEXT, None), slice(0, TEXT)
OUT, IN = "output", "input"
MODULES = {
    "flux": {
        "blocks.1.img.attn.q": ("transformer_blocks.1.attn.to_q", OUT, ALL, ALL),
        "blocks.1.txt.attn.k": ("transformer_blocks.1.attn.add_k_proj", OUT, ALL, ALL),
        "blocks.0.img.attn.z": ("transformer_blocks.0.attn.to_out.0", IN, ALL, ALL),
        "blocks.0.txt.attn.z": ("transformer_blocks.0.attn.to_add_out", IN, ALL, ALL),
        "blocks.0.img.mlp.post": ("transformer_blocks.0.ff.net.2", IN, ALL, ALL),
        "blocks.0.txt.mlp.pre": ("transformer_blocks.0.ff_context.net.0.proj", OUT, ALL, ALL),
        "blocks.3.img.attn.v": ("single_transformer_blocks.1.attn.to_v", OUT, JOINT_IMAGE, ALL),
        "blocks.3.txt.attn.v": ("single_transformer_blocks.1.attn.to_v", OUT, JOINT_TEXT, ALL),
        "blocks.4.img.mlp.post": ("single_transformer_blocks.2.act_mlp", OUT, JOINT_IMAGE, ALL),
        "blocks.4.img.mod.gate": ("single_transformer_blocks.2.norm.linear", OUT, ALL, slice(2 * WIDTH, 3 * WIDTH)),
        "blocks.0.img.mod.mlp.shift": ("transformer_blocks.0.norm1.linear", OUT, ALL, slice(3 * WIDTH, 4 * WIDTH)),
        "blocks.0.img.resid_mid": ("transformer_blocks.0.norm2", IN, ALL, ALL),
    },
    "klein": {
        "blocks.0.img.attn.q": ("transformer_blocks.0.attn.to_q", OUT, ALL, ALL),
        "blocks.0.img.mlp.post": ("transformer_blocks.0.ff.linear_out", IN, ALL, ALL),
        "blocks.3.img.attn.k": (
            "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
            OUT,
            JOINT_IMAGE,
            slice(WIDTH, 2 * WIDTH),
        ),
        "blocks.3.txt.mlp.pre": (
            "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
            OUT,
            JOINT_TEXT,
            slice(3 * WIDTH, None),
        ),
        "blocks.3.img.attn.z": ("single_transformer_blocks.1.attn.to_out", IN, JOINT_IMAGE, slice(0, WIDTH)),
    },
    "qwen": {
        "blocks.2.img.attn.v": ("transformer_blocks.2.attn.to_v", OUT, ALL, ALL),
        "blocks.2.txt.mlp.pre": ("transformer_blocks.2.txt_mlp.net.0.proj", OUT, ALL, ALL),
        "blocks.1.img.mod.attn.gate": ("transformer_blocks.1.img_mod", OUT, ALL, slice(2 * WIDTH, 3 * WIDTH)),
    },
    "sd3": {
        "blocks.0.img.attn.q": ("transformer_blocks.0.attn.to_q", OUT, ALL, ALL),
        "blocks.2.txt.attn.q": ("transformer_blocks.2.attn.add_q_proj", OUT, ALL, ALL),
        "blocks.1.txt.mlp.post": ("transformer_blocks.1.ff_context.net.2", IN, ALL, ALL),
    },
    "pixart-sigma": {
        "blocks.1.img.attn.z": ("transformer_blocks.1.attn1.to_out.0", IN, ALL, ALL),
        "blocks.1.img.cross_out": ("transformer_blocks.1.attn2", OUT, ALL, ALL),
    },
    "sana": {"blocks.0.img.attn.k": ("transformer_blocks.0.attn1.to_k", OUT, ALL, ALL)},
    "dit": {"blocks.2.img.mlp.pre": ("transformer_blocks.2.ff.net.0.proj", OUT, ALL, ALL)},
    "ernie": {
        "blocks.1.img.attn.k": ("layers.1.self_attention.to_k", OUT, slice(0, 24), ALL),
        "blocks.1.img.mlp.post": ("layers.1.mlp.linear_fc2", IN, slice(0, 24), ALL),
    },
    "zimage": {"blocks.3.img.attn.q": ("layers.1.attention.to_q", OUT, slice(0, 24), ALL)},
}
# Without attn_out and mlp_out, a cache that empties the text, and rows of other lengths, which fit no one tensor.
LACK_WRITES = {"qwen21", "lumina2-ragged", "ernie", "hunyuan_dit", "nucleus", "bria_fibo2", "aura_flow", "prx"}
HAVE_WRITES = [name for name in ENTRIES if name not in LACK_WRITES]


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, sites in MODULES.items() for site in sites])
def test_a_point_is_what_its_module_holds(name, site):
    zoo = zoo_of(name)
    path, side, tokens, channels = MODULES[name][site]
    branch = zoo.branches[-1]
    run = zoo.run([Read(site, branch=branch)])
    seen = []
    module = zoo.pipe.transformer.get_submodule(path)

    def keep(_, args, output):
        value = output if side == OUT else args[0]
        value = value.transpose(0, 1) if len(value) == zoo.count + TOKENS else value  # [token, row, channel]
        seen.append((value[:, None] if value.ndim == 2 else value)[:, tokens, channels].clone())

    handle = module.register_forward_hook(keep)
    zoo.plain_of(zoo.call)
    handle.remove()
    for step, found in enumerate(run[site].as_subclass(torch.Tensor)):
        call, rows = zoo.place(step, branch)
        assert torch.equal(found, seen[call][rows.start : rows.stop]), step


@pytest.mark.parametrize("name", HAVE_WRITES)
def test_writes_add_up_to_the_residual(name):
    zoo = zoo_of(name)
    bases = [site.removesuffix(".mlp_out") for site in zoo.lens.sites("blocks.*.*.mlp_out")]
    assert bases
    points = ["blocks.*.*.resid_pre", "blocks.*.*.*_out", "blocks.*.*.resid_mid", "blocks.*.*"]
    run = zoo.run([Read(points)])
    for base in bases:
        writes = [key for key in run.keys() if key.startswith(f"{base}.") and key.endswith("_out")]  # noqa: SIM118
        total = run[f"{base}.resid_pre"]
        for write in [key for key in writes if not key.endswith("mlp_out")]:
            total = total + run[write]
        if f"{base}.resid_mid" in run.keys():  # noqa: SIM118
            torch.testing.assert_close(total, run[f"{base}.resid_mid"].as_subclass(torch.Tensor))
        torch.testing.assert_close(total + run[f"{base}.mlp_out"], run[base].as_subclass(torch.Tensor))


@pytest.mark.parametrize("name", ["flux", "klein", "chroma", "hunyuan_video"])
def test_what_one_projection_adds_up_is_cut_apart(name):
    """Gate times the columns of its weight that attention's outputs meet, or the MLP's; the bias goes to the MLP."""
    zoo = zoo_of(name)
    block = zoo.lens.anatomy.stacks["single"][-1]
    stack = zoo.pipe.transformer.single_transformer_blocks
    inner, projection = stack[-1], stack[-1].attn.to_out if name == "klein" else stack[-1].proj_out
    run = zoo.run([Read(f"blocks.{block}.{{img,txt}}.{{attn_out,mlp_out}}", branch="cond")])
    seen, gates, width = [], [], zoo.lens.anatomy.width

    def keep(_, args, __):
        seen.append(args[0].clone())

    def keep_gate(module, args, kwargs, output):
        gates.append(
            kwargs["temb_mod"].chunk(3, -1)[2].reshape(-1, 1, width) if name == "klein" else output[1][:, None]
        )

    handles = [projection.register_forward_hook(keep)]
    handles.append((inner if name == "klein" else inner.norm).register_forward_hook(keep_gate, with_kwargs=True))
    zoo.plain_of(zoo.call)
    for handle in handles:
        handle.remove()
    weight, bias = projection.weight, 0 if projection.bias is None else projection.bias
    for step in range(2):
        call, rows = zoo.place(step, "cond")
        entering, gate = (found[call][rows.start : rows.stop] for found in (seen, gates))
        from_attention = gate * (entering[..., :width] @ weight[:, :width].T)
        from_mlp = gate * (entering[..., width:] @ weight[:, width:].T + bias)
        count = zoo.count
        image, text = slice(None, count), slice(count, None)
        if name != "hunyuan_video":
            image, text = slice(-count, None), slice(None, -count)
        for stream, tokens in (("img", image), ("txt", text)):
            for point, wanted in (("attn_out", from_attention), ("mlp_out", from_mlp)):
                found = run[f"blocks.{block}.{stream}.{point}"][step]
                torch.testing.assert_close(found, wanted[:, tokens], msg=f"{stream} {point}")
    for op in (Zero(f"blocks.{block}.img.attn_out"), Swap(f"blocks.{block}.img.mlp_out", source=torch.zeros(1))):
        with pytest.raises(OpError, match=r"one projection adds up.*Write blocks\.\d+\.img\.attn\.z or mlp\.post"):
            zoo.run([op])


def test_a_projection_that_does_not_say_how_wide_it_is_is_cut_apart_too():
    """As those of other libraries may not: the last channel and the bias are still counted."""
    zoo = Zoo(ENTRIES["flux"])
    block = zoo.lens.pipe.transformer.single_transformer_blocks[-1]
    block.proj_out = torch.nn.Sequential(block.proj_out)
    sites = [f"blocks.4.img{point}" for point in (".resid_pre", ".attn_out", ".mlp_out", "")]
    run = zoo.run([Read(sites)])
    *parts, whole = (run[site].as_subclass(torch.Tensor) for site in sites)
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(("name", "path"), [("flux", "attn"), ("sd3", "attn"), ("sana", "attn1"), ("dit", "attn1")])
def test_zeroing_a_write_is_zeroing_the_module(name, path):
    zoo = zoo_of(name)
    run = zoo.run([Zero("blocks.1.img.attn_out")])

    def silence(_, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handle = zoo.pipe.transformer.transformer_blocks[1].get_submodule(path).register_forward_hook(silence)
    plain = zoo.plain_of(zoo.call)
    handle.remove()
    assert torch.equal(zoo.drawn(run), plain.drawn)
    assert all(after == (0.0,) * 2 for after in [entry.after for entry in run.receipt.entries])


def test_scaling_a_write_by_one_changes_nothing_and_the_receipt_speaks_of_what_is_added():
    zoo = zoo_of("flux")
    run = zoo.run([Read("blocks.1.img.mlp_out", branch="both"), Scale("blocks.1.img.mlp_out", factor=1.0)])
    assert torch.equal(zoo.drawn(run), zoo.plain().drawn)
    (cond, _) = run.receipt.entries
    wanted = torch.linalg.vector_norm(run["blocks.1.img.mlp_out"][:, 0].flatten(1), dim=1)
    torch.testing.assert_close(torch.tensor(cond.before), wanted.as_subclass(torch.Tensor))


def test_an_edit_inside_a_joint_fused_tensor_touches_one_stream_and_its_channels():
    zoo = zoo_of("klein")
    run = zoo.run([Zero("blocks.3.img.attn.z", channels=[4], branch="cond")])

    def silence(module, args):
        x = args[0].clone()
        if calls[0] % 2 == 0:
            x[:, TEXT:, 4] = 0
        calls[0] += 1
        return (x,)

    calls = [0]
    handle = zoo.pipe.transformer.single_transformer_blocks[1].attn.to_out.register_forward_pre_hook(silence)
    plain = zoo.plain_of(zoo.call)
    handle.remove()
    assert torch.equal(zoo.drawn(run), plain.drawn)


@pytest.mark.parametrize(("name", "block", "path"), [("sd3", 1, "attn.to_out.0"), ("krea2", 1, "attn.to_out.0")])
def test_silencing_a_head(name, block, path):
    zoo = zoo_of(name)
    site = f"blocks.{block}.img.attn.z"
    assert zoo.lens.heads(site) == [range(16), range(16, 32)]
    run = zoo.run([Zero(site, channels=zoo.lens.heads(site)[1])])
    joint = slice(TEXT, None) if name == "krea2" else ALL

    def silence(_, args):
        x = args[0].clone()
        x[:, joint, 16:] = 0
        return (x,)

    handle = zoo.pipe.transformer.transformer_blocks[block].get_submodule(path).register_forward_pre_hook(silence)
    plain = zoo.plain_of(zoo.call)
    handle.remove()
    assert torch.equal(zoo.drawn(run), plain.drawn)


def test_heads_that_share_keys_and_what_has_no_heads():
    lens = zoo_of("krea2").lens
    assert len(lens.heads("blocks.0.img.attn.q")) == 2
    assert lens.heads("blocks.0.img.attn.k") == [range(16)]
    with pytest.raises(SiteError, match="not made of heads"):
        lens.heads("blocks.0.img")


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in {"ernie", "hidream"}])
def test_every_family_counts_its_heads(name):
    lens = zoo_of(name).lens
    site = lens.sites("blocks.-1.img.attn.q")[0]
    assert {len(head) for head in lens.heads(site)} <= {16, 20}


def test_modulation_is_one_vector_a_row():
    zoo = zoo_of("flux")
    run = zoo.run([Read("blocks.*.img.mod.*", branch="cond")])
    assert run["blocks.0.img.mod.attn.gate"].shape == (2, zoo.rows, 1, WIDTH)
    again = zoo.run([Swap("blocks.0.img.mod.attn.gate", source="row:0", rows=1)])
    assert not torch.equal(zoo.drawn(again), zoo.plain().drawn)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("flux", "blocks.3.img.resid_mid", r"attention and MLP run side by side"),
        ("aura_flow", "blocks.0.img.attn_out", r"attention is not added to the residual"),
        ("ernie", "blocks.0.img.attn_out", r"its modulation comes as a list of tensors"),
        ("hunyuan_dit", "blocks.0.img.mod.attn.gate", r"have no mod\.attn\.gate"),
        ("sd3", "blocks.2.txt.mlp_out", r"the last, returns no txt tokens"),
        ("cogview4", "blocks.0.txt.mlp_out", r"second call, for the text, is not followed"),
    ],
)
def test_a_point_that_a_family_lacks_says_why(name, site, reason):
    zoo = zoo_of(name)
    with pytest.raises(SiteError, match=reason):
        zoo.run([Read(site)])


@pytest.mark.parametrize("name", ["pixart-sigma", "sana"])
def test_modulation_from_a_table_is_read_only(name):
    zoo = zoo_of(name)
    run = zoo.run([Read("blocks.1.img.mod.mlp.gate")])
    seen = []

    def keep(module, args, kwargs):
        time = kwargs["timestep"] if "timestep" in kwargs else args[4]
        seen.append(time.reshape(len(time), 6, -1)[:, 5] + module.scale_shift_table[5])

    handle = zoo.pipe.transformer.transformer_blocks[1].register_forward_pre_hook(keep, with_kwargs=True)
    zoo.plain_of(zoo.call)
    handle.remove()
    for step, found in enumerate(run["blocks.1.img.mod.mlp.gate"].as_subclass(torch.Tensor)):
        call, rows = zoo.place(step, "cond")
        assert torch.equal(found[:, 0], seen[call][rows.start : rows.stop])
    with pytest.raises(OpError, match="can only be read"):
        zoo.run([Zero("blocks.1.img.mod.mlp.gate")])
