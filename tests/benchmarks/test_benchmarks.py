"""The benchmarks run, in small; what they say follows from what they measured."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import browser, processes, work
from benchmarks.gpu import main
from benchmarks.measure import Row, alternate, moved, peak_bytes


def row(value, low, high, target=1.05, name="x"):
    return Row("group", name, "ratio", value, low, high, target)


def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_ratio_is_that_of_the_time_spent():
    found = alternate(lambda: burn(0.04), lambda: burn(0.02), rounds=3)
    assert 1.9 < found["low"] <= found["value"] <= found["high"] < 2.1
    assert 0.019 < found["base"] < 0.03


def test_the_peak_is_what_was_held_at_one_time():
    import torch

    def make(kept):
        held = []
        for _ in range(4):
            held = [*held, torch.zeros(1000, 256)] if kept else [torch.zeros(1000, 256)]

    size = 1000 * 256 * 4
    assert 4 * size <= peak_bytes(lambda: make(kept=True)) < 5 * size
    assert size <= peak_bytes(lambda: make(kept=False)) <= 2 * size


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (row(1.04, 1.03, 1.05), "met"),
        (row(1.08, 1.07, 1.09), "missed"),
        (row(1.04, 0.95, 1.15), "spread too wide to say"),
        (row(1.40, 1.30, 1.50), "missed"),  # wide, but its lower quartile is beyond the target
        (row(1.04, 1.03, 1.05, target=None), ""),
    ],
)
def test_a_target_is_judged_only_where_the_spread_lets_it(found, says):
    assert found.state == says


def test_only_what_moved_beyond_its_spread_is_named(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.machine", lambda: {"device": "here"})
    before = {"machine": {"device": "here"}, "rows": [asdict(row(1.0, 0.98, 1.02, name=name)) for name in "abc"]}
    now = [row(1.05, 1.03, 1.07, name="a"), row(1.01, 0.99, 1.03, name="b"), row(0.9, 0.89, 0.91, name="c")]
    assert [text.split(":")[0] for text in moved(now, before)] == ["slower", "faster"]
    assert "another machine" in next(moved(now, {**before, "machine": {"device": "there"}}))


def test_the_script_for_a_gpu_runs_in_small_on_a_cpu(tmp_path):
    file = tmp_path / "found.json"
    only = ["waits", "SANA-1.6B"]
    code = main(["--tiny", "--device", "cpu", "--rounds", "1", "--steps", "1", "--json", str(file), "--only", *only])
    found = json.loads(file.read_text())
    assert code == 0, found["failed"]
    assert {line["group"] for line in found["rows"]} >= {"FLUX.1-dev waits", "SANA-1.6B"}
    assert all(line["value"] > 0 for line in found["rows"] if line["unit"] == "ratio")


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("no such weights")
        yield

    monkeypatch.setitem(__import__("benchmarks.gpu").gpu.PARTS, "memory", fail)
    file = tmp_path / "found.json"
    parts = ["memory", "waits"]
    code = main(["--tiny", "--device", "cpu", "--rounds", "1", "--steps", "1", "--json", str(file), "--only", *parts])
    found = json.loads(file.read_text())
    assert code == 1
    assert found["failed"] == [{"part": "memory", "says": "RuntimeError: no such weights"}]
    assert found["rows"]


def test_clusters_are_compared_on_the_same_labels():
    (found,) = work.measure_clusters(rounds=1, maps=1)
    assert found.note == "the same labels"


def test_every_group_can_be_imported():
    assert browser.measure_explorer
    assert processes.measure_demo


def test_the_page_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import performance

    assert performance.PAGE.read_text("utf-8") == performance.page(), "run `python docs/performance.py`"
