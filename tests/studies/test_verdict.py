"""The rules of the verdict: against tests of scipy, on tables where the answer is known, and how often they err."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from dit_lens.studies.parts.verdict import (
    Thresholds,
    compare_controls,
    compare_parts,
    decide_necessity,
    decide_sufficiency,
    name_cell,
    take_shares,
)
from tests.studies.operating_curve import count_answers


def test_answers_are_those_of_paired_t_tests():
    """Of normal effects under one seed: Student's test of the bound for every control, and Holm's steps by hand."""
    rng = np.random.default_rng(0)
    agree, said = 0, set()
    for _ in range(150):
        truth = rng.uniform(-0.2, 0.5)
        common = rng.normal(0, 0.2, (40, 1))
        controls = {name: common + rng.normal(0, 0.1, (40, 1)) for name in "abc"}
        top = common + truth + rng.normal(0, 0.25, (40, 1))
        tests = {name: ttest_1samp((top - control)[:, 0] - 0.1, 0) for name, control in controls.items()}
        ordered = sorted(tests.values(), key=lambda one: one.pvalue)
        passed = []
        for one, level in zip(ordered, (0.05 / 3, 0.05 / 2, 0.05), strict=True):
            if one.pvalue > level:
                break
            passed.append(one.statistic > 0)
        expected = "no" if False in passed else "yes" if len(passed) == 3 else "undecided"
        found = compare_controls(top, controls, np.ones((40, 1)))
        agree += found.says == expected
        said.add(expected)
    assert said == {"yes", "no", "undecided"}
    assert agree >= 145  # the interval of skewed values is a little longer than Student's


def test_a_share_is_the_ratio_of_means_over_prompts():
    """Its interval is Fieller's: of the shares r at which the mean of effect - r most could be 0."""
    rng = np.random.default_rng(1)
    most = rng.uniform(0.3, 1, (50, 1))
    effect = 0.4 * most + rng.normal(0, 0.1, (50, 1))
    found = take_shares(effect, most).interval()
    assert found.mean == pytest.approx(effect.mean() / most.mean())
    tried = np.linspace(0, 1, 2001)
    inside = [r for r in tried if ttest_1samp((effect - r * most)[:, 0], 0).pvalue >= 0.05]
    assert (found.low, found.high) == pytest.approx((inside[0], inside[-1]), abs=0.004)


def test_every_prompt_counts_the_same_in_a_share():
    effect = np.array([[1.0, 1.0, 1.0], [0.0, np.nan, np.nan], [0.5, 0.5, np.nan]])
    assert take_shares(effect, np.ones((3, 3))).mean == pytest.approx(0.5)
    assert np.isnan(take_shares(effect, np.zeros((3, 3))).mean)  # nothing could be had


def test_values_lie_within_their_limits():
    rng = np.random.default_rng(2)
    for _ in range(50):
        most = rng.choice([1 / 6, 0.5, 1.0], (9, 2))
        shares = take_shares(rng.choice([-1.0, 0.0, 1 / 3, 1.0], (9, 2)), most)
        assert shares.limits[0] <= shares.values.min() <= shares.values.max() <= shares.limits[1]
        shares.interval()  # which refuses values beyond


@pytest.fixture
def effects():
    """[64, 1] each, which differ a little from prompt to prompt."""
    rng = np.random.default_rng(3)
    return lambda mean: np.clip(mean + rng.normal(0, 0.1, (64, 1)), -1, 1)


@pytest.mark.parametrize(
    ("top", "controls", "says"),
    [
        (0.5, (0.0, 0.1, 0.2), "yes"),
        (0.5, (0.0, 0.1, 0.5), "no"),  # as much as one control
        (0.2, (0.6, 0.7, 0.6), "no"),  # less than the controls
        (0.05, (0.0, 0.0, 0.0), "no"),  # more, but too little to count
        (0.1, (0.0, 0.0, 0.0), "undecided"),  # at the bound nothing can be shown
    ],
)
def test_yes_and_no_are_shown_against_controls(effects, top, controls, says):
    found = compare_controls(
        effects(top), {name: effects(one) for name, one in zip("abc", controls, strict=True)}, np.ones((64, 1))
    )
    assert found.says == says
    assert found.control == "c" or top < 0.5


def test_no_answer_without_ceiling_or_readable_images(effects):
    top, none, ones = effects(0.6), {"bottom": effects(0.0)}, np.ones((64, 1))
    limits = Thresholds()
    assert decide_necessity(top, none, ones, 0.5, limits).says == "yes"
    low = decide_necessity(top, none, ones, 0.49, limits)
    assert low[:2] == ("undecided", "only 49% of the images are readable without them")
    every = effects(0.9)
    assert decide_sufficiency(top, none, every, ones, 1.0, limits).says == "yes"
    assert decide_sufficiency(top, none, every, ones, 0.2, limits).why.endswith("readable with them moved")
    seven = effects(0.7)
    capped = decide_sufficiency(top, none, seven, ones, 1.0, limits)
    assert capped[:2] == ("undecided", f"moving all channels gains {seven.mean():.2f} of what is missing, below 0.8")
    assert decide_necessity(top, none, ones, np.nan, limits).says == "undecided"


def test_what_all_channels_do_not_move_says_nothing_against_some(effects):
    """Where the text enters beside the channels, only a yes can be shown."""
    none, every, ones = {"bottom": effects(0.0)}, effects(0.9), np.ones((64, 1))
    for top, alone, says in ((0.0, 0.9, "no"), (0.0, 0.2, "undecided"), (0.5, 0.2, "yes")):
        found = decide_sufficiency(effects(top), none, every, ones, 1.0, Thresholds(), effects(alone))
        assert found.says == says
    assert (
        "but all channels of these sites alone gain 0."
        in decide_sufficiency(effects(0.0), none, every, ones, 1.0, Thresholds(), effects(0.2)).why
    )


def test_a_share_of_the_ceiling(effects):
    """Of a ceiling of a half, what gains 0.08 gains 0.16 of it: more than the bound."""
    every, top = effects(0.5), np.full((64, 1), 0.08) + 0.01 * effects(0.0)
    none = {"bottom": 0.01 * effects(0.0)}
    assert compare_controls(top, none, every).says == "yes"
    assert compare_controls(top, none, np.ones((64, 1))).says == "no"


@pytest.mark.parametrize(
    ("one", "other", "says"), [(0.6, 0.1, "first"), (0.1, 0.6, "second"), (0.3, 0.3, "equal"), (0.4, 0.3, "undecided")]
)
def test_parts_are_compared_with_each_other(effects, one, other, says):
    assert compare_parts(effects(one), effects(other), np.ones((64, 1))) == says


def test_too_few_images_decide_nothing():
    lone = compare_controls(np.ones((1, 1)), {"bottom": np.zeros((1, 1))}, np.ones((1, 1)))
    assert lone[:2] == ("undecided", "1 prompts give no interval against bottom")
    assert compare_controls(np.ones((9, 1)), {}, np.ones((9, 1))).says == "undecided"
    unread = compare_controls(np.ones((9, 1)), {"bottom": np.full((9, 1), np.nan)}, np.ones((9, 1)))
    assert unread.says == "undecided"


def test_cells():
    answers = ("yes", "no", "undecided")
    named = {(need, bring): name_cell(need, bring) for need in answers for bring in answers}
    assert named["yes", "yes"] == "necessary and movable"
    assert named["no", "yes"] == "movable, not necessary"
    assert sum(cell == "undecided" for cell in named.values()) == 5
    assert len(set(named.values())) == 5


def test_the_verdict_is_right_as_often_as_the_docs_say():
    """docs/concepts/carrier-or-detail.md has the same simulation with a thousand studies a number."""
    carrier = "necessary and movable"
    none = count_answers(40, 64, 0.0, 0.0)
    assert none.get(carrier, 0) <= 0.05
    assert none["neither"] > 0.8
    assert count_answers(25, 64, 1.0, 1.0)[carrier] >= 0.95
    assert count_answers(25, 64, 0.3, 0.3).get("undecided", 0) < 0.5
    assert count_answers(20, 64, 1.0, 0.0)["necessary, not movable"] > 0.8
    assert count_answers(20, 64, 0.0, 1.0)["movable, not necessary"] > 0.8
