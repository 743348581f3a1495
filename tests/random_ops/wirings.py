"""Where tiny pipelines keep their tensors, written by hand from the sources of diffusers."""

import re
from dataclasses import replace

import torch
import torch.nn.functional as F

from tests import pipelines
from tests.random_ops.places import Place, Wiring

WIDTH, IMAGE, TEXT = 32, 24, 7
HIDDEN, ENCODER = ("hidden_states", 0), ("encoder_hidden_states", 1)
HIDDEN_OF_MODEL = Place("", "in", HIDDEN)
UNTRIED = Place("", "out", writes="untried")
POINTS = (
    "resid_pre",
    *(f"mod.{part}" for part in ("shift", "scale", "gate")),
    *(f"mod.{where}.{part}" for where in ("attn", "mlp") for part in ("shift", "scale", "gate")),
    *(f"attn.{part}" for part in "qkvz"),
    "attn_out",
    "cross_out",
    "resid_mid",
    "mlp.pre",
    "mlp.post",
    "mlp_out",
    "resid_post",
)


def after(count):
    """All tokens but the first ones."""
    return lambda length: slice(count, length)


def first(count):
    """The first tokens."""
    return lambda length: slice(0, count)


def item(index):
    """A gate [row, channel] among a module's outputs."""
    return lambda module, output: output[index][:, None]


def chunk(index, count, *, name=None, tanh=False):
    """One of equal parts of what a module makes of the time embedding, or is given as an argument of that name."""

    def cut(module, value):
        value = value if name is None else value[1][name]
        part = value.chunk(count, -1)[index]
        part = part[:, None] if part.ndim == 2 else part
        return part.tanh() if tanh else part

    return cut


def table(index, position, name):
    """A row of a block's own table plus what the block is given of the time."""

    def add(block, value):
        args, kwargs = value
        time = kwargs[name] if name in kwargs else args[position]
        return (block.scale_shift_table.reshape(1, 6, -1) + time.reshape(len(time), 6, -1))[:, index : index + 1]

    return add


def modulations(module, names, **more):
    """Parts of one vector [row, channel]."""
    parts = [(i * WIDTH, (i + 1) * WIDTH) for i in range(len(names))]
    return {
        f"mod.{name}": Place(module, "out", part=part, vector=True, **more)
        for name, part in zip(names, parts, strict=True)
    }


SIX = [f"{where}.{part}" for where in ("attn", "mlp") for part in ("shift", "scale", "gate")]


def inside(attention, mlp, *, text=False, span=None, hidden=128):
    """Queries, keys, values and the hidden layer of the MLP, which diffusers calls the same in most models."""
    more = {} if span is None else {"span": span}
    q, k, v, z = (
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if text else ("to_q", "to_k", "to_v", "to_out.0")
    )
    return {
        **{
            f"attn.{point}": Place(f"{attention}.{name}", "out", **more)
            for point, name in zip("qkv", (q, k, v), strict=True)
        },
        "attn.z": Place(f"{attention}.{z}", "in", ("input", 0), **more),
        "mlp.pre": Place(f"{mlp}.net.0.proj", "out", width=hidden, **more),
        "mlp.post": Place(f"{mlp}.net.2", "in", ("input", 0), width=hidden, **more),
    }


def ordered(streams):
    """The points of a block by (stream, point), in the order in which it computes them."""
    return {
        (stream, point): streams[stream][point]
        for point in POINTS
        for stream in ("txt", "img")
        if point in streams.get(stream, {})
    }


def joint_block(path, stream_names, gates, more):
    """A block of two streams, as FLUX, FLUX.2, SD3 and Qwen-Image have them.

    path: of the block.
    stream_names: stream -> its MLP, and the norm before that.
    gates: stream -> of attention and MLP.
    more: stream -> further points.
    """
    streams = {}
    for stream, key, attended, left in (("txt", ENCODER, 1, 0), ("img", HIDDEN, 0, 1)):
        (mlp, norm), (gate, mlp_gate) = stream_names[stream], gates[stream]
        streams[stream] = {
            "resid_pre": Place(path, "in", key),
            "attn_out": Place(f"{path}.attn", "out", attended, writes="linear", gate=gate),
            "resid_mid": Place(f"{path}.{norm}", "in", ("input", 0), writes="none"),
            "mlp_out": Place(f"{path}.{mlp}", "out", writes="linear", gate=mlp_gate),
            "resid_post": Place(path, "out", left),
            **more[stream],
        }
    return streams


NORMS = {"img": ("ff", "norm2"), "txt": ("ff_context", "norm2_context")}


def adaln_block(path):
    """A block whose AdaLayerNormZero returns x, gate, shift, scale, gate."""
    names = {"img": "norm1", "txt": "norm1_context"}
    gates = {stream: [(f"{path}.{norm}", "out", item(index)) for index in (1, 4)] for stream, norm in names.items()}
    more = {
        stream: modulations(f"{path}.{norm}.linear", SIX)
        | inside(f"{path}.attn", f"{path}.{NORMS[stream][0]}", text=stream == "txt")
        for stream, norm in names.items()
    }
    return joint_block(path, NORMS, gates, more)


def flux_single(path, text):
    """Attention and MLP side by side; one projection adds up what they write, its bias counted with the MLP.

    The modulation is one tensor for both streams, so that an edit of one is seen at the other or not, by their order:
    Read("blocks.2.img.mod.gate"), Zero("blocks.2.txt.mod.gate"). It is not edited here. mlp.post is believed to be as
    wide as the block, and is wider: Read("blocks.2.img.mlp.post", channels=-1). Neither is tried.
    """
    gate = (f"{path}.norm", "out", item(1))

    def halves(span):
        def place(made):
            return Place(f"{path}.proj_out", "in", ("input", 0), span, writes="none", gate=gate, made=made)

        return {
            "attn_out": place(lambda module, x, moment: F.linear(x[..., :WIDTH], module.weight[:, :WIDTH])),
            "mlp_out": place(lambda module, x, moment: F.linear(x[..., WIDTH:], module.weight[:, WIDTH:], module.bias)),
        }

    streams = {}
    for stream, key, left, span in (("txt", ENCODER, 0, first(text)), ("img", HIDDEN, 1, after(text))):
        streams[stream] = {
            "resid_pre": Place(path, "in", key),
            **modulations(f"{path}.norm.linear", ("shift", "scale", "gate"), writes="none"),
            **{f"attn.{part}": Place(f"{path}.attn.to_{part}", "out", span=span) for part in "qkv"},
            "attn.z": Place(f"{path}.attn", "out", span=span),
            "mlp.pre": Place(f"{path}.proj_mlp", "out", span=span, width=128),
            "mlp.post": UNTRIED,
            **halves(span),
            "resid_post": Place(path, "out", left),
        }
    return streams


def clean(sign=1):
    """What the clean latents are by a flow: x_sigma = (1 - sigma) x0 + sigma noise, and v = noise - x0.

    sign: -1 where the pipeline negates what the transformer predicts.
    """

    def made(module, predicted, moment):
        latents = HIDDEN_OF_MODEL.find(moment.inputs)
        if isinstance(predicted, list):
            latents, predicted = torch.stack(list(latents)), torch.stack(predicted)
        return latents.float() - moment.sigma * sign * predicted.float()

    return made


def named(blocks, final, velocity, sign=1):
    """Sites by name, in the order of the model."""
    places = {
        f"blocks.{i}.{stream}" + ("" if point == "resid_post" else f".{point}"): place
        for i, block in enumerate(blocks)
        for (stream, point), place in ordered(block).items()
    }
    x0 = replace(velocity, writes="none", made=clean(sign))
    return {**places, "final.img": final, "velocity": velocity, "x0": x0}


def letters(prompt, word):
    """The tokens of a word under a tokenizer of one token a letter."""
    return sorted(
        {
            token
            for found in re.finditer(re.escape(word), prompt, re.IGNORECASE)
            for token in range(*found.span())
            if not (prompt[: found.start()][-1:].isalnum() or prompt[found.end() :][:1].isalnum())
        }
    )


def transformer_blocks(count, name="transformer_blocks"):
    return [f"{name}.{i}" for i in range(count)]


def flux():
    singles = transformer_blocks(3, "single_transformer_blocks")
    blocks = [*map(adaln_block, transformer_blocks(2)), *(flux_single(path, pipelines.LENGTH) for path in singles)]
    places = named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, width=16))
    stacks = {"blocks": range(5), "double": range(2), "single": range(2, 5)}
    return Wiring(places, stacks, grid=(4, 7), text=pipelines.LENGTH, knows_text=True, words=letters)


THREE = {"blocks": range(3), "block": range(3)}


def sd3():
    """The last block reads the text and does not write it."""
    blocks = [adaln_block(path) for path in transformer_blocks(3)]
    left = ("resid_pre", "attn.q", "attn.k", "attn.v")
    blocks[-1]["txt"] = {point: blocks[-1]["txt"][point] for point in left}
    places = named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, patch=(2, 2), width=16))
    return Wiring(places, THREE)


def qwen():
    blocks = []
    for path in transformer_blocks(3):
        names = {stream: (f"{stream}_mlp", f"{stream}_norm2") for stream in ("img", "txt")}
        gates = {stream: [(f"{path}.{stream}_mod", "out", chunk(index, 6)) for index in (2, 5)] for stream in names}
        more = {
            stream: modulations(f"{path}.{stream}_mod", SIX)
            | inside(f"{path}.attn", f"{path}.{stream}_mlp", text=stream == "txt")
            for stream in names
        }
        blocks.append(joint_block(path, names, gates, more))
    return Wiring(named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, width=16)), THREE)


def klein():
    """The single blocks work on one sequence, text first; modulations are given to the blocks."""
    blocks = []
    for path in transformer_blocks(2):
        gates = {
            stream: [(path, "in", chunk(index, 6, name=f"temb_mod_{stream}")) for index in (2, 5)]
            for stream in ("img", "txt")
        }
        blocks.append(joint_block(path, NORMS, gates, {"img": {}, "txt": {}}))
    for path in transformer_blocks(3, "single_transformer_blocks"):
        spans = {"txt": first(TEXT), "img": after(TEXT)}
        blocks.append(
            {
                stream: {
                    "resid_pre": Place(path, "in", HIDDEN, span),
                    "attn_out": UNTRIED,
                    "mlp_out": UNTRIED,
                    "resid_post": Place(path, "out", span=span),
                }
                for stream, span in spans.items()
            }
        )
    places = named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, width=16))
    return Wiring(places, {"blocks": range(5), "double": range(2), "single": range(2, 5)})


def image_block(path, attention, norm, mlp, gates, more):
    """A block of image tokens alone, into which text enters by cross-attention."""
    return {
        "img": {
            "resid_pre": Place(path, "in", HIDDEN),
            "attn_out": Place(f"{path}.{attention}", "out", writes="linear", gate=(path, "in", gates[0])),
            "cross_out": Place(f"{path}.attn2", "out"),
            "resid_mid": Place(f"{path}.{norm}", "in", ("input", 0), writes="none"),
            "mlp_out": Place(f"{path}.{mlp}", "out", writes="linear", gate=(path, "in", gates[1])),
            "resid_post": Place(path, "out"),
            **more,
        }
    }


def without_x0(wiring):
    """The same, x0 not tried."""
    return replace(wiring, places=wiring.places | {"x0": UNTRIED})


def sana():
    gates, blocks = [table(index, 4, "timestep") for index in (2, 5)], []
    for path in transformer_blocks(3):
        conv = {
            "mlp.pre": Place(f"{path}.ff.conv_inverted", "out", patch=(1, 1), width=160),
            "mlp.post": Place(f"{path}.ff.conv_point", "in", ("input", 0), patch=(1, 1), width=80),
            "mlp_out": Place(f"{path}.ff", "out", writes="linear", gate=(path, "in", gates[1]), patch=(1, 1)),
        }
        blocks.append(image_block(path, "attn1", "norm2", "ff", gates, inside(f"{path}.attn1", "") | conv))
    places = named(blocks, Place("norm_out", "in", HIDDEN), Place("", "out", 0, patch=(1, 1), width=4))
    return Wiring(places, THREE, text=None)


def wan():
    gates, blocks = [table(index, 2, "temb") for index in (2, 5)], []
    for path in transformer_blocks(3, "blocks"):
        more = inside(f"{path}.attn1", f"{path}.ffn", hidden=48)
        blocks.append(image_block(path, "attn1", "norm3", "ffn", gates, more))
    places = named(blocks, Place("norm_out", "in", ("input", 0)), Place("", "out", 0, patch=(2, 2), width=16))
    return Wiring(places, THREE, grid=(2, 4, 6), text=None, knows_grid=False)


def next_block(path, spans, names, *, gated=True):
    """A block that normalises what attention and MLP write, as Z-Image and Lumina-Image 2.0 have it.

    path: of the block.
    spans: stream -> where its tokens are.
    names: of attention's module, of the block's first argument, and of the norms before and after attention and MLP.
    gated: whether writes are multiplied by gates.
    """
    attention, argument, norms = names
    streams = {}
    for stream, span in spans.items():
        gates = [(f"{path}.adaLN_modulation", "out", chunk(index, 4, tanh=True)) for index in (1, 3)]
        more = {"writes": "linear"} if gated else {}
        streams[stream] = {
            "resid_pre": Place(path, "in", (argument, 0), **span),
            **{f"attn.{part}": Place(f"{path}.{attention}.to_{part}", "out", **span) for part in "qkv"},
            "attn.z": Place(f"{path}.{attention}.to_out.0", "in", ("input", 0), **span),
            "attn_out": Place(f"{path}.{norms[0]}", "out", gate=gates[0] if gated else None, **span, **more),
            "resid_mid": Place(f"{path}.{norms[1]}", "in", ("x", 0), writes="none", **span),
            "mlp_out": Place(f"{path}.{norms[2]}", "out", gate=gates[1] if gated else None, **span, **more),
            "resid_post": Place(path, "out", **span),
        }
    return streams


def zimage():
    """Image tokens come first, padded to 32 as the text is."""
    names = "attention", "x", ("attention_norm2", "ffn_norm1", "ffn_norm2")
    image, text = {"span": first(IMAGE)}, {"span": after(32)}
    blocks = [
        next_block("noise_refiner.0", {"img": image}, names),
        next_block("context_refiner.0", {"txt": {}}, names, gated=False),
        *(next_block(f"layers.{i}", {"img": image, "txt": text}, names) for i in range(3)),
    ]
    places = named(
        blocks,
        Place("all_final_layer.2-1", "in", ("x", 0), **image),
        Place("", "out", 0, patch=(2, 2), width=16),
        sign=-1,
    )
    stacks = {"blocks": range(5), "noise_refiner": [0], "context_refiner": [1], "layer": range(2, 5)}
    return Wiring(places, stacks, ("t", 1), text=32)


def ernie():
    """Tokens come before rows, and the image before the text. What attention and MLP write is left out."""
    blocks = []
    for path in transformer_blocks(3, "layers"):
        spans = {"img": first(IMAGE), "txt": after(IMAGE)}
        blocks.append(
            {
                stream: {
                    "resid_pre": Place(path, "in", ("x", 0), span, transposed=True),
                    "resid_post": Place(path, "out", span=span, transposed=True),
                }
                for stream, span in spans.items()
            }
        )
    final = Place("final_norm", "in", ("x", 0), first(IMAGE), transposed=True)
    places = named(blocks, final, Place("", "out", 0, patch=(1, 1), width=4))
    return Wiring(places, {"blocks": range(3), "layer": range(3)})


def lumina():
    """Image tokens follow the text, which is of another length in each row and not tried."""
    ragged = {"starts": "encoder_attention_mask", "count": IMAGE}
    text = {"txt": {"resid_pre": UNTRIED, "resid_post": UNTRIED}}

    def block(path, **more):
        return {"img": {"resid_pre": Place(path, "in", HIDDEN, **more), "resid_post": Place(path, "out", **more)}}

    refiners = transformer_blocks(2, "noise_refiner")
    blocks = [text, text, *map(block, refiners)]
    blocks += [text | block(path, **ragged) for path in transformer_blocks(3, "layers")]
    velocity = Place("", "out", 0, patch=(2, 2), width=16)
    places = named(blocks, Place("norm_out", "in", ("x", 0), **ragged), velocity, sign=-1)
    stacks = {"blocks": range(7), "context_refiner": [0, 1], "noise_refiner": [2, 3], "layer": range(4, 7)}
    return Wiring(places, stacks)
