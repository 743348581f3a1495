"""The studies give the right, opposite answers on two models whose truth was built in."""

import numpy as np
import pandas as pd
import pytest

from dit_lens import DiTLens, studies
from dit_lens.studies.shared.judges import scene_judge
from tests import planted

PROMPTS = [scene.caption for scene in planted.SCENES]
K = 16


@pytest.fixture(scope="module")
def carrier(toy):
    return DiTLens(planted.pipeline(toy, planted.Carrier), defaults=planted.CALL)


@pytest.fixture(scope="module")
def detail(toy):
    return DiTLens(planted.pipeline(toy, planted.DetailOnly), defaults=planted.CALL)


@pytest.fixture(scope="module", params=["carrier", "detail"])
def model(request):
    return request.param, request.getfixturevalue(request.param)


def test_the_planted_channels_are_found(model):
    _, lens = model
    found = lens.massive_channels(PROMPTS, k=K, seed=0)
    assert all(set(channels) == set(range(K)) for channels in found.values())
    assert min(found.energy_share().values()) > 0.9


def test_both_draw_their_prompts(model):
    _, lens = model
    images = lens.run(PROMPTS, seed=0).images
    assert [scene_judge(image, prompt)["fidelity"] for image, prompt in zip(images, PROMPTS, strict=True)] == [1.0] * 4


def test_disruption(model):
    name, lens = model
    result = studies.disruption(lens, PROMPTS, k=K, draws=2, judge=scene_judge)
    rows = result.summary.set_index("arm")
    assert rows.loc["no-op", "rmse"] == 0
    assert not result.table.loc[result.table["arm"] == "energy-matched", "matched"].astype(bool).any()
    assert rows.loc["attenuated", "rmse"] < rows.loc["top", "rmse"]

    def differ(measure, arms):
        """By how much top exceeds the arms, in each of the prompts: so few say little of others."""
        pairs = result.table.groupby(["prompt", "arm"])[measure].mean().unstack("arm")
        return np.array([pairs["top"] - pairs[arm] for arm in arms])

    if name == "carrier":
        assert rows.loc["top", "rmse_low"] > 5 * rows.loc[["bottom", "random", "energy-matched"], "rmse_high"].max()
        assert rows.loc["top", "fidelity"] < 0.6
        assert rows.loc["random", "fidelity"] == 1
        assert differ("rmse", ["bottom", "random", "energy-matched"]).min() > 10
        assert differ("fidelity", ["bottom", "random", "energy-matched"]).max() < 0
        assert rows.loc["norm-kept", "rmse"] > 10
    else:
        assert rows.loc["top", "rmse"] < 0.5 * rows.loc[["random", "energy-matched"], "rmse"].min()
        assert rows.loc["energy-matched", "rmse_top_minus_high"] < 0  # four prompts that differ much say no more
        assert differ("rmse", ["random", "energy-matched"]).max() < 0
        assert rows.loc["norm-kept", "rmse"] < rows.loc["random", "rmse"] / 10
        assert rows.loc["top", "fidelity"] == 1


def test_results_are_saved_and_loaded(carrier, tmp_path):
    result = studies.organisation(carrier, PROMPTS[:2], k=K, draws=1, masks=planted.masks()[:2])
    loaded = studies.Result.load(result.save(tmp_path / "result"))
    for name in ("table", "summary"):
        one, other = getattr(result, name), getattr(loaded, name)
        assert list(one.columns) == list(other.columns)
        pd.testing.assert_frame_equal(one, other, check_dtype=False, check_exact=True)
    assert loaded.notes == result.notes
    assert loaded.settings["k"] == K
    assert all(np.array_equal(mask, loaded.masks[key]) for key, mask in result.masks.items())
    assert all(image.tobytes() == loaded.images[key].tobytes() for key, image in result.images.items())
    assert loaded.figure().to_plotly_json()["data"]
