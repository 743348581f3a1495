"""Directions that steer: what plain hooks measure and add, and files that nobody has to trust."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dit_lens as dl
from dit_lens import DiTLens, Read, Steering
from dit_lens.errors import OpError, PromptError, StoreError
from dit_lens.ops import from_json, to_json
from tests import pipelines

PAIRS = [("red", "blue"), ("red cat", "blue cat"), ("a red", "a blue")]
SITES = ["blocks.1.img", "blocks.2.txt"]
CALL = {**pipelines.CALL, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


@pytest.fixture(scope="module")
def found(lens):
    return Steering.from_pairs(lens, PAIRS, SITES, seeds=[3, 4], **CALL)


def token_means(lens, prompt, seed):
    """[step, channel] of both sites of the plain pipeline, by hooks."""
    kept = {site: [] for site in SITES}
    transformer = lens.pipe.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [
        blocks[1].register_forward_hook(lambda _, __, out: kept["blocks.1.img"].append(out[1][0].mean(0))),
        blocks[2].register_forward_hook(lambda _, __, out: kept["blocks.2.txt"].append(out[0][0].mean(0))),
    ]
    try:
        lens.pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **CALL)
    finally:
        for hook in hooks:
            hook.remove()
    return {site: torch.stack(values) for site, values in kept.items()}


def test_a_mean_difference_is_what_hooks_measure(lens, found):
    for site in SITES:
        wanted = torch.stack(
            [
                token_means(lens, to, seed)[site] - token_means(lens, start, seed)[site]
                for start, to in PAIRS
                for seed in (3, 4)
            ]
        ).mean(0)
        torch.testing.assert_close(found.vectors[site], wanted, rtol=1e-4, atol=1e-5)
    assert (found.n, found.method, found.pairs) == (6, "mean", tuple(PAIRS))


def test_one_direction_for_all_steps_is_the_mean_of_theirs(lens, found):
    one = Steering.from_pairs(lens, PAIRS, SITES, seeds=[3, 4], per_step=False, **CALL)
    for site in SITES:
        torch.testing.assert_close(one.vectors[site], found.vectors[site].mean(0), rtol=1e-4, atol=1e-5)


def test_its_op_adds_them_step_by_step(lens, found):
    run = lens.run("green", [found.op(2.0, sites=SITES[0]), Read(SITES[0])], seed=5, **CALL)
    step = iter(range(9))
    vector = found.vectors[SITES[0]]

    def add(_, __, out):
        return (out[0], out[1] + 2.0 * vector[next(step)], *out[2:])

    block = [*lens.pipe.transformer.transformer_blocks, *lens.pipe.transformer.single_transformer_blocks][1]
    hook = block.register_forward_hook(add)
    try:
        drawn = lens.pipe(prompt="green", generator=torch.Generator().manual_seed(5), **CALL).images[0]
    finally:
        hook.remove()
    assert run.images[0].tobytes() == drawn.tobytes()
    assert found.op(1, steps=0, tokens=[2], rows=0, branch="cond").tokens == [2]


@pytest.fixture
def sister(lens):
    """A lens on the same model under the name of another family."""
    other = copy.copy(lens)
    other.family = replace(lens.family, name="Sister")
    other.anatomy = copy.copy(lens.anatomy)
    other.anatomy.family = other.family
    return other


def test_it_acts_on_its_own_family_and_steps_only(lens, found, sister, tmp_path, monkeypatch):
    """Also where a site, a width and the number of chosen steps fit by chance; from files and specs as well."""
    loaded = Steering.load(found.save(tmp_path / "blue.safetensors"))
    ops = [found.op(), loaded.op(-1, sites=SITES[0]), from_json(json.loads(json.dumps(to_json(found.op()))))]
    longer = {**CALL, "num_inference_steps": 5}
    one = Steering.from_pairs(lens, PAIRS[:1], SITES, per_step=False, **CALL)
    single = Steering.from_pairs(lens, PAIRS[:1], SITES, **{**CALL, "num_inference_steps": 1})
    monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it draws"))
    for op in ops:
        with pytest.raises(OpError, match=r"directions are of FLUX\.1, and this model is Sister\. Channels of one"):
            sister.run("green", op, **CALL)
    for steps in (None, [0, 1, 2], (0.0, 0.6), slice(3)):
        with pytest.raises(OpError, match=r"of a run of 3 steps, each with its own, and this one has 5\."):
            lens.run("green", found.op(steps=steps), **longer)
    with pytest.raises(OpError, match=r"of a run of 1 steps"):
        lens.run("green", single.op(), **CALL)
    assert lens.cost("green", one.op(steps=[0, 1, 2]), **longer).bytes == 0  # it can be planned
    with pytest.raises(OpError, match=r"one for each of 2 and of 3 steps"):
        Steering({"a": torch.ones(2, 4), "b": torch.ones(3, 4)})


def test_reads_and_channels_are_of_their_own_model_too(lens, sister, monkeypatch):
    run = lens.run("green", [Read(SITES[0]), Read(SITES[0], reduce="mean", name="mean")], seed=0, **CALL)
    narrow = torch.ones(4)
    channels = dl.ChannelSet({SITES[0]: (1,)}, {SITES[0]: narrow}, {SITES[0]: narrow})
    monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it draws"))
    reading = run.reading(SITES[0])
    kept = from_json(json.loads(json.dumps(to_json(dl.Swap(SITES[0], source=reading)))))
    for op in (dl.Swap(SITES[0], source=reading), kept, dl.MeanAblate(SITES[0], mean=run["mean"])):
        with pytest.raises(OpError, match=r"the source read is of FLUX\.1, this model is Sister"):
            sister.cost("green", op, **CALL)
    with pytest.raises(OpError, match=r"ranked among 4 at blocks\.1\.img, which has 32 here"):
        lens.run("green", dl.Zero(SITES[0], channels=channels), seed=0, **CALL)


def test_a_probe_points_at_what_tells_the_sides_apart():
    from dit_lens.instruments.steering_vectors import _probe as probe

    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 400, 6, generator=generator)
    both[1, :, 2] += 5.0
    both[..., 4] *= 20  # large, but the same on both sides: it moves the mean difference, not the probe
    direction = probe(both)
    assert torch.nn.functional.cosine_similarity(direction, torch.eye(6)[2], dim=0) > 0.95
    assert direction.norm() == pytest.approx(5.0, rel=0.1)


def test_arithmetic_and_the_control(found):
    double = 2 * found + found
    control = found.randomised(1)
    for site in SITES:
        torch.testing.assert_close(double.vectors[site], 3 * found.vectors[site])
        torch.testing.assert_close(control.vectors[site].norm(dim=-1), found.vectors[site].norm(dim=-1))
        assert not torch.equal(control.vectors[site], found.randomised(2).vectors[site])
    other = Steering({"blocks.0.img": torch.ones(4)})
    assert found in [other, found]
    half, back, none = found / 2, -found, found - found
    assert (double.n, half.n, (found - other).n, sum([found, found]).n) == (12, 6, 6, 12)
    for site in SITES:
        torch.testing.assert_close(half.vectors[site] * 2, found.vectors[site])
        assert torch.equal(back.vectors[site], -found.vectors[site])
        assert not none.vectors[site].any()
        torch.testing.assert_close(sum([found, found]).vectors[site], 2 * found.vectors[site])
    assert torch.equal((found - other).vectors["blocks.0.img"], -torch.ones(4))
    for wrong in (lambda: found * "a", lambda: found / "a", lambda: found * np.nan, lambda: found / True):
        with pytest.raises(OpError, match="multiplied and divided by finite numbers"):
            wrong()
    with pytest.raises(OpError, match="not divided by 0"):
        found / 0
    for wrong in (lambda: found + 3, lambda: 3 + found, lambda: found - "a"):
        with pytest.raises(OpError, match="goes together with a Steering"):
            wrong()
    with pytest.raises(OpError, match="do not add up"):
        found + Steering({"blocks.0.img": torch.ones(4)}, family="SANA")
    assert list((found + other).vectors) == [*SITES, "blocks.0.img"]
    with pytest.raises(OpError, match="per_step=False"):
        found + Steering({SITES[0]: torch.ones(found.vectors[SITES[0]].shape[1])})


def test_a_file_comes_back_as_it_was(found, tmp_path):
    path = found.save(tmp_path / "blue.safetensors")
    back = Steering.load(path)
    assert (back.method, back.pairs, back.n, back.family) == (found.method, found.pairs, found.n, found.family)
    assert all(torch.equal(back.vectors[site], found.vectors[site]) for site in SITES)
    assert [one.name for one in tmp_path.iterdir()] == ["blue.safetensors"]


@pytest.mark.parametrize("kind", ["text", "other", "nan", "fields", "version", "cut", "folder", "missing"])
def test_files_of_other_things_are_refused(found, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    about = {"format": 1, "method": "mean", "pairs": [], "n": 0, "family": ""}
    if kind == "text":
        path.write_text("no tensors")
    elif kind == "other":
        save_file({"a": torch.ones(3)}, path)
    elif kind == "nan":
        save_file({"a": torch.full((3,), np.nan)}, path, metadata={"steering": json.dumps(about)})
    elif kind == "fields":
        save_file({"a": torch.ones(3)}, path, metadata={"steering": json.dumps({"format": 1})})
    elif kind == "version":
        save_file({"a": torch.ones(3)}, path, metadata={"steering": json.dumps({**about, "format": 9})})
    elif kind == "cut":
        path.write_bytes(found.save(tmp_path / "y.safetensors").read_bytes()[:-7])
    elif kind == "folder":
        path.mkdir()
    with pytest.raises((StoreError, OpError)):
        Steering.load(path)


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([[1, -2, 3]]),
        [[1, -2.0, 3]],
        ([1, -2, 3],),
        np.array([[1.0, -2.0, 3.0]]),
        np.array([[1, -2, 3]], np.int8),
        [torch.tensor([1.0, -2.0, 3.0])],
        torch.tensor([[1, -2, 3]], dtype=torch.float16),
    ],
)
def test_numbers_of_any_type_are_directions(given):
    kept = Steering({"blocks.0.img": given}).vectors["blocks.0.img"]
    assert torch.equal(kept, torch.tensor([[1.0, -2.0, 3.0]]))
    assert kept.dtype == torch.float32


def test_nothing_is_added_from_either_side(found):
    site = SITES[0]
    for same in (found + 0, 0 + found, found - 0, found + 0.0):
        assert torch.equal(same.vectors[site], found.vectors[site])
    assert torch.equal((0 - found).vectors[site], -found.vectors[site])
    for odd in (lambda: found + 1, lambda: 1 + found, lambda: 1 - found, lambda: found - None):
        with pytest.raises(OpError, match="goes together with a Steering"):
            odd()


def test_refusals(lens, found):
    with pytest.raises(PromptError, match="at least one seed"):
        Steering.from_pairs(lens, PAIRS, seeds=[], **CALL)
    with pytest.raises(PromptError, match=r"seeds=\[3, 3\] names a seed twice"):
        Steering.from_pairs(lens, PAIRS, seeds=[3, 3], **CALL)
    with pytest.raises(PromptError, match="names a pair twice"):
        Steering.from_pairs(lens, [*PAIRS, PAIRS[0]], **CALL)
    with pytest.raises(OpError, match=r"op: sites=\[\] chooses no site"):
        found.op(sites=[])
    for odd in (
        torch.ones(3, dtype=torch.bool),
        torch.ones(3) * 1j,
        ["a"],
        "abc",
        None,
        3.0,
        [],
        [[1.0], [1.0, 2.0]],
        {1},
    ):
        with pytest.raises(OpError, match=r"finite tensor \[channel\] or \[step, channel\]|a tensor of real numbers"):
            Steering({"a": odd})
    for pairs in ([], [("red", "red")]):
        with pytest.raises(PromptError, match="pair"):
            Steering.from_pairs(lens, pairs, **CALL)
    for pairs in (["red"], [("red",)], [("red", 3)], "red"):
        with pytest.raises(OpError, match="cannot be used"):
            Steering.from_pairs(lens, pairs, **CALL)
    with pytest.raises(PromptError, match="called seeds= here"):
        Steering.from_pairs(lens, PAIRS, seed=0, **CALL)
    with pytest.raises(PromptError, match="at least two pairs"):
        Steering.from_pairs(lens, PAIRS[:1], method="probe", **CALL)
    with pytest.raises(OpError, match=r"'man' is not a valid method\..*'mean'"):
        Steering.from_pairs(lens, PAIRS, method="man", **CALL)
    with pytest.raises(OpError, match=r"no direction at 'blocks\.3\.img'"):
        found.op(sites="blocks.3.img")
    with pytest.raises(OpError, match=r"takes no token=.*'tokens'"):
        found.op(token=3)
    with pytest.raises(OpError, match="cannot be used"):
        found.op(float("nan"))
    for vectors in ({}, {"a": torch.ones(2, 2, 2)}, {"a": torch.tensor([np.inf])}):
        with pytest.raises(OpError, match=r"vectors=|finite tensor"):
            Steering(vectors)
    with pytest.raises(dl.errors.DitLensError, match="step"):
        lens.run("green", found.op(), seed=0, **{**CALL, "num_inference_steps": 5})
