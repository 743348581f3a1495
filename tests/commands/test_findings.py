"""The page of findings says what the numbers say, for numbers that say either."""

import numpy as np
import pandas as pd
import pytest

from dit_lens.commands import sentences
from dit_lens.commands.chapters import CHAPTERS, Size
from dit_lens.commands.findings import (
    describe_retraining,
    describe_sizes,
    describe_training,
    findings,
    write_overview,
    write_table,
)
from dit_lens.commands.findings_cost import count_images
from dit_lens.errors import StoreError
from dit_lens.studies import Result
from dit_lens.studies.parts.chosen_block import choose_halves
from dit_lens.studies.shared.tables import compare_arms

# One step without guidance: half of the passes of one with it.
SMALL = Size(prompts=2, seeds=1, draws=1, call={"num_inference_steps": 1, "true_cfg_scale": 1.0})


def summary(columns, rows):
    """Rows of an arm and a mean for every measure, with bounds 1 below and above unless given as (mean, low, high)."""
    table = []
    for arm, *values in rows:
        line = {"arm": arm}
        for name, value in zip(columns, values, strict=True):
            mean, low, high = value if isinstance(value, tuple) else (value, value - 1, value + 1)
            line |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        table.append(line)
    return pd.DataFrame(table)


def measured(columns, rows):
    """Measurements of eight prompts, with the means of rows: far apart between prompts, and little between arms."""
    rng, lines = np.random.default_rng(0), []
    prompts = np.linspace(-20, 20, 8)
    for arm, *values in rows:
        own = rng.normal(0, 0.3, (len(prompts), len(values)))
        own -= own.mean(0)
        for i, prompt in enumerate(prompts):
            lines.append(
                {"arm": arm, "prompt": str(i), "seed": 0} | dict(zip(columns, values + prompt + own[i], strict=True))
            )
    return pd.DataFrame(lines)


def result(study, summary, table=None, notes=()):
    return Result(study, summary if table is None else table, summary, {}, notes=list(notes))


@pytest.mark.parametrize(("top", "word"), [(50.0, "holds"), (12.0, "holds"), (3.0, "fails"), (10.05, "is undecided")])
def test_a_claim_is_decided_by_differences_within_prompts(top, word):
    table = measured(["rmse"], [("top", top), ("bottom", 8.0), ("random", 10.0), ("norm", 99.0)])
    over = ["bottom", "random"]
    assert sentences.decide_claim(table, "rmse", over=over) == word
    assert sentences.decide_claim(table.assign(rmse=-table["rmse"]), "rmse", over=over, larger=False) == word
    shuffled = table.assign(prompt=table["arm"] + table["prompt"])  # nothing to compare: no prompt has two arms
    assert sentences.decide_claim(shuffled, "rmse", over=over) == "is undecided"


def of_arms(rng, effects, prompts, seeds=2, draws=3, missing=0.0):
    """Measurements of arms with several draws of each control, of which some may be missing."""
    own, lines = rng.normal(size=(prompts, seeds)), []
    for arm, effect in effects.items():
        for p, s, draw in np.ndindex(prompts, seeds, 1 if arm == "top" else draws):
            if arm == "top" or rng.random() >= missing:
                value = effect + own[p, s] + rng.normal()
                lines.append({"arm": arm, "prompt": f"{p}", "seed": s, "draw": draw, "k": 8, "x": value})
    return pd.DataFrame(lines)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_verdicts_and_tables_have_the_same_numbers(missing):
    table = of_arms(np.random.default_rng(0), dict.fromkeys(("top", *sentences.CONTROLS), 0.0), 9, missing=missing)
    columns = compare_arms(table, ["k"], ["x"]).set_index("arm")
    index = sentences.subtract_controls(table, "x")
    for end in ("", "_low", "_high", "_p"):
        assert columns[f"x_top_minus{end}"].to_dict() == index[f"x{end}"].to_dict()


def test_holds_and_fails_are_rare_where_nothing_differs_and_mirror_each_other():
    words = []
    for seed in range(40):
        table = of_arms(np.random.default_rng(seed), dict.fromkeys(("top", *sentences.CONTROLS), 0.0), 8, draws=1)
        words.append(sentences.decide_claim(table, "x"))
        assert sentences.decide_claim(table.assign(x=-table["x"]), "x", larger=False) == words[-1]
    assert words.count("holds") <= 1
    assert words.count("fails") <= 4  # 2.5 % of 40 are 1
    one = pd.DataFrame({"arm": [*sentences.CONTROLS], "x": 0.0}).assign(prompt="a", seed=0)
    top = one.assign(arm="top", x=1.0).iloc[:1]
    assert sentences.decide_claim(pd.concat([one, top]), "x") == "is undecided"  # one prompt decides nothing


def test_a_claim_that_only_some_controls_support_is_undecided():
    effects = {"top": 3.0, "bottom": 0.0, "random": 0.0, "energy-matched": 3.0}
    table = of_arms(np.random.default_rng(1), effects, 12)
    assert sentences.decide_claim(table, "x") == "is undecided"
    assert sentences.decide_claim(table, "x", over=["bottom", "random"]) == "holds"


def test_a_comparison_names_the_strongest_control():
    arms = [("top", 5.0), ("bottom", 2.0), ("random", 5.01), ("energy-matched", 3.0)]
    comparison = sentences.ControlComparison(summary(["x"], arms).set_index("arm"), measured(["x"], arms), "x")
    assert comparison.brief.startswith("is undecided: 5.0 (4.0 to 6.0); random 5.0 (4.0 to 6.0); difference -0.0 (-0.")
    falling = sentences.ControlComparison(
        summary(["x"], arms).set_index("arm"), measured(["x"], arms), "x", larger=False
    )
    assert falling.brief.startswith("fails: 5.0 (4.0 to 6.0); bottom 2.0 (1.0 to 3.0); difference +3.0 (+2.")


ARMS = ("bottom", "random", "energy-matched", "attenuated", "rescaled", "norm-kept", "random-direction")


@pytest.mark.parametrize(
    ("rescaled", "kept", "reason"),
    [(5.0, 60.0, "is not the reason"), (60.0, 60.0, "may be part"), (5.0, 10.0, "may be part")],
)
def test_claim_1_in_words(rescaled, kept, reason):
    values = dict.fromkeys(ARMS, 10.0) | {"rescaled": rescaled, "norm-kept": kept, "attenuated": 40.0}
    columns = ["rmse", "fidelity", "energy_share"]
    rows = [("top", 70.0, 0.1, 0.5), *((arm, value, 0.9, 0.02) for arm, value in values.items())]
    said = sentences.describe_disruption(
        result("disruption", summary(columns, rows).assign(k=8), measured(columns, rows))
    )
    assert "The claim holds" in said
    assert f"The next norm {reason}" in said
    assert "for their size holds by the change of pixels and is undecided by the attributes" in said
    assert "70.0 (69.0 to 71.0)" in said
    assert "with 10% of attributes right" in said


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (8, "10% of attributes right;"),
        (3, "10% of attributes right (3 of 8 images can be read back);"),
        (0, "no image that can be read back;"),
    ],
)
def test_what_cannot_be_read_is_said(read, said):
    columns = ["rmse", "fidelity", "energy_share"]
    rows = [("top", 70.0, 0.1, 0.5), *((arm, 10.0, 0.9, 0.02) for arm in ARMS)]
    table = measured(columns, rows)
    seen = table.groupby("arm").cumcount() < read
    table["readable"] = ((table["arm"] != "top") | seen).astype(float)
    found = sentences.describe_disruption(result("disruption", summary(columns, rows).assign(k=8), table))
    assert f"changes images by 70.0 (69.0 to 71.0) with {said}" in found
    assert sentences.describe_readable(table, "top").startswith(f"{read or 'none'} of 8 images can be read back")


def test_what_enters_the_first_block_writes_too():
    rows = summary(["share"], [("top", (0.5, 0.4, 0.6)), ("top", (0.3, 0.2, 0.4))])
    said = sentences.describe_write_attribution(
        result("write_attribution", rows.assign(point=["input", "mlp_out"], block=[float("nan"), 3.0]))
    )
    assert said.endswith("what enters the first block 0.50 (0.40 to 0.60), mlp_out of block 3 0.30 (0.20 to 0.40).")


def test_claim_2_in_words():
    arms = [("top", 0.5), ("bottom", 0.2), ("random", 0.45), ("energy-matched", 0.3), ("norm", 0.6), ("component", 0.4)]
    rows = measured(["iou"], [*arms, ("centre", 0.4)]).assign(chance=0.21, iou_other_prompts=0.25, step=3)
    rows["iou"] = (rows["iou"] - 0.5) / 100 + 0.5  # of eight prompts, far apart, beside noise of 0.003
    lines = pd.concat([rows.assign(block=3), rows.assign(block=4, iou=rows["iou"] - 0.2)])
    lines["half"] = lines["prompt"].map(choose_halves(lines["prompt"]))
    said = sentences.describe_organisation(result("organisation", lines))
    assert "At block 3 the claim is undecided" in said  # top and random are 0.0005 apart
    assert "4 prompts chose it, by the top channels, and the other 4 judge" in said
    assert "norm 0." in said
    assert "other prompts 0.25" in said
    assert "chance 0.21" in said


def test_a_misspelt_toy_is_found_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_lens.commands.findings.run_chapters", lambda *_: pytest.fail("drawn"))
    with pytest.raises(StoreError, match="no toy called 'fluks'"):
        findings(tmp_path / "page", toys=["flux", "fluks"])
    assert not (tmp_path / "page").exists()


def test_a_toy_that_was_never_measured_is_said_to_be_so():
    card = {"training": {"seed": 3, "stages": {"transformer": {"iterations": 1234}}}}
    assert describe_training(card) == "Trained from seed 3 for 1,234 iterations. How well it draws was not measured."


def test_weights_that_are_not_in_the_repository_can_be_trained():
    stages = {"transformer": {"iterations": 1234}}
    training = {"seed": 3, "stages": stages, "hardware": "1 CPU thread"}
    said = "\n".join(describe_retraining({"toy": "sana", "training": training}))
    assert "`dit-lens train-toy sana --seed 3 --out DIR --iterations 1234` trains it anew" in said
    assert "`DIR/pipeline` is moved to `toys/sana-seed3`" in said
    assert describe_retraining({"toy": "sana", "training": {**training, "seed": 0}}) == []


def test_every_study_states_its_own_size():
    table = of_arms(np.random.default_rng(0), dict.fromkeys(("top", "random", "energy-matched"), 0.0), 3, 1, 4)
    found = Result("disruption", table, table, {})
    assert describe_sizes(found) == "*Size:* 3 prompts x 1 seed; 4 draws of energy-matched, 4 draws of random."
    pairs = pd.DataFrame({"prompt": ["a -> b"], "seed": [0], "row": ["x"]})
    assert describe_sizes(Result("patching", pairs, pairs, {})) == "*Size:* 1 pair of prompts x 1 seed."


def test_no_prompt_of_the_findings_is_there_twice():
    assert len(set(Size(prompts=64).texts)) == 64
    assert Size(prompts=16).texts == Size(prompts=64).texts[:16]


def test_a_reader_sees_in_colour_what_holds_and_below_what_it_rests_on(tmp_path):
    claims = [chapter.claim for chapter in CHAPTERS if chapter.claim]
    flux = [
        "holds: 62.8; random 8.6; difference +54",
        "is undecided: 3 prompts",
        "fails: 9.0; bottom 1.0; difference +8",
    ]
    row = {"toy": "flux", "iterations": "8,716", **dict(zip(claims, flux, strict=True))}
    row |= {"carrier or detail": "necessary, not movable", "k of the width": "8 of 128"}
    row |= {"top sets of two prompts overlap by": "0.39", "strongest over median": "32"}
    earlier = {"toy": "sana", "iterations": "5,136", claims[0]: "holds: 23.9", "carrier or detail": "undecided"}
    for line in (row, earlier):
        (tmp_path / line["toy"]).mkdir()
        pd.DataFrame([line]).to_csv(tmp_path / line["toy"] / "glance.csv", index=False)
    write_overview(tmp_path)
    said = (tmp_path / "index.md").read_text("utf-8")
    glance, rests = said.split("## At a glance")[1].split("## What the verdicts rest on")
    assert (
        "| [flux](flux/index.md) | 8,716 | 🟢 holds | 🟡 undecided | 🔴 fails | 🔵 necessary, not movable |" in glance
    )
    assert "| [sana](sana/index.md) | 5,136 | 🟢 holds |  |  | 🟡 undecided |" in glance
    assert "12 of 3,072 channels of FLUX count as massive (0.4 % of its width)" in glance
    assert "| [flux](flux/index.md) | 8 of 128 | 0.39 | 32 |" in glance
    assert f"| {' | '.join([flux[0], 'undecided: 3 prompts', flux[2]])} |" in rests
    assert "over training" not in said
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "index.md").touch()
    write_overview(tmp_path)
    assert "[over training](training/index.md)" in (tmp_path / "index.md").read_text("utf-8")


def test_every_measurement_is_kept_and_gives_the_verdict_again(tmp_path):
    table = of_arms(np.random.default_rng(0), {"top": 9.0, "bottom": 0.0, "random": 1.0, "energy-matched": 2.0}, 8)
    for name in ("one", "two"):
        write_table(tmp_path / f"{name}.csv.gz", table)
    assert (tmp_path / "one.csv.gz").read_bytes() == (tmp_path / "two.csv.gz").read_bytes()
    kept = pd.read_csv(tmp_path / "one.csv.gz")
    np.testing.assert_allclose(kept["x"], table["x"], rtol=1e-6)
    assert sentences.decide_claim(kept, "x") == sentences.decide_claim(table, "x") == "holds"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_the_code_beside_a_chapter_is_the_call_that_made_it(chapter, monkeypatch):
    size, calls = Size(prompts=4, seeds=1, draws=2, call={"num_inference_steps": 2}), []
    monkeypatch.setattr("dit_lens.DiTLens.toy", lambda name: name)
    monkeypatch.setattr(f"dit_lens.studies.{chapter.name}", lambda lens, **given: calls.append((lens, given)))
    code = chapter.write_code("flux-seed1", size)
    exec(code, {})  # what a reader would paste
    assert calls == [("flux-seed1", chapter.arguments(size))]
    assert len(code) < 700


def test_what_will_be_drawn_is_counted_before_it_is(toy, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(toy), "run", lambda *_, **__: pytest.fail("drawn"))
        count = count_images(toy, SMALL)
    assert list(count) == [chapter.name for chapter in CHAPTERS]
    drawn = []
    forward = toy.pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: drawn.append(len(given["hidden_states"])), with_kwargs=True
    )
    try:
        for name in ("stability", "disruption", "organisation"):
            chapter = next(one for one in CHAPTERS if one.name == name)
            drawn.clear()
            with toy.quiet():
                chapter.study.function(toy, **chapter.arguments(SMALL))
            assert sum(drawn) == count[name], name
    finally:
        forward.remove()
    twice = count_images(toy, Size(prompts=4, seeds=2, draws=1))
    assert twice["disruption"] == 4 * count["disruption"]


@pytest.mark.slow
def test_a_toy_has_its_page_and_all_toys_have_one(tmp_path):
    out = tmp_path / "page"
    earlier = out / "another"
    earlier.mkdir(parents=True)
    (earlier / "glance.csv").write_text('toy,iterations\nanother,"1,234"\n')
    (out / "flux").mkdir()
    (out / "flux" / "index.md").write_text("an earlier page")
    (out / "flux" / "glance.csv").write_text("of an earlier page")
    (out / "flux" / "notes.csv").write_text("mine")

    page = findings(out, size=SMALL, cells=tmp_path / "cells")

    of_toy = (out / "flux" / "index.md").read_text(encoding="utf-8")
    for chapter in CHAPTERS:
        assert f"## {chapter.study.question}" in of_toy
        assert f"({chapter.name}.webp)" in of_toy
        assert (out / "flux" / f"{chapter.name}.webp").stat().st_size > 10_000
        assert len(pd.read_csv(out / "flux" / f"{chapter.name}.csv"))
        assert len(pd.read_csv(out / "flux" / f"{chapter.name}.csv.gz")) > 1
        assert f"dl.studies.{chapter.name}(dl.DiTLens.toy('flux'), " in of_toy
    assert (out / "flux" / "heat-and-masks.webp").stat().st_size > 10_000
    assert "Unlike the literature's: k = 8 of 128 channels is 6.2 %, 16 times" in of_toy
    assert (
        "Everything on this page is made by `dit-lens findings --toys flux --prompts 2 --seeds 1 --draws 1`" in of_toy
    )
    assert "untrained twin" in of_toy
    assert "Trained from seed 0 for 8,716 iterations. Shares right in images of 200 held-out prompts: " in of_toy
    assert (out / "flux" / "notes.csv").read_text() == "mine"
    assert earlier.is_dir()

    said = page.read_text(encoding="utf-8")
    glance = said.split("## At a glance")[1].split("## ")[0]
    rows = [line for line in glance.splitlines() if line.startswith("| [")]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| [another](another/index.md)", "1,234"],
        ["| [flux](flux/index.md)", "8,716"],
    ]
    assert all(chapter.claim in said for chapter in CHAPTERS)
    assert "nan" not in of_toy
