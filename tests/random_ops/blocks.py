"""Where blocks keep their tensors, written by hand from the sources of diffusers."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.random_ops.places import Place

WIDTH = 32
HIDDEN, ENCODER = ("hidden_states", 0), ("encoder_hidden_states", 1)
HIDDEN_OF_MODEL = Place("", "in", HIDDEN)
UNTRIED = Place("", "out", writes="untried")
POINTS = (
    "resid_pre",
    *(f"mod.{part}" for part in ("shift", "scale", "gate")),
    *(f"mod.{where}.{part}" for where in ("attn", "mlp") for part in ("shift", "scale", "gate")),
    "attn.in",
    *(f"attn.{part}" for part in "qkvzo"),
    "attn_out",
    *(f"cross.{part}" for part in "qkvzo"),
    "cross_out",
    "resid_mid",
    "mlp.in",
    "mlp.pre",
    "mlp.post",
    "mlp.o",
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
        "attn.in": Place(attention, "in", ENCODER if text else HIDDEN, **more),
        "attn.z": Place(f"{attention}.{z}", "in", ("input", 0), **more),
        "mlp.in": Place(mlp, "in", HIDDEN, **more),
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
            "attn.o": Place(f"{path}.attn", "out", attended),
            "attn_out": Place(f"{path}.attn", "out", attended, writes="linear", gate=gate),
            "resid_mid": Place(f"{path}.{norm}", "in", ("input", 0), writes="none"),
            "mlp.o": Place(f"{path}.{mlp}", "out"),
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

    The modulation is one tensor under two names.
    """
    gate = (f"{path}.norm", "out", item(1))

    def halves(span):
        made = {
            "attn": lambda module, x, moment: F.linear(x[..., :WIDTH], module.weight[:, :WIDTH]),
            "mlp": lambda module, x, moment: F.linear(x[..., WIDTH:], module.weight[:, WIDTH:], module.bias),
        }
        return {
            f"{part}{end}": Place(
                f"{path}.proj_out", "in", ("input", 0), span, writes="none", gate=after_it, made=made[part]
            )
            for part in made
            for end, after_it in ((".o", None), ("_out", gate))
        }

    streams = {}
    for stream, key, left, span in (("txt", ENCODER, 0, first(text)), ("img", HIDDEN, 1, after(text))):
        streams[stream] = {
            "resid_pre": Place(path, "in", key),
            **modulations(f"{path}.norm.linear", ("shift", "scale", "gate")),
            **{f"attn.{part}": Place(f"{path}.attn.to_{part}", "out", span=span) for part in "qkv"},
            "attn.in": Place(f"{path}.attn", "in", HIDDEN, span),
            "attn.z": Place(f"{path}.attn", "out", span=span),
            "mlp.in": Place(f"{path}.proj_mlp", "in", ("input", 0), span),
            "mlp.pre": Place(f"{path}.proj_mlp", "out", span=span, width=128),
            "mlp.post": Place(f"{path}.proj_out", "in", ("input", 0), span, part=(WIDTH, None), width=128),
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


def clean_by_noise(module, predicted, moment):
    """What they are where noise is predicted, its variance beside it: x = sqrt(1 - sigma^2) x0 + sigma noise."""
    latents = HIDDEN_OF_MODEL.find(moment.inputs)
    noise = predicted[:, : latents.shape[1]]
    return (latents.float() - moment.sigma * noise.float()) / (1 - moment.sigma**2) ** 0.5


def named(blocks, final, velocity, sign=1, mod=None):
    """Sites by name, in the order of the model.

    mod: name of the final norm's argument, its second, from which shift and scale are made; None: it has none.
    """
    places = {
        f"blocks.{i}.{stream}" + ("" if point == "resid_post" else f".{point}"): place
        for i, block in enumerate(blocks)
        for (stream, point), place in ordered(block).items()
    }
    x0 = replace(velocity, writes="none", made=clean(sign))
    norm = {} if mod is None else {"final.img.mod": Place(final.module, "in", (mod, 1), vector=True)}
    return {**places, **norm, "final.img": final, "velocity": velocity, "x0": x0}


def image_block(path, attention, norm, mlp, gates, more):
    """A block of image tokens alone, into which text enters by cross-attention."""
    return {
        "img": {
            "resid_pre": Place(path, "in", HIDDEN),
            "attn.o": Place(f"{path}.{attention}", "out"),
            "attn_out": Place(f"{path}.{attention}", "out", writes="linear", gate=(path, "in", gates[0])),
            "cross.o": Place(f"{path}.attn2", "out"),
            "cross_out": Place(f"{path}.attn2", "out"),
            "resid_mid": Place(f"{path}.{norm}", "in", ("input", 0), writes="none"),
            "mlp.o": Place(f"{path}.{mlp}", "out"),
            "mlp_out": Place(f"{path}.{mlp}", "out", writes="linear", gate=(path, "in", gates[1])),
            "resid_post": Place(path, "out"),
            **more,
        }
    }


def crossing(path):
    """Queries and outputs of a cross-attention, and keys and values of the text that it reads."""
    return {
        "img": {"cross.q": Place(f"{path}.to_q", "out"), "cross.z": Place(f"{path}.to_out.0", "in", ("input", 0))},
        "txt": {f"cross.{part}": Place(f"{path}.to_{part}", "out") for part in "kv"},
    }


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
            "attn.in": Place(f"{path}.{attention}", "in", HIDDEN, **span),
            "attn.z": Place(f"{path}.{attention}.to_out.0", "in", ("input", 0), **span),
            "attn.o": Place(f"{path}.{norms[0]}", "out", **span),
            "mlp.in": Place(f"{path}.feed_forward", "in", ("x", 0), **span),
            "mlp.o": Place(f"{path}.{norms[2]}", "out", **span),
            "attn_out": Place(f"{path}.{norms[0]}", "out", gate=gates[0] if gated else None, **span, **more),
            "resid_mid": Place(f"{path}.{norms[1]}", "in", ("x", 0), writes="none", **span),
            "mlp_out": Place(f"{path}.{norms[2]}", "out", gate=gates[1] if gated else None, **span, **more),
            "resid_post": Place(path, "out", **span),
        }
    return streams


def transformer_blocks(count, name="transformer_blocks"):
    return [f"{name}.{i}" for i in range(count)]
