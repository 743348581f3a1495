"""A study is found by its name, of today or of before; and everything about it is in its record."""

import pandas as pd
import pytest

from dit_lens import plots, studies
from dit_lens.errors import OpError, StoreError
from dit_lens.studies.shared.registry import find_study, get_study


def test_every_study_is_public_under_its_name():
    assert set(studies.STUDIES) <= set(studies.__all__)
    for name in studies.STUDIES:
        assert getattr(studies, name) is get_study(name).function
        assert get_study(name).question.endswith("?")


def test_every_figure_of_a_study_is_a_public_plot():
    for name in studies.STUDIES:
        figure = get_study(name).figure.__name__
        assert figure in plots.__all__
        assert getattr(plots, figure) is get_study(name).figure


def test_an_old_name_is_the_study_and_says_so():
    with pytest.warns(FutureWarning, match=r"births is called dit_lens\.studies\.write_attribution now"):
        assert studies.births is studies.write_attribution
    with pytest.warns(FutureWarning, match=r"births_figure is called dit_lens\.plots\.write_attribution_figure now"):
        assert plots.births_figure is plots.write_attribution_figure
    assert find_study("births") is find_study("write_attribution")
    assert find_study("phrenology") is None
    assert not hasattr(studies, "phrenology")
    with pytest.raises(StoreError, match=r"no study 'phrenology' in this version .* disruption"):
        get_study("phrenology")


def test_images_and_masks_are_found_by_what_was_done():
    images = {"0/0/4/top": "an image", "0/0/4/bottom": "another"}
    result = studies.Result("disruption", pd.DataFrame(), pd.DataFrame(), {}, images, {"0/0/truth": "a mask"})
    assert result.image(0, 0, k=4, arm="top") == "an image"
    assert result.mask(0, 0, arm="truth") == "a mask"
    with pytest.raises(OpError, match=r"no image '0/0/4/topp'\. Nearest: '0/0/4/top'\. All keys are in result\.images"):
        result.image(0, 0, k=4, arm="topp")
    with pytest.raises(OpError, match=r"no mask '9/9'\. All keys are in result\.masks"):
        result.mask(9, 9)
    with pytest.warns(FutureWarning, match=r"Result\.pictures is called images now"):
        assert result.pictures is images
