"""Where tiny pipelines keep their tensors, written by hand from the sources of diffusers."""

import re
from dataclasses import replace

from tests import pipelines
from tests.random_ops.blocks import (
    HIDDEN,
    NORMS,
    SIX,
    UNTRIED,
    adaln_block,
    after,
    chunk,
    clean_by_noise,
    crossing,
    first,
    flux_single,
    image_block,
    inside,
    joint_block,
    modulations,
    named,
    next_block,
    table,
    transformer_blocks,
)
from tests.random_ops.places import Place, Wiring

IMAGE, TEXT = 24, 7
MOD = "conditioning_embedding"


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


def flux():
    singles = transformer_blocks(3, "single_transformer_blocks")
    blocks = [*map(adaln_block, transformer_blocks(2)), *(flux_single(path, pipelines.LENGTH) for path in singles)]
    places = named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, width=16), mod=MOD)
    stacks = {"blocks": range(5), "double": range(2), "single": range(2, 5)}
    paths = [*transformer_blocks(2), *singles]
    attentions = both_read([f"{path}.attn" for path in paths], "text first")
    return Wiring(
        places,
        stacks,
        grid=(4, 7),
        text=pipelines.LENGTH,
        knows_text=True,
        words=letters,
        attentions=attentions,
        rotates=True,
    )


def both_read(paths, order):
    """Attentions of both streams."""
    return {(i, keys): (path, order) for i, path in enumerate(paths) for keys in ("img", "txt")}


THREE = {"blocks": range(3), "block": range(3)}


def sd3():
    """The last block reads the text and does not write it."""
    blocks = [adaln_block(path) for path in transformer_blocks(3)]
    left = ("resid_pre", "attn.in", "attn.q", "attn.k", "attn.v")
    blocks[-1]["txt"] = {point: blocks[-1]["txt"][point] for point in left}
    places = named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, patch=(2, 2), width=16), mod=MOD)
    return Wiring(
        places, THREE, attentions=both_read([f"{path}.attn" for path in transformer_blocks(3)], "image first")
    )


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
    return Wiring(named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, width=16), mod=MOD), THREE)


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
                    **dict.fromkeys(("attn.o", "attn_out", "mlp.o", "mlp_out"), UNTRIED),
                    "resid_post": Place(path, "out", span=span),
                }
                for stream, span in spans.items()
            }
        )
    places = named(blocks, Place("norm_out", "in", ("x", 0)), Place("", "out", 0, width=16), mod=MOD)
    return Wiring(places, {"blocks": range(5), "double": range(2), "single": range(2, 5)})


def without_x0(wiring):
    """The same, x0 not tried."""
    return replace(wiring, places=wiring.places | {"x0": UNTRIED})


def sana():
    gates, blocks = [table(index, 4, "timestep") for index in (2, 5)], []
    for path in transformer_blocks(3):
        conv = {
            "mlp.in": Place(f"{path}.ff", "in", HIDDEN, patch=(1, 1)),
            "mlp.o": Place(f"{path}.ff", "out", patch=(1, 1)),
            "mlp.pre": Place(f"{path}.ff.conv_inverted", "out", patch=(1, 1), width=160),
            "mlp.post": Place(f"{path}.ff.conv_point", "in", ("input", 0), patch=(1, 1), width=80),
            "mlp_out": Place(f"{path}.ff", "out", writes="linear", gate=(path, "in", gates[1]), patch=(1, 1)),
        }
        blocks.append(image_block(path, "attn1", "norm2", "ff", gates, inside(f"{path}.attn1", "") | conv))
    places = named(blocks, Place("norm_out", "in", HIDDEN), Place("", "out", 0, patch=(1, 1), width=4), mod="temb")
    return Wiring(places, THREE, text=None)


def wan():
    gates, blocks = [table(index, 2, "temb") for index in (2, 5)], []
    for path in transformer_blocks(3, "blocks"):
        more = inside(f"{path}.attn1", f"{path}.ffn", hidden=48)
        block, crossed = image_block(path, "attn1", "norm3", "ffn", gates, more), crossing(f"{path}.attn2")
        blocks.append({"img": block["img"] | crossed["img"], "txt": crossed["txt"]})
    places = named(blocks, Place("norm_out", "in", ("input", 0)), Place("", "out", 0, patch=(2, 2), width=16))
    attentions = {(i, "img"): (f"blocks.{i}.attn1", "own") for i in range(3)}
    attentions |= {(i, "txt"): (f"blocks.{i}.attn2", "cross") for i in range(3)}
    return Wiring(places, THREE, grid=(2, 4, 6), knows_grid=False, attentions=attentions, rotates=True)


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
        mod="c",
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
    places = named(blocks, final, Place("", "out", 0, patch=(1, 1), width=4), mod="conditioning")
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
    places = named(blocks, Place("norm_out", "in", ("x", 0), **ragged), velocity, sign=-1, mod=MOD)
    stacks = {"blocks": range(7), "context_refiner": [0, 1], "noise_refiner": [2, 3], "layer": range(4, 7)}
    return Wiring(places, stacks)


def hunyuan_dit():
    """Blocks of the second half are given what earlier ones left, beside what the one before left."""
    blocks = [
        {
            "img": {
                "resid_pre": Place(path, "in", HIDDEN),
                "cross_out": Place(f"{path}.attn2", "out"),
                "resid_post": Place(path, "out"),
            }
        }
        for path in transformer_blocks(6, "blocks")
    ]
    velocity = Place("", "out", 0, patch=(2, 2), width=32)
    places = named(blocks, Place("norm_out", "in", ("x", 0)), velocity, mod=MOD)
    places["x0"] = replace(velocity, width=16, writes="none", made=clean_by_noise)
    return Wiring(places, {"blocks": range(6), "block": range(6)}, ("timestep", 1), text=None)
