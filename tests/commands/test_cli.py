"""The command line as a person types it."""

import json
import runpy
import sys
from html.parser import HTMLParser

import pytest

from dit_lens import Run
from dit_lens.commands import cli
from dit_lens.lens import DiTLens


def sources(page):
    """Every address that the elements of a page name; what is inside scripts is no element."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.extend(v for k, v in attributes if k in ("src", "href"))
    parser.feed(page)
    return found


PROMPT = "a big red circle left on a checkered blue background"


def test_info(capsys):
    assert cli.main(["info", "toy:flux"]) == 0
    said = capsys.readouterr().out
    for words in ("FLUX.1", "blocks", "16 x 16 image tokens", "what leaves a block enters the next one"):
        assert words in said


def test_run_with_ops(tmp_path, capsys):
    ops = [{"op": "Zero", "site": "blocks.3.img", "channels": [1]}, {"op": "Read", "site": "blocks.3.img"}]
    (tmp_path / "ops.json").write_text(json.dumps(ops))
    arguments = [
        "run",
        "toy:flux",
        PROMPT,
        "--ops",
        str(tmp_path / "ops.json"),
        "--steps",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(arguments) == 0
    assert "Zero blocks.3.img" in capsys.readouterr().out
    run = Run.load(tmp_path / "run")
    assert bool((run["blocks.3.img"][..., 1] == 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "toy:fluks"], "Nearest: 'flux'"),
        (["info", "nowhere/at-all"], "could not be loaded"),
        (["run", "toy:flux", "a pink circle", "--out", "x"], "'pink'"),
        (["demo", "--prompt", "a cat", "--out", "x"], "not a sentence of the grammar"),
        (["train-toy", "flux"], "Pass --out DIR"),
        (["doctor", "toy:flux", "--device", "nonsense"], "device 'nonsense' is not there"),
        (["doctor", "toy:flux", "--device", "cuda:77"], "device 'cuda:77' is not there"),
        (["doctor", "toy:flux", "--device", ""], "device '' is not there"),
        (["atlas", "toy:flux", "--device", "nonsense"], "device 'nonsense' is not there"),
        (["atlas", "toy:flux", "--device", "cpu", "--out", "."], "no name of its own"),
        (["atlas", "toy:flux", "--device", "cpu", "--out", "/"], "no name of its own"),
        (["atlas", "toy:flux", "--device", "cpu", "--out", "/usr"], "is a folder"),
        (["atlas", "toy:flux", "--device", "cpu", "--megabytes", "1e15"], "are free there"),
        (["findings", "--prompts", "-1", "--out", "x"], "prompts=-1 is out of range"),
        (["findings", "--draws", "0", "--out", "x"], "draws=0 is out of range"),
        (["demo", "--source", "", "--out", "x"], "not a sentence of the grammar"),
        (["demo", "-k", "0", "--out", "x"], "k=0"),
        (["demo", "--out", "/usr"], "no earlier demo"),
        (["demo", "--seed", "-1", "--out", "x"], "seed -1 is not a whole number from 0 up"),
        (["findings", "--seeds", "0", "--out", "x"], "seeds=0 is out of range"),
        (["study", "nowhere/at-all", "--protocol", "turri2025"], "Nearest: 'turri2026'"),
        (["study", "nowhere/at-all", "--judge", "clap"], "Nearest: 'clip'"),
        (["study", "nowhere/at-all", "--device", "nonsense"], "device 'nonsense' is not there"),
        (["board", "nowhere", "--out", "x"], "nowhere/result.json does not exist"),
        (["run", "toy:flux", PROMPT, "--seed", "-1", "--out", "x"], "seed -1 is not a whole number from 0 up"),
        (["run", "toy:flux", PROMPT, "--steps", "0", "--out", "x"], "num_inference_steps=0"),
        (["run", "toy:flux", PROMPT, "--ops", "/dev/zero", "--out", "x"], "not a file"),
        (["atlas", "toy:flux", "--device", "cpu", "--megabytes", "-1"], "megabytes=-1.0 is out of range"),
        (["atlas", "toy:flux", "--device", "cpu", "--megabytes", "1e-9"], "cannot hold one step"),
        (["atlas", "toy:flux", "--device", "cpu", "-k", "-1"], "k=-1"),
        (["atlas", "toy:flux", "--device", "cpu", "--seed", "-1"], "seed -1 is not a whole number from 0 up"),
        (["atlas", "toy:flux", "--device", "cpu", "--steps", "0"], "num_inference_steps=0"),
        (["train-toy", "flux", "--out", "x", "--iterations", "-1"], "iterations=-1 is out of range"),
        (["train-toy", "flux", "--out", "x", "--keep-every", "-1"], "keep_every=-1 is out of range"),
        (["train-toy", "flux", "--out", "x", "--until", "nan"], "until=nan cannot be used"),
        (["train-toy", "flux", "--out", "x", "--until", "2"], "until=2.0 is out of range"),
        (["train-toy", "flux", "--out", "x", "--batch", "0"], "batch=0 is out of range"),
        (["train-toy", "flux", "--out", "x", "--rate", "0"], "rate=0.0 is out of range"),
        (["train-toy", "flux", "--out", "x", "--seed", "-1"], "seed -1 is not a whole number from 0 up"),
        (["train-toy", "flux", "--out", "x", "--device", "nonsense"], "device 'nonsense' is not there"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.rstrip().splitlines()[-1].startswith("dit-lens: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", ["demo", "findings", "cells", "study", "board", "run", "atlas", "train-toy", "evaluate"]
)
def test_a_place_that_nobody_can_write_is_told_before_anything_is_loaded(command, tmp_path, capsys, monkeypatch):
    def load(*args, **options):
        raise AssertionError("a pipeline is loaded")

    place = str(tmp_path / "file" / "under")
    (tmp_path / "file").write_text("")
    arguments = {
        "demo": ["demo", "--out", place],
        "findings": ["findings", "--out", place],
        "cells": ["findings", "--out", str(tmp_path / "new"), "--cells", place],
        "study": ["study", "toy:flux", "--out", place],
        "board": ["board", str(tmp_path), "--out", place],
        "run": ["run", "toy:flux", PROMPT, "--out", place],
        "atlas": ["atlas", "toy:flux", "--out", place],
        "train-toy": ["train-toy", "flux", "--out", place],
        "evaluate": ["train-toy", "flux", "--evaluate", "--out", place],
    }[command]
    if command == "atlas":
        monkeypatch.setattr(DiTLens, "massive_channels", load)
    else:
        monkeypatch.setattr(DiTLens, "from_pretrained", load)
        monkeypatch.setattr("dit_lens.toys.train.fit", load)
    assert cli.main(arguments) == 2
    assert "cannot be written: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_page_of_someone_else_is_not_replaced_by_findings(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DiTLens, "from_pretrained", None)  # nothing is loaded
    (tmp_path / "index.md").write_text("# My site")
    assert cli.main(["findings", "--out", str(tmp_path)]) == 2
    assert "index.md is a page of something else" in capsys.readouterr().err
    (tmp_path / "index.md").unlink()
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "index.md").write_text("# My page")
    assert cli.main(["findings", "--out", str(tmp_path)]) == 2
    assert "it has no glance.csv" in capsys.readouterr().err
    assert (tmp_path / "flux" / "index.md").read_text() == "# My page"


def test_a_run_that_is_there_is_told_before_the_pipeline_is_loaded(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["run", "nowhere/at-all", PROMPT, "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_home_folder_is_found_after_an_equals_sign(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["run", "nowhere/at-all", PROMPT, "--out=~/a", "--ops=~/b.json"]) == 2
    assert f"{tmp_path / 'b.json'} does not exist" in capsys.readouterr().err


def test_a_folder_of_someone_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds no earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_it_is_a_module_as_well(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dit-lens", "info", "toy:nothing"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("dit_lens", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("dit-lens: ")
