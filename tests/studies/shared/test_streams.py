"""Random controls have random numbers of their own, and cells that were drawn otherwise are not mixed with new ones."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_lens as dl
from dit_lens.channels import top_channels
from dit_lens.errors import StoreError
from dit_lens.studies.shared.arms import add_controls, count_arms
from dit_lens.studies.shared.streams import make_stream
from tests.fixtures.saved_by_0_1_0 import make

SAVED = Path(make.__file__).parent


def test_no_two_draws_share_a_stream():
    parts = list(itertools.product(range(5), ["a", "b", "1", ""], range(5), ["random", "energy-matched"], range(5)))
    parts += [(seed, k) for seed in range(30) for k in range(30)] + [("a", "b"), ("ab",), ("", "ab"), (1,), ("1",)]
    parts += [(0,), (0, 0), (0, 0, 0), (2**40, 1), (1, 2**40), (1, 256), (1 + 2**32, 0), (1, 1, 0)]
    assert len({make_stream(*some) for some in parts}) == len(set(parts))


def test_streams_stay_what_they_are():
    """Saved studies go on with them."""
    entropy = np.random.SeedSequence([2, 0, 3, 7])
    assert make_stream(3, 7) == int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


@pytest.fixture(scope="module")
def top():
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    energy = 1 + torch.rand(40, generator=torch.Generator().manual_seed(1)) / 10  # many maps are as good as the best
    return top_channels({"blocks.0.img": scores}, {"blocks.0.img": energy}, k=6)


def draws(arms, name):
    return [tuple(arm.sets[row]["blocks.0.img"]) for arm in arms if arm.name == name for row in range(len(arm.sets))]


@pytest.mark.parametrize(("name", "least"), [("random", 36), ("energy-matched", 12)])
def test_seeds_images_and_draws_have_other_channels(top, name, least):
    found = []
    for seed, k in itertools.product(range(3), range(2)):
        found += draws(add_controls([top, top], 3, seed, ["red", "blue"], k), name)
    assert len(found) == 36
    assert len(set(found)) >= least


def test_an_image_keeps_its_draws_in_whatever_company(top):
    alone = add_controls([top], 4, 0, ["blue"], 6)
    among = add_controls([top, top], 4, 0, ["red", "blue"], 6)
    assert len(alone) == count_arms(4) == 2 + 4 + 3
    assert [arm.sets[0] for arm in alone] == [arm.sets[1] for arm in among]
    assert [(arm.name, arm.draw) for arm in alone][-4:] == [("random", 3), *(("energy-matched", i) for i in range(3))]


def test_a_folder_with_other_streams_is_loaded_and_not_continued(toy, tmp_path):
    folder = shutil.copytree(SAVED / "disruption", tmp_path / "disruption")
    call = {"k": 2, "seeds": [0], "draws": 1, "confounds": False, **make.CALL, "out": folder}
    before = dl.studies.disruption(toy, make.PROMPTS[:1], **call)
    last = max((folder / "cells").iterdir())
    shutil.rmtree(last)
    with pytest.raises(StoreError, match=r"drew other random controls: new cells do not go with.*Result\.load"):
        dl.studies.disruption(toy, make.PROMPTS[:1], **call)
    assert len(dl.studies.Result.load(folder).table) == len(before.table) - 1
    study = folder / "study.json"
    study.write_text(json.dumps({**json.loads(study.read_text()), "streams": 2}))
    assert len(dl.studies.disruption(toy, make.PROMPTS[:1], **call).table) == len(before.table)
