"""An op that names a tensor by both of its names acts on it once."""

import pytest
import torch

from dit_lens import Add, Apply, MeanAblate, Read, Scale, Swap
from dit_lens.errors import OpError
from tests import pipelines

CALL = {"seed": 1, "output_type": "latent", "num_inference_steps": 2}
BOTH = "blocks.*.*.mod.gate"  # in single blocks img.mod.gate and txt.mod.gate are one tensor
NAMES = [f"blocks.3.{stream}.mod.gate" for stream in ("img", "txt")]


def hooked(pipe, block, change):
    """The latents of the plain pipeline, where a hook changes what multiplies the output of a single block."""

    def hook(_module, _args, output):
        return output[0], change(output[1])

    handle = pipe.transformer.single_transformer_blocks[block].norm.register_forward_hook(hook)
    call = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "output_type": "latent"}
    found = pipe("red", generator=torch.Generator().manual_seed(1), **call).images
    handle.remove()
    return found


OPS = [
    (lambda site: Scale(site, factor=2.0), lambda gate: 2 * gate),
    (lambda site: Add(site, value=0.5), lambda gate: gate + 0.5),
    (lambda site: Apply(site, fn=lambda tensor, hook: 3 * tensor), lambda gate: 3 * gate),
]


@pytest.mark.parametrize(
    ("op", "change", "names"),
    [(*OPS[0], NAMES[::-1]), (*OPS[0], NAMES[1:]), *((*one, "blocks.3.*.mod.gate") for one in OPS)],
)
def test_once_whatever_the_names(cfg_lens, op, change, names):
    run = cfg_lens.run("red", op(names), **CALL)
    assert torch.equal(run.latents, hooked(cfg_lens.pipe, 1, change))
    assert {entry.site for entry in run.receipt.entries} <= set(NAMES)
    assert len(run.receipt.entries) == 2  # one for each branch


def test_reads_keep_both_names(cfg_lens):
    run = cfg_lens.run("red", [Read(BOTH, name="before"), Scale(BOTH, factor=2.0), Read(BOTH, name="after")], **CALL)
    assert set(NAMES) <= set(run["before"])
    for name in run["before"]:
        assert torch.equal(run["after"][name][0], 2 * run["before"][name][0])  # later steps follow from the edit


def test_values_that_differ_between_the_names_are_refused(cfg_lens):
    one, other = NAMES
    with pytest.raises(OpError, match="two names of one tensor, and its channels or values differ"):
        cfg_lens.run("red", Add(NAMES, value={one: 1.0, other: 2.0}), **CALL)
    with pytest.raises(OpError, match="two names of one tensor"):
        cfg_lens.run("red", Scale(NAMES, factor=2.0, channels={one: [1], other: [2]}), **CALL)
    equal = cfg_lens.run("red", Add(NAMES, value={one: 1.0, other: 1.0}), **CALL)
    assert torch.equal(equal.latents, hooked(cfg_lens.pipe, 1, lambda gate: gate + 1))


def test_sources_of_both_names(cfg_lens):
    source = cfg_lens.run("blue", Read(NAMES), **{**CALL, "seed": 2})
    gate = source[NAMES[0]].as_subclass(torch.Tensor)
    for op in (
        Swap(NAMES, source=source, steps=0),
        Swap(NAMES, source={name: source[name] for name in NAMES}, steps=0),
    ):
        run = cfg_lens.run("red", [op, Read(NAMES, name="after", steps=0)], **CALL)
        assert torch.equal(run["after"][NAMES[1]].as_subclass(torch.Tensor), gate[:1])
    mean = {name: torch.zeros(pipelines.WIDTH) for name in NAMES}
    run = cfg_lens.run("red", [MeanAblate(NAMES, mean=mean)], **CALL)
    assert torch.equal(run.latents, hooked(cfg_lens.pipe, 1, torch.zeros_like))
