"""A study in parts: together they are the study, whoever comes first, dies or has a folder of its own."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest

from dit_lens import DiTLens, studies
from dit_lens.commands import cli
from dit_lens.errors import OpError, StoreError
from dit_lens.studies import Result
from dit_lens.studies.shared import slots
from dit_lens.studies.shared.cells import Cell, read_cell
from dit_lens.studies.shared.slots import Slot
from tests import pipelines
from tests.small_studies import CALLS, PROMPTS, assert_same, draw_whole, make_lens, named

QUICK = ["disruption", "stability", "patching"]
DISRUPTION, HOW = CALLS["disruption"]
TRACE = {"k": 4, "batch_size": 1, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def lens():
    return make_lens()


@pytest.fixture(scope="module")
def whole():
    return draw_whole("disruption")


def count_cells(folder):
    return len(list((folder / "cells").glob("0*")))


@pytest.mark.filterwarnings("ignore:this study has 2 parts")  # two seeds of stability
@pytest.mark.parametrize("name", named(QUICK))
def test_shards_of_one_folder_are_the_study(lens, tmp_path, name):
    """In any order, and the last one has the result."""
    (args, how), study = CALLS[name], getattr(studies, name)
    expected = draw_whole(name)
    order = np.random.default_rng(len(name)).permutation(3).tolist()
    results = [study(lens, *args, **how, out=tmp_path / "s", shard=(i, 3)) for i in order]
    assert_same(results[-1], expected)
    assert_same(Result.load(tmp_path / "s"), expected)
    assert results[0].table.empty
    assert f"cells of this {name} are in {tmp_path / 's'}" in results[0].notes[0]


def test_shards_of_several_folders_are_merged(lens, whole, tmp_path, capsys):
    """Each makes what it needs of the others itself."""
    folders = [tmp_path / str(i) for i in range(2)]
    for i, folder in enumerate(folders):
        part = studies.disruption(lens, *DISRUPTION, **HOW, out=folder, shard=(i, 2))
        assert part.table.empty
        assert count_cells(folder) < count_cells_of(whole)
    assert studies.merge(folders[:1], tmp_path / "m")[0].startswith(f"{count_cells(folders[0])} of 12 cells of disr")
    said = studies.merge([*folders, tmp_path / "m"], tmp_path / "m")
    assert said == ["12 of 12 cells of disruption"]
    assert_same(Result.load(tmp_path / "m"), whole)
    assert cli.main(["merge", *map(str, folders), "--out", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.strip() == said[0]
    assert_same(Result.load(tmp_path / "c"), whole)
    made = tmp_path / "c" / "cells" / "000003"
    shutil.rmtree(made)
    assert studies.merge([tmp_path / "c"], tmp_path / "d") == ["11 of 12 cells of disruption; missing: 000003"]
    cell = json.loads((folders[0] / "cells" / "000000" / "cell.json").read_text())
    cell["lines"][0]["brightness"] = 1.0
    (folders[0] / "cells" / "000000" / "cell.json").write_text(json.dumps(cell))
    with pytest.warns(UserWarning, match="1 cells of the disruption .* with other numbers"):
        studies.merge(folders[::-1], tmp_path / "e")


def count_cells_of(result):
    return len(result.table.groupby(["k", "arm", "draw"])) * 2


def test_what_is_not_one_study_is_not_merged(lens, tmp_path):
    other = DiTLens(pipelines.flux(seed=1), defaults=dict(lens.defaults))
    for name, one, k in (("a", lens, 4), ("b", lens, 2), ("c", other, 4)):
        studies.write_attribution(one, PROMPTS[:2], **{**TRACE, "k": k}, out=tmp_path / name, shard=(0, 2))
    (tmp_path / "d").mkdir()
    with pytest.raises(StoreError, match="another setting; k: 4 in the first, 2 in the second") as two:
        studies.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert str(two.value).startswith(f"{tmp_path / 'a'} and {tmp_path / 'b'} hold ")
    with pytest.raises(StoreError, match="another model; "):
        studies.merge([tmp_path / "a", tmp_path / "c"], tmp_path / "ac")
    with pytest.raises(StoreError, match="holds no study that could be merged"):
        studies.merge([tmp_path / "a", tmp_path / "d"], tmp_path / "ad")
    for nothing in ([], ()):
        with pytest.raises(OpError, match="at least one"):
            studies.merge(nothing, tmp_path / "nothing")
    other = json.loads((tmp_path / "b" / "study.json").read_text())
    (tmp_path / "b" / "study.json").write_text(json.dumps({**other, "study": "disruption"}))
    with pytest.raises(StoreError, match=r"/a holds the study 'write_attribution', and .*/b 'disruption'"):
        studies.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    studies.merge([tmp_path / "a"], tmp_path / "m")
    with pytest.raises(StoreError, match=f"{tmp_path / 'm'} and {tmp_path / 'c'} hold "):
        studies.merge([tmp_path / "c"], tmp_path / "m")


def test_a_folder_with_gaps_says_so(lens, tmp_path):
    expected = studies.write_attribution(lens, PROMPTS[:3], **TRACE)
    studies.write_attribution(lens, PROMPTS[:3], **TRACE, out=tmp_path, shard=(0, 2))
    shutil.copytree(tmp_path / "cells" / "000000", tmp_path / "cells" / "000002", dirs_exist_ok=True)
    part = Result.load(tmp_path)
    assert part.notes[-1].startswith("not the whole study: ")
    shutil.rmtree(tmp_path / "cells" / "000000")
    with pytest.raises(StoreError, match=r"but .* later cells, without the first one"):
        Result.load(tmp_path)
    shutil.rmtree(tmp_path / "cells" / "000002")
    assert_same(studies.write_attribution(lens, PROMPTS[:3], **TRACE, out=tmp_path), expected)


def test_a_sweep_and_a_protocol_in_shards(lens, tmp_path):
    call = ("write_attribution", lens, PROMPTS[:3])
    how = {"over": {"k": [2, 4]}, "batch_size": 1, "num_inference_steps": 1}
    expected = studies.sweep(*call, **how)
    parts = [studies.sweep(*call, **how, out=tmp_path / "s", shard=(i, 2)) for i in (1, 0)]
    assert parts[0].table.empty
    assert_same(parts[1], expected)
    assert_same(Result.load(tmp_path / "s"), expected)
    how = {**TRACE, "seeds": [0, 1], "protocol": "turri2026"}
    expected = studies.stability(lens, PROMPTS[:1], **how, out=tmp_path / "p")
    for i in range(2):
        studies.stability(lens, PROMPTS[:1], **how, out=tmp_path / str(i), shard=(i, 2))
    studies.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "m")
    assert Result.load(tmp_path / "m").notes == expected.notes
    assert_same(Result.load(tmp_path / "m"), Result.load(tmp_path / "p"))


def die_in_the_second_cell(lens, out):
    write, written = slots.write_cell, []

    def write_or_die(*args):
        written.append(1)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    slots.write_cell = write_or_die
    studies.write_attribution(lens, PROMPTS, **TRACE, out=out, shard=(0, 2))


def test_a_killed_shard_loses_the_cell_it_was_at(lens, tmp_path):
    died = multiprocessing.get_context("fork").Process(target=die_in_the_second_cell, args=(lens, tmp_path))
    died.start()
    died.join(300)
    assert died.exitcode == -signal.SIGKILL
    assert count_cells(tmp_path) == 1
    for i in (1, 0):
        result = studies.write_attribution(lens, PROMPTS, **TRACE, out=tmp_path, shard=(i, 2))
    assert_same(result, studies.write_attribution(lens, PROMPTS, **TRACE))


def test_cells_that_share_work_are_of_one_shard(lens, tmp_path):
    """The moves of an arm run in one batch: whoever makes one makes all."""
    args, how = (PROMPTS[:2],), {**CALLS["carrier_or_detail"][1], "draws": 0, "num_inference_steps": 1}
    runs, run = [], lens.run
    lens.run = lambda *args, **call: runs.append(1) or run(*args, **call)
    try:
        studies.carrier_or_detail(lens, *args, **how)
        alone = len(runs)
        for i in range(2):
            studies.carrier_or_detail(lens, *args, **how, out=tmp_path, shard=(i, 2))
    finally:
        lens.run = run
    assert len(runs) - alone <= alone + 1  # one untouched batch that the second had not made yet


def test_arguments_that_are_no_shard(lens, tmp_path, capsys):
    for shard in ((2, 2), (-1, 2), (0,), (0, 0), "ab", 3, (0.5, 2)):
        with pytest.raises(OpError, match=r"is not a valid part\. Give \(i, n\)"):
            studies.disruption(lens, *DISRUPTION, **HOW, out=tmp_path, shard=shard)
    with pytest.raises(OpError, match=r"Pass out=FOLDER"):
        studies.disruption(lens, *DISRUPTION, **HOW, shard=(0, 2))
    with pytest.warns(UserWarning, match="has 3 parts that can be made apart, so 4 shards are more"):
        studies.write_attribution(lens, PROMPTS[:3], **TRACE, out=tmp_path, shard=(0, 4))
    for wrong, said in (
        (["--shard", "3/2"], "--shard 3/2 is not a valid part. Give I/N"),
        (["--shard", "0/2", "--workers", "2"], "Give one of them"),
        (["--ray", "auto"], "Say how many with --workers N"),
        (["--workers", "0"], "num=0 is out of range"),
    ):
        assert cli.main(["study", "toy:flux", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_arrays_come_back_with_their_shapes(tmp_path):
    """Also one without an axis: what needs a cell does the same with one that was kept."""
    cell = Cell(arrays={"none": np.array(2.0), "two": np.arange(6).reshape(2, 3).T})
    place = {"study": "basis", "number": 0, "key": "a", "group": "a", "closed": None}
    Slot(**place, folder=tmp_path / "000000", create=lambda: cell).make()
    found = read_cell(tmp_path / "000000", "basis").arrays
    assert {name: value.shape for name, value in found.items()} == {"none": (), "two": (3, 2)}
