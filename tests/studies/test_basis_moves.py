"""Directions that are moved: every arm is what plain hooks make of it, and its worth is counted from the pictures."""

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import DiTLens, studies
from dit_lens.errors import PromptError
from dit_lens.studies import Result
from dit_lens.studies.parts.equal_energy import compare_with_top, describe_moves
from dit_lens.studies.shared.checkpoints import check_arguments_only
from tests import oracle, pipelines
from tests.directions import CALL, SEED, K, directions_by_hand, draw_tokens

PROMPTS = ["a cat", "two dogs", "no bird at all"]
FEW = {"k": K, "seeds": SEED, "bases": ["components", "mean-direction"], "draws": 1}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


@pytest.fixture(scope="module")
def result(lens, tmp_path_factory):
    return studies.basis(lens, PROMPTS, **FEW, out=tmp_path_factory.mktemp("basis") / "s")


@pytest.fixture(scope="module")
def plain():
    """The plain pipeline, its images, and its tokens at every block: block -> [s, b, n, d], float64."""
    pipe = pipelines.flux()
    return (pipe, *draw_tokens(pipe, PROMPTS))


@pytest.mark.parametrize(("name", "level"), [("top", f"k={K}"), ("components", f"k={K}"), ("mean-direction", "mean")])
def test_a_moved_arm_is_what_plain_hooks_make_of_it(result, plain, name, level):
    pipe, clean, x = plain
    v = {(block, row): directions_by_hand(name, x[block][:, row]) for block in x for row in range(3)}
    into = {(i + 1) % 3: i for i in range(3)}  # target -> source

    def edit(step, block, stream, old):
        if stream != "img":
            return None
        new = old.double()
        for target, source in into.items():
            way = (old[3 + source] - old[target]).double()
            new[target] += way @ v[block, source][step] @ v[block, source][step].T
        return new.float()

    images, _ = oracle.draw(pipe, PROMPTS * 2, [SEED] * 6, CALL, edit)
    table = result.table.set_index(["arm", "level", "prompt"]).sort_index()
    pixels = [np.asarray(image).astype(float) for image in clean]

    def apart(one, other):
        return np.sqrt(np.square(one - other).mean())

    for target, source in into.items():
        key = f"{source}/{SEED}/transport/{name}/{level}"
        found, other = np.asarray(images[target]).astype(float), 3 - target - source
        assert np.abs(np.asarray(result.images[key]).astype(float) - found).max() <= 1
        line = table.loc[(name, level, PROMPTS[source])]
        assert line["target"] == PROMPTS[target]
        own, others = apart(found, pixels[source]), apart(found, pixels[other])
        start = apart(pixels[target], pixels[source])
        assert own > 0.1
        expected = {
            "to_source": own,
            "to_target": apart(found, pixels[target]),
            "to_others": others,
            "to_mean": apart(found, np.mean(pixels, 0).round()),
            "to_grey": apart(found, np.full_like(found, 128)),
            "specificity": others - own,
            "share": (start - own) / start,  # the ceiling is the source itself
        }
        assert line[list(expected)].astype(float).to_dict() == pytest.approx(expected, abs=0.02)
        held = [
            torch.einsum("snd,sdm->snm", x[block][:, source], v[block, source]).square().sum()
            / x[block][:, source].square().sum()
            for block in x
        ]
        assert line["energy_held"] == pytest.approx(float(np.mean(held)), rel=1e-3)


def test_the_ceiling_is_the_source_and_a_collapse_has_no_specificity(result):
    table = result.table.set_index("arm")
    assert (table.loc["ceiling", "to_source"] < 0.05).all()
    assert table.loc["ceiling", "share"].to_numpy(float) == pytest.approx([1] * 3, abs=0.02)
    assert table.loc["untouched", "share"].tolist() == [0, 0, 0]
    # A collapse is one picture for all: its nearness to own sources is its nearness to others.
    for arm in ("mean-picture", "grey"):
        assert table.loc[arm, "to_others"].mean() == pytest.approx(table.loc[arm, "to_source"].mean(), abs=1e-6)
    assert any(note.startswith("the ceiling, all channels, and what modulates the final norm") for note in result.notes)
    assert any(note.startswith("moved, images are nearer to their own source") for note in result.notes)
    assert "nearer to own source" in result.figure().layout.yaxis2.title.text


def test_what_is_drawn_is_said_beforehand(lens, monkeypatch):
    drawn, run = [], DiTLens.run

    def count(self, prompt, *args, **call):
        drawn.append(len(prompt))
        return run(self, prompt, *args, **call)

    with check_arguments_only() as counts:
        studies.basis(lens, PROMPTS, **FEW)
    monkeypatch.setattr(DiTLens, "run", count)
    studies.basis(lens, PROMPTS, **FEW)
    with check_arguments_only() as usual:
        studies.basis(lens, PROMPTS)
    assert usual[0].images == 3 * 106  # as the docstring says
    assert sum(drawn) == counts[0].images == 3 * (1 + 7) + 6 * (1 + 6)


def test_a_result_is_loaded_and_made_again(lens, result, tmp_path, monkeypatch):
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("something ran"))
    loaded = Result.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(
        loaded.summary.astype(object).fillna(-1), result.summary.astype(object).fillna(-1), check_dtype=False
    )
    assert loaded.notes == result.notes


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2}])
def test_a_single_prompt_has_nowhere_to_move_to(lens, monkeypatch, options):
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(PromptError, match="one batch has a single prompt"):
        studies.basis(lens, PROMPTS, transport=True, **FEW, **options)
    with check_arguments_only() as counts:
        studies.basis(lens, PROMPTS, **FEW, **options)
    assert counts[0].images == 3 * 8


def test_moves_are_answered_only_where_it_is_certain():
    def answer(*differences):
        lines = []
        for i, difference in enumerate(differences):
            one = {"prompt": str(i), "seed": 0, "draw": 0}
            lines += [
                {**one, "arm": arm, "energy_held": held, "specificity": value}
                for arm, held, value in (
                    ("untouched", 0.0, 0.0),
                    ("top", 0.5, 50.0),
                    ("rotation", 0.5, 50.0 - difference),
                    ("grey", np.nan, 0.0),
                )
            ]
        return describe_moves(compare_with_top(pd.DataFrame(lines), ["specificity"], "energy_held"))[-1].split()[4]

    assert answer(9, 10, 11, 12) == "channels:"
    assert answer(-9, -10, -11, -12) == "directions:"
    assert answer(9, -10, 11, -12) == "undecided:"
