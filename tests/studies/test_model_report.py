"""A model report reads back as it was written, and what is none is refused, with the file and what is wrong."""

import copy
import gzip
import hashlib
import json
import random

import pandas as pd
import pytest

from dit_lens.errors import StoreError
from dit_lens.studies import ModelReport, Result
from dit_lens.studies.shared.schema import find_mistakes, load_schema
from tests.reports import CONTENT, TABLE, made_up

SCHEMA = load_schema("model_report.schema.json")


@pytest.fixture(scope="module")
def standard():
    """A checker by the standard, imported here since it takes seconds."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator(SCHEMA)


def test_it_reads_back_as_it_was_written(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    report = made_up()
    file = report.save(tmp_path)
    for path in (tmp_path, file):
        again = ModelReport.load(path)
        pd.testing.assert_frame_equal(again.table, TABLE, check_dtype=False)
        assert again.table["seed"].tolist() == [0, 1, 2, 3]
        assert again.table["rmse"].tolist()[:2] == TABLE["rmse"].tolist()[:2]  # to the last bit
        assert {name: again.content[name] for name in CONTENT} == CONTENT
    assert again.verdicts["verdict"].tolist() == ["holds", "undecided"]
    assert repr(again).startswith("someone/a-model: turri2026, 3 prompts, 4 rows\n  claim 1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sorted(before) == ["notes.txt", "pictures.csv.gz", "result.json"]


def test_the_file_is_one_that_others_can_check_and_read(tmp_path, standard):
    made_up().save(tmp_path)
    standard.validate(json.loads((tmp_path / "result.json").read_text()))
    others = pd.read_csv(tmp_path / "pictures.csv.gz", float_precision="round_trip", keep_default_na=False)
    assert others["prompt"].tolist() == ['a "cat", asleep', "zwei Hunde\nund é", "NA", ""]


def places(value, path=()):
    """Every entry of nested data, by its path."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


ODD = (None, True, -1, 0, 2.5, "", "x", [], {}, ["x"], {"x": 1}, [None], float("inf"))


def test_it_finds_what_a_checker_of_the_standard_finds(tmp_path, standard):
    made_up().save(tmp_path)
    good = json.loads((tmp_path / "result.json").read_text())
    dice = random.Random(0)
    assert not list(find_mistakes(good, SCHEMA))
    wrong = 0
    for _ in range(600):
        data = copy.deepcopy(good)
        *outer, last = dice.choice([path for path in places(good) if path])
        at = data
        for key in outer:
            at = at[key]
        match dice.randrange(3) if isinstance(at, dict) else 0:
            case 0:
                at[last] = dice.choice(ODD)
            case 1:
                del at[last]
            case 2:
                at["more"] = dice.choice(ODD)
        if "Infinity" in json.dumps(data):
            continue  # no JSON
        found = bool(list(find_mistakes(data, SCHEMA)))
        assert found != standard.is_valid(data), list(standard.iter_errors(data)) or data
        wrong += found
    assert 200 < wrong < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("verdicts"), r"result\.json is no model report of schema 1: the whole lacks 'verdicts'"),
        (lambda data: data.update(schema=2), "schema is 2, and not 1"),
        (lambda data: data["model"].update(width=0), "model.width is 0, which is below 1"),
        (lambda data: data["verdicts"][0].update(verdict=None), r"verdicts\[0\]\.verdict is None, which is no string"),
        (lambda data: data.update(energy_share=float("nan")), "energy_share is nan, which is no number or null"),
        (lambda data: data["table"].update(file="../../etc/passwd"), "table.file is '../../etc/passwd', and not"),
        (lambda data: data.update(extra=1), "has 'extra', which the format does not know"),
        (lambda data: data["table"].update(rows=3), "has 4 rows of study, .* tells of 3 rows"),
        (lambda data: data["table"]["columns"].update(prompt="number"), "a value that is of no such kind"),
        (lambda data: data["table"].update(sha256="0" * 64), "its hash is another"),
    ],
)
def test_what_does_not_conform_is_named(tmp_path, change, message):
    file = made_up().save(tmp_path)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=message) as caught:
        ModelReport.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "swapped", "missing", "text"])
def test_a_damaged_table_is_named(tmp_path, damage):
    made_up().save(tmp_path)
    file = tmp_path / "pictures.csv.gz"
    packed = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(packed[: len(packed) // 2])
        case "swapped":
            file.write_bytes(gzip.compress(b"study\nx\n"))
        case "missing":
            file.unlink()
        case "text":
            file.write_text("study,prompt\n")
    with pytest.raises(StoreError, match=r"pictures\.csv\.gz"):
        ModelReport.load(tmp_path)


def test_a_table_larger_than_said_is_not_unpacked_whole(tmp_path, monkeypatch):
    file = made_up().save(tmp_path)
    packed = gzip.compress(b"a" * 2_000_000)
    (tmp_path / "pictures.csv.gz").write_bytes(packed)
    data = json.loads(file.read_text())
    data["table"]["sha256"] = hashlib.sha256(packed).hexdigest()
    file.write_text(json.dumps(data))
    monkeypatch.setattr("dit_lens.studies.model_report.LARGEST_JSON", 1_000_000)
    with pytest.raises(StoreError, match="larger than 0 MiB when unpacked"):
        ModelReport.load(tmp_path)


def test_what_does_not_conform_is_not_written(tmp_path):
    with pytest.raises(StoreError, match=r"energy_share is 'x', which is no number or null"):
        made_up(energy_share="x").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_result_of_one_study_is_said_to_be_one(tmp_path):
    frame = pd.DataFrame({"arm": ["top"]})
    Result("disruption", frame, frame, {}).save(tmp_path / "one")
    with pytest.raises(StoreError, match=r"is the result of one study, 'disruption', and no model report"):
        ModelReport.load(tmp_path / "one")
    with pytest.raises(StoreError, match="does not exist"):
        ModelReport.load(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="holds no result of format 1"):
        Result.load(made_up().save(tmp_path / "report").parent)


def test_an_unknown_word_of_a_schema_is_no_silent_pass():
    with pytest.raises(NotImplementedError, match="maximum"):
        list(find_mistakes(1, {"maximum": 0}))
