"""The block of claim 2 is chosen on one half of the prompts and judged on the other, against controls and nulls."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from dit_lens.commands import sentences
from dit_lens.studies import Result
from dit_lens.studies.parts.chosen_block import RIVALS, choose_block, choose_halves, describe_choice

ARMS = ("top", "bottom", "random", "energy-matched", "component", "centre")
words = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=40)


def measured(rng, means, *, prompts=16, blocks=8, seeds=1, others=0.2, noise=0.05):
    """Measurements of arms at some blocks: a mean for every arm, a part of the prompt's, and noise."""
    lines = []
    for p, s, block in np.ndindex(prompts, seeds, blocks):
        for arm in ARMS:
            value = np.clip(means.get(arm, 0.2) + rng.normal(0, noise), 0, 1)
            line = {"prompt": f"scene {p}", "seed": s, "step": 3, "block": block, "arm": arm, "draw": 0, "iou": value}
            lines.append({**line, "iou_other_prompts": others + rng.normal(0, 0.01), "chance": 0.1})
    table = pd.DataFrame(lines)
    return table.assign(half=table["prompt"].map(choose_halves(table["prompt"])))


def compared(table):
    return sentences.compare_overlap(Result("organisation", table, table, {}))


@settings(max_examples=50, deadline=None)
@given(words, st.randoms())
def test_halves_are_equal_and_do_not_depend_on_order(prompts, rng):
    halves = choose_halves(prompts)
    shuffled = rng.sample(prompts, len(prompts))
    assert choose_halves(shuffled) == halves
    assert set(halves) == set(prompts)
    chooses = list(halves.values()).count("chooses")
    assert chooses == len(set(prompts)) // 2


def test_the_block_is_that_of_one_half_and_the_numbers_are_of_the_other():
    rng = np.random.default_rng(0)
    for _ in range(10):
        table = measured(rng, {"top": 0.5}, prompts=9, blocks=4, seeds=2)
        halves = choose_halves(table["prompt"])
        top = table[table["arm"] == "top"].pivot_table(index="prompt", columns="block", values="iou")
        chooses = [halves[prompt] == "chooses" for prompt in top.index]
        best = int(top[chooses].mean().to_numpy().argmax())
        found = choose_block(table)
        assert (found.step, found.block, found.chosen_on, found.judged_on) == (3, best, 4, 5)
        at = compared(table)
        judges = [prompt for prompt in top.index if halves[prompt] == "judges"]
        assert at.means.loc["top", "iou"] == pytest.approx(top.loc[judges, best].mean())
        own = table[(table["arm"] == "top") & (table["block"] == best) & table["prompt"].isin(judges)]
        assert at.means.loc["other prompts", "iou"] == pytest.approx(own["iou_other_prompts"].mean())


def test_a_choice_on_half_of_the_prompts_favours_nothing():
    rng, halved, whole = np.random.default_rng(1), [], []
    for _ in range(60):
        table = measured(rng, {}, prompts=8, noise=0.1)
        rows = choose_block(table).table.groupby("arm")["iou"].mean()
        halved.append(rows["top"] - rows["random"])
        means = table.groupby(["arm", "block"])["iou"].mean()
        best = means["top"].idxmax()
        whole.append(means["top"][best] - means["random"][best])
    error = np.std(halved) / len(halved) ** 0.5
    assert abs(np.mean(halved)) < 3 * error
    assert np.mean(whole) > 0.02  # what all prompts choose and judge


@pytest.mark.parametrize("null", ["component", "centre", "other prompts"])
@pytest.mark.parametrize(("level", "word"), [(0.3, "holds"), (0.5, "is undecided"), (0.7, "fails")])
def test_nulls_decide_as_controls_do(null, level, word):
    rng = np.random.default_rng(2)
    means = {"top": 0.5} | ({} if null == "other prompts" else {null: level})
    table = measured(rng, means, prompts=24, blocks=3, others=level if null == "other prompts" else 0.2)
    found = compared(table)
    assert found.verdict == word
    if word != "holds":
        assert f"; {null} " in found.brief


def test_differences_are_those_of_a_paired_t_test_where_noise_is_normal():
    table = measured(np.random.default_rng(3), {"top": 0.5, "random": 0.45}, prompts=40, blocks=2)
    found = sentences.subtract_controls(choose_block(table).table, "iou", over=RIVALS)
    judged = choose_block(table).table.pivot_table(index="prompt", columns="arm", values="iou")
    for arm in RIVALS:
        assert found.loc[arm, "iou"] == pytest.approx((judged["top"] - judged[arm]).mean())
        assert found.loc[arm, "iou_p"] == pytest.approx(ttest_rel(judged["top"], judged[arm]).pvalue, abs=0.02)


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_few_prompts_choose_nothing_and_the_page_says_so(prompts):
    table = measured(np.random.default_rng(4), {"top": 0.9}, prompts=prompts)
    assert choose_block(table) is None
    found = compared(table)
    assert found.verdict == "is undecided"
    assert f"{prompts} readable prompts cannot choose a block and judge it" in found.brief
    assert "name the block beforehand, such as site='blocks.7.img'" in describe_choice(table)
    said = sentences.describe_organisation(Result("organisation", table, table, {}))
    assert said.startswith("**The claim is undecided:**")


def test_a_block_that_was_named_is_judged_by_all_prompts():
    table = measured(np.random.default_rng(5), {"top": 0.9}, prompts=3, blocks=1)
    found = choose_block(table)
    assert (found.chosen_on, found.judged_on) == (0, 3)
    assert describe_choice(table).startswith(
        "block 0, named beforehand and judged on 3 prompts: the IoU of top lies 0.7"
    )
    said = sentences.describe_organisation(Result("organisation", table, table, {}))
    assert "It was named beforehand, and 3 prompts judge" in said


def test_of_several_steps_one_is_chosen_too():
    table = measured(np.random.default_rng(6), {"top": 0.4}, prompts=6, blocks=2)
    later = measured(np.random.default_rng(7), {"top": 0.6}, prompts=6, blocks=2).assign(step=9)
    both = pd.concat([table, later])
    assert choose_block(both).step == 9
    assert "at step 9, chosen on 3 prompts" in describe_choice(both)
