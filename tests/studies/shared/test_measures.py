"""Measures that users bring: each keeps a column of its own, or an error says why not, before anything is drawn."""

import functools

import numpy as np
import pytest
import torch

from dit_lens import DiTLens, metrics, studies
from dit_lens.errors import OpError, StoreError
from tests import pipelines

PAIR = ("red", "blue")
FEW = {"k": 2, "draws": 1, "site": "blocks.3.img", "num_inference_steps": 1}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


def named(name, value=1.0):
    """A distance of a name."""

    def distance(a, b):
        return value

    distance.__name__ = name
    return distance


def disrupt(lens, **given):
    return studies.disruption(lens, "red", **{"confounds": False, "distances": [], **FEW, **given})


@pytest.mark.parametrize(
    "distances",
    [
        [lambda a, b: 1.0, lambda a, b: 2.0],
        [functools.partial(metrics.rmse), functools.partial(metrics.psnr)],
        ["rmse", named("rmse")],
        [named("rmse"), "rmse"],
        [named("psnr")],
        *([named(name)] for name in ("fidelity", "arm", "prompt", "seed", "k", "k_share", "draw", "energy_share")),
        *([named(name)] for name in ("matched", "n", "rmse_low", "rmse_top_minus")),
        [named("mine"), named("mine_high")],
    ],
)
def test_distances_that_would_take_anothers_place(lens, forwards, distances):
    with pytest.raises(OpError, match="name"):
        disrupt(lens, distances=distances)
    assert not forwards


def test_distances_of_names_of_their_own(lens):
    one, other = functools.partial(metrics.rmse), functools.partial(metrics.mean_abs)
    one.__name__, other.__name__ = "one", "other"
    table = disrupt(lens, distances=["rmse", metrics.psnr, one, other, one]).table
    edited = table[table["arm"] == "top"]
    assert edited["one"].tolist() == edited["rmse"].tolist()
    assert (edited["other"] < edited["rmse"]).all()
    assert "psnr" in edited


@pytest.mark.parametrize("value", [torch.tensor(7.0), np.float32(7), np.array(7), np.int64(7), 7])
def test_a_distance_is_any_number(lens, value):
    table = disrupt(lens, distances=[named("mine", value)]).table
    assert set(table["mine"].dropna()) == {7.0}


def test_a_distance_that_gives_no_number_later_is_told(lens):
    answers = iter([1.0])
    with pytest.raises(OpError, match="'mine' of two images must be a number, but it returned None"):
        disrupt(lens, distances=[lambda_named("mine", lambda a, b: next(answers, None))])


def lambda_named(name, fn):
    fn.__name__ = name
    return fn


@pytest.mark.parametrize(
    "said",
    [
        *({name: 0.5} for name in ("arm", "rmse", "seed", "k", "prompt", "draw", "k_share", "energy_share", "n")),
        {"rmse_low": 0.5},
        {"mine": 0.5},
        {"clip": 0.5, "clip_top_minus": 0.5},
        {"min": 0.5},
    ],
)
def test_a_judge_that_would_take_anothers_place(lens, forwards, said):
    with pytest.raises(OpError, match=r"the judge <lambda>"):
        disrupt(lens, judge=lambda image, prompt: said, distances=[named("mine"), named("min_low")])
    assert len(forwards) <= 1  # the first image


def edit(lens, **given):
    return studies.carrier_or_detail(lens, ["red", "blue"], seeds=[0], **{**FEW, **given})


def transfer(lens, **given):
    return studies.transfer(lens, [PAIR], strengths=[1.0], mask_from=None, **{**FEW, **given})


def patch(lens, **given):
    return studies.patching(lens, [PAIR], attribute=(), **{**FEW, **given})


@pytest.mark.parametrize("said", [{name: 0.5, "fidelity": 1} for name in ("arm", "effect", "rmse", "source", "part")])
def test_a_judge_of_carrier_or_detail(lens, forwards, said):
    with pytest.raises(OpError, match=r"the judge <lambda> calls a measure"):
        edit(lens, judge=lambda image, prompt: said)
    assert len(forwards) <= 1


@pytest.mark.parametrize("study", [edit, transfer, patch])
def test_studies_that_go_by_the_fidelity_need_it(lens, forwards, study):
    with pytest.raises(OpError, match=r"'fidelity', and the judge <lambda> gave 'clip'\."):
        study(lens, judge=lambda image, prompt: {"clip": 0.5})
    assert len(forwards) <= 4  # the untouched images, and once more their latents


@pytest.mark.parametrize(
    ("study", "fidelity"),
    [*((study, 7) for study in (disrupt, edit, transfer, patch)), (disrupt, -0.1), (disrupt, torch.tensor(1.1))],
)
def test_fidelity_is_from_0_to_1(lens, study, fidelity):
    with pytest.raises(OpError, match=r"'fidelity' is from 0"):
        study(lens, judge=lambda image, prompt: {"fidelity": fidelity})


@pytest.mark.parametrize("fidelity", [0, 1 + 1e-9, np.float32(0.5), torch.tensor(0.5), True, None, float("nan")])
def test_what_a_fidelity_may_be(lens, fidelity):
    table = disrupt(lens, judge=lambda image, prompt: {"fidelity": fidelity}).table
    missing = fidelity is None or np.isnan(float(fidelity))
    assert table["fidelity"].isna().all() if missing else (table["fidelity"] == float(fidelity)).all()


def test_a_judge_and_a_swept_argument(lens, forwards):
    """The column of a swept argument takes the place of a study's own of that name; a measure's is never lost."""
    with pytest.raises(OpError, match="calls a measure 'site'"):
        studies.sweep(
            "disruption",
            lens,
            "red",
            over={"site": ["blocks.3.img"]},
            judge=lambda image, prompt: {"site": 0.5},
            **{name: value for name, value in FEW.items() if name != "site"},
        )
    assert len(forwards) <= 1


def test_a_folder_tells_a_distance_from_another_of_its_name(lens, tmp_path):
    disrupt(lens, distances=[named("mine", 1.0)], out=tmp_path / "study")
    again = disrupt(lens, distances=[named("mine", 1.0)], out=tmp_path / "study")
    assert set(again.table["mine"].dropna()) == {1.0}
    with pytest.raises(StoreError, match="mine"):
        disrupt(lens, distances=[named("mine", 2.0)], out=tmp_path / "study")
