"""A run takes nnsight's places of the modules that it visits, and of no other."""

import pytest
import torch
from nnsight.intervention.source import Controller

from dit_lens import Apply, DiTLens, Read, Zero, families
from dit_lens.errors import FamilyError
from tests import pipelines

CALL = {"seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults={**pipelines.TRUE_CFG, "num_inference_steps": 2})


def places(module):
    """The modules whose forward nnsight stands in for."""
    return {name for name, one in module.named_modules() if isinstance(vars(one).get("forward"), Controller)}


def test_only_modules_that_are_visited_are_stood_in_for(lens):
    seen = []

    def look(tensor, hook):
        parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
        seen.extend((name, frozenset(places(getattr(lens.pipe, name)))) for name in parts)

    ops = [Apply("blocks.1.img", fn=look), Read("blocks.3.img", reduce="mean", steps=-1)]
    lens.run("red", ops, **CALL)
    (transformer,) = {names for part, names in seen if part == "transformer"}
    assert transformer == {"", "transformer_blocks.1", "single_transformer_blocks.1"}
    assert not any(names for part, names in seen if part != "transformer")
    assert not places(lens.pipe.transformer)


def test_a_module_that_is_not_visited_may_be_called_by_a_function(lens):
    """It computes what it always does, and the run goes on as if nobody had called it."""
    blocks, made = lens.pipe.transformer.single_transformer_blocks, []

    def call(tensor, hook):
        made.append(blocks[0].norm.linear(torch.ones(1, pipelines.WIDTH)))

    reads = [Read("blocks.*.img"), Zero("blocks.4.img", channels=[1])]
    alone = lens.run("red", reads, **CALL)
    run = lens.run("red", [Apply("blocks.1.img", fn=call), *reads], **CALL)
    expected = blocks[0].norm.linear(torch.ones(1, pipelines.WIDTH))
    assert len(made) == 4
    assert all(torch.equal(one, expected) for one in made)
    assert torch.equal(run.latents, alone.latents)
    assert all(torch.equal(run[site], value) for site, value in alone.items())


def cached(*_):
    raise AssertionError


MARKS = {
    "_chunk_size": (4, "forward chunking"),
    "fused_projections": (True, "projections are fused"),
    "_compiled_call_impl": (cached, "is compiled"),
    "_call_impl": (cached, "has .* as its _call_impl"),
    "__call__": (cached, "has .* as its __call__"),
}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("of_class", [False, True], ids=["of a module", "of its class"])
def test_a_mark_is_seen_on_a_module_and_on_its_class(lens, mark, of_class):
    value, match = MARKS[mark]
    attention = lens.pipe.transformer.transformer_blocks[1].attn
    there = type(attention) if of_class else attention
    before = vars(there).get(mark, cached)
    setattr(there, mark, value)
    try:
        with pytest.raises(FamilyError, match=match):
            families.refuse_unsafe(lens.pipe)
    finally:
        delattr(there, mark) if before is cached else setattr(there, mark, before)
    families.refuse_unsafe(lens.pipe)
