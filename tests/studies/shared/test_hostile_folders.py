"""Folders of studies and results as nobody wrote them, and full disks: StoreError, soon, nothing outside read."""

import contextlib
import errno
import json
import shutil
import time

import pytest
from PIL import Image

from dit_lens import ChannelSet
from dit_lens.errors import DitLensError, StoreError
from dit_lens.studies import Result
from tests.channel_sets import sample_set
from tests.wrong_arguments.calls import saved_result

SAVED = "tests/fixtures/saved_by_0_1_0"
TEXTS = [
    "",
    "null",
    "[]",
    "7",
    "{}",
    "[" * 100_000,
    "9" * 10_000,
    "\0",
    '{"format": 1',
    '{"format": 1}',
    '{"format": 1, "study": 7}',
]


def spoil(data):
    """name -> change of a JSON object that makes it say something impossible."""
    odd = [None, 7, -1, 10**400, float("nan"), "x", "../../etc/passwd", "a\0b", [], {}, [[[]]], {"a": {"b": []}}]
    return [(name, value) for name in data for value in odd]


@pytest.fixture
def study(tmp_path):
    """A folder of each kind: a study's cells, and a result."""
    shutil.copytree(f"{SAVED}/disruption", tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def result(tmp_path):
    return saved_result().save(tmp_path / "result")


def load(folder):
    began = time.monotonic()
    try:
        Result.load(folder)
    except StoreError:
        pass
    finally:
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_hostile_json(study, result, text):
    for file in (study / "study.json", study / "cells/000000/cell.json", result / "result.json"):
        before = file.read_bytes()
        file.write_text(text)
        with pytest.raises(StoreError):
            Result.load(result if file.parent == result else study)
        file.write_bytes(before)


def test_every_field_may_say_anything(study, result):
    for file in (study / "study.json", study / "cells/000000/cell.json", result / "result.json"):
        before = file.read_text()
        data = json.loads(before)
        for name, value in spoil(data):
            file.write_text(json.dumps({**data, name: value}))
            load(result if file.parent == result else study)
        for name in data:
            file.write_text(json.dumps({key: value for key, value in data.items() if key != name}))
            load(result if file.parent == result else study)
        file.write_text(before)
    assert Result.load(result).masks
    assert len(Result.load(study).table)


def test_nothing_outside_a_folder_is_read(result, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    file = result / "result.json"
    data = json.loads(file.read_text())
    for name in ("../../secret.png", str(tmp_path / "secret.png"), "..", "", 7):
        file.write_text(json.dumps({**data, "images": {"0/0/untouched": name}}))
        with pytest.raises(StoreError, match="outside itself"):
            Result.load(result)
    file.write_text(json.dumps(data))
    (result / "images" / "0000.png").unlink()
    (result / "images" / "0000.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(StoreError, match="outside itself"):
        Result.load(result)


@pytest.mark.parametrize("damage", ["truncated", "folder", "missing", "other", "header"])
def test_damaged_tensors_and_images(result, damage):
    for file in (result / "masks.safetensors", result / "images" / "0000.png", result / "result.json"):
        before = file.read_bytes()
        file.unlink()
        if damage == "truncated":
            file.write_bytes(before[: len(before) // 2])
        elif damage == "folder":
            file.mkdir()
        elif damage == "other":
            file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
        elif damage == "header":
            file.write_bytes(b"\xff" * 8 + before[8:])
        with pytest.raises(StoreError):
            Result.load(result)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(before)
    assert Result.load(result).masks


def test_a_bomb_of_pixels(result):
    Image.new("1", (12_000, 12_000)).save(result / "images" / "0000.png")
    with pytest.raises(StoreError, match="incomplete or damaged"):
        Result.load(result)


def test_channel_sets_from_anything():
    data = sample_set(0).to_json()
    for name, value in spoil(data):
        with contextlib.suppress(DitLensError):
            ChannelSet.from_json({**data, name: value})
    for odd in (None, [], {}, 7, "x", {1: 2}, {**data, "scores": {**data["scores"], "blocks.0.img": [[1.0]]}}):
        with pytest.raises(DitLensError):
            ChannelSet.from_json(odd)


def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["images", "masks", "json"])
def test_a_full_disk_leaves_what_was_there(result, monkeypatch, place):
    import safetensors.numpy

    target = {"images": (Image.Image, "save"), "masks": (safetensors.numpy, "save_file"), "json": (json, "dumps")}[
        place
    ]
    monkeypatch.setattr(*target, full)
    with pytest.raises(StoreError, match=r"No space left.*nothing is left half-written"):
        saved_result().save(result, overwrite=True)
    monkeypatch.undo()
    assert Result.load(result).masks
    assert [entry.name for entry in result.parent.iterdir() if entry.name.endswith((".partial", ".old"))] == []


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "under", tmp_path / ("x" * 5000), "/proc/1/nothing"):
        began = time.monotonic()
        with pytest.raises(StoreError):
            saved_result().save(place)
        assert time.monotonic() - began < 5


def test_pages_on_a_full_disk(tmp_path, monkeypatch):
    from dit_lens.core.runs.files import write_text

    page = write_text(tmp_path / "page.html", "old")
    monkeypatch.setattr(type(page), "write_bytes", full)
    with pytest.raises(StoreError, match="nothing is left half-written"):
        write_text(page, "new")
    assert page.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
