"""Tokens that are others at every site and step: ops and reads do what plain hooks do."""

import json
import random

import numpy as np
import pytest
import torch

from dit_lens import Add, DiTLens, MeanAblate, Read, Scale, Swap, TokenSet, Zero
from dit_lens.core.request.ops import from_json, to_json
from dit_lens.core.runs.receipt import Receipt
from dit_lens.errors import OpError
from tests import oracle, pipelines

PROMPTS, SEEDS, STEPS, COUNT = ["a cat", "two dogs"], [1, 2], 3, 96
CALL = {**pipelines.CALL, "num_inference_steps": STEPS}
SITES = ("blocks.1.img", "blocks.3.img")
DRAWN = random.Random(7)
SOME = {site: [sorted(DRAWN.sample(range(COUNT), n)) for n in (2, 0, 3)] for site in SITES}  # none at step 1
EVEN = {site: [sorted(DRAWN.sample(range(COUNT), 2)) for _ in range(STEPS)] for site in SITES}
VECTORS = torch.randn(STEPS, pipelines.WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


@pytest.fixture(scope="module")
def source(lens):
    """Another run, of which all image tokens were read."""
    return lens.run(["a bird", "no bird"], Read(SITES), seed=[3, 4])


def by_hand(change, tokens=SOME):
    """The latents of the plain pipeline with change(x [b, k, d], step, site, tokens) at the tokens of every step."""

    def edit(step, block, stream, old):
        site = f"blocks.{block}.{stream}"
        if not tokens.get(site, [[]] * STEPS)[step]:
            return None
        chosen = tokens[site][step]
        old[:, chosen] = change(old[:, chosen], step, site, chosen)
        return old

    images, records = oracle.draw(pipelines.flux(), PROMPTS, SEEDS, {**CALL, "output_type": "latent"}, edit)
    return images, records


def swap_rows(x, step, site, tokens):
    x[1] = x[0]
    return x


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda tokens, _: Zero(SITES, tokens=tokens), lambda x, *_: torch.zeros_like(x)),
        (lambda tokens, _: Scale(SITES, factor=3.0, tokens=tokens), lambda x, *_: x * 3.0),
        (lambda tokens, _: Add(SITES, value=VECTORS, tokens=tokens), lambda x, step, *_: x + VECTORS[step]),
        (lambda tokens, _: Swap(SITES, source="row:0", rows=1, tokens=tokens, branch="both"), swap_rows),
        (
            lambda tokens, run: Swap(SITES, source=run, tokens=tokens),
            lambda x, step, site, chosen, run=None: run[site][step][:, chosen],
        ),
        (
            lambda tokens, _: MeanAblate(SITES, mean=dict.fromkeys(SITES, VECTORS), tokens=tokens),
            lambda x, step, *_: VECTORS[step].expand_as(x),
        ),
    ],
    ids=["zero", "scale", "add", "row", "run", "mean"],
)
def test_an_edit_is_what_plain_hooks_make_of_it(lens, source, make, change, request):
    op = make(TokenSet(SOME), source)
    if "run" in request.node.callspec.id:
        change = lambda x, step, site, chosen: source[site][step][:, chosen]  # noqa: E731
    run = lens.run(PROMPTS, op, seed=SEEDS, output_type="latent")
    latents, _ = by_hand(change)
    torch.testing.assert_close(run.latents, latents, atol=1e-5, rtol=1e-5)
    plain = lens.run(PROMPTS, seed=SEEDS, output_type="latent")
    assert not torch.equal(run.latents, plain.latents)
    # The receipt names the tokens of every step.
    told = {(entry.site, step): entry.tokens for entry in run.receipt.entries for step in entry.steps}
    assert told == {(site, step): tuple(some) for site in SITES for step, some in enumerate(SOME[site]) if some}
    assert Receipt.from_json(json.loads(json.dumps(run.receipt.to_json()))) == run.receipt


def test_a_read_takes_the_tokens_of_every_step(lens, source, tmp_path):
    tokens = TokenSet(EVEN)
    run = lens.run(
        PROMPTS, [Read(SITES, tokens=tokens, name="x"), Read(SITES, tokens=tokens, reduce="mean", name="m")], seed=SEEDS
    )
    _, records = oracle.draw(pipelines.flux(), PROMPTS, SEEDS, CALL)
    for site in SITES:
        block = int(site.split(".")[1])
        expected = torch.stack([records[step][block, "img", "post"][:, EVEN[site][step]] for step in range(STEPS)])
        torch.testing.assert_close(run["x"][site].as_subclass(torch.Tensor), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run["m"][site].as_subclass(torch.Tensor), expected.mean(2), atol=1e-5, rtol=1e-5)
        assert run.reading(site).tokens[site] == tuple(map(tuple, EVEN[site]))
    loaded = type(run).load(run.save(tmp_path / "run"))
    # What such a read holds is put back at the same tokens of the same steps, and nowhere else.
    for held in (run, loaded):
        again = lens.run(PROMPTS, Swap(SITES, source=held["x"], tokens=tokens), seed=SEEDS, output_type="latent")
        plain = lens.run(PROMPTS, seed=SEEDS, output_type="latent")
        torch.testing.assert_close(again.latents, plain.latents, atol=1e-6, rtol=1e-6)
    with pytest.raises(OpError, match="at other tokens at every step"):
        lens.run(PROMPTS, Swap(SITES, source=run["x"]), seed=SEEDS)


def test_some_steps_of_a_set_reduced_or_not(lens):
    run = lens.run(PROMPTS, [Zero(SITES, tokens=TokenSet(SOME), steps=[2]), Read(SITES[0], steps=-1)], seed=SEEDS)
    assert (run[SITES[0]][0][:, SOME[SITES[0]][2]] == 0).all()
    assert {entry.steps for entry in run.receipt.entries} == {(2,)}
    uneven = TokenSet({SITES[0]: [[1], [1, 2], [5]]})
    reduced = lens.run(PROMPTS, Read(SITES[0], tokens=uneven, reduce="rms"), seed=SEEDS)
    assert reduced[SITES[0]].shape == (STEPS, 2, pipelines.WIDTH)


def test_sets_are_json():
    tokens = TokenSet(SOME, "sinks", COUNT, {SITES[0]: [1.5, 2.0, 3.0]})
    op = Zero(SITES, tokens=tokens)
    again = from_json(json.loads(json.dumps(to_json(op))))
    assert again.tokens == tokens
    assert repr(again.tokens) == "TokenSet of sinks: 2 sites, 3 steps, 0 to 3 tokens"
    assert TokenSet({SITES[0]: [np.array([3, 1])]})[SITES[0]] == ((1, 3),)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Zero("blocks.*.img", tokens=TokenSet(SOME)), r"blocks.0.img is not among them. Narrow the op's site"),
        (
            Zero(SITES, tokens=TokenSet({site: some[:2] for site, some in SOME.items()})),
            "of a run of 2 steps, .* has 3",
        ),
        (Zero(SITES, tokens=TokenSet(SOME, count=400)), "among 400 tokens, and blocks.1.img has 96"),
        (Zero(SITES, tokens=TokenSet(SOME, "registers"), steps=1), "no registers at any of the chosen sites and steps"),
        (Read(SITES, tokens=TokenSet(SOME, "sinks")), "0 or 2 or 3 sinks at blocks.1.img"),
        (Read(SITES[0], tokens=TokenSet({SITES[0]: [[1], [1, 2], [5]]})), r"1 or 2 tokens .* reduce over them"),
        (
            Zero(SITES[0], tokens=TokenSet({SITES[0]: [[300], [2], []]})),
            "token 300 at blocks.1.img, step 0, which has 96",
        ),
        (Zero("blocks.1.img.mod.attn.shift", tokens=TokenSet(SOME)), "one vector for each image"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(lens, monkeypatch, op, message):
    monkeypatch.setattr(lens.engine, "generate", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises(OpError, match=message):
        lens.run(PROMPTS, op, seed=SEEDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "chooses no tokens"),
        ({"a": [[1]], "b": [[1], [2]]}, "other numbers of steps"),
        ({"a": [[-1]]}, "whole numbers from 0 up"),
        ({"a": [[1, 1]]}, "different whole numbers"),
        ({"a": [[1.5]]}, "whole number"),
    ],
)
def test_what_is_no_set_is_told(given, message):
    with pytest.raises(OpError, match=message):
        TokenSet(given)
