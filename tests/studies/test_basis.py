"""Channels or directions: every arm is what plain hooks make of it, and planted models are told apart."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import DiTLens, plots, studies
from dit_lens.errors import OpError, SiteError
from dit_lens.studies import Result
from dit_lens.studies.parts.directions import find_basis, make_rotation
from dit_lens.studies.parts.equal_energy import compare_with_top, describe_comparison
from dit_lens.toys.scenes import sample_scenes
from tests import oracle, pipelines, planted
from tests.directions import CALL, SEED, STEPS, K, directions_by_hand, draw_tokens

PROMPTS = ["a cat", "two dogs"]
BASES = ["components", "mean-direction", "relevant", "random", "rotation"]
FEW = {"k": K, "seeds": SEED, "bases": BASES, "draws": 1, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


@pytest.fixture(scope="module")
def pipe():
    return pipelines.flux()


@pytest.fixture(scope="module")
def results(lens):
    few = {**FEW, "bases": BASES[:2]}
    return {
        "zero": studies.basis(lens, PROMPTS, **FEW),
        "mean": studies.basis(lens, PROMPTS, ablation="mean", **few),
    }


@pytest.fixture(scope="module")
def tokens(pipe):
    return draw_tokens(pipe, PROMPTS)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize(("name", "level"), [("top", f"k={K}"), ("components", f"k={K}"), ("mean-direction", "mean")])
def test_an_arm_is_what_plain_hooks_make_of_it(results, pipe, tokens, name, level, ablation):
    clean, x = tokens
    v = {(block, row): directions_by_hand(name, x[block][:, row]) for block in x for row in range(2)}
    put = {block: x[block].mean((1, 2)) * (ablation == "mean") for block in x}  # [s, d]

    def edit(step, block, stream, old):
        if stream != "img":
            return None
        gone = old.double() - put[block][step]
        rows = [one @ v[block, row][step] @ v[block, row][step].T for row, one in enumerate(gone)]
        return old - torch.stack(rows).float()

    images, _ = oracle.draw(pipe, PROMPTS, [SEED] * 2, CALL, edit)
    table = results[ablation].table.set_index(["arm", "level", "prompt"]).sort_index()
    for row, prompt in enumerate(PROMPTS):
        found = results[ablation].image(row, SEED, arm=name, part=level)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(images[row])).max() <= 1
        line = table.loc[(name, level, prompt)]
        before, after = (np.asarray(one[row]).astype(float) for one in (clean, images))
        assert line["rmse"] == pytest.approx(np.sqrt(((before - after) ** 2).mean()), abs=0.05)
        assert line["rmse"] > 1
        shares = [
            ((x[block][:, row] - put[block][:, None]) @ v[block, row]).square().sum() / x[block][:, row].square().sum()
            for block in x
        ]
        assert line["energy_share"] == pytest.approx(float(np.mean(shares)), rel=1e-3)


def test_relevant_channels_are_those_of_gradients_by_plain_hooks(lens, results, pipe, tokens):
    calls, found = [], {}
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**kwargs, "return_dict": False}), with_kwargs=True
    )
    oracle.draw(pipe, PROMPTS, [SEED] * 2, CALL)
    handle.remove()
    seen = []

    def keep(_, args, output):
        seen.append(output[1] if output[1].requires_grad else output[1].requires_grad_())

    handles = [block.register_forward_hook(keep) for block in oracle.blocks_of(pipe)]
    for call in calls:
        seen.clear()
        with torch.enable_grad():
            velocity = pipe.transformer(**call)[0]
            gradients = torch.autograd.grad((velocity**2).sum() / 2, seen)
        for block, (x, gradient) in enumerate(zip(seen, gradients, strict=True)):
            found[block] = found.get(block, 0) + (x * gradient).detach().abs().mean(1)
    for one in handles:
        one.remove()
    _, x = tokens
    table = results["zero"].table.set_index(["arm", "level", "prompt"])
    for row, prompt in enumerate(PROMPTS):
        shares = []
        for block in x:
            energy = x[block][:, row].square().sum((0, 1))
            shares.append(energy[found[block][row].argsort(descending=True)[:K]].sum() / energy.sum())
        assert table.loc[("relevant", f"k={K}", prompt), "energy_share"] == pytest.approx(np.mean(shares), rel=1e-3)
    sets = lens.massive_channels(PROMPTS, K, score="relevance", seed=SEED)
    assert sets.score == "relevance"
    for block, scores in found.items():
        assert set(sets[f"blocks.{block}.img"]) == set(scores.mean(0).argsort(descending=True)[:K].tolist())
        energy = x[block].square().mean((0, 1, 2))
        torch.testing.assert_close(sets.energy[f"blocks.{block}.img"], energy.float(), rtol=1e-3, atol=1e-5)


def test_energies_are_met_as_nearly_as_directions_allow(lens, results):
    found = studies.basis(lens, PROMPTS[0], energies=[0.3, 0.6], seeds=SEED, bases=BASES[:-1], draws=2)
    assert (found.table.loc[found.table["arm"].isin(["untouched", "no-op"]), ["rmse", "energy_share"]] == 0).all(None)
    rows = found.table[found.table["level"].isin(["0.3", "0.6"])]
    assert (rows["energy_share"] - rows["level"].astype(float)).abs().max() < 0.1
    own = found.table[found.table["level"] == "mean"].groupby("arm")["energy_share"].mean()
    assert own.to_numpy() == pytest.approx([own["mean-direction"]] * len(own), abs=0.1)
    # One random order an image: draws and prompts have others.
    drawn = found.table[(found.table["arm"] == "random") & (found.table["level"] == "0.6")]
    assert drawn["rmse"].nunique() == 2
    # Within reach of the curve, every arm is compared.
    assert found.table.loc[~found.table["arm"].isin(["untouched", "no-op", "top"]), "rmse_top_minus"].notna().all()


def test_levels_that_remove_the_same_run_once(lens):
    found = studies.basis(lens, PROMPTS[0], energies=[0.001, 0.002, 0.5], bases=["components"])
    assert found.table["level"].tolist().count("0.001") == 2
    assert "0.002" not in found.table["level"].tolist()


@pytest.mark.parametrize("name", ["top", "random", "rotation", "components", "mean-direction", "relevant"])
def test_a_basis_is_orthonormal_and_holds_the_energy_it_says(name):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(3, 20, 6, generator=random) * torch.tensor([9.0, 1, 2, 0.1, 1, 4]) + torch.arange(6)
    relevance = torch.rand(6, generator=random)
    steps = [0, 2]
    one = find_basis(name, x, steps, score="|mean|", seed=1, relevance=relevance)
    v = (torch.eye(6) if one.vectors is None else one.vectors)[..., one.order].expand(3, 6, -1)
    torch.testing.assert_close(v.mT @ v, torch.eye(v.shape[-1]).expand(3, -1, -1), atol=1e-5, rtol=0)
    parts = (x @ v)[steps].square().sum((0, 1)) / x[steps].square().sum()
    torch.testing.assert_close(one.held, parts, atol=1e-5, rtol=1e-4)
    if name != "mean-direction":
        assert one.held.sum() == pytest.approx(1, abs=1e-5)
    if name in ("top", "rotation"):
        scores = (x @ v)[steps].mean(1).abs().mean(0)
        assert (scores.diff() <= 1e-6).all()


def test_rotations_differ_and_are_drawn_again_by_their_seed():
    one, other = make_rotation(8, 1), make_rotation(8, 2)
    assert torch.equal(one, make_rotation(8, 1))
    assert (one - other).abs().max() > 0.1


# What the study says.


@pytest.mark.parametrize(("kind", "said"), [(planted.Direction, "directions"), (planted.Channels, "channels")])
def test_planted_directions_and_channels_are_told_apart(toy, kind, said):
    scenes = sample_scenes(10, seed=1)
    lens = DiTLens(planted.pipeline(toy, kind, scenes), defaults=planted.CALL)
    prompts = [scene.caption for scene in scenes]
    found = studies.basis(
        lens, prompts, energies=[0.3, 0.5], bases=["rotation", "components", "mean-direction"], draws=1, transport=False
    )
    answer = next(note for note in found.notes if note.startswith("channels or directions? "))
    assert answer.startswith(f"channels or directions? {said}: "), found.notes
    own = found.summary[found.summary["level"] == "mean"].set_index("arm")["rmse"]
    assert (own["mean-direction"] > own["top"]) == (said == "directions")


def curve(*points, arm="top", **more):
    return [{"arm": arm, "energy_share": x, "rmse": y, "prompt": "a", "seed": 0, "draw": 0, **more} for x, y in points]


def test_arms_are_compared_between_what_was_run_and_never_beyond():
    lines = [*curve((0, 0.0), arm="untouched"), *curve((0.4, 8.0), (0.2, 2.0))]
    lines += curve((0.1, 5.0), (0.2, 5.0), (0.3, 5.0), (0.4001, 5.0), arm="rotation")
    lines += curve((0.3, 1.0), arm="rotation", prompt="b")  # no curve of its own image
    found = compare_with_top(pd.DataFrame(lines), ["rmse"])
    assert found.loc[found["arm"] == "rotation", "rmse_top_minus"].tolist() == pytest.approx(
        [-4, -3, 0, np.nan, np.nan], nan_ok=True
    )
    assert describe_comparison(found)[0].startswith("2 of 5 measurements are compared with nothing")


def test_an_answer_needs_certainty():
    def answer(*differences):
        lines = [
            line
            for i, difference in enumerate(differences)
            for line in [
                *curve((0, 0.0), arm="untouched", prompt=str(i)),
                *curve((0.5, 50.0), prompt=str(i)),
                *curve((0.5, 50.0 - difference), arm="components", prompt=str(i)),
            ]
        ]
        return describe_comparison(compare_with_top(pd.DataFrame(lines), ["rmse"]))[-1].split()[3]

    assert answer(9, 10, 11, 12) == "channels:"
    assert answer(-9, -10, -11, -12) == "directions:"
    assert answer(9, -10, 11, -12) == "undecided:"
    assert answer(9) == "undecided:"  # one image has no interval


def test_a_result_is_loaded_goes_on_and_makes_itself_again(lens, tmp_path, monkeypatch):
    options = {"k": [1, 4], "bases": ["mean-direction", "rotation"], "draws": 1, "site": "blocks[1:3].img"}
    whole = studies.basis(lens, PROMPTS, **options, out=tmp_path / "s")
    runs = []
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: runs.append(1))
    again = studies.basis(lens, PROMPTS, **options, out=tmp_path / "s")
    monkeypatch.undo()
    assert not runs
    for other in (again, Result.load(tmp_path / "s"), Result.load(whole.save(tmp_path / "saved"))):
        pd.testing.assert_frame_equal(
            other.summary.astype(object).fillna(-1), whole.summary.astype(object).fillna(-1), check_dtype=False
        )
        assert other.notes == whole.notes
        assert other.images.keys() == whole.images.keys()
    scope = {"lens": lens}
    exec("\n".join(whole.code.splitlines()[:-1]), scope)
    pd.testing.assert_frame_equal(scope["result"].summary, whole.summary)
    lines = whole.figure().data
    assert [line.name for line in lines] == ["top (massive)", "a random rotation's top", "the mean direction"]
    top = whole.summary[whole.summary["arm"] == "top"].sort_values("energy_share")
    assert lines[0].x.tolist() == top["energy_share"].tolist()
    assert lines[0].y.tolist() == top["rmse"].tolist()


def test_batches_and_steps(lens, results):
    single = studies.basis(lens, PROMPTS, batch_size=1, **{**FEW, "bases": ["mean-direction", "rotation"]})
    one, other = (result.table.set_index(["arm", "level", "prompt"]) for result in (single, results["zero"]))
    one = one.drop(index="most", level="level")
    assert one["rmse"].to_numpy() == pytest.approx(other.loc[one.index, "rmse"].to_numpy(), abs=0.5)
    last = studies.basis(lens, PROMPTS[:1], k=K, seeds=SEED, bases=["mean-direction"], steps=-1)
    whole = results["zero"].table
    for name in ("top", "mean-direction"):
        late, early = (
            table.loc[(table["arm"] == name) & (table["prompt"] == PROMPTS[0]), "rmse"].iloc[0]
            for table in (last.table, whole)
        )
        assert 0 < late < early


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"energies": [0.2, 1.0]}, OpError, r"energies=\[0.2, 1.0\]: give at least one share .*, between 0 and 1\."),
        ({"energies": []}, OpError, "give at least one share"),
        ({"energies": -1}, OpError, "energies=-1.0 is out of range"),
        ({"k": 0}, OpError, r"k=0 is not a valid number of directions\. Choose from 1 to 31\."),
        ({"k": 1.5}, OpError, "k=1.5 is not a valid number"),
        ({"bases": ["componets"]}, OpError, "'componets' is not a valid basis. Nearest: 'components'"),
        ({"score": "topk(3)"}, OpError, "gives several numbers for a channel"),
        ({"score": "meen"}, OpError, "'meen' is not a valid reduction. Nearest: 'mean'"),
        ({"ablation": "resample"}, OpError, "ablation='resample' cannot be used"),
        ({"site": "blocks.*.txt"}, SiteError, r"blocks.0.txt does not hold image tokens"),
        ({"steps": 9}, Exception, "9"),
    ],
)
def test_mistakes_are_told_before_anything_runs(lens, monkeypatch, options, error, message):
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(error, match=message):
        studies.basis(lens, PROMPTS, **options)


def test_a_figure_needs_rows_to_draw():
    with pytest.raises(OpError, match="no edited images to draw"):
        plots.basis_figure(pd.DataFrame([{"arm": "no-op", "n": 1, "k": 0, "energy_share": 0.0, "rmse": 0.0}]))


def test_every_level_is_drawn_once_for_every_basis(results):
    lines = results["zero"].table.groupby(["arm", "level", "draw", "prompt"]).size()
    assert (lines == 1).all()
    expected = {(arm, level) for arm, level in itertools.product(["top", *BASES], ["mean", f"k={K}"])}
    expected -= {("mean-direction", f"k={K}")}
    assert expected <= set(results["zero"].summary[["arm", "level"]].itertuples(index=False, name=None))
