"""How many prompts decide which difference, against simulated studies."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from dit_lens.errors import OpError
from dit_lens.studies import Result, power


def share_found(difference, spread, n, level=0.05, runs=20_000):
    """How often the t-test of SciPy finds a difference in simulated prompts."""
    drawn = np.random.default_rng(n).normal(difference, spread, (runs, n))
    return np.mean(ttest_1samp(drawn, 0, axis=1).pvalue < level)


@pytest.mark.parametrize("n", [2, 3, 8, 16, 64])
def test_the_difference_that_is_decided_is_found_as_often_as_asked(n):
    decides = power(3.0, prompts=n, power=0.8)["decides"].item()
    assert share_found(decides, 3.0, n) == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("asked", [0.5, 0.9])
def test_the_fewest_prompts_are_enough_and_one_less_is_not(effect, asked):
    needs = power(2.0, difference=2 * effect, power=asked)["needs"].item()
    assert share_found(effect, 1, needs) >= asked - 0.015
    assert needs == 2 or share_found(effect, 1, needs - 1) <= asked + 0.015


def test_a_result_says_it_of_every_control_with_the_level_shared_among_them():
    rng = np.random.default_rng(0)
    lines = []
    for prompt in range(12):
        for seed in (0, 1):
            base = rng.normal(50, 5)
            shared = {"prompt": str(prompt), "seed": seed}
            lines.append({"arm": "top", "draw": 0, "rmse": base + 8, **shared})
            lines += [{"arm": "random", "draw": i, "rmse": base + rng.normal(0, 4), **shared} for i in range(3)]
            lines += [{"arm": "bottom", "draw": 0, "rmse": base + rng.normal(7, 6), **shared}]
            lines += [{"arm": "untouched", "draw": 0, "rmse": np.nan, **shared}]
    table = pd.DataFrame(lines)
    found = power(Result("disruption", table, pd.DataFrame(), {})).set_index("arm")
    assert sorted(found.index) == ["bottom", "random"]
    wide = table[table["arm"] != "untouched"].groupby(["arm", "prompt"])["rmse"].mean().unstack("arm")
    for arm in found.index:
        pairs = wide["top"] - wide[arm]
        assert found.loc[arm, "spread"] == pytest.approx(pairs.std())
        assert found.loc[arm, "difference"] == pytest.approx(pairs.mean())
        assert share_found(found.loc[arm, "decides"], pairs.std(), 12, level=0.025) == pytest.approx(0.8, abs=0.015)
        assert found.loc[arm, "needs"] == power(pairs.std(), pairs.mean(), level=0.975)["needs"].item()


def test_levels_of_a_transport_are_no_arms():
    rng = np.random.default_rng(1)
    arms = ("top", "random", "ceiling", "mean-picture", "grey", "untouched")
    lines = [
        {"arm": arm, "prompt": str(i), "seed": 0, "specificity": rng.normal(9 * (arm == "top"), 1.0)}
        for i in range(6)
        for arm in arms
    ]
    table = pd.DataFrame(lines)
    found = power(Result("transfer", table, pd.DataFrame(), {}))
    assert found["arm"].tolist() == ["random"]
    wide = table.pivot(index="prompt", columns="arm", values="specificity")
    alone = power(float((wide["top"] - wide["random"]).std()), prompts=6)  # one comparison: the whole level is its own
    assert found["decides"].item() == pytest.approx(alone["decides"].item())


def test_what_cannot_be_answered_is_told():
    assert np.isnan(power(1.0, difference=0.0)["needs"].item())
    assert np.isnan(power(1.0, difference=1e-6)["needs"].item())
    lone = pd.DataFrame({"arm": ["top", "random"], "prompt": ["a", "a"], "seed": [0, 0], "rmse": [1.0, 2.0]})
    for wrong, message in [
        (lambda: power(1.0), "a spread alone says nothing"),
        (lambda: power(-1.0, 1.0), "pilot=-1.0 is out of range"),
        (lambda: power(1.0, 1.0, power=1.0), "power=1.0 is out of range"),
        (lambda: power(1.0, 1.0, prompts=1), "prompts=1 is out of range"),
        (lambda: power(Result("disruption", lone, lone, {})), "two prompts or more, and random shares fewer"),
        (lambda: power(Result("disruption", lone, lone, {}), measure="rmsee"), "no measure 'rmsee'.*'rmse'"),
        (
            lambda: power(Result("carrier_or_detail", lone.assign(part="mean", effect=0.1), lone, {})),
            r"carrier_or_detail asks several questions\. Give the spread of one",
        ),
        (lambda: power(Result("disruption", lone, lone, {}), base="topp"), "no arm is called 'topp'.*'top'"),
    ]:
        with pytest.raises(OpError, match=message):
            wrong()
