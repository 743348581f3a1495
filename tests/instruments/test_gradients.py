"""Gradients at sites equal autograd's own, by hooks written here, and finite differences, in every family."""

import pytest
import torch

from dit_lens import Add, DiTLens
from dit_lens.errors import ExecutionError, FamilyError, OpError, PromptError, SiteError
from dit_lens.instruments.gradients import attribution, nearness
from tests import pipelines
from tests.oracle import blocks_of, generators
from tests.zoo import truth

PROMPTS = ["a cat", "two dogs"]
SEEDS = [3, 4]
CALL = {**pipelines.CALL, "num_inference_steps": 3}


def metric(latents):
    return latents.square().sum() / 10


@pytest.fixture(scope="module")
def by_autograd():
    """Block -> the gradient at its image tokens, at every step; by hooks on a pipeline that no lens has seen."""
    pipe, kept = pipelines.flux(), []

    def hook(module, args, kwargs, output):
        txt, img = output
        img = img.requires_grad_() if not img.requires_grad else img
        kept.append(img)
        return txt, img

    for block in blocks_of(pipe):
        block.register_forward_hook(hook, with_kwargs=True)
    pipe.transformer.requires_grad_(False)
    with torch.enable_grad():
        call = {**CALL, "output_type": "latent", "generator": generators(SEEDS)}
        latents = type(pipe).__call__.__wrapped__(pipe, PROMPTS, **call).images
        taken = torch.autograd.grad(metric(latents), kept)
    return latents.detach(), torch.stack(taken).unflatten(0, (3, pipelines.DEPTH))


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(CALL))


def test_they_are_those_of_plain_autograd(lens, by_autograd):
    latents, truth_of = by_autograd
    found = lens.gradients(PROMPTS, "blocks.*.img", metric=metric, seed=SEEDS)
    assert torch.allclose(found.run.latents, latents, atol=1e-5)
    assert torch.equal(found.run.latents, lens.run(PROMPTS, seed=SEEDS, output_type="latent").latents)
    assert torch.equal(found.value, metric(found.run.latents))
    assert found.steps == (0, 1, 2)
    for block in range(pipelines.DEPTH):
        assert torch.allclose(found[f"blocks.{block}.img"], truth_of[:, block], rtol=1e-4, atol=1e-6)
    assert found["blocks.0.img"].abs().max() > 0.1


def test_some_steps_and_sites_are_those_of_all(lens, by_autograd):
    found = lens.gradients(PROMPTS, "blocks.3.img", metric=metric, steps=[1, 2], seed=SEEDS)
    assert list(found) == ["blocks.3.img"]
    assert torch.allclose(found["blocks.3.img"], by_autograd[1][1:, 3], rtol=1e-4, atol=1e-6)


def test_checkpointed_blocks_give_the_same(lens, by_autograd):
    lens.pipe.transformer.enable_gradient_checkpointing()
    try:
        found = lens.gradients(PROMPTS, "blocks.2.img", metric=metric, seed=SEEDS)
    finally:
        lens.pipe.transformer.disable_gradient_checkpointing()
    assert torch.allclose(found["blocks.2.img"], by_autograd[1][:, 2], rtol=1e-4, atol=1e-6)


def test_a_reduction_is_of_the_tensor_and_its_gradient(lens):
    whole = lens.gradients(PROMPTS, "blocks.1.img", metric=metric, seed=SEEDS)
    cache = lens.run_with_cache(PROMPTS, "blocks.1.img", seed=SEEDS)[1]
    found = lens.gradients(PROMPTS, "blocks.1.img", metric=metric, seed=SEEDS, reduce=lambda x, g: (x * g).sum((1, 2)))
    assert torch.equal(found["blocks.1.img"], (cache["blocks.1.img"] * whole["blocks.1.img"]).sum((2, 3)))


def test_through_one_step_they_are_those_of_the_prediction(lens):
    """At the last step of Euler the latents are the prediction's, but for a factor; at others the graph ends there."""
    weights = torch.randn(2, 96, 16, generator=torch.Generator().manual_seed(0))
    found = lens.gradients(PROMPTS, "blocks.*.img", metric=lambda v: (v * weights).sum(), through="step", seed=SEEDS)
    whole = lens.gradients(PROMPTS, "blocks.*.img", metric=lambda x: (x * weights).sum(), seed=SEEDS)
    sigma = whole.run.sigmas[-1]
    for site, taken in found.items():
        assert torch.allclose(-sigma * taken[-1], whole[site][-1], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(taken[0] / taken[0].norm(), whole[site][0] / whole[site][0].norm(), atol=1e-3)
    assert torch.equal(found.run.latents, whole.run.latents)
    assert found.value.shape == (3,)


def test_the_graph_of_a_step_is_let_go(lens):
    """Through one step, what enters a call has no graph, whatever the call before left behind."""
    seen = []
    block = blocks_of(lens.pipe)[0]
    handle = block.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"].requires_grad), with_kwargs=True
    )
    call = {"metric": metric, "seed": 3}
    try:
        lens.gradients("a cat", "blocks.2.img", through="step", **call)
        lens.gradients("a cat", "blocks.2.img", **call)
    finally:
        handle.remove()
    assert seen == [False, False, False, False, True, True]


EPSILON = {"kandinsky5": 1e-1}  # it rotates in bfloat16, where the step of the others drowns
# Where the gradient could not be told: experts under no_grad, and images instead of latents.
REFUSED = ("hidream", "dit")


@pytest.mark.parametrize("name", sorted(set(truth.ENTRIES) - set(REFUSED)))
def test_finite_differences_in_every_family(name):
    """From the middle of the first step to the final latents: through the loop, its scheduler and its guidance."""
    zoo = truth.zoo_of(name)
    call = {**zoo.call, "seed": truth.SEED, "output_type": "latent", "num_inference_steps": 3}
    sites = zoo.lens.sites("blocks.*.img")
    site = sites[len(sites) // 2]
    noise = torch.Generator().manual_seed(1)
    direction = torch.randn(zoo.lens.anatomy.channels(zoo.lens.anatomy.site(site)), generator=noise)

    epsilon = EPSILON.get(name, 1e-3)

    def measure(latents):
        return (latents.float() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))).mean()

    found = zoo.lens.gradients(**{"prompt": None, **call}, site=site, metric=measure, steps=0)
    up, down = (
        zoo.lens.run(**call, ops=Add(site, value=size * direction, steps=0, branch="cond")).latents
        for size in (epsilon, -epsilon)
    )
    slope = float(measure(up) - measure(down)) / (2 * epsilon)
    assert slope != 0
    assert float((found[site][0].float() * direction).sum()) == pytest.approx(slope, rel=0.01)


def test_models_that_leave_the_graph_are_refused():
    def gradients(name, **how):
        zoo = truth.zoo_of(name)
        return zoo.lens.gradients(**{"prompt": None, **zoo.call, **how}, site="blocks.0.img", metric=metric, seed=3)

    with pytest.raises(FamilyError, match=r"MOEFeedForwardSwiGLU\.moe_infer runs under torch\.no_grad"):
        gradients("hidream")
    with pytest.raises(FamilyError, match="does not return latents"):
        gradients("dit")
    assert gradients("dit", through="step")["blocks.0.img"].abs().min() > 0


def test_the_pipeline_is_as_it_was(lens):
    before = [p.requires_grad for p in lens.pipe.transformer.parameters()]
    images = lens.run("a cat", seed=3).images

    def broken(latents):
        raise ZeroDivisionError

    for through in ("run", "step"):
        with pytest.raises(ZeroDivisionError):
            lens.gradients("a cat", "blocks.0.img", metric=broken, through=through, seed=3)
    assert any(before)
    assert [p.requires_grad for p in lens.pipe.transformer.parameters()] == before
    assert not lens.pipe.transformer._forward_hooks  # noqa: SLF001
    run = lens.run("a cat", seed=3)
    assert [image.tobytes() for image in run.images] == [image.tobytes() for image in images]


def test_a_metric_of_several_numbers_or_of_none_is_refused(lens):
    with pytest.raises(OpError, match="one number"):
        lens.gradients("a cat", "blocks.0.img", metric=lambda x: x.sum(-1), seed=3)
    with pytest.raises(ExecutionError, match="does not depend"):
        lens.gradients("a cat", "blocks.0.img", metric=lambda x: x.detach().sum(), seed=3)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (OpError, "Nearest: 'step'", {"through": "steps"}),
        (OpError, "one branch", {"branch": "both"}),
        (OpError, "no 'uncond' branch", {"branch": "uncond"}),
        (OpError, "step 9 does not exist", {"steps": 9}),
        (PromptError, "batch_size", {"batch_size": 1}),
        (PromptError, "images have no gradient", {"output_type": "pil"}),
        (SiteError, "block 9", {"site": "blocks.9.img"}),
        (OpError, "only be read", {"site": "blocks.0.img.resid_mid"}),
    ],
)
def test_mistakes_raise_before_any_step(lens, error, match, call):
    count = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        with pytest.raises(error, match=match):
            lens.gradients("a cat", **{"site": "blocks.0.img", "metric": metric, "seed": 3, **call})
    finally:
        handle.remove()
    assert not count


def test_attribution_is_the_difference_times_the_gradient(lens):
    """By hand, from a run's activations and the gradients of the whole batch."""
    found = attribution(lens, *PROMPTS, seed=3)
    run = lens.run_with_cache(PROMPTS, seed=3, output_type="latent")[1]

    def near(latents):
        source, target = run.latents
        return 1 - (latents[1] - source).norm() / (target - source).norm()

    whole = lens.gradients(PROMPTS, "blocks.*.img", metric=near, seed=3)
    assert whole.value == 0
    for site in whole:
        product = (run[site][:, 0] - run[site][:, 1]) * whole[site][:, 1]
        assert torch.allclose(found.channels[site], product.sum(1), atol=1e-6)
        assert torch.allclose(found.tokens[site], product.sum(2), atol=1e-6)
        assert torch.allclose(found.tokens[site].sum(1), found.channels[site].sum(1), atol=1e-5)


def test_nearness_is_the_share_of_the_way():
    source, target = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    x = torch.stack([torch.lerp(target, source, share) for share in (0.0, 0.25, 1.0)])
    assert torch.allclose(nearness(x, source, target), torch.tensor([0.0, 0.25, 1.0]), atol=1e-6)
    assert nearness((2 * target - source)[None], source, target) == pytest.approx(-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("through", ["run", "step"])
def test_whatever_mode_the_caller_is_in(cfg_lens, mode, through):
    def take():
        call = {"metric": lambda x: x.square().mean(), "through": through, "seed": 0, "num_inference_steps": 2}
        return cfg_lens.gradients("red", "blocks.0.img", **call)["blocks.0.img"]

    plain = take()
    with mode():
        assert torch.equal(take(), plain)
    assert plain.abs().max() > 0


def test_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))
    with pytest.raises(ExecutionError, match="outside of it"):
        lens.gradients("red", "blocks.0.img", metric=torch.mean)
