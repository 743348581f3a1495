"""What a study has finished is kept: after Ctrl-C, after kill -9, and for readers without the model."""

import multiprocessing
import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dit_lens import DiTLens
from dit_lens.core.runs.files import LOCK
from dit_lens.errors import PromptError, StoreError, StudyInterrupted
from dit_lens.studies import Result, disruption, merge
from dit_lens.studies.shared import cells
from dit_lens.studies.shared.batches import make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.folders import claim_folder, describe_settings
from tests import pipelines

PROMPTS = ["a cat", "two dogs", "red"]
STUDY = {"k": [2, 4], "seeds": [0, 1], "draws": 1, "batch_size": 2, "confounds": False, "num_inference_steps": 1}
CELLS = 2 * 2 * (2 + 2 * 4)  # seeds, batches; untouched, no-op, and four arms for every k


def brightness(image, prompt):
    return {"brightness": float(np.mean(image)), "length": len(prompt)}


study = partial(disruption, prompts=PROMPTS, judge=brightness, **STUDY)


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies") / "whole"


@pytest.fixture(scope="module")
def whole(lens, folder):
    """The study without interruption."""
    return study(lens, out=folder)


@pytest.fixture
def runs(lens, monkeypatch):
    """Counts the runs of the lens."""
    count, run = [], lens.run
    monkeypatch.setattr(lens, "run", lambda *args, **call: count.append(1) or run(*args, **call))
    return count


def assert_same(one, other):
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    pd.testing.assert_frame_equal(one.summary, other.summary, check_exact=True)
    assert {name: p.tobytes() for name, p in one.images.items()} == {
        name: p.tobytes() for name, p in other.images.items()
    }
    assert (one.settings, one.notes) == (other.settings, other.notes)


def die_in_the_tenth_cell(lens, out):
    """Runs the study until half of a cell is on the disk, and kills this process."""
    write, written = cells.write_json, []

    def write_or_die(path, value):
        if path.name == "cell.json":
            written.append(path)
            if len(written) == 10 and any(path.parent.glob("*.png")):
                os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    cells.write_json = write_or_die
    study(lens, out=out)


def test_a_killed_study_goes_on_without_losing_or_repeating_a_cell(lens, whole, runs, tmp_path):
    out = tmp_path / "study"
    died = multiprocessing.get_context("fork").Process(target=die_in_the_tenth_cell, args=(lens, out))
    died.start()
    died.join(300)
    assert died.exitcode == -signal.SIGKILL
    assert len(list((out / "cells").glob("0*"))) == 9
    assert len(list((out / "cells").glob(".*.partial"))) == 1
    part = Result.load(out)  # the half-written cell is not seen
    pd.testing.assert_frame_equal(part.table, whole.table.head(len(part.table)), check_exact=True)
    result = study(lens, out=out)
    assert len(runs) == CELLS - 9
    assert [file.name for file in (out / "cells").glob(".*")] == [LOCK]  # nothing is left of the half-written cell
    assert_same(result, whole)
    assert_same(Result.load(out), whole)
    assert_same(study(lens, out=out), whole)
    assert len(runs) == CELLS - 9  # nothing was left to run


def test_ctrl_c_leaves_what_was_finished(lens, whole, tmp_path, monkeypatch):
    """Without a folder, and in one that goes on twice."""
    run, ran, folder = lens.run, [], tmp_path / "study"
    for out, done, left in ((None, 1, 1), (None, 13, 13), (folder, 1, 1), (folder, 13, 12)):

        def interrupted(*args, left=left, **call):
            if len(ran) == left:
                raise KeyboardInterrupt
            ran.append(1)
            return run(*args, **call)

        ran.clear()
        monkeypatch.setattr(lens, "run", interrupted)
        with pytest.raises(StudyInterrupted, match=rf"after {done} of {CELLS}") as stop:
            study(lens, out=out)
        monkeypatch.undo()
        part = stop.value.result
        pd.testing.assert_frame_equal(
            part.table.dropna(axis=1), whole.table.head(len(part.table)).dropna(axis=1), check_dtype=False
        )
        assert repr(part)
        if out:
            assert str(out) in str(stop.value)
            assert_same(Result.load(out), part)
        else:
            assert "out=FOLDER" in str(stop.value)
    assert_same(study(lens, out=folder), whole)


def test_ctrl_c_before_the_first_cell(lens, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may lack
    monkeypatch.setattr(lens, "run", lambda *args, **call: signal.raise_signal(signal.SIGINT))
    with pytest.raises(StudyInterrupted, match="after 0 of") as stop:
        study(lens, out=tmp_path)
    assert stop.value.result is None
    with pytest.raises(StoreError, match="disruption study with nothing finished yet"):
        Result.load(tmp_path)


def test_an_error_is_not_swallowed_and_leaves_the_pipeline_as_it_was(lens):
    def broken(image, prompt):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # what a pipeline notes of its last call is there from the first one on
        disruption(lens, PROMPTS, judge=broken, **STUDY)
    before = dict(vars(lens.pipe))
    with pytest.raises(ZeroDivisionError):
        disruption(lens, PROMPTS, judge=broken, **STUDY)
    assert vars(lens.pipe) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": [2, 5]}, r"another setting; k: \[2, 4\] there, \[2, 5\] now\. Call it as before to continue it"),
        ({"num_inference_steps": 3}, r'call: .*"num_inference_steps": 1'),
        ({"seeds": [0, 2], "draws": 2}, r"draws: 1 there, 2 now; seeds: \[0, 1\] there, \[0, 2\] now"),
        ({"judge": None}, r'judge: "brightness" there, null now'),
        ({"prompts": ["a cat", "two dogs", "blue"]}, "prompts: "),
    ],
)
def test_other_settings_are_refused_with_what_differs(lens, whole, folder, runs, change, said):
    with pytest.raises(StoreError, match=said):
        study(lens, **change, out=folder)
    assert not runs


def test_a_folder_of_something_else_is_refused(lens, tmp_path):
    with StudyCheckpoints("organisation", {"k": 3}, lens=lens, total=1, out=tmp_path / "other"):
        pass
    with pytest.raises(StoreError, match=r"holds the study 'organisation'\. Choose another folder"):
        study(lens, out=tmp_path / "other")
    with pytest.raises(StoreError, match="holds other files and no study"):
        study(lens, out=tmp_path)


def test_another_model_is_refused(lens, tmp_path):
    settings = {"k": 3}
    claim_folder(tmp_path, "disruption", settings, lens)
    defaults = dict(pipelines.CALL)
    claim_folder(
        tmp_path, "disruption", settings, DiTLens(pipelines.flux(), defaults=defaults)
    )  # the same weights, loaded again
    with pytest.raises(StoreError, match="another model; weights: "):
        claim_folder(tmp_path, "disruption", settings, DiTLens(pipelines.flux(seed=1), defaults=defaults))
    with pytest.raises(StoreError, match='another model; dtype: "float32" there, "bfloat16" now'):
        claim_folder(tmp_path, "disruption", settings, DiTLens(pipelines.flux(dtype=torch.bfloat16), defaults=defaults))


def test_a_folder_that_died_before_its_first_file_is_taken(lens, tmp_path):
    (tmp_path / ".study.json.partial").write_text("{")
    claim_folder(tmp_path, "disruption", {}, lens)
    claim_folder(tmp_path, "disruption", {}, lens)


def full_cell():
    random = np.random.default_rng(0)
    return Cell(
        [{"prompt": "é", "rmse": 0.1 + 0.2, "psnr": np.nan, "n": np.int64(3), "matched": np.bool_(True)}],
        {"a/b": Image.fromarray(random.integers(0, 256, (5, 4, 3), dtype=np.uint8))},
        {"mask": random.random((5, 4)) > 0.5},
        {"score/blocks.0.img": random.random(7).astype(np.float32)},
    )


def test_a_kept_cell_is_the_cell_that_was_made(lens, tmp_path):
    for folder in (None, tmp_path):
        with StudyCheckpoints("disruption", {}, lens=lens, total=1, out=folder) as cells:
            made = cells.get("only", full_cell)
    with StudyCheckpoints("disruption", {}, lens=lens, total=1, out=tmp_path) as cells:
        found = cells.get("only", lambda: pytest.fail("it was there"))
    assert made.lines == found.lines == [{"prompt": "é", "rmse": 0.1 + 0.2, "psnr": None, "n": 3, "matched": True}]
    assert found.images["a/b"].tobytes() == made.images["a/b"].tobytes()
    for part in ("masks", "arrays"):
        assert all(np.array_equal(value, getattr(found, part)[name]) for name, value in getattr(made, part).items())
        assert all(value.dtype == getattr(found, part)[name].dtype for name, value in getattr(made, part).items())


@pytest.mark.parametrize("damage", ["0000.png", "arrays.safetensors", "cell.json"])
def test_a_damaged_cell_is_named(lens, damage, tmp_path):
    with StudyCheckpoints("disruption", {}, lens=lens, total=1, out=tmp_path) as cells:
        cells.get("only", full_cell)
    file = tmp_path / "cells" / "000000" / damage
    file.write_bytes(file.read_bytes()[:20])
    cells = StudyCheckpoints("disruption", {}, lens=lens, total=1, out=tmp_path)
    with cells, pytest.raises(StoreError, match="000000"):
        cells.get("only", full_cell)
    with pytest.raises(StoreError, match="000000"):
        Result.load(tmp_path)
    file.unlink()
    with pytest.raises(StoreError, match="000000"):
        Result.load(tmp_path)


@pytest.mark.parametrize("damage", ["not JSON", None])
def test_deleting_the_folder_of_a_damaged_cell_makes_that_cell_again(lens, whole, folder, damage, tmp_path):
    """As the message says: its folder alone, and no other cell is touched."""
    shutil.copytree(folder, tmp_path / "s")
    place = tmp_path / "s" / "cells" / "000003"
    other = {file: file.stat().st_mtime_ns for file in place.parent.glob("*/cell.json") if file.parent != place}
    (place / "cell.json").unlink() if damage is None else (place / "cell.json").write_text(damage)
    advice = re.escape(f"Delete the folder {place}, and the study makes this cell again; the others stay.")
    for call in (lambda: study(lens, out=tmp_path / "s"), lambda: Result.load(tmp_path / "s")):
        with pytest.raises(StoreError, match=advice):
            call()
    with pytest.raises(StoreError, match=advice):
        merge([tmp_path / "s"], tmp_path / "m")
    shutil.rmtree(place)
    again = study(lens, out=tmp_path / "s")
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert len(other) == CELLS - 1
    assert {file: file.stat().st_mtime_ns for file in other} == other


def test_cells_in_another_order_are_refused(lens, tmp_path):
    with StudyCheckpoints("disruption", {}, lens=lens, total=1, out=tmp_path) as cells:
        cells.get("first", Cell)
    again = StudyCheckpoints("disruption", {}, lens=lens, total=1, out=tmp_path)
    with again, pytest.raises(StoreError, match="is the cell 'first', and 'other' was to come here"):
        again.get("other", Cell)


def test_a_study_of_another_version_is_named(lens, tmp_path):
    with StudyCheckpoints("phrenology", {}, lens=lens, total=1, out=tmp_path) as cells:
        cells.get("only", Cell)
    with pytest.raises(StoreError, match=r"no study 'phrenology' in this version .* disruption"):
        Result.load(tmp_path)


def test_settings_are_told_apart_by_their_content():
    one, other = torch.zeros(2), torch.ones(2)
    image = Image.new("RGB", (2, 2))
    told = describe_settings({"a": one, "b": other, "c": image, "d": np.float32(0.5), "e": brightness, "f": (1, 2)})
    assert told["a"] != told["b"]
    assert told["a"] == describe_settings({"a": one.clone()})["a"]
    assert told["c"] == describe_settings({"c": image.copy()})["c"]
    assert (told["d"], told["e"], told["f"]) == (0.5, "brightness", [1, 2])


def test_batches_go_seed_by_seed():
    assert [(part.seed, list(part.rows), part.prompts) for part in make_batches("abc", [5, 6], 2)] == [
        (5, [0, 1], ("a", "b")),
        (5, [2], ("c",)),
        (6, [0, 1], ("a", "b")),
        (6, [2], ("c",)),
    ]
    assert [part.prompts for part in make_batches("abc", [5], None)] == [("a", "b", "c")]
    with pytest.raises(PromptError, match="batch_size=0"):
        make_batches("abc", [5], 0)


def test_a_result_is_saved_and_loaded_whole(whole, tmp_path):
    assert_same(Result.load(whole.save(tmp_path / "result")), whole)
