"""Guidance away from a degraded twin, against plain hooks on the pipeline."""

import pytest
import torch

import dit_lens as dl
from dit_lens import Guide, Read, Skip, Swap, TokenMean, Zero
from dit_lens.errors import ExecutionError, OpError
from tests import pipelines

CALL = {**pipelines.CALL, "output_type": "latent"}
GUIDED = {"true_cfg_scale": 2.5, "negative_prompt": "bad"}
PAIR = ["a red fox", "a red fox"]
# Perturbed attention, skipped layers, smoothed queries, and channels that are left out.
TWINS = {
    "pag": Swap("blocks.1.img.attn.z", source="site:blocks.1.img.attn.v", rows=1),
    "slg": Skip("blocks[2:4].*", rows=1),
    "seg": TokenMean("blocks.1.img.attn.q_rot", rows=1),
    "detail": Zero("blocks.2.img", channels=[3, 7], rows=1),
}


@pytest.fixture(scope="module")
def lens():
    return dl.DiTLens(pipelines.flux(), defaults=CALL)


@pytest.mark.parametrize("call", [{}, GUIDED], ids=["plain", "guided"])
def test_it_is_the_formula_of_plain_hooks(lens, call):
    """Blocks 2 and 3 skipped in the twin, whose prediction the row is pushed away from."""
    run = lens.run(PAIR, [Skip("blocks[2:4].*", rows=1, branch="cond"), Guide(scale=1.5)], seed=[4, 4], **call)
    pipe, made = pipelines.flux(), []
    split = 2 if call else 1

    def skip(module, args, kwargs, output):
        if (len(made) - 1) % split:
            return output
        given = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        return tuple(torch.cat([new[:1], old[1:]]) for new, old in zip(output, given, strict=True))

    def push(module, args, output):
        (v,) = output
        uncond = (len(made) - 1) % split
        return ((v[:1] if uncond else v[:1] + 1.5 * (v[:1] - v[1:])).expand_as(v),)

    pipe.transformer.register_forward_pre_hook(lambda *_: made.append(None))
    for block in pipe.transformer.single_transformer_blocks[:2]:
        block.register_forward_hook(skip, with_kwargs=True)
    pipe.transformer.register_forward_hook(push)
    more = {**call, "negative_prompt": ["bad", "bad"]} if call else {}
    generators = [torch.Generator().manual_seed(4) for _ in PAIR]
    latents = pipe(PAIR, **{**CALL, **more}, generator=generators)[0]
    assert torch.equal(run.latents, latents)
    assert torch.equal(run.latents[0], run.latents[1])
    assert not torch.equal(run.latents, lens.run(PAIR, seed=[4, 4], **call).latents)


@pytest.mark.parametrize("name", TWINS)
def test_published_guidances_are_settings_of_the_twin(lens, name):
    plain = lens.run(PAIR, seed=[4, 4], **GUIDED)
    none, some, twice = (
        lens.run(PAIR, [TWINS[name], Guide(scale=scale), Read("velocity")], seed=[4, 4], **GUIDED)
        for scale in (0, 0.5, 1.0)
    )
    assert torch.equal(none.latents, plain.latents)
    assert torch.equal(some.latents[0], some.latents[1])
    assert not torch.equal(some.latents, plain.latents)
    first = [run["velocity"].as_subclass(torch.Tensor)[0, 0] for run in (none, some, twice)]
    torch.testing.assert_close(first[2] - first[0], 2 * (first[1] - first[0]), rtol=1e-3, atol=1e-6)


def test_receipt_json_and_the_with_form(lens):
    run = lens.run(PAIR, [TWINS["slg"], Guide(scale=2.0)], seed=[4, 4])
    assert [(entry.kind, entry.site, entry.rows) for entry in run.receipt.entries][-1] == ("Guide", "velocity", (0, 1))
    assert torch.equal(lens.run_spec(run.spec).latents, run.latents)
    with lens.trace(PAIR, seed=[4, 4]) as trace:
        trace.skip("blocks[2:4].*", rows=1)
        trace.guide(scale=2.0)
    assert torch.equal(trace.run.latents, run.latents)


@pytest.mark.parametrize(
    ("prompts", "op", "call", "says"),
    [
        (["a fox", "red"], Guide(), {"seed": [4, 4]}, "another prompt each"),
        (PAIR, Guide(), {"seed": [4, 5]}, "another seed each"),
        (PAIR, Guide(twin=0), {"seed": 4}, "are to be two rows"),
        (PAIR, Guide(twin=2), {"seed": 4}, "row 2 does not exist"),
        (PAIR, Guide(steps=[0]), {"seed": 4}, r"takes no steps="),
        (PAIR, Guide(scale=float("nan")), {"seed": 4}, "not a finite number"),
        (PAIR, Guide("blocks.1.img"), {"seed": 4}, "is for the prediction"),
        (PAIR, Guide(), {"seed": 4, "batch_size": 1}, "the twin of a guided row"),
    ],
)
def test_what_is_refused_before_the_run(lens, prompts, op, call, says):
    with pytest.raises(OpError, match=says):
        lens.run(prompts, [op], **call)


def test_rows_that_begin_from_other_noise_are_told(lens):
    latents = lens.run(PAIR, seed=[4, 5], num_inference_steps=1).latents
    with pytest.raises(ExecutionError, match="begin from other noise"):
        lens.run(PAIR, [Guide()], seed=4, latents=latents)
