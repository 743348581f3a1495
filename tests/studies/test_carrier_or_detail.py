"""The study of necessity and sufficiency: its tables are those of models whose truth was built in."""

import itertools
from dataclasses import astuple

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import Apply, DiTLens, Read, studies
from dit_lens.analysis.channels import ChannelSet
from dit_lens.commands.sentences import describe_carrier_or_detail
from dit_lens.errors import OpError, PromptError, StoreError
from dit_lens.studies.carrier_or_detail import assemble
from dit_lens.studies.parts.channel_parts import (
    make_ceiling,
    make_move,
    make_removal,
    predict_removal,
    split,
    weigh_move,
    weigh_removal,
)
from dit_lens.studies.parts.doses import read_doses
from dit_lens.studies.parts.evidence import Tables, decide_verdicts, weigh_destruction, weigh_edits, weigh_information
from dit_lens.studies.parts.information import compare_halves, pool_tokens
from dit_lens.studies.parts.part_cells import EditStudy
from dit_lens.studies.parts.verdict import Thresholds
from dit_lens.studies.shared.arms import Arm, select_common_channels
from dit_lens.studies.shared.batches import PromptBatch
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.judges import scene_judge
from tests import pipelines, planted

SCENES = planted.name_scenes(14)
PROMPTS = [scene.caption for scene in SCENES]
ONCE = {**planted.CALL, "num_inference_steps": 1}
SITE = "blocks.*.img"


@pytest.mark.parametrize(
    ("strengths", "part"),
    [
        ((0.0, 0.0), "mean"),
        ((0.1, 0.3), "residual"),
        ((0.3, 0.1), "mean"),
        ((0.5, 1.0), "residual"),
        ((1.0, 0.5), "mean"),
    ],
)
def test_tables_are_those_of_the_planted_strength(toy, strengths, part):
    """What every image loses and gains, counted from the plan itself; the other part of the channels does nothing."""
    scenes = SCENES[:5]
    pipe = planted.named(toy, scenes, necessity=strengths[0], sufficiency=strengths[1], part=part)
    lens = DiTLens(pipe, defaults=ONCE)
    study = EditStudy(lens=lens, site=SITE, sites=lens.sites(SITE), score="|mean|", ablation="mean", judge=scene_judge)
    batch = PromptBatch(0, range(5), tuple(PROMPTS[:5]))
    clean = study.run_clean(batch)
    found = select_common_channels([clean.arrays], 16, "|mean|")
    assert all(set(channels) == set(range(16)) for channels in found.values())
    means = {name.split("/", 2)[2]: torch.tensor(x.mean(1)) for name, x in clean.arrays.items() if "all/mean" in name}
    model = pipe.transformer
    lost = model.needed.double().mean(1)
    others = [scenes[(i + 1) % 5] for i in range(5)]
    differ = np.array([np.not_equal(astuple(a), astuple(b)) for a, b in zip(scenes, others, strict=True)])
    gained = (differ & model.moved.numpy()).mean(1)
    for edited, factor in (("whole", 1), (part, 1), ({"mean": "residual", "residual": "mean"}[part], 0)):
        removed = pd.DataFrame(study.remove(batch, clean, Arm("top", 0, (found,)), edited, means).lines)
        moved = pd.DataFrame(study.move(batch, clean, [(Arm("top", 0, (found,)), edited)])[0]().lines)
        assert removed["effect"].to_numpy() == pytest.approx(factor * lost.numpy())
        assert moved["effect"].to_numpy() == pytest.approx(factor * gained)
        assert moved["possible"].to_numpy() == pytest.approx(differ.mean(1))
        assert removed["destroyed"].sum() == moved["destroyed"].sum() == 0
        assert removed["dose"].to_numpy() == pytest.approx(removed["dose_intended"].to_numpy(), rel=0.01, abs=1e-4)
    every = pd.DataFrame(study.move(batch, clean, [(Arm("all", 0), "whole")])[0]().lines)
    assert every["effect"].to_numpy() == pytest.approx(differ.mean(1))
    assert (every["fidelity"] + every["effect"]).to_numpy() == pytest.approx(1)
    assert every["dose"].to_numpy() == pytest.approx(1)


def test_moves_that_share_their_sources_are_those_that_run_alone(monkeypatch):
    lens = DiTLens(pipelines.flux(), defaults={**pipelines.CALL, "num_inference_steps": 2})
    judge = lambda image, prompt: {"fidelity": np.asarray(image)[..., len(prompt) % 3].mean() / 255}  # noqa: E731
    study = EditStudy(lens=lens, site=SITE, sites=lens.sites(SITE), score="|mean|", ablation="mean", judge=judge)
    batch = PromptBatch(0, range(3), ("a cat", "two dogs", "no bird"))
    clean = study.run_clean(batch)
    top = Arm("top", 0, (select_common_channels([clean.arrays], 6, "|mean|"),))
    moves = [(top, part) for part in ("whole", "mean", "residual")] + [(Arm("all", 0), "whole")]
    rows, run = [], DiTLens.run

    def spy(self, prompts, *given, **call):
        rows.append(len(prompts))
        return run(self, prompts, *given, **call)

    monkeypatch.setattr(DiTLens, "run", spy)
    together = [make() for make in study.move(batch, clean, moves)]
    assert rows == [3 * 4 + 3]
    for move, found in zip(moves, together, strict=True):
        (alone,) = (make() for make in study.move(batch, clean, [move]))
        for one, other in zip(found.lines, alone.lines, strict=True):
            assert one.keys() == other.keys()
            same = [name for name in one if not isinstance(one[name], float)]
            assert [one[name] for name in same] == [other[name] for name in same]
            assert [one[n] for n in one if n not in same] == pytest.approx(
                [other[n] for n in one if n not in same], abs=0.02, nan_ok=True
            )
        assert found.images.keys() == alone.images.keys()
    assert together[0].lines[0]["rmse"] > 0.2
    assert len({line["rmse"] for cell in together for line in cell.lines}) == 12


def test_an_image_that_an_edit_destroys_has_no_effect(toy):
    """All attributes are gone, which says nothing of them; to a judge that never says "readable" every image is."""
    lens = DiTLens(planted.pipeline(toy, planted.Carrier), defaults=ONCE)
    prompts = tuple(scene.caption for scene in planted.SCENES[:2])
    batch, every = PromptBatch(0, range(2), prompts), ChannelSet.random(lens.massive_channels(list(prompts), 16), 0)
    top = Arm("top", 0, (ChannelSet({site: tuple(range(16)) for site in every}, every.scores, every.energy),))
    for judge, gone in ((scene_judge, 1.0), (lambda *given: {"fidelity": scene_judge(*given)["fidelity"]}, 0.0)):
        study = EditStudy(lens=lens, site=SITE, sites=lens.sites(SITE), score="|mean|", ablation="zero", judge=judge)
        clean = study.run_clean(batch)
        means = {site: torch.zeros(1, 64) for site in lens.sites(SITE)}
        table = pd.DataFrame(study.remove(batch, clean, top, "whole", means).lines)
        assert table["fidelity"].tolist() == [0.0, 0.0]
        assert table["destroyed"].tolist() == [gone] * 2
        assert table["effect"].isna().tolist() == [bool(gone)] * 2
        assert table["possible"].tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def carried(toy, tmp_path_factory):
    """The whole study on a model whose massive channels hold all of every prompt, in their mean."""
    lens = DiTLens(planted.named(toy, SCENES, necessity=1.0, sufficiency=1.0), defaults=ONCE)
    folder = tmp_path_factory.mktemp("carried") / "study"
    result = studies.carrier_or_detail(
        lens, PROMPTS, k=16, draws=0, judge=scene_judge, attributes=lambda _: {}, out=folder
    )
    return result, folder


def test_the_whole_study_finds_a_carrier(carried):
    result, folder = carried
    rows = result.summary.set_index(["measure", "part"])
    top = rows[rows["arm"] == "top"]
    assert rows.loc[("verdict", "overall"), "says"] == "necessary and movable"
    assert rows.loc[("verdict", "mean"), "says"] == "necessary and movable"
    assert rows.loc[("verdict", "residual"), "says"] != "necessary and movable"
    assert top.loc[("necessity", "whole"), "value"] == pytest.approx(1)
    assert top.loc[("sufficiency", "whole"), "value"] == pytest.approx(1)
    assert top.loc[("sufficiency", "mean - residual"), "says"] == "mean"
    assert rows.loc[("ceiling", "whole"), "value"] == pytest.approx(1)
    assert set(rows.loc[("destroyed when moved", "whole"), "arm"]) == {
        "top", "bottom", "energy-matched", "all",
    }  # fmt: skip
    assert top.loc[("necessity", "whole"), "readable"] == 1
    assert "variance was not measured: of one seed all that varies depends on the prompt" in result.notes
    again = studies.Result.load(folder)
    pd.testing.assert_frame_equal(again.summary, result.summary)
    assert again.notes == result.notes


def test_the_figure_tells_the_verdict(carried, tmp_path):
    result, _ = carried
    loaded = studies.Result.load(result.save(tmp_path / "saved"))
    for one in (result, loaded):
        figure = one.figure()
        assert "Necessary and movable" in figure.layout.title.text
        assert "ceiling 1.00 (reached)" in figure.layout.title.subtitle.text
        assert figure.layout.shapes[0].x1 == 0.1
    old = pd.DataFrame({"measure": ["ablation"], "part": ["whole"], "value": [0.5], "strongest control": ["random"]})
    with pytest.raises(OpError, match="of an earlier release"):
        studies.Result("carrier_or_detail", old, old, {"thresholds": {"carrier": 0.3}}).figure()


def test_cells_of_an_earlier_release_are_refused():
    with pytest.raises(StoreError, match=r"begun by an earlier release.*Run the study again in a new folder"):
        assemble({"thresholds": {"carrier": 0.3, "detail": 0.1, "change": 0.5}}, [Cell()])


def test_moving_a_part_moves_that_part_and_no_other(lens):
    site, prompts = "blocks.1.img", ["a cat", "two dogs"]
    clean = lens.run(prompts, Read(site, steps=0), seed=0)[site][0]
    for part in ("mean", "residual", "whole"):
        op = make_move(site, {site: (2, 5)}, part, 0, 1)
        got = lens.run(prompts, [op, Read(site, steps=0)], seed=0)[site][0]
        other = {"mean": "residual", "residual": "mean", "whole": None}[part]
        target, source, moved = (x[..., [2, 5]].numpy() for x in (clean[0], clean[1], got[0]))
        assert np.allclose(split(moved, part), split(source, part), atol=1e-5)
        if other:
            assert np.allclose(split(moved, other), split(target, other), atol=1e-5)
        assert np.array_equal(np.delete(got[0].numpy(), [2, 5], -1), np.delete(clean[0].numpy(), [2, 5], -1))
        assert np.array_equal(got[1].numpy(), clean[1].numpy())


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_removing_a_part_leaves_the_other(lens, kind):
    """And its dose is the energy that was moved, as the receipt gave it and as it was predicted."""
    site, prompts, chosen = "blocks.1.img", ["a cat", "two dogs"], [2, 5]
    clean = lens.run(prompts, Read(site, steps=0), seed=0)[site][0].numpy()
    steps = lens.outline(prompts).steps
    means = {site: torch.linspace(-1, 1, clean.shape[-1]).expand(steps, -1)}
    channels = ChannelSet({site: (2, 5)}, {site: torch.zeros(clean.shape[-1])}, {site: torch.ones(clean.shape[-1])})
    for part in ("mean", "residual", "whole"):
        op = make_removal(site, channels, part, kind, means)
        ops = weigh_removal(op, [site], lens.anatomy, range(2), 0)
        run = lens.run(prompts, [*ops, Read(site, steps=0)], seed=0)
        got = run[site][0].numpy()
        new = means[site][0, chosen].numpy() if kind == "mean" else 0.0
        own = clean[..., chosen].mean(1, keepdims=True)
        expected = (new if part != "residual" else own) + (clean[..., chosen] - own if part == "mean" else 0)
        assert np.allclose(got[..., chosen], expected, atol=1e-5)
        assert np.array_equal(np.delete(got, chosen, -1), np.delete(clean, chosen, -1))
        dose = ((got - clean) ** 2).sum((1, 2)) / (clean**2).sum((1, 2))
        given = read_doses(ops, run.receipt)
        arrays = {f"{i}/energy at first/{site}": (clean[i] ** 2).mean(0) for i in range(2)}
        arrays |= {f"{i}/mean at first/{site}": clean[i].mean(0) for i in range(2)}
        left = {site: means[site][0].numpy() * (kind == "mean")}
        for i in range(2):
            assert given[i] == pytest.approx(dose[i], rel=1e-3)
            assert predict_removal(arrays, i, channels, [[site]], part, left) == pytest.approx(dose[i], rel=1e-3)


def test_all_that_is_moved_is_the_source(lens):
    site, prompts = "blocks.1.img", ["a cat", "two dogs"]
    sites = lens.sites(SITE)
    ops = weigh_move(make_ceiling(sites, lens.anatomy, 0, 1), sites, lens.anatomy, (0, 1), 0)
    run = lens.run(prompts, ops, seed=0)
    assert run.images[0].tobytes() == run.images[1].tobytes()
    assert read_doses(ops, run.receipt)[0] == pytest.approx(1)
    half = weigh_move(
        [Apply(site, rows=0, fn=lambda x, _: x + 1.0, branch="cond")], [site], lens.anatomy, (0, 1), 0, None, "mean"
    )
    clean = lens.run(prompts, Read(site, steps=0), seed=0)[site][0].numpy()
    way = (clean[1] - clean[0]).mean(0)
    expected = way.sum() / np.square(way).sum()  # of the way of the mean alone
    assert read_doses(half, lens.run(prompts, half, seed=0).receipt)[0] == pytest.approx(expected, rel=1e-3)


def make_table(prompts=64, *, destroyed=0.0, arms=("top", "bottom", "random")):
    """Images whose top channels carry everything, of which an edit destroys some."""
    rng, lines = np.random.default_rng(0), []
    for measure, part, arm, i in itertools.product(
        ("ablation", "transport"), ("whole", "mean", "residual"), (*arms, "all"), range(prompts)
    ):
        if arm == "all" and (measure, part) != ("transport", "whole"):
            continue
        gone = arm == "top" and rng.random() < destroyed
        carried = arm == "all" or (arm == "top" and part != "residual")
        effect = np.nan if gone else (0.9 if carried else 0.0) + rng.choice([-0.1, 0.0, 0.1])
        lines.append(
            {"measure": measure, "part": part, "arm": arm, "draw": 0, "prompt": f"p{i}", "seed": 0, "effect": effect,
             "possible": 1.0, "destroyed": float(gone)}
        )  # fmt: skip
    return Tables(pd.DataFrame(lines), [f"p{i}" for i in range(prompts)], [0])


def says(lines):
    return {(line["measure"], line["part"]): line["says"] for line in lines if line.get("arm", "top") == "top"}


def test_evidence_of_a_table():
    tables = make_table()
    lines = weigh_edits(tables, Thresholds())
    found = says(lines)
    assert found["necessity", "whole"] == found["sufficiency", "mean"] == "yes"
    assert found["necessity", "residual"] == found["sufficiency", "residual"] == "no"
    assert found["necessity", "mean - residual"] == found["sufficiency", "mean - residual"] == "mean"
    verdicts = {line["part"]: line["says"] for line in decide_verdicts(lines)}
    assert verdicts == {"overall": "necessary and movable", "mean": "necessary and movable", "residual": "neither"}
    assert says(weigh_destruction(tables, Thresholds()))["destroyed when moved", "whole"] == "no"


def test_destroyed_images_are_counted_apart():
    tables = make_table(destroyed=0.3)
    lines = weigh_edits(tables, Thresholds())
    assert says(lines)["necessity", "whole"] == "yes"
    line = next(one for one in lines if (one["measure"], one["part"]) == ("necessity", "whole"))
    assert line["readable"] == pytest.approx(0.7, abs=0.15)
    assert line["n"] == round(64 * line["readable"])
    assert line["value"] == pytest.approx(0.9, abs=0.05)  # not lower: they lost nothing that could be judged
    rates = weigh_destruction(tables, Thresholds())
    rate = {(one["measure"], one["arm"]): one["value"] for one in rates if one["part"] == "whole"}
    assert rate["destroyed when removed", "top"] == pytest.approx(1 - line["readable"])
    assert rate["destroyed when removed", "random"] == rate["destroyed when moved", "all"] == 0
    lines = weigh_edits(make_table(destroyed=0.9), Thresholds())
    few = says(lines)
    assert few["necessity", "whole"] == few["necessity", "mean - residual"] == "undecided"
    line = next(one for one in lines if (one["measure"], one["part"]) == ("necessity", "whole"))
    assert "excess" not in line  # of the few that are left
    assert line["why"].endswith("of the images are readable without them")


def test_notes_say_what_decides_and_what_it_would_take():
    tables = make_table(16)
    table = tables.table.assign(rmse=1.0, dose_intended=0.4, dose=np.where(tables.table["arm"] == "random", 0.5, 0.41))
    settings = {
        "prompts": tables.prompts, "seeds": [0, 1], "k": 8, "width": 128, "ablation": "mean", "attributes": [{}],
        "thresholds": {"bound": 0.1, "ceiling": 0.8, "readable": 0.5},
    }  # fmt: skip
    result = assemble(settings, [Cell(lines=table.to_dict("records"))])
    notes = "\n".join(result.notes)
    row = result.summary.set_index(["measure", "part"]).loc[("necessity", "whole")]
    needs = studies.power(row["spread"], 0.1, prompts=16, level=1 - 0.05 / 3).iloc[0]
    assert (
        f"16 prompts that differ by {row['spread']:.2f} say yes to an excess of {0.1 + needs['decides']:.2f}" in notes
    )
    assert f"to say no to an excess of 0 takes {needs['needs']:.0f} of them" in notes
    assert "images destroyed when removed: top 0%, bottom 0%, random 0% (n = 16)" in notes
    assert "ablation of random (whole) gave a dose of 0.5 where 0.4 was intended" in notes
    assert "of top" not in notes
    assert "two seeds tell little of others" in notes
    sentence = describe_carrier_or_detail(result)
    assert sentence.startswith("**Verdict: necessary and movable.** Needed: yes (more than 0.1 beyond every control)")
    assert "All channels gain 0.9" in sentence


def test_a_study_that_was_stopped_early_has_its_evidence_so_far():
    table = make_table(4).table
    for part in (table[table["measure"] == "ablation"], table[table["arm"] == "all"], table[table["arm"] == "bottom"]):
        lines = weigh_edits(Tables(part, ["p0", "p1", "p2", "p3"], [0]), Thresholds())
        assert {line["says"] for line in decide_verdicts(lines)} == {"undecided"}


@pytest.fixture
def images():
    """Values of 8 prompts x 2 seeds: "mean" codes the colour, the residual the side, by what is planted."""
    rng = np.random.default_rng(0)
    attributes = [{"colour": c, "side": s} for c, s in itertools.product(("red", "blue"), ("left", "right"))] * 2

    def values(*, colour, side):
        x = 0.3 * rng.normal(size=(1, 16, 16, 3))
        x -= x.mean(2, keepdims=True)
        x += 0.3 * rng.normal(size=(1, 16, 1, 3))
        for m in range(16):
            one = attributes[m % 8]
            x[0, m] += colour * (1 if one["colour"] == "red" else -1)
            half = np.where(np.arange(16) % 4 < 2, 1, -1)[:, None]
            x[0, m] += side * half * (1 if one["side"] == "left" else -1)
        return {"blocks.0.img": pool_tokens(x, (4, 4))}

    return attributes * 2, values


def test_information_is_found_in_the_part_that_holds_it(images):
    attributes, values = images
    for planted_part, other in (("mean", "residual"), ("residual", "mean")):
        strength = {"colour": 2 * (planted_part == "mean"), "side": 2 * (planted_part == "residual")}
        both = {"top": [values(**strength)], "bottom": [values(colour=0, side=0), values(colour=0, side=0)]}
        lines = list(weigh_information(both, attributes, 8, Thresholds()))
        found = {(line["measure"], line["part"]): line for line in lines}
        # One attribute of two: at most half of the skill.
        assert found["decoding", planted_part]["value"] > 0.2 > found["decoding", other]["value"]
        assert found["variance", planted_part]["value"] > 0.9
        assert found["variance", other]["value"] < 0.5
        assert found["variance", planted_part]["control_value"] < 0.5


def test_noise_shares_nothing_between_halves():
    """An analysis of variance without replicates gives its interaction 30 of 31 parts of such noise."""
    rng = np.random.default_rng(1)
    noise = {"blocks.0.img": rng.normal(size=(1, 2 * 16, 17, 3))}
    assert abs(compare_halves(noise, "residual", 16).mean) < 0.1
    prompts = rng.normal(size=(1, 1, 16, 17, 3))
    half = {"blocks.0.img": (np.repeat(prompts, 2, 1) + rng.normal(size=(1, 2, 16, 17, 3))).reshape(1, 32, 17, 3)}
    assert compare_halves(half, "whole", 16).mean == pytest.approx(0.5, abs=0.15)
    same = {"blocks.0.img": np.repeat(prompts, 2, 1).reshape(1, 32, 17, 3)}
    assert compare_halves(same, "mean", 16).mean == pytest.approx(1)


def test_what_cannot_be_judged_or_moved_is_refused(lens):
    with pytest.raises(OpError, match="pass judge="):
        studies.carrier_or_detail(lens, ["a cat", "two dogs"], k=4)
    with pytest.raises(PromptError, match="single prompt"):
        studies.carrier_or_detail(lens, ["a cat", "two dogs"], k=4, judge=scene_judge, batch_size=1)
    with pytest.raises(OpError, match=r"'zeros' is not a valid ablation.*'zero'"):
        studies.carrier_or_detail(lens, ["a cat", "two dogs"], k=4, judge=scene_judge, ablation="zeros")
