"""Stability of channel sets: overlaps are those of sets made by hand, and the rule stops where it should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dit_lens import DiTLens, Read, studies
from dit_lens.analysis.channels import RunningStats, jaccard, top_channels
from dit_lens.errors import OpError, PromptError, StudyInterrupted
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.stability import stable_after
from tests import pipelines, planted

PROMPTS = ["a cat", "two dogs in the rain", "x", "an old red door"]
K = 5


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults={**pipelines.CALL, "num_inference_steps": 3})


@pytest.fixture(scope="module")
def result(lens):
    return studies.stability(lens, PROMPTS, k=K, seeds=[0, 1])


def by_hand(lens, seed, score="|mean|", batch=PROMPTS):
    """[step, row, site] -> scores, read plainly."""
    run = lens.run(batch, [Read("blocks.*.img", reduce=score)], seed=seed)
    return np.stack([run[name].float().numpy() for name in lens.sites("blocks.*.img")], 2)


def top(scores):
    return top_channels({"a": scores}, {"a": scores}, K)["a"]


def test_overlaps_over_prompts_seeds_steps_sites_and_scores_are_those_by_hand(lens, result):
    scores = {seed: by_hand(lens, seed) for seed in (0, 1)}
    other = by_hand(lens, 0, "mean|x|")
    whole = {
        seed: [[top(torch.tensor(one.mean(0)[row, site])) for site in range(5)] for row in range(4)]
        for seed, one in scores.items()
    }
    table = result.table.set_index(["over", "site", "seed", "prompt"]).sort_index()
    site = "blocks.2.img"
    row = PROMPTS.index("x")
    found = {
        over: table.loc[(over, site, 0, "x"), "jaccard"].item()
        for over in ("prompts", "seeds", "steps", "sites", "scores")
    }
    assert found["prompts"] == pytest.approx(
        np.mean([jaccard(whole[0][row][2], whole[0][i][2]) for i in range(4) if i != row])
    )
    assert found["seeds"] == pytest.approx(jaccard(whole[0][row][2], whole[1][row][2]))
    assert found["sites"] == pytest.approx(
        np.mean([jaccard(whole[0][row][2], whole[0][row][i]) for i in range(5) if i != 2])
    )
    steps = [top(torch.tensor(scores[0][step, row, 2])) for step in range(3)]
    assert found["steps"] == pytest.approx(np.mean([jaccard(a, b) for a, b in itertools.combinations(steps, 2)]))
    assert found["scores"] == pytest.approx(jaccard(whole[0][row][2], top(torch.tensor(other.mean(0)[row, 2]))))
    pairs = result.summary[result.summary["over"] == "site x site"].set_index(["a", "b"])["jaccard"]
    expected = np.mean([jaccard(one[1], one[4]) for rows in whole.values() for one in rows])
    assert (
        pairs.loc[("blocks.1.img", "blocks.4.img")]
        == pairs.loc[("blocks.4.img", "blocks.1.img")]
        == pytest.approx(expected)
    )
    assert pairs.loc[("blocks.3.img", "blocks.3.img")] == 1


def test_the_running_aggregate_is_the_mean_over_the_prompts_so_far(lens, result):
    scores = torch.tensor(by_hand(lens, 1).mean(0))  # [row, site, d]
    sets = [[top(scores[:n, site].double().mean(0)) for site in range(5)] for n in range(1, 5)]
    expected = [np.mean([jaccard(a, b) for a, b in zip(*pair, strict=True)]) for pair in itertools.pairwise(sets)]
    rows = result.table[(result.table["over"] == "running") & (result.table["seed"] == 1)]
    assert rows["a"].tolist() == [2, 3, 4]
    assert rows["jaccard"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("size", [1, 3])
def test_batches_change_nothing(lens, result, size):
    found = studies.stability(lens, PROMPTS, k=K, seeds=[0, 1], batch_size=size)
    assert found.table["over"].tolist() == result.table["over"].tolist()
    # A row alone differs from the row in a batch by rounding, which may exchange channels of nearly equal scores.
    assert np.abs(found.table["jaccard"].to_numpy() - result.table["jaccard"].to_numpy()).mean() < 0.02


def test_goes_on_from_its_folder_with_the_same_numbers(lens, result, tmp_path, monkeypatch):
    whole = studies.stability(lens, PROMPTS, k=K, seeds=[0, 1], batch_size=1)
    plain, runs = DiTLens.run, []

    def interrupted(self, *args, **call):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(1)
        return plain(self, *args, **call)

    monkeypatch.setattr(DiTLens, "run", interrupted)
    with pytest.raises(StudyInterrupted) as stopped:
        studies.stability(lens, PROMPTS, k=K, seeds=[0, 1], batch_size=1, out=tmp_path / "s")
    assert stopped.value.result is not None
    monkeypatch.undo()
    again = studies.stability(lens, PROMPTS, k=K, seeds=[0, 1], batch_size=1, out=tmp_path / "s")
    loaded = studies.Result.load(tmp_path / "s")
    for one in (again, loaded):
        assert one.table.equals(whole.table)
        assert one.notes == whole.notes
    saved = studies.Result.load(loaded.save(tmp_path / "saved"))
    assert len(saved.figure().data) == len(whole.figure().data) == 9  # five lines, chance, running, two maps


def test_scores_do_not_pile_up_in_memory(lens, monkeypatch):
    kept = []
    plain = StudyCheckpoints.result
    monkeypatch.setattr(StudyCheckpoints, "result", lambda self: kept.extend(self.finished) or plain(self))
    studies.stability(lens, PROMPTS, k=2, batch_size=1)
    assert len(kept) == 4
    assert all(array.dtype == np.int32 for cell in kept for array in cell.arrays.values())


def test_planted_channels_are_stable_at_once(toy):
    lens = DiTLens(planted.pipeline(toy, planted.Carrier), defaults=planted.CALL)
    prompts = [scene.caption for scene in planted.SCENES]
    result = studies.stability(lens, prompts, k=16)
    assert (result.table["jaccard"] == 1).all()
    assert "is stable from prompt 2 of 4 on, for every seed" in result.notes[1]
    assert result.notes[2].endswith(", ".join(map(str, range(16))))


@pytest.mark.parametrize(
    ("running", "expected"),
    [([], None), ([0.8], None), ([0.9], 2), ([1.0, 0.89, 0.9, 1.0], 4), ([1.0, 1.0, 0.5], None)],
)
def test_the_stopping_rule_wants_the_overlap_to_stay(running, expected):
    assert stable_after(running) == expected


def test_one_prompt_and_one_step_leave_out_what_they_cannot_tell(lens):
    result = studies.stability(lens, "a cat", k=K, scores=["rms"], site="blocks.3.img", steps=-1)
    assert set(result.summary["over"]) == {"step x step", "site x site"}
    assert "one prompt cannot tell whether" in result.notes[1]
    with pytest.raises(OpError, match="compares no sets"):
        result.figure()


def test_mistakes_are_told_before_anything_runs(lens, monkeypatch):
    monkeypatch.setattr(DiTLens, "run", None)
    for wrong, words in [
        ({"k": 33}, r"k=33 channels were asked for, but blocks\.0\.img has 32\. Choose k from 1 to 32"),
        ({"scores": []}, r"scores=\[\] names no score"),
        ({"stable": 0}, r"stable=0 must be an overlap in \(0, 1\]; SPARK's is 0\.9"),
        ({"site": ["blocks.0.img", "blocks.0.img.mlp.post"]}, r"blocks\.0\.img.* has .* Choose sites of one width"),
    ]:
        with pytest.raises(OpError, match=words):
            studies.stability(lens, PROMPTS, **({"k": K} | wrong))
    with pytest.raises(PromptError, match="list of prompts is empty"):
        studies.stability(lens, [])


def test_merging_leaves_the_other_statistics_alone():
    one, copied = RunningStats(), RunningStats()
    one.update(torch.tensor([[1.0, 2.0]]))
    copied.merge(one)
    copied.update(torch.tensor([[3.0, 0.0]]))
    assert (one.count, one.mean.tolist(), one.max.tolist()) == (1, [1.0, 2.0], [1.0, 2.0])
