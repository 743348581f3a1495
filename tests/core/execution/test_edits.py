"""Edits do to the network what plain torch hooks do, touch exactly what the receipt names, and leave nothing behind."""

import numpy as np
import pytest
import torch

from dit_lens import Add, Apply, MeanAblate, Read, Resample, Scale, Swap, TokenMean, Zero, sigma
from dit_lens.errors import OpError
from tests import oracle, pipelines

PROMPTS = ["red", "a blue one"]
SEEDS = [3, 3]
EVERY = Read("blocks.*.{img,txt}", branch=None, name="after")
H, W = pipelines.GRID
MASK = np.zeros(pipelines.GRID, bool)
MASK[2:5, 3:9] = True
CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 3}  # a first, a last, and one between
INSIDE = np.flatnonzero(MASK).tolist()


def same(images, others):
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(images, others, strict=True))


def changed(steps, block, fn, *, stream="img", calls_per_step=2, branches=(0, 1)):
    """A hook edit at one block, at some steps and branches; ``fn(x)`` works in place on [row, token, channel]."""

    def edit(call, index, kind, x):
        step, branch = divmod(call, calls_per_step)
        if step not in steps or index != block or kind != stream or branch not in branches:
            return None
        fn(x)
        return x

    return edit


def zero_channels(x):
    x[..., [3, 17]] = 0


def zero_inside(x):
    x[1, INSIDE] = 0


def scale_row(x):
    x[0][:, [1]] *= 2.5


def add_vector(x):
    x[:, :, [4, 6]] += torch.tensor([1.0, -2.0])


def copy_row(x):
    x[1][:, [1, 2, 9]] = x[0][:, [1, 2, 9]]


def blend_row(x):
    part = x[1, INSIDE]
    x[1, INSIDE] = torch.lerp(part, x[0, INSIDE], 0.3)


def token_mean(x):
    x[:, :, [8]] = x[:, :, [8]].mean(1, keepdim=True)


def residual(x):
    x[:, :, [8]] -= x[:, :, [8]].mean(1, keepdim=True)


CASES = {
    "zero": (Zero("blocks.3.img", channels=[3, 17]), changed([0, 1, 2], 3, zero_channels)),
    "zero txt": (Zero("blocks.1.txt", channels=[3, 17]), changed([0, 1, 2], 1, zero_channels, stream="txt")),
    "zero, first half": (Zero("blocks.3.img", channels=[3, 17], steps=(0.0, 0.5)), changed([0, 1], 3, zero_channels)),
    "zero, last step": (Zero("blocks.3.img", channels=[3, 17], steps=-1), changed([2], 3, zero_channels)),
    "zero, noisy steps": (
        Zero("single.1.img", channels=[3, 17], steps=sigma(1.0, 0.5)),
        changed([0, 1], 3, zero_channels),
    ),
    "zero, uncond": (
        Zero("blocks.0.img", channels=[3, 17], branch="uncond"),
        changed([0, 1, 2], 0, zero_channels, branches=[1]),
    ),
    "zero, cond": (
        Zero("blocks.0.img", channels=[3, 17], branch="cond"),
        changed([0, 1, 2], 0, zero_channels, branches=[0]),
    ),
    "zero, mask and row": (Zero("blocks.2.img", mask=MASK, rows=1), changed([0, 1, 2], 2, zero_inside)),
    "zero, tokens and row": (Zero("blocks.2.img", tokens=INSIDE, rows=[-1]), changed([0, 1, 2], 2, zero_inside)),
    "scale": (Scale("blocks.2.img", factor=2.5, rows=0, channels=1), changed([0, 1, 2], 2, scale_row)),
    "add": (Add("blocks.2.img", value=torch.tensor([1.0, -2.0]), channels=[4, 6]), changed([0, 1, 2], 2, add_vector)),
    "copy a row": (Swap("blocks.4.img", source="row:0", rows=1, channels=[1, 2, 9]), changed([0, 1, 2], 4, copy_row)),
    "blend a row": (
        Swap("blocks.4.img", source="row:0", rows=1, mask=MASK, strength=0.3, steps=[1]),
        changed([1], 4, blend_row),
    ),
    "token mean": (TokenMean("blocks.0.img", channels=[8]), changed([0, 1, 2], 0, token_mean)),
    "residual": (TokenMean("blocks.0.img", channels=[8], keep="residual"), changed([0, 1, 2], 0, residual)),
    "apply": (Apply("blocks.3.img", fn=lambda x, hook: x * (hook.step + 1)), None),
}


@pytest.fixture(scope="module")
def wrapped():
    from dit_lens import DiTLens

    return DiTLens(pipelines.flux(), defaults=dict(CALL))


@pytest.fixture(scope="module")
def untouched(wrapped):
    return wrapped.run(PROMPTS, [EVERY], seed=3)


@pytest.fixture(scope="module")
def bare():
    return pipelines.flux()


@pytest.mark.parametrize("name", CASES)
def test_edits_equal_plain_hooks(name, wrapped, bare, untouched):
    op, edit = CASES[name]
    if name == "apply":

        def edit(call, index, kind, x):
            return x * (call // 2 + 1) if index == 3 and kind == "img" else None

    images, records = oracle.draw(bare, PROMPTS, SEEDS, CALL, edit)
    run = wrapped.run(PROMPTS, [op, EVERY], seed=3)
    assert same(run.images, images)
    for site, value in run["after"].items():
        place = wrapped.anatomy.site(site)
        for step in range(3):
            assert torch.equal(value[step], records[2 * step][place.block, place.stream, "post"]), (site, step)
    assert not same(run.images, untouched.images), "the edit changed nothing, so this test would show nothing"


def test_edits_of_inputs_and_of_the_prediction(wrapped, untouched):
    for site in ("blocks.2.img.resid_pre", "blocks.0.txt.resid_pre", "final.img", "velocity"):
        half = Scale(site, factor=0.5, channels=range(8))  # not all: a norm takes a common factor out again
        run = wrapped.run(PROMPTS, [half, Read(site, name="after", steps=0)], seed=3)
        before = wrapped.run(PROMPTS, [Read(site, name="before", steps=0)], seed=3)
        assert not same(run.images, untouched.images), site
        if site != "blocks.2.img.resid_pre":  # what comes before is unchanged at the first step
            assert torch.equal(run["after"].tensor[..., :8], before["before"].tensor[..., :8] * 0.5), site
            assert torch.equal(run["after"].tensor[..., 8:], before["before"].tensor[..., 8:]), site


def test_an_input_is_what_the_block_before_left(wrapped):
    ops = [
        Zero("blocks.1.img", channels=[2]),
        Read("blocks.2.img.resid_pre", name="into"),
        Read("blocks.1.img", name="out of"),
    ]
    run = wrapped.run(PROMPTS, ops, seed=3)
    assert torch.equal(run["into"].tensor, run["out of"].tensor)
    assert bool((run["into"].tensor[..., 2] == 0).all())


def test_an_edit_touches_exactly_what_its_receipt_names(wrapped, untouched):
    op = Zero(
        "blocks.2.{img,txt}", channels={"blocks.2.img": [3, 17], "blocks.2.txt": [0]}, tokens=[1, 5], rows=1, steps=[0]
    )
    run = wrapped.run(PROMPTS, [op, EVERY], seed=3)
    entries = {(entry.site, entry.branch): entry for entry in run.receipt.entries}
    assert set(entries) == {
        (f"blocks.2.{stream}", branch) for stream in ("img", "txt") for branch in ("cond", "uncond")
    }
    for stream in ("img", "txt"):
        entry = entries[f"blocks.2.{stream}", "cond"]
        before, after = (one["after"][entry.site][0] for one in (untouched, run))
        named = torch.zeros_like(before, dtype=torch.bool)
        named[np.ix_(entry.rows, entry.tokens, entry.channels)] = True
        assert torch.equal(after[named], torch.zeros(int(named.sum())))
        assert torch.equal(after[~named], before[~named])
        assert entry.elements == int(named.sum())
        assert entry.before == pytest.approx([float(before[named].norm())])
        assert entry.after == (0.0,)
        assert entry.steps == (0,)


def test_an_empty_edit_changes_nothing(wrapped, untouched):
    run = wrapped.run(PROMPTS, [Zero("blocks.*.img", channels=[]), EVERY], seed=3)
    assert same(run.images, untouched.images)
    assert len(run.receipt.entries) == 2 * pipelines.DEPTH
    assert all(entry.elements == 0 for entry in run.receipt.entries)


def test_strength_zero_emits_no_action(wrapped, untouched):
    run = wrapped.run(PROMPTS, [Swap("blocks.*.img", source="row:0", rows=1, strength=0)], seed=3)
    assert same(run.images, untouched.images)
    assert run.receipt.entries == ()


def test_swapping_a_row_with_itself_is_the_identity(wrapped, untouched):
    run = wrapped.run(PROMPTS, [Swap("blocks.*.{img,txt}", source="row:1", rows=1)], seed=3)
    assert same(run.images, untouched.images)


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
def test_swapping_back_what_was_read_is_the_identity(wrapped, untouched, branch):
    source = wrapped.run(PROMPTS, [Read("blocks.*.img", branch=branch)], seed=3)
    run = wrapped.run(PROMPTS, [Swap("blocks.*.img", source=source)], seed=3)
    assert same(run.images, untouched.images)
    touched = {entry.branch for entry in run.receipt.entries}
    assert touched == ({"cond", "uncond"} if branch == "both" else {branch})


def test_lockstep_equals_stored(wrapped):
    channels = [1, 2, 9]
    lockstep = wrapped.run(
        PROMPTS, [Swap("blocks.1.img", source="row:0", rows=1, channels=channels, mask=MASK, branch="both")], seed=3
    )
    source = wrapped.run(PROMPTS, [Read("blocks.1.img", branch="both", rows=0)], seed=3)
    stored = wrapped.run(PROMPTS, [Swap("blocks.1.img", source=source, rows=1, channels=channels, mask=MASK)], seed=3)
    assert same(lockstep.images, stored.images)
    narrow = wrapped.run(PROMPTS, [Read("blocks.1.img", branch="both", rows=0, channels=[9, 1, 2, 5])], seed=3)
    assert same(
        lockstep.images,
        wrapped.run(
            PROMPTS, [Swap("blocks.1.img", source=narrow, rows=1, channels=channels, mask=MASK)], seed=3
        ).images,
    )


def test_swapping_from_tensors(wrapped, untouched):
    kept = wrapped.run(PROMPTS, [Read("blocks.1.img", branch="both")], seed=3)["blocks.1.img"]
    cond = kept[:, 0]
    back = wrapped.run(PROMPTS, [Swap("blocks.1.img", source=cond, branch="cond")], seed=3)
    assert same(back.images, untouched.images)
    mapped = wrapped.run(
        PROMPTS, [Swap("blocks.1.img", source={"blocks.1.img": cond[..., [4]]}, channels=[4], branch="cond")], seed=3
    )
    assert same(mapped.images, untouched.images)
    flat = wrapped.run(PROMPTS, [Swap("blocks.1.img", source=torch.zeros(32))], seed=3)
    assert same(flat.images, wrapped.run(PROMPTS, [Zero("blocks.1.img")], seed=3).images)


def test_mean_ablation_and_resampling(wrapped):
    means = wrapped.run(PROMPTS, [Read("blocks.1.img", reduce="mean")], seed=3)
    run = wrapped.run(
        PROMPTS, [MeanAblate("blocks.1.img", mean=means, channels=[7], branch="cond"), Read("blocks.1.img")], seed=3
    )
    wanted = means["blocks.1.img"][:, :, 7].mean(1)
    torch.testing.assert_close(run["blocks.1.img"][..., 7], wanted[:, None, None].expand(3, 2, 96))
    data = wrapped.run(PROMPTS, [Read("blocks.1.img")], seed=4)
    resampled = wrapped.run(PROMPTS, [Resample("blocks.1.img", source=data), Read("blocks.1.img")], seed=3)
    assert torch.equal(resampled["blocks.1.img"], data["blocks.1.img"].flip(1))  # of two rows, always the other


def test_ops_act_in_the_order_in_which_they_are_written(wrapped):
    with wrapped.trace(PROMPTS, seed=3) as t:
        before = t.read("blocks.1.img", name="before")
        t.zero("blocks.1.img", channels=[0])
        between = t.read("blocks.1.img", name="between")
        t.add("blocks.1.img", 1.0, channels=[0])
        after = t.read("blocks.1.img", name="after")
    assert bool((before.tensor[..., 0] != 0).any())
    assert bool((between.tensor[..., 0] == 0).all())
    assert bool((after.tensor[..., 0] == 1).all())


def test_batches_give_the_same_edits(wrapped):
    ops = [Zero("blocks.2.img", channels=[3], rows=1), Read("blocks.2.img", channels=[3], steps=0)]
    run = wrapped.run(PROMPTS, ops, seed=3, batch_size=1)
    assert bool((run["blocks.2.img"][:, 1] == 0).all())
    assert bool((run["blocks.2.img"][:, 0] != 0).all())
    (entry, _) = run.receipt.entries
    assert entry.rows == (1,)
    assert entry.elements == 96
    with pytest.raises(OpError, match="raise batch_size"):
        wrapped.run(PROMPTS, [Swap("blocks.2.img", source="row:0", rows=1)], seed=3, batch_size=1)


def test_the_pipeline_is_left_as_it_was_found(bare):
    from dit_lens import DiTLens

    call = {**pipelines.TRUE_CFG, "negative_prompt": ["bad"], "generator": oracle.generators([3])}
    clean = bare(["red"], **call).images
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in bare.transformer.named_modules()}  # noqa: SLF001
    config, keys = dict(bare.scheduler.config), list(bare.transformer.state_dict())
    weights = [weight.clone() for weight in bare.transformer.state_dict().values()]
    lens = DiTLens(bare, defaults=dict(pipelines.TRUE_CFG))
    bar = bare._progress_bar_config  # noqa: SLF001

    def fails(tensor, hook):
        raise KeyError("mine")

    lens.run("red", [Zero("blocks.*.img")], seed=3)
    with pytest.raises(KeyError, match="mine"):
        lens.run("red", [Zero("blocks.0.img"), Apply("blocks.1.img", fn=fails)], seed=3)
    assert hooks == {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks))  # noqa: SLF001
        for name, m in bare.transformer.named_modules()
    }
    assert dict(bare.scheduler.config) == config
    assert list(bare.transformer.state_dict()) == keys
    assert bare._progress_bar_config == bar  # noqa: SLF001
    assert all(
        torch.equal(one, other) for one, other in zip(weights, bare.transformer.state_dict().values(), strict=True)
    )
    assert same(bare(["red"], **{**call, "generator": oracle.generators([3])}).images, clean)


def test_half_precision():
    from dit_lens import DiTLens

    lens = DiTLens(pipelines.flux(dtype=torch.bfloat16), defaults=dict(pipelines.TRUE_CFG))
    run = lens.run(
        PROMPTS,
        [Zero("blocks.1.img", channels=[2]), Read("blocks.1.img"), Read("blocks.1.img", reduce="mean", name="m")],
        seed=3,
    )
    assert run["blocks.1.img"].dtype == torch.bfloat16
    assert run["m"].tensor.dtype == torch.float32
    assert bool((run["blocks.1.img"][..., 2] == 0).all())
