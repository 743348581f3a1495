"""Lists that users give: an iterator works as the list it gives, and what is named twice is no second measurement.

Forward passes are counted by a plain hook.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dit_lens import DiTLens, clusters, plots, studies
from dit_lens.errors import DitLensError, OpError, PromptError
from tests import pipelines

PAIR = ("red", "blue")
NO_K = {"num_inference_steps": 2, "seeds": [0]}
FEW = {"k": 2, **NO_K}
SOURCE = [Image.new("RGB", (48, 32), colour) for colour in ("red", "red", "blue")]


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


STUDIES = {
    "disruption": lambda lens, **given: studies.disruption(
        lens, **{"prompts": ["red"], "draws": 1, "confounds": False, **FEW, **given}
    ),
    "stability": lambda lens, **given: studies.stability(lens, **{"prompts": ["red"], **FEW, **given}),
    "organisation": lambda lens, **given: studies.organisation(
        lens, **{"prompts": ["red"], "draws": 1, "masks": lambda *_: np.eye(8, dtype=bool), "words": [], **FEW, **given}
    ),
    "write_attribution": lambda lens, **given: studies.write_attribution(lens, **{"prompts": ["red"], **FEW, **given}),
    "carrier_or_detail": lambda lens, **given: studies.carrier_or_detail(
        lens, **{"prompts": list(PAIR), "draws": 1, "judge": lambda *_: {"fidelity": 0.5}, **FEW, **given}
    ),
    "blocks": lambda lens, **given: studies.blocks(
        lens, **{"prompts": ["red"], "site": "blocks.3.img", "parts": "mlp", **NO_K, **given}
    ),
    "patching": lambda lens, **given: studies.patching(
        lens, **{"pairs": [PAIR], "site": "blocks.3.img", "attribute": (), **FEW, **given}
    ),
    "transfer": lambda lens, **given: studies.transfer(
        lens, **{"pairs": [PAIR], "draws": 1, "mask_from": None, "strengths": [1.0], **FEW, **given}
    ),
    "transfer_image": lambda lens, **given: studies.transfer_image(
        lens, **{"pairs": [(SOURCE[0], "blue")], "draws": 1, "mask_from": None, "strengths": [1.0], **FEW, **given}
    ),
    "sweep": lambda lens, **given: studies.sweep("stability", lens, ["red"], **{"num_inference_steps": 2, **given}),
}
PROMPTED = ("disruption", "blocks", "stability", "organisation", "write_attribution", "carrier_or_detail")
PAIRED = ("patching", "transfer", "transfer_image")
TWICE = [
    *((study, "prompts", ["red", "blue", "red"]) for study in PROMPTED),
    *((study, "seeds", given) for study in (*PROMPTED, *PAIRED) for given in ([0, 0], np.array([3, 3]))),
    *((study, "pairs", [PAIR, ("red", "green"), list(PAIR)]) for study in ("patching", "transfer")),
    ("transfer_image", "pairs", [(image, "blue") for image in SOURCE]),
    *((study, "k", given) for study in ("disruption", "transfer", "transfer_image") for given in ([2, 2], (4, 2, 4))),
    *((study, "strengths", [1.0, 0.5, 1]) for study in ("transfer", "transfer_image")),
    ("transfer", "strengths", [0.12345671, 0.12345672]),
    ("stability", "scores", ["|mean|", "rms", "|mean|"]),
    ("patching", "attribute", ["run", "run"]),
    ("blocks", "parts", ["mlp", "mlp"]),
    ("sweep", "over", {"k": [2, 2]}),
    ("sweep", "over", {"stable": [1, 0.5, 1.0]}),
    ("sweep", "over", {"seeds": [[0], 0]}),
]


@pytest.mark.parametrize(("study", "argument", "given"), TWICE)
def test_what_is_named_twice_is_told_before_a_run(lens, forwards, study, argument, given):
    error = PromptError if argument in ("prompts", "seeds") else OpError
    with pytest.raises(error, match="twice"):
        STUDIES[study](lens, **{argument: given})
    assert not forwards


def test_what_differs_is_measured_apart(lens):
    """Of two prompts, two k and two seeds every arm has its own lines: as many as they are."""
    call = {"prompts": ["red", "blue"], "k": [2, 4], "seeds": [0, 1], "num_inference_steps": 1}
    table = STUDIES["disruption"](lens, **call).table
    assert (table[table["arm"] == "top"].groupby("k").size() == 4).all()


def same(one, other):
    """Whether two answers are equal, whatever they are."""
    if isinstance(one, studies.Result):
        return same(one.table, other.table) and same(one.summary, other.summary) and one.settings == other.settings
    if isinstance(one, pd.DataFrame):
        return one.equals(other)
    return one == other if not hasattr(one, "to_json") else str(one.to_json()) == str(other.to_json())


# name -> (what calls the library with a list, the list)
LISTS = {
    "site of massive channels": (
        lambda lens, given: lens.massive_channels("red", 2, site=given, seed=0),
        ["blocks.1.img", "blocks.2.img"],
    ),
    "steps of massive channels": (lambda lens, given: lens.massive_channels("red", 2, steps=given, seed=0), [0, 1]),
    "site of a study": (lambda lens, given: STUDIES["disruption"](lens, site=given), ["blocks.1.img", "blocks.2.img"]),
    "steps of a study": (lambda lens, given: STUDIES["stability"](lens, steps=given), [1]),
    "steps of patching": (lambda lens, given: STUDIES["patching"](lens, steps=given), [1]),
    "distances": (lambda lens, given: STUDIES["disruption"](lens, distances=given), ["psnr", "mean_abs"]),
    "prompts": (lambda lens, given: STUDIES["stability"](lens, prompts=given), ["red", "blue"]),
    "swept values": (lambda lens, given: STUDIES["sweep"](lens, over={"k": given}), [2, 4]),
    "a fixed argument of a sweep": (
        lambda lens, given: STUDIES["sweep"](lens, over={"k": [2, 4]}, site=given),
        ["blocks.1.img", "blocks.2.img"],
    ),
    "sigmas": (
        lambda lens, given: STUDIES["stability"](lens, prompts=["red", "blue"], batch_size=1, sigmas=given),
        [1.0, 0.4],
    ),
    "tokens to cluster": (
        lambda _, given: clusters.cluster(given).tolist(),
        [[0.0], [10.0], [0.2], [9.0]],
    ),
    "labels of a figure": (lambda _, given: plots.strip(SOURCE[1:], given), ["a", "b"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_an_iterator_is_the_list_it_gives(lens, name):
    call, given = LISTS[name]
    wanted = call(lens, given)
    assert same(call(lens, (one for one in given)), wanted)


def test_an_iterator_without_end_is_told(lens, forwards):
    with pytest.raises(DitLensError, match=r"site= gives more than 1,048,576 values, or does not end"):
        lens.massive_channels("red", 2, site=itertools.repeat("blocks.1.img"))
    assert not forwards
