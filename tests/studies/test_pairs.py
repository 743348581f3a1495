"""Pairs of prompts: one prompt is no pair, and many pairs are compared as in every other study."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dit_lens import DiTLens, studies
from dit_lens.errors import PromptError
from dit_lens.studies.patching import assemble
from dit_lens.studies.shared.cells import Cell
from tests import pipelines


@pytest.mark.parametrize("study", [studies.transfer, studies.patching])
def test_a_prompt_is_no_pair_with_itself(monkeypatch, study):
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(PromptError, match=r"source and target are both 'a cat': under one noise they are one image"):
        study(lens, [("a dog", "a cat"), ("a cat", "a cat")])


def test_patches_of_many_pairs_are_compared_pair_by_pair():
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": f"{i}", "pair": i, "seed": 0, "row": "blocks.0.img", "column": column, "draw": draw, "effect": value}
        for i in range(8)
        for column, draw, value in (
            ("top", 0, rng.normal(0.6, 0.1)), ("random", 0, rng.normal(0.3, 0.1)), ("random", 1, rng.normal(0.3, 0.1)),
        )
    ]  # fmt: skip
    ends = [{**lines[0], "row": "untouched", "column": end} for end in ("source", "target")]
    settings = {"attribute": [], "over": "block x channel group", "k": 1, "width": 8}
    found = assemble(settings, [Cell(lines=[*ends, *lines])]).summary.set_index("column")
    wide = pd.DataFrame(lines).groupby(["pair", "column"])["effect"].mean().unstack("column")
    differences = wide["top"] - wide["random"]
    expected = stats.ttest_1samp(differences, 0)
    assert found.loc["random", "effect_top_minus"] == pytest.approx(differences.mean())
    assert found.loc["random", "effect_top_minus_p"] == pytest.approx(expected.pvalue, abs=1e-3)
    interval = expected.confidence_interval()
    assert found.loc["random", "effect_top_minus_low"] == pytest.approx(interval.low, abs=0.03)
    assert found.loc["random", "effect_top_minus_high"] == pytest.approx(interval.high, abs=0.03)
    assert np.isnan(found.loc["top", "effect_top_minus"])
