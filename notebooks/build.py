"""Writes the notebooks of the lessons, and executes lessons for the tests and the documentation.

    python notebooks/build.py            write notebooks/*.ipynb and notebooks/solutions/*.ipynb
    python notebooks/build.py --check    write nothing; list the notebooks that differ from their source

The sources are the percent scripts beside this file. A cell with the tag "solution" is blank in the notebook (its first
comments, and `name = ...` for what it defines) and complete in the solutions; a cell with the tag "check" tests the
solution of an exercise. The same source always gives the same bytes.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import os
import sys
import tempfile
from itertools import takewhile
from pathlib import Path

import jupytext
import nbformat
import psutil
from filelock import FileLock
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell

REPOSITORY = "dit-lens/dit_lens"  # owner/name on GitHub, for Colab; to be changed in a fork

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BADGE = "colab.svg"  # in the folder of the notebooks
EXECUTED = ROOT / "build" / "lessons"
SECONDS = 300  # time limit of a cell
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
IN_COLAB = """\
import sys

if "google.colab" in sys.modules:
    %pip install -q {packages}"""
ALSO = {"lesson_8_features": " eai-sparsify"}  # packages that a lesson needs beside this one
WIDGET = "application/vnd.jupyter.widget-view+json"


def list_sources() -> list[Path]:
    """Returns the sources of all lessons."""
    return sorted(path for path in HERE.glob("*.py") if path != Path(__file__).resolve())


def make_notebooks(source: Path) -> dict[Path, nbformat.NotebookNode]:
    """Returns the two notebooks of a lesson by their paths: the one with blanks, and the one with solutions."""
    solved = _convert(source)
    blank = copy.deepcopy(solved)
    solved.cells[1].source = solved.cells[1].source.replace(BADGE, f"../{BADGE}")
    for cell in blank.cells:
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.source = blank_solution(cell.source)
        if "check" in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
    name = f"{source.stem}.ipynb"
    return {HERE / name: blank, HERE / "solutions" / name: solved}


def blank_solution(code: str) -> str:
    """Replaces the values in a solution by dots, and keeps its first comments.

    >>> print(blank_solution("# The answer.\\nhalf = 0.5\\nanswer = 84 * half"))
    # The answer.
    half = ...
    answer = ...
    """
    comments = takewhile(lambda line: line.startswith("#"), code.splitlines())
    assigned = (target for node in ast.parse(code).body if isinstance(node, ast.Assign) for target in node.targets)
    names = (node for target in assigned for node in ast.walk(target) if isinstance(node, ast.Name))
    defined = dict.fromkeys(name.id for name in names if isinstance(name.ctx, ast.Store))
    return "\n".join([*comments, *(f"{name} = ..." for name in defined)])


def find_outdated(*, write: bool = False) -> list[Path]:
    """Returns the notebooks that differ from their source. write: whether to update them."""
    found = []
    for source in list_sources():
        for path, notebook in make_notebooks(source).items():
            text = nbformat.writes(notebook) + "\n"
            if path.is_file() and path.read_text("utf-8") == text:
                continue
            found.append(path)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")
    return found


def execute_lesson(source: Path) -> Path:
    """Returns the path of a lesson's notebook with solutions and all outputs, in build/lessons.

    Executes it if the lesson, this file or the package has changed; a second process waits for the first.
    Raises nbclient.exceptions.CellExecutionError if a cell fails.
    """
    path, digest = EXECUTED / f"{source.stem}.ipynb", _compute_digest(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file() or nbformat.read(path, as_version=4).metadata.get("made_from") != digest:
            notebook = run(make_notebooks(source)[HERE / "solutions" / path.name])
            notebook.metadata["made_from"] = digest
            nbformat.write(notebook, path)
    return path


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Executes a notebook in an empty folder and returns it with its outputs; its metadata have the CPU seconds.

    All notebooks of a process share a kernel, which imports torch once; each finds it without names of another.
    """
    with tempfile.TemporaryDirectory() as folder:
        _begin_anew(folder)
        before = _kernel_seconds()
        try:
            _execute(notebook)
            notebook.metadata["seconds"] = _kernel_seconds() - before
        finally:
            _begin_anew(ROOT)  # before the folder is gone
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_transient(output)]
    return notebook


@functools.cache
def _client() -> NotebookClient:
    """A client whose kernel lives as long as this process."""
    return NotebookClient(nbformat.v4.new_notebook(), timeout=SECONDS, store_widget_state=False)


def _execute(notebook: nbformat.NotebookNode) -> None:
    """Executes the cells of a notebook in the kernel of this process."""
    client = _client()
    client.nb = notebook
    client.reset_execution_trackers()
    client.execute(cleanup_kc=False, env={**os.environ, "DIT_LENS_RENDER": "static"})  # explorers need no kernel


def _begin_anew(folder: str | Path) -> None:
    """Empties the namespace of the kernel, and moves it to a folder."""
    code = f"get_ipython().reset(); __import__('os').chdir({str(folder)!r})"
    _execute(nbformat.v4.new_notebook(cells=[new_code_cell(code)]))


def _kernel_seconds() -> float:
    """CPU seconds of the kernel so far."""
    return psutil.Process(_client().km.provisioner.pid).cpu_times().user


def _is_transient(output: nbformat.NotebookNode) -> bool:
    """Returns whether an output depends on this machine or moment: on stderr, or a progress bar."""
    return output.get("name") == "stderr" or (output.output_type == "display_data" and WIDGET in output.data)


def _convert(source: Path) -> nbformat.NotebookNode:
    """Converts a percent script to a notebook, with a link to Colab."""
    title, *rest = jupytext.read(source).cells
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{source.stem}.ipynb"
    in_colab = IN_COLAB.format(packages=f'"git+https://github.com/{REPOSITORY}"{ALSO.get(source.stem, "")}')
    colab = [
        new_markdown_cell(f"[![Open in Colab]({BADGE})]({address})"),
        new_code_cell(in_colab, metadata={"tags": ["remove-cell"]}),  # not shown in the documentation
    ]
    cells = [title, *colab, *rest]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:03}"  # random by default
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def _compute_digest(source: Path) -> str:
    """Returns a hash of everything that the outputs of a lesson depend on."""
    package = (path for path in sorted((ROOT / "dit_lens").rglob("*")) if "__pycache__" not in path.parts)
    files = [source, Path(__file__), *filter(Path.is_file, package)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    check = bool(arguments)
    found = find_outdated(write=not check)
    for path in found:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
