"""What version 0.1.0 saved is loaded and says what it said then; three runs give the values they gave then."""

import copy
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dit_lens as dl
from dit_lens import ops
from dit_lens.analysis.channels import ChannelSet
from dit_lens.core.runs.run import Run
from dit_lens.errors import StoreError
from dit_lens.studies import Result
from tests.fixtures.saved_by_0_1_0 import make

SAVED = Path(make.__file__).parent
EXPECTED = json.loads((SAVED / "expected.json").read_text("utf-8"))
STUDIES = ("disruption", "births", "transfer", "sweep", "organisation")

# What a study and columns were called then, and are called now; columns of bounds are named after their measure.
NAMES = {
    "births": "write_attribution",
    "says_source": "fidelity_source",
    "says_target": "fidelity_target",
    "behind": "iou_gap",
    "others": "iou_other_prompts",
}


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch):
    """References to runs are relative to where they were saved."""
    monkeypatch.chdir(SAVED)


@pytest.fixture(scope="module")
def channels():
    return {
        name: ChannelSet.from_json(data) for name, data in json.loads((SAVED / "channels.json").read_text()).items()
    }


def as_json(values):
    """Values as JSON knows them: tuples are lists, keys are words."""
    return json.loads(json.dumps(values))


def assert_same(found, expected, where=""):
    """Equal, but for the last digits of numbers: other machines add up in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert found == expected, where


def assert_as_drawn_then(image, expected):
    """Grey levels differ by 1 at most in nearly every pixel, on whatever machine it is drawn."""
    apart = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert (apart <= 1).mean() >= 0.995


@pytest.mark.parametrize("name", ["run", "edits"])
def test_a_run(name):
    assert_same(as_json(make.of_run(Run.load(name))), EXPECTED[name])


@pytest.mark.parametrize("name", ["run", "edits"])
def test_a_run_is_run_again(name, toy):
    """Its ops are taken from its JSON, one of them with the values of another run."""
    saved = Run.load(name)
    again = saved.rerun(toy)
    assert max(again.reads.values()) < 1e-3
    assert len(again.reads) == sum(map(len, saved.readings))
    for image, expected in zip(again.b.images, saved.images, strict=True):
        assert_as_drawn_then(image, expected)
    assert [entry.site for entry in again.b.receipt.entries] == [entry.site for entry in saved.receipt.entries]


def test_ops(channels):
    saved = json.loads((SAVED / "ops.json").read_text())
    wanted = make.every_op(channels["massive"], Run.load("run"))
    for data, op in zip(saved, wanted, strict=True):
        loaded = ops.from_json(data)
        assert type(loaded) is type(op)
        for field in fields(op):
            assert_same_value(getattr(loaded, field.name), getattr(op, field.name))
        assert ops.to_json(loaded) == data
        assert ops.to_json(op) == data
    kinds = set(ops.OPS) - {
        "Apply",
        "Skip",
        "AttentionMask",
        "Guide",
        "Rope",
        "Feature",
        "ReadFeatures",
    }  # a function has no JSON form, and the others came later
    assert {data["op"] for data in saved} == kinds


def assert_same_value(found, expected):
    """Of an op's field: tensors and arrays by what is in them, runs by what they read, sequences without their type."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, Run):
        assert isinstance(found, Run)
        assert_same(as_json(make.of_run(found)), as_json(make.of_run(expected)))
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected)
    elif hasattr(expected, "keys"):
        assert list(found) == list(expected)
        for key in expected:
            assert_same_value(found[key], expected[key])
    else:
        assert as_json(found) == as_json(expected) if isinstance(expected, tuple | list) else found == expected


@pytest.mark.parametrize("name", ["massive", "control"])
def test_a_set_of_channels(name, channels):
    found = channels[name]
    facts = {
        "heading": repr(found).split("\n", maxsplit=1)[0],
        "channels": dict(found),
        "energy share": found.energy_share(),
        "scores": {site: make.of_array(values) for site, values in found.scores.items()},
    }
    assert_same(as_json(facts), EXPECTED["channels"][name])


def today(name):
    """What a study, or a column of one, is called today."""
    for then, now in NAMES.items():
        name = re.sub(rf"(^|_){then}(_low|_high|$)", rf"\1{now}\2", name)
    return name


def without_intervals(table, columns):
    """A table as JSON with these columns, but for bounds of intervals."""
    kept = [name for name in table["columns"] if name in columns and not name.endswith(("_low", "_high"))]
    places = [table["columns"].index(name) for name in kept]
    return {"columns": kept, "data": [[row[i] for i in places] for row in table["data"]]}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study(study):
    """Four folders of ``out=``, one of them a sweep's, and a result that was saved."""
    result, expected = Result.load(study), copy.deepcopy(EXPECTED[study])
    assert (SAVED / study / ("result.json" if study == "organisation" else "study.json")).exists()
    found = as_json(make.of_result(result, result.images))
    assert found["study"] == today(expected["study"])
    if study == "sweep":
        expected["settings"]["study"] = today(expected["settings"]["study"])
    for table in ("table", "summary"):
        expected[table]["columns"] = [today(column) for column in expected[table]["columns"]]
    if study != "organisation":  # whose summary was saved itself; others are summarised anew, with today's intervals
        found["summary"] = without_intervals(found["summary"], expected["summary"]["columns"])
        expected["summary"] = without_intervals(expected["summary"], expected["summary"]["columns"])
    for part in ("table", "summary", "images", "masks", "settings"):
        assert_same(found[part], expected[part], part)
    numbers = [[re.findall(r"\d+(?:\.\d+)?", note) for note in notes] for notes in (found["notes"], expected["notes"])]
    assert numbers[0] == numbers[1]
    assert result.figure().data


@pytest.mark.parametrize("study", ["disruption", "births"])
def test_a_study_goes_on(study, toy, tmp_path, monkeypatch):
    """The call that filled a folder finds every cell there, and draws nothing."""
    folder = shutil.copytree(SAVED / study, tmp_path / study)
    monkeypatch.setattr(toy, "run", lambda *_, **__: pytest.fail("drawn"))
    few = {"k": 2, "seeds": [0], **make.CALL, "out": folder}
    if study == "disruption":
        result = dl.studies.disruption(toy, make.PROMPTS[:1], **few, draws=1, confounds=False)
    else:
        result = dl.studies.write_attribution(toy, make.PROMPTS[:1], **few, site="blocks.1.img")
    assert result.table.equals(Result.load(study).table)


def test_a_study_that_has_other_arms_today_does_not_go_on(toy, tmp_path, monkeypatch):
    folder = shutil.copytree(SAVED / "transfer", tmp_path / "transfer")
    monkeypatch.setattr(toy, "run", lambda *_, **__: pytest.fail("drawn"))
    few = {"k": 2, "seeds": [0], "draws": 1, "strengths": 1.0, "site": "blocks.7.img", "mask_from": None}
    with pytest.raises(StoreError, match="an earlier release of dit_lens, whose transfer had no no_modulation"):
        dl.studies.transfer(toy, [tuple(make.PROMPTS)], **few, **make.CALL, out=folder)


def test_three_runs(toy):
    """Reads, edits and a swap between rows, computed anew."""
    then, found = load_file(SAVED / "three_runs.safetensors"), make.of_three_runs(toy)
    assert found.keys() == then.keys()
    for name, expected in then.items():
        value = found[name]
        assert value.shape == expected.shape, name
        if "/image " in name:
            assert_as_drawn_then(value, expected)
        else:
            assert (value - expected).norm() <= 1e-3 * expected.norm(), name
