"""Folders under racing writers, on top of what is not ours, and full of what nobody wrote.

DIT_LENS_RACE sets for how many seconds processes race; a few by default.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import dit_lens as dl
from dit_lens import Read, Run
from dit_lens.core.runs.files import find_folder, read_json, whole_folder, write_text
from dit_lens.errors import StoreError

SECONDS = float(os.environ.get("DIT_LENS_RACE", "3"))
FORK = multiprocessing.get_context("fork")  # which has imported everything already


def write_for_a_while(saved, out, name, counts):
    """Saves a run over and over under a name, and counts how often."""
    run, end, number = Run.load(saved), time.time() + SECONDS, 0
    run.spec["writer"] = name
    while time.time() < end:
        run.save(out, overwrite=True)
        number += 1
    counts.put(number)


@pytest.fixture(scope="module")
def saved(cfg_lens, tmp_path_factory):
    run = cfg_lens.run("red", [Read("blocks.*.img", channels=[1, 2]), Read("blocks.1.txt", reduce="mean")], seed=0)
    return run.save(tmp_path_factory.mktemp("saved") / "run")


def load_or_none(folder):
    """The run, or None where the folder was replaced while its files were opened one by one."""
    try:
        return Run.load(folder)
    except StoreError as damage:
        if "No such file" in str(damage) or "does not exist" in str(damage):
            return None
        raise


def test_racing_writers_and_a_reader_never_see_half_a_run(saved, tmp_path):
    out = tmp_path / "run"
    counts, whole, seen = FORK.SimpleQueue(), Run.load(saved), set()
    writers = [FORK.Process(target=write_for_a_while, args=(saved, out, name, counts)) for name in "abc"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if find_folder(out).exists():
            found = load_or_none(out)
            if found is None:
                continue
            seen.add(found.spec["writer"])
            assert all(torch.equal(found[site], whole[site]) for site in whole)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert all(counts.get() > 3 for _ in writers)
    assert len(seen) > 1
    assert [entry.name for entry in tmp_path.iterdir() if entry.name not in ("run", ".dit_lens.lock")] == []


def test_what_a_killed_writer_left_is_removed_by_the_next(saved, tmp_path):
    out = tmp_path / "run"
    endless = f"""
import time
from dit_lens.core.runs.files import whole_folder
with whole_folder({str(out)!r}, mark="run.json", own="run.json"):
    print("in", flush=True)
    time.sleep(60)
"""
    writer = subprocess.Popen([sys.executable, "-c", endless], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "in\n"
    Run.load(saved).save(out)  # a writer that lives is left alone
    assert len([entry for entry in tmp_path.iterdir() if entry.name.endswith(".partial")]) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    Run.load(saved).save(out, overwrite=True)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".partial")]


def test_the_folder_is_there_between_the_two_renames(saved, tmp_path):
    (tmp_path / "run").mkdir()
    Run.load(saved).save(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / ".run.old")  # the writer died here
    assert Run.load(tmp_path / "run").images


@pytest.mark.parametrize("overwrite", [True, False])
def test_only_what_a_run_wrote_is_replaced(saved, tmp_path, overwrite):
    run = Run.load(saved)
    thesis = tmp_path / "thesis" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years")
    note = tmp_path / "notes.txt"
    note.write_text("more")
    link = tmp_path / "link"
    link.symlink_to(thesis.parent)
    for place in (thesis.parent, note, link):
        with pytest.raises(StoreError, match=r"not replaced|never replaced"):
            run.save(place, overwrite=overwrite)
    assert thesis.read_text() == "years"
    assert note.read_text() == "more"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Run.load(run.save(empty, overwrite=overwrite)).images


def test_a_folder_that_becomes_somebody_elses_meanwhile_is_not_replaced(tmp_path):
    writing = whole_folder(tmp_path / "out", mark="run.json", own="run.json")
    writing.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(StoreError, match="not replaced"):
        writing.__exit__(None, None, None)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    write_text(file, "old")
    with pytest.raises(StoreError, match=r"half of a character.*nothing is left half-written"):
        write_text(file, "\ud800")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{" + '"a":' * 3,
        "9" * 10_000,
        "\x00",
        '"' + "\ud800" + '"',
        "null",
        "[]",
        '{"format": 1}',
        '{"format": 1, "images": 1000000000, "latents": false, "readings": []}',
        '{"format": 1, "images": "x", "latents": true}',
    ],
)
def test_hostile_json_ends_in_a_store_error(saved, tmp_path, text):
    run = Run.load(saved).save(tmp_path / "run")
    (run / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    began = time.monotonic()
    with pytest.raises(StoreError):
        Run.load(run)
    assert time.monotonic() - began < 5


def broken_records():
    def channels(data):
        data["readings"][0]["channels"] = None

    def steps(data):
        data["readings"][0]["steps"] = [0]

    def more_channels(data):
        data["readings"][0]["channels"] = {site: [1, 2, 3] for site in data["readings"][0]["channels"]}

    def sites(data):
        data["readings"][0]["sites"] = ["../../x"]

    def clock(data):
        data["clock"] = [["x", 1, 1]]

    def receipt(data):
        data["receipt"] = [{"op": 1}]

    def unknown(data):
        data["readings"][0]["colour"] = "red"

    def spec(data):
        data["spec"] = 7

    return [channels, steps, more_channels, sites, clock, receipt, unknown, spec]


@pytest.mark.parametrize("change", broken_records(), ids=lambda change: change.__name__)
def test_a_record_that_does_not_fit_its_tensors_is_told(saved, tmp_path, change):
    run = Run.load(saved).save(tmp_path / "run")
    data = json.loads((run / "run.json").read_text())
    change(data)
    (run / "run.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match="incomplete or damaged"):
        Run.load(run)


def test_a_bomb_of_pixels_is_told(saved, tmp_path):
    from PIL import Image

    run = Run.load(saved).save(tmp_path / "run")
    Image.new("1", (30_000, 30_000)).save(run / "images" / "000.png")
    with pytest.raises(StoreError, match="incomplete or damaged"):
        Run.load(run)


@pytest.mark.parametrize("name", ["a\x00b", "file/under", "x" * 5000], ids=["nul", "under a file", "too long"])
def test_impossible_names_are_told(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Run.load(tmp_path / name)
    with pytest.raises(StoreError):
        read_json(tmp_path / name, "a test")


@pytest.mark.parametrize(
    "value",
    [
        "x",
        7,
        None,
        [],
        {"op": "Zero"},
        {"op": ["Zero"]},
        {"op": "Zero", "site": {"tensor": "AAA", "dtype": "float32", "shape": [1]}},
        {"op": "Add", "site": "x", "value": {"tensor": "AAAA", "dtype": "float32", "shape": [10**9]}},
        {"op": "Add", "site": "x", "value": {"tensor": "AAAA", "dtype": "load", "shape": [1]}},
        {"op": "Add", "site": "x", "value": {"tensor": "AAAA", "dtype": "float32", "shape": ["x"]}},
        {"op": "Zero", "site": "x", "steps": {"slice": "abcd"}},
        {"op": "Zero", "site": "x", "steps": {"sigma": [1]}},
        {"op": "Zero", "site": "x", "mask": {"array": {"a": 1}}},
        {"op": "Swap", "site": "x", "source": {"run": 7}},
    ],
)
def test_hostile_ops_end_in_an_error_of_ours(value):
    with pytest.raises(dl.errors.DitLensError):
        dl.ops.from_json(value)


def test_ops_nested_without_end_are_told():
    value = {"mapping": {}}
    for _ in range(100_000):
        value = {"mapping": {"a": value}}
    with pytest.raises(dl.errors.OpError):
        dl.ops.from_json({"op": "Zero", "site": "x", "channels": value})
