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
    if name == "carrier":
        assert rows.loc["top", "rmse_low"] > 5 * rows.loc[["bottom", "random", "energy-matched"], "rmse_high"].max()
        assert rows.loc["top", "fidelity"] < 0.6
        assert rows.loc["random", "fidelity"] == 1
    else:
        assert rows.loc["top", "rmse"] < 0.5 * rows.loc[["random", "energy-matched"], "rmse"].min()
        assert rows.loc["energy-matched", "rmse_top_minus_high"] < 0  # four prompts that differ much say no more
        assert rows.loc["top", "fidelity"] == 1


def test_organisation(model):
    name, lens = model
    result = studies.organisation(lens, PROMPTS, k=K, draws=2, masks=planted.masks(), polarity="border")
    last = result.summary[result.summary["block"] == 3].set_index("arm")
    if name == "carrier":
        assert last.loc["top", "iou"] > 0.6
        assert last.loc["top", "iou"] > last.loc[["bottom", "random"], "iou"].max() + 0.3
        assert last.loc["top", "iou"] > last.loc["top", "chance"] + 0.3
    else:
        assert last.loc["top", "iou"] < last.loc["top", "chance"] + 0.1
        assert last.loc["random", "iou"] > last.loc["top", "iou"] + 0.3


def test_transfer(model):
    name, lens = model
    result = studies.transfer(
        lens,
        [(PROMPTS[0], PROMPTS[1]), (PROMPTS[2], PROMPTS[3])],
        k=K,
        draws=1,
        judge=scene_judge,
        **({"strengths": [0.5, 1.0]} if name == "carrier" else {"strengths": [1.0], "mask_from": None}),
    )
    rows = result.summary.set_index(["arm", "masked", "strength"]).sort_index()
    top, every, random = (rows.loc[(arm, False, 1.0)] for arm in ("top", "all", "random"))
    assert every["to_source"] < 1
    if name == "carrier":
        assert top["to_source"] < 0.1 * top["to_target"]
        assert random["to_target"] < 0.1 * random["to_source"]
        assert top["fidelity_source"] == 1
        half = rows.loc[("top", False, 0.5)]
        assert top["to_source"] < half["to_source"] < half["to_source"] + half["to_target"] < 1.2 * top["to_target"]
        inside = rows.loc[("top", True, 1.0)]
        assert inside["inside"] > 2 * inside["outside"]
    else:
        assert top["to_target"] < 0.1 * top["to_source"]
        assert top["fidelity_target"] == 1
        assert random["to_target"] > 5 * top["to_target"]


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
