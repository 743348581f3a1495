"""The protocol on a stranger's pipeline: said first, run in cells, gone on with after Ctrl-C, and read back."""

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dit_lens.commands import cli, study_inputs
from dit_lens.commands.study import make_plan
from dit_lens.commands.study_plan import ORDER
from dit_lens.core.runs.provenance import fingerprint
from dit_lens.lens import DiTLens
from dit_lens.studies import ModelReport, Result
from dit_lens.studies.shared import protocols, slots
from dit_lens.studies.shared.schema import find_mistakes, load_schema
from tests import pipelines

JUDGE = """
import numpy as np

def judge(image, prompt):
    return {"fidelity": float(np.asarray(image).mean() / 255)}
"""
MASKS = """
import numpy as np

def masks(image, prompt):
    found = np.zeros((image.height, image.width), bool)
    found[8:24, 8:24] = True
    return found
"""
CALL = ["--call", "height=32", "width=48", "max_sequence_length=24", "--steps", "2", "-k", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline as strangers save it, prompts, a judge and masks."""
    folder = tmp_path_factory.mktemp("study")
    pipelines.flux().save_pretrained(folder / "model")
    (folder / "prompts.csv").write_text("id,prompt\ncat,a cat\ndogs,two dogs\n")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "masks.py").write_text(MASKS)
    (folder / "drawn").mkdir()
    for name in ("cat", "dogs"):
        Image.fromarray(np.uint8(255 * (np.indices((32, 48))[1] > 20))).save(folder / "drawn" / f"{name}.png")
    return folder


def call(place, *more, out=None):
    arguments = ["study", str(place / "model"), "--prompts", str(place / "prompts.csv"), *CALL, *more]
    return cli.main([*arguments, *(["--out", str(out)] if out else [])])


@pytest.fixture
def no_browser(monkeypatch):
    monkeypatch.setattr("dit_lens.commands.page.find_browser", lambda: None)


def interrupt_after(monkeypatch, count):
    """Ctrl-C once so many cells are written; returns the names of cells as they are written."""
    written, write = [], slots.write_cell

    def stop(folder, key, cell):
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(folder)
        write(folder, key, cell)

    monkeypatch.setattr(slots, "write_cell", stop)
    return written


def test_a_plan_says_what_would_be_and_writes_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(place, "--plan", "--seeds", "3", "--draws", "2") == 0
    said = capsys.readouterr().out
    for words in (
        "model: FluxPipeline, 5 blocks of 32 channels",
        "protocol turri2026 (",
        "in its place: k=4, draws=2, num_inference_steps=2, height=32",
        "this model is none of the protocol's (FLUX.1-dev, ",
        "prompts: 2 of prompts.csv (",
        "pairs: 1, neighbours in the list\n",
        "seeds: 3, so intervals are of new prompts and new seeds; 4 prompts or pairs at once",
        "studies: stability, disruption, transfer\n",
        "left out: organisation, as nothing says where subjects are (--masks does)",
        "left out: carrier_or_detail, as no judge says",
        "hours): an image of 2 steps took ",
    ):
        assert words in said
    assert not list(tmp_path.iterdir())


FINISHED = ["--seeds", "1", "--draws", "1"]


def inputs(place):
    return ["--judge", str(place / "judge.py"), "--masks", str(place / "masks.py"), *FINISHED]


def quick(protocol):
    """A protocol whose transport has one strength: a fourth of the images."""
    choices = [replace(one, value=(1.0,)) if one.argument == "strengths" else one for one in protocol.choices]
    return replace(protocol, choices=tuple(choices))


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The folder of all studies, of which the second was interrupted; what the first call said, and what was drawn."""
    out, drawn, run = tmp_path_factory.mktemp("finished") / "out", [], DiTLens.run

    def counted(self, prompt=None, *arguments, **options):
        found = run(self, prompt, *arguments, **options)
        drawn.append(len(found.latents if found.images is None else found.images))
        return found

    get = protocols.get
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dit_lens.commands.page.find_browser", lambda: None)
        patched.setattr(DiTLens, "run", counted)
        patched.setattr(protocols, "get", lambda name: quick(get(name)))
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as inner, redirect_stdout(said), redirect_stderr(said):
            before = interrupt_after(inner, 5)
            assert call(place, *inputs(place), out=out) == 130
        assert not (out / "result.json").exists()
        times = {folder: (folder / "cell.json").stat().st_mtime_ns for folder in before}
        assert call(place, *inputs(place), out=out) == 0
        assert {folder: (folder / "cell.json").stat().st_mtime_ns for folder in before} == times
        yield out, said.getvalue(), drawn


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_a_study_that_was_interrupted_says_how_to_go_on(finished):
    _, said, drawn = finished
    assert "disruption was interrupted after 4 of 11 cells; it continues from" in said
    assert "when it is called again with the same arguments" in said
    planned = sum(int(line.split("about ")[1].split()[0]) for line in said.splitlines() if " images, cells: " in line)
    assert planned == pytest.approx(sum(drawn) - 4 - 2, rel=0.3)  # without what was timed, and drawn twice


def written(column, kind):
    """The values of a column; lists, and numbers that are mixed with texts, as texts."""
    missing = [value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)) for value in column]
    texts = [str(value) if kind == "text" else value for value in column]
    return [None if gone else text for gone, text in zip(missing, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_result_json_conforms_and_has_what_the_studies_found(finished, place):
    out, _, _ = finished
    content, table = ModelReport.load(out).content, ModelReport.load(out).table
    data = json.loads((out / "result.json").read_text())
    assert list(find_mistakes(data, load_schema("model_report.schema.json"))) == []
    lens = DiTLens.from_pretrained(place / "model")
    assert content["model"]["weights"] == fingerprint(lens.pipe.transformer)
    assert (content["settings"]["steps"], content["settings"]["call"]["height"]) == (2, 32)
    assert [one["study"] for one in content["studies"]] == list(ORDER)
    for one in content["studies"]:
        kept = Result.load(out / "cells" / one["study"])
        rows = table[table["study"] == one["study"]].reset_index(drop=True)
        assert len(rows) == one["rows"]
        for name, kind in content["table"]["columns"].items():
            if name in kept.table:
                assert written(rows[name], kind) == written(kept.table[name], kind)
        assert len(pd.read_csv(out / f"{one['study']}.csv")) == len(kept.summary)
    edits = table[(table["study"] == "disruption") & (table["k"] > 0)]
    means = edits.groupby("arm")["rmse"].mean()
    claim = content["verdicts"][0]
    assert claim["value"]["mean"] == pytest.approx(means["top"])
    assert {one["from"] for one in claim["differences"]} == {"bottom", "random", "energy-matched"}
    for one in claim["differences"]:
        assert one["estimate"]["mean"] == pytest.approx(means["top"] - means[one["from"]])
    assert [one["claim"].partition(":")[0] for one in content["verdicts"]] == [
        "claim 1, critical", "claim 2, organised", "claim 3, movable", "carrier or detail", "necessary", "movable",
    ]  # fmt: skip
    summary = Result.load(out / "cells" / "carrier_or_detail").summary.set_index(["measure", "part"])
    necessity = content["verdicts"][4]
    assert necessity["value"]["mean"] == pytest.approx(summary.loc[("necessity", "whole"), "value"])
    assert content["verdicts"][1]["reason"].startswith("2 readable prompts cannot choose a block")
    untouched = table[(table["study"] == "disruption") & (table["arm"] == "untouched")]
    assert content["ceiling"][0]["estimate"]["mean"] == pytest.approx(untouched["fidelity"].mean())


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_the_page_tells_of_every_study(finished):
    out, _, _ = finished
    page = (out / "index.md").read_text()
    for words in ("**claim 1, critical: RMSE of ablation**", "Prompts that decide a difference as large as this one"):
        assert words in page
    for name in ORDER:
        assert f"[{name}.csv]({name}.csv)" in page
        assert f"studies.{name}(" in page
    assert re.search(r"\ndit-lens study \S+ --prompts \S+ .*--call height=32 width=48 max_sequence_length=24.*\n", page)
    assert "nan" not in page.partition("## Are they the same channels")[0]


@pytest.mark.slow
@pytest.mark.xdist_group("study")
def test_a_finished_study_draws_nothing_and_writes_the_same(finished, place, capsys):
    out, _, drawn = finished
    files = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    drawn.clear()
    assert call(place, *inputs(place), out=out) == 0
    assert sum(drawn) == 2  # those that are timed
    other = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert other <= {"index.md"}  # which says how long an image took
    assert call(place, *inputs(place), "--draws", "2", out=out) == 2
    assert "holds a disruption study with another setting; draws: 1 there, 2 now" in capsys.readouterr().err


def test_without_a_judge_what_needs_one_is_left_out(place, tmp_path, no_browser):
    protocol = ["--protocol", "fig3-reproduction", "--masks", str(place / "drawn"), "--seeds", "1", "--draws", "1"]
    assert call(place, *protocol, out=tmp_path / "out") == 0
    content = ModelReport.load(tmp_path / "out").content
    assert [one["study"] for one in content["studies"]] == ["stability", "organisation"]
    assert content["left_out"]["disruption"] == "the protocol fig3-reproduction says nothing of it"
    assert content["left_out"]["carrier_or_detail"] == "the protocol fig3-reproduction changes no activations"
    assert content["settings"]["masks"] == "images of a folder"
    assert [one["claim"] for one in content["verdicts"]] == ["claim 2, organised: IoU with the subject"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "turri2025"], "Nearest: 'turri2026'"),
        (["--seeds", "0"], "seeds=0 is out of range"),
        (["--draws", "0"], "draws=0 is out of range"),
        (["--masks", "missing.py"], "there is no file missing.py"),
        (["--prompts", "missing.csv"], "there is no file missing.csv"),
        (["--judge", "nonsense"], "--judge nonsense is none. There are: clip, vqa, FILE.py."),
        (["--judge", "missing.py"], "there is no file missing.py"),
        (["--judge", "{place}/masks.py"], "has no function judge(image, prompt)"),
        (["--judge", "{place}/broken.py"], "broken.py raises ZeroDivisionError when it is run"),
        (["--masks", "nowhere"], "--masks nowhere is none. There are: birefnet, FILE.py, a folder"),
        (["--masks", "{place}"], "there is no mask"),
        (["--call", "height"], "--call height has no '='"),
        (["--call", "hight=32"], "hight"),
        (["--prompts", "{place}/one.csv"], "has one prompt, of which no difference can be told"),
        (["-k", "20"], "k=20 leaves no control of equal size"),
        (["--out", "{place}"], "holds other files and no study"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(place, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (place / "broken.py").write_text("1 / 0")
    (place / "one.csv").write_text("prompt\na cat\n")
    assert call(place, *(option.format(place=place) for option in options)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prompts_are_those_of_the_file_or_of_the_library(tmp_path, toy):
    paired = "prompt,pair,role\na cat,1,source\na dog,1,target\na hat,,\na bat,,\n"
    (tmp_path / "pairs.csv").write_text(paired)
    found = study_inputs.read_prompts(toy, tmp_path / "pairs.csv")
    assert (found.texts, found.pairs) == (["a hat", "a bat"], [("a cat", "a dog")])
    of_toy = study_inputs.read_prompts(toy, None)
    assert len(set(of_toy.texts)) == 16
    assert of_toy.digest != found.digest
    assert of_toy.digest == study_inputs.read_prompts(toy, None).digest


def test_a_model_of_the_protocol_runs_as_it_says(toy):
    """The toy under the name of FLUX.1-schnell, whose row sets the size of an image."""
    options = study_inputs.StudyOptions(steps=2, call=("height=64", "width=64", "max_sequence_length=16"))
    plan = make_plan(toy, "black-forest-labs/flux.1-SCHNELL", options)
    assert plan.call == {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 16} | {
        "guidance_scale": 0.0
    }
    said = plan.describe()
    assert "FLUX.1-schnell: repository='black-forest-labs/FLUX.1-schnell' (ours), guidance_scale=0.0 (makers)" in said
    assert "max_sequence_length=16, dtype=float32" in said


def test_no_prompt_is_alone_in_a_batch_and_no_verdict_has_two_seeds(toy):
    found = study_inputs.read_prompts(toy, None)
    plan = make_plan(toy, "toy", study_inputs.StudyOptions(steps=2, seeds=2))
    seeds = {name: arguments["seeds"] for name, arguments in plan.arguments().items()}
    assert seeds == {name: [0] if name == "carrier_or_detail" else [0, 1] for name in ORDER}
    for prompts, size in ((2, 4), (4, 4), (5, 5), (9, 5), (16, 4), (61, 7)):
        texts = [str(i) for i in range(prompts)]
        assert replace(plan, prompts=replace(found, texts=texts)).batch_size == size


@pytest.mark.filterwarnings("ignore:this study has 1 parts")
def test_shards_end_with_what_is_missing_and_the_last_one_writes_the_page(place, tmp_path, no_browser, capsys):
    """Two prompts are one batch, which is a cell of either study."""
    out, how = tmp_path / "out", ["--protocol", "fig3-reproduction", *inputs(place)]
    assert call(place, *how, "--shard", "1/2", out=out) == 0
    said = capsys.readouterr().out
    assert f"0 of 1 cells of this organisation are in {out / 'cells' / 'organisation'}" in said
    assert "The same command without --shard writes the page when all shards have run." in said
    assert not (out / "index.md").exists()
    assert call(place, *how, "--shard", "0/2", out=out) == 0
    assert str(out / "index.md") in capsys.readouterr().out
    assert [one["study"] for one in ModelReport.load(out).content["studies"]] == ["stability", "organisation"]
