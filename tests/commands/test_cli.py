"""The command line as a person types it."""

import json
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
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.rstrip().splitlines()[-1].startswith("dit-lens: ")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_someone_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds no earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_the_demo(tmp_path, capsys, monkeypatch):
    load = DiTLens.toy

    def quick(*args, **kwargs):
        lens = load(*args, **kwargs)
        lens.defaults["num_inference_steps"] = 3
        return lens

    monkeypatch.setattr(DiTLens, "toy", quick)
    monkeypatch.setattr("dit_lens.commands.page.find_browser", lambda: None)
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "energy-matched" in said
    assert said.rstrip().endswith("index.html")
    page = (tmp_path / "demo" / "index.html").read_text()
    for words in (
        "Massive channels",
        "Are they critical?",
        "organised in space?",
        "Can they be moved?",
        "data:image/png",
    ):
        assert words in page
    addresses = sources(page)
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    from dit_lens.studies import Result

    for study in ("disruption", "organisation", "transfer"):
        assert len(Result.load(tmp_path / "demo" / study).table)
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--seed", "1", "--prompt", "a cat"]) == 2
    assert (tmp_path / "demo" / "index.html").read_text() == page
