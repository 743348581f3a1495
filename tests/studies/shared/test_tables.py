"""Means of what was measured: a value that is missing is as a row that is not there."""

import numpy as np
import pandas as pd
import pytest

from dit_lens.studies.shared.tables import compare_arms, summarise


@pytest.fixture
def table():
    rng, lines = np.random.default_rng(0), []
    for p, s, arm in np.ndindex(5, 2, 2):
        value = np.nan if rng.random() < 0.3 else 10 * p + rng.normal()
        lines.append({"prompt": f"{p}", "seed": s, "k": 4, "arm": ("top", "random")[arm], "rmse": value})
    return pd.DataFrame(lines)


@pytest.mark.parametrize("seeded", [True, False])
def test_a_missing_value_is_as_a_row_that_is_not_there(table, seeded):
    table = table if seeded else table.drop(columns="seed")
    assert table["rmse"].isna().any()
    found, expected = (summarise(one, ["arm"], ["rmse"]).drop(columns="n") for one in (table, table.dropna()))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found["rmse_low"].notna().all()


def test_a_pair_of_which_one_is_missing_is_as_a_pair_that_is_not_there(table):
    whole = table.groupby(["prompt", "seed"])["rmse"].transform(lambda pair: pair.notna().all())
    found, expected = (compare_arms(one, ["k"], ["rmse"]) for one in (table, table[whole]))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found["rmse_top_minus_low"].notna().all()
