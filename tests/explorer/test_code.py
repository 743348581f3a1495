"""The code of a result or figure makes the same again."""

import inspect

import pandas as pd
import pytest
import torch
from PIL import Image

import dit_lens as dl

CIRCLE = "a big red circle left on a checkered blue background"
CROSS = "a small white cross right on a plain green background"
PROMPTS = [CIRCLE, CROSS]
CALL = {"k": 4, "num_inference_steps": 1, "true_cfg_scale": 1.0}
MADE = {
    "disruption": ([PROMPTS], {"draws": 1, "confounds": False, **CALL}),
    "organisation": ([PROMPTS], {"draws": 1, "site": "blocks[4:6].img", "polarity": "border", **CALL}),
    "transfer": ([[(CROSS, CIRCLE)]], {"draws": 1, "strengths": [0.5], "mask_from": None, "steps": 0, **CALL}),
    "stability": ([PROMPTS], {"seeds": [0, 3], "site": "blocks[6:8].img", **CALL}),
    "write_attribution": ([PROMPTS], {"site": "blocks.2.img", **CALL}),
    "blocks": ([PROMPTS], {"parts": ["mlp"], "site": "blocks.2.img", "draws": 0, "num_inference_steps": 1}),
    "patching": ([[(CROSS, CIRCLE)]], {"over": "block x step", "attribute": (), **CALL}),
}


@pytest.mark.parametrize("study", MADE)
def test_the_code_of_a_result_makes_it_again(toy, study):
    arguments, options = MADE[study]
    result = getattr(dl.studies, study)(toy, *arguments, **options)
    *made, shown = result.code.splitlines()
    assert shown == "result.figure()"
    found = {"lens": toy}
    exec("\n".join(made), found)
    assert found["result"].settings == result.settings
    pd.testing.assert_frame_equal(found["result"].summary, result.summary)
    assert result.figure().layout.meta["code"] == result.code


def test_code_names_the_users_thresholds_and_judges():
    thresholds = {"bound": 0.2, "ceiling": 0.8, "readable": 0.5}
    settings = {"prompts": [CIRCLE], "k": 4, "thresholds": thresholds, "judge": "mine", "attributes": [{"size": "big"}]}
    code = dl.studies.Result("carrier_or_detail", None, None, settings).code
    assert "thresholds=dl.studies.Thresholds(bound=0.2, ceiling=0.8, readable=0.5)," in code
    assert "judge=...,  # mine" in code
    assert "attributes" not in code


def test_the_code_of_a_figure_makes_it_again():
    """Arguments that cannot be written as code stand as their names, so that the code runs where they are defined."""
    scores = torch.tensor([0.1, 9.0, 0.2])
    figure = dl.plots.channel_spectrum(scores, [1], site="blocks.3.img", by_rank=True)
    code = figure.layout.meta["code"]
    assert "    scores,  # Tensor [3]\n    [1],\n    site='blocks.3.img',\n    by_rank=True,\n" in code
    again = eval(code.split("\n\n")[1], {"dl": dl, "scores": scores})
    assert again.to_json() == figure.to_json()
    assert "images,  # list 1" in dl.plots.strip([Image.new("RGB", (8, 8))], ["red"]).layout.meta["code"]


def test_every_plot_has_its_code():
    figures = [getattr(dl.plots, name) for name in dl.plots.__all__]
    plots = [one for one in figures if inspect.isfunction(one) and one is not dl.plots.looks]
    assert len(plots) >= 17
    assert all(hasattr(one, "__wrapped__") for one in plots)
