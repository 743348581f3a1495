"""Registers and sinks are those of plain hooks, and an image without any is told."""

import pytest
import torch

from dit_lens import DiTLens
from dit_lens.errors import DitLensError, OpError, PromptError, SiteError
from tests import oracle, pipelines

PROMPT, SEED, STEPS, K = "a cat", 1, 2, 3
CALL = {**pipelines.CALL, "num_inference_steps": STEPS}
SITES = ["blocks.1.img", "blocks.4.img"]


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


def test_registers_are_the_longest_tokens_without_massive_channels(lens):
    found = lens.find_tokens(PROMPT, k=2, without=K, site=SITES, seed=SEED)
    _, records = oracle.draw(pipelines.flux(), [PROMPT], [SEED], CALL)
    for site in SITES:
        x = torch.stack([record[int(site.split(".")[1]), "img", "post"][0] for record in records])  # [s, n, d]
        massive = x.mean(1).abs().mean(0).topk(K).indices
        rest = x.clone()
        rest[..., massive] = 0
        norms = rest.norm(dim=-1)
        assert found[site] == tuple(tuple(sorted(step.topk(2).indices.tolist())) for step in norms)
        assert found.peaks[site] == pytest.approx(
            [float(step.max()) / float(step.double().quantile(0.5)) for step in norms], rel=1e-4
        )
    assert (found.kind, found.count, found.steps) == ("registers", 96, STEPS)


@pytest.mark.parametrize("site", ["blocks.1.img", "blocks.1.txt"])
def test_sinks_get_the_most_attention_of_all_heads(lens, site):
    found = lens.find_tokens(PROMPT, "sinks", k=2, site=site, seed=SEED)
    patterns = lens.read_pattern(PROMPT, 1, heads=[0, 1], steps=None, seed=SEED)
    stream = site.split(".")[2]
    mass = torch.cat([patterns.between(1, queries, stream) for queries in ("img", "txt")], 3).mean((2, 3))[:, 0]
    assert found[site] == tuple(tuple(sorted(step.topk(2).indices.tolist())) for step in mass)
    assert found.peaks[site] == pytest.approx(
        [float(m.max()) / float(m.double().quantile(0.5)) for m in mass], rel=1e-4
    )


def test_a_token_that_stands_out_is_found_and_none_is_told(lens):
    with pytest.warns(UserWarning, match=r"there are no registers: no token has 5 times the median norm"):
        found = lens.find_tokens(PROMPT, site=SITES, seed=SEED)
    assert found.is_empty

    def plant(module, args, kwargs):
        img = kwargs["hidden_states"].clone()
        img[:, 7] *= 40
        return args, {**kwargs, "hidden_states": img}

    pipe = pipelines.flux()
    handle = oracle.blocks_of(pipe)[4].register_forward_pre_hook(plant, with_kwargs=True)
    try:
        planted = DiTLens(pipe, defaults=CALL).find_tokens(PROMPT, site="blocks.4.img", seed=SEED)
    finally:
        handle.remove()
    assert planted["blocks.4.img"] == ((7,), (7,))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kind": "register"}, DitLensError, "Nearest: 'registers'"),
        ({"over": 2.0, "k": 1}, OpError, "two rules for the same tokens"),
        ({"over": 0.5}, OpError, "over=0.5"),
        ({"k": 0}, OpError, "k=0"),
        ({"k": 9999}, OpError, "k=9999 tokens are asked for, and blocks"),
        ({"site": "blocks.*.img.attn.q"}, SiteError, "of the tokens that a block leaves"),
        ({"num_images_per_prompt": 2}, PromptError, "tokens are of one image, and this call draws 2"),
    ],
)
def test_mistakes_are_told_before_anything_runs(lens, monkeypatch, given, error, message):
    monkeypatch.setattr(lens.engine, "generate", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises(error, match=message):
        lens.find_tokens(PROMPT, seed=SEED, **given)
