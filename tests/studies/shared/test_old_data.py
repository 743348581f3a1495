"""What earlier releases saved is read under today's names, and nothing else is renamed."""

import json

import pytest

from dit_lens.studies.shared.old_data import update_cell, update_study

COLUMNS = ["prompt", "says_source", "matched_says_target_low", "behind", "others"]


def saved(study, /, **settings):
    table = {"data": [["picture 0 -> a cat", 0.5, 0.25, 0.1, 0.2]], "columns": COLUMNS}
    return {"format": 1, "study": study, "settings": settings, "table": table, "pictures": {"0/0": "0000.png"}}


def test_a_result_is_read_under_todays_names():
    before = saved("transfer", pictures=["a digest"], k=[4])
    copied = json.loads(json.dumps(before))
    new = update_study(before)
    assert before == copied
    assert new["images"] == {"0/0": "0000.png"}
    assert new["settings"] == {"images": ["a digest"], "k": [4]}
    columns = ["prompt", "fidelity_source", "matched_fidelity_target_low", "behind", "others"]
    assert new["table"] == {"data": [["image 0 -> a cat", 0.5, 0.25, 0.1, 0.2]], "columns": columns}
    assert update_study(new) == new


@pytest.mark.parametrize(
    ("study", "settings"), [("organisation", {}), ("sweep", {"study": "organisation", "over": {"k": [1]}})]
)
def test_columns_are_those_of_the_study_that_wrote_them(study, settings):
    """A judge may call its own numbers "others"."""
    columns = update_study(saved(study, **settings))["table"]["columns"]
    assert columns == ["prompt", "says_source", "matched_says_target_low", "iou_gap", "iou_other_prompts"]
    assert update_study(saved("disruption"))["table"]["columns"] == COLUMNS


def test_names_of_studies():
    assert update_study(saved("births"))["study"] == "write_attribution"
    assert update_study(saved("sweep", study="births", over={}))["settings"]["study"] == "write_attribution"
    assert update_study(saved("phrenology"))["study"] == "phrenology"


def test_a_cell():
    cell = {"key": "0/0", "lines": [{"prompt": "a", "behind": None}], "pictures": {"0/0": "0000.png"}, "parts": []}
    expected = {"key": "0/0", "lines": [{"prompt": "a", "iou_gap": None}], "images": {"0/0": "0000.png"}, "parts": []}
    assert update_cell(cell, "organisation") == expected
    assert update_cell(expected, "organisation") == expected
