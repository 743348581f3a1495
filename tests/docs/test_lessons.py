"""The lessons run, show what they should, and their exercises tell a blank from an answer."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks import build

SOURCES = build.list_sources()
LESSONS = [source for source in SOURCES if source.stem.startswith("lesson_")]
SECONDS = 100  # that a lesson may take on one core
DRAWS = re.compile(r"^(plots\.\w+\(|dl\.(explore|steer)\(|.*\.figure\(\)$)", re.MULTILINE)
DRAWN = {"application/vnd.plotly.v1+json", "text/html"}


def named(source):
    return source.stem


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_the_notebooks_are_what_their_sources_say():
    assert build.main(["--check"]) == 0


def test_a_notebook_that_was_changed_is_named_and_mended(tmp_path, monkeypatch, capsys):
    source = tmp_path / "lesson.py"
    source.write_text("# %% [markdown]\n# # A lesson\n\n# %% tags=['solution']\n# A number.\nx = 1\n")
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.main([]) == 0
    written = (tmp_path / "lesson.ipynb").read_bytes()
    assert build.main(["--check"]) == 0
    (tmp_path / "lesson.ipynb").write_bytes(written + b"\n")
    capsys.readouterr()
    assert build.main(["--check"]) == 1
    assert capsys.readouterr().out == "out of date: lesson.ipynb\n"
    assert build.main([]) == 0
    assert (tmp_path / "lesson.ipynb").read_bytes() == written


def test_a_blank_keeps_the_first_comments_and_the_names():
    solution = "# An image.\n# With seed=0.\nrun = f()\n# no more\nearly, late = run[0], run[1]\nearly.x = 1"
    assert build.blank_solution(solution) == "# An image.\n# With seed=0.\nrun = ...\nearly = ...\nlate = ..."


def test_a_lesson_is_executed_once_until_it_changes(tmp_path, monkeypatch):
    source, runs = tmp_path / "lesson.py", []
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "EXECUTED", tmp_path / "executed")
    monkeypatch.setattr(build, "run", lambda notebook: runs.append(notebook) or notebook)
    for text in ("# %%\n1\n", "# %%\n1\n", "# %%\n2\n"):
        source.write_text(text)
        assert nbformat.read(build.execute_lesson(source), as_version=4).cells[0].source == text[5:-1]
    assert len(runs) == 2


def test_what_is_said_of_this_machine_and_moment_is_left_out():
    chatter = "import sys\nfrom tqdm.auto import tqdm\nfor _ in tqdm([1]):\n    print('here', file=sys.stderr)\n6 * 7"
    (cell,) = build.run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(chatter)])).cells
    assert [output.data["text/plain"] for output in cell.outputs] == ["42"]


def test_a_notebook_finds_nothing_that_another_left():
    left = "import pathlib\nx = 1\nopen('here', 'w').close()\n1 / 0"
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        build.run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(left)]))
    found = "[name for name in ('x', 'pathlib') if name in globals()], __import__('os').listdir()"
    (cell,) = build.run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(found)])).cells
    assert [output.data["text/plain"] for output in cell.outputs] == ["([], [])"]
    assert cell.execution_count == 1


@pytest.mark.parametrize("source", LESSONS, ids=named)
def test_a_lesson_says_what_it_teaches_and_has_exercises(source):
    whole = build.make_notebooks(source)[build.HERE / "solutions" / f"{source.stem}.ipynb"]
    text = "\n".join(cell.source for cell in whole.cells if cell.cell_type == "markdown")
    assert text.startswith("# ")
    taught = text.split("You will learn\n\n")[1].split("\n\n")[0]
    assert len(re.findall(r"^- ", taught, re.MULTILINE)) == 3
    assert "## What we know, and what we do not" in text
    assert 2 <= len(tagged(whole, "solution")) == len(tagged(whole, "check")) <= 3


@pytest.mark.parametrize("source", LESSONS, ids=named)
def test_a_blank_exercise_fails_its_check_with_what_to_do(source):
    blank = build.make_notebooks(source)[build.HERE / f"{source.stem}.ipynb"]
    exercises = zip(tagged(blank, "solution"), tagged(blank, "check"), strict=True)
    for number, (answer, check) in enumerate(exercises, start=1):
        names = {}
        exec(answer.source, names)
        with pytest.raises(AssertionError, match=rf"^Exercise {number} is blank: \w.*\.$"):
            exec(check.source, names)


@pytest.mark.slow
@pytest.mark.xdist_group("lessons")  # of which one kernel executes all
@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_a_lesson_runs_in_time_and_shows_its_figures(source):
    notebook = nbformat.read(build.execute_lesson(source), as_version=4)
    assert 0 < notebook.metadata.seconds < SECONDS
    figures = [cell for cell in notebook.cells if cell.cell_type == "code" and DRAWS.search(cell.source)]
    assert len(figures) > 1 or source.stem == "lesson_7_own_model"  # which has tables
    for cell in figures:
        assert DRAWN & set(cell.outputs[-1].data), cell.source
    for cell in tagged(notebook, "check"):
        assert "is solved" in cell.outputs[0].text
