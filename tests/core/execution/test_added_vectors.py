"""What Add adds, in every form, is what a plain hook adds that looks the vector up itself."""

import numpy as np
import pytest
import torch

from dit_lens import Add, DiTLens, Read
from dit_lens.errors import OpError
from dit_lens.ops import from_json, to_json
from tests import oracle, pipelines

STEPS, D = 3, pipelines.WIDTH
PROMPTS = ["red", "a blue one"]
CALL = {**pipelines.TRUE_CFG, "height": 16, "width": 16, "num_inference_steps": STEPS}
EVERY = Read("blocks.*.{img,txt}", branch="both", name="after")
BLOCKS = "blocks[1:3].img"
BRANCHES = ("cond", "uncond")


def vector(seed, *size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


V, W, A, B = (vector(seed, D) for seed in range(4))
OF_STEPS = vector(4, STEPS, D)
OF_TWO = vector(5, 2, D)
ONE, TWO = "blocks.1.img", "blocks.2.img"

# op, and (block, step, branch) -> the vector over all channels that is added there; None for none
FORMS = {
    "a number": (Add(BLOCKS, value=0.5), lambda block, step, branch: 0.5),
    "a torch number": (Add(BLOCKS, value=torch.tensor(2)), lambda block, step, branch: 2.0),
    "a vector": (Add(BLOCKS, value=V), lambda block, step, branch: V),
    "a numpy vector, reversed": (Add(BLOCKS, value=V.numpy()[::-1]), lambda block, step, branch: V.flip(0)),
    "a list": (Add(BLOCKS, value=V.tolist()), lambda block, step, branch: V),
    "a vector per step": (Add(BLOCKS, value=OF_STEPS), lambda block, step, branch: OF_STEPS[step]),
    "one for all steps": (
        Add(BLOCKS, value=V[None], steps=[0, 2]),
        lambda block, step, branch: V if step != 1 else None,
    ),
    "a vector per chosen step": (
        Add(BLOCKS, value=OF_TWO, steps=[0, 2]),
        lambda block, step, branch: {0: OF_TWO[0], 2: OF_TWO[1]}.get(step),
    ),
    "steps chosen of all": (
        Add(BLOCKS, value=OF_STEPS.numpy(), steps=np.array([2])),
        lambda block, step, branch: OF_STEPS[2] if step == 2 else None,
    ),
    "a number per step": (
        Add(BLOCKS, value=torch.tensor([[1.0], [0.0], [-2.0]])),
        lambda block, step, branch: [1.0, 0.0, -2.0][step],
    ),
    "a vector per branch": (
        Add(BLOCKS, value={"cond": A, "uncond": B}),
        lambda block, step, branch: A if branch == "cond" else B,
    ),
    "one branch named": (
        Add(BLOCKS, value={"uncond": B}),
        lambda block, step, branch: B if branch == "uncond" else None,
    ),
    "one of two branches": (
        Add(BLOCKS, value={"cond": A, "uncond": B}, branch="cond"),
        lambda block, step, branch: A if branch == "cond" else None,
    ),
    "a vector per site": (
        Add(BLOCKS, value={ONE: V, TWO: W, "velocity": 3.0}),
        lambda block, step, branch: V if block == 1 else W,
    ),
    "all at once": (
        Add(BLOCKS, value={ONE: {"cond": OF_STEPS, "uncond": A}, TWO: 1.0}),
        lambda block, step, branch: 1.0 if block == 2 else OF_STEPS[step] if branch == "cond" else A,
    ),
}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


@pytest.fixture(scope="module")
def bare():
    return pipelines.flux()


@pytest.mark.parametrize(
    ("form", "batch_size"), [*((form, None) for form in FORMS), ("a vector per step", 1), ("all at once", 1)]
)
def test_forms_equal_plain_hooks(form, batch_size, lens, bare):
    op, added = FORMS[form]

    def edit(call, index, kind, x):
        value = added(index, call // 2, BRANCHES[call % 2]) if index in (1, 2) and kind == "img" else None
        return None if value is None else x + value

    _, records = oracle.draw(bare, PROMPTS, [3, 3], CALL, edit)
    kept = from_json(to_json(op))
    for one in (op, kept):
        run = lens.run(PROMPTS, [one, EVERY], seed=3, batch_size=batch_size)
        for name, value in run["after"].items():
            place = lens.anatomy.site(name)
            for call in range(2 * STEPS):
                found = value[call // 2, call % 2]
                expected = records[call][place.block, place.stream, "post"]
                assert torch.allclose(found, expected, atol=1e-5 if batch_size else 0, rtol=0), (name, call)


def test_chosen_channels_and_the_receipt(lens):
    op = Add([ONE, TWO], value={ONE: [1.0, -1.0], TWO: {"cond": 2.0}}, channels={ONE: [5, 3], TWO: [7]}, steps=0)
    before = lens.run("red", [EVERY], seed=3)["after"]
    run = lens.run("red", [op, EVERY], seed=3)
    moved = (run["after"][ONE] - before[ONE])[0]  # [branch, row, token, channel]
    assert torch.allclose(moved[..., 5], torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(moved[..., 3], torch.tensor(-1.0), atol=1e-5)
    assert {(entry.site, entry.branch) for entry in run.receipt.entries} == {
        (ONE, "cond"),
        (ONE, "uncond"),
        (TWO, "cond"),
    }


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda: Add(BLOCKS, value={ONE: V}), rf"Add: value= has no entry for {TWO}.*site=list\(value\)"),
        (
            lambda: Add(ONE, value={ONE: V, "blokcs.2.img": V}),
            r"'blokcs\.2\.img', which is no site.*Nearest: 'blocks\.2",
        ),
        (lambda: Add(ONE, value={0: V, 1: V}), "value= has the key 0, which is no site"),
        (lambda: Add(ONE, value={ONE: {ONE: V}}), "value is dict, not a number"),
        (lambda: Add(ONE, value={"cond": {"cond": V}}), "value is dict, not a number"),
        (lambda: Add(ONE, value=vector(0, 4, D)), r"shape \[4, 32\].*\[step, channel\] for 3 chosen steps or all 3"),
        (lambda: Add(ONE, value=OF_TWO, steps=0), r"for 1 chosen steps or all 3"),
        (lambda: Add(ONE, value=vector(0, STEPS, D + 1)), r"a vector over the 32 chosen channels"),
        (lambda: Add(ONE, value={"cond": V}, branch="both"), "holds cond only, not the 'uncond' branch"),
        (lambda: Add(ONE, value=V / 0 * 0), r"holds values that are no numbers \(NaN\)"),
        (lambda: Add(ONE, value=1e300), "not finite, or too large"),
        (lambda: Add(ONE, value=10**400), "not a number"),
    ],
)
def test_what_cannot_be_meant_is_told_before_a_run(lens, monkeypatch, op, message):
    monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(OpError, match=message):
        lens.run(PROMPTS, op(), seed=3)
    with pytest.raises(OpError, match="guidance is off"):
        lens.run("red", Add(ONE, value={"uncond": V}), seed=3, true_cfg_scale=1.0)
