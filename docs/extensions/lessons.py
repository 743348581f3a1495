"""Makes pages of the executed lessons, whose figures are drawn by one plotly.js for the whole site."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from build import BADGE, HERE, execute_lesson, list_sources

PLOTLY = "application/vnd.plotly.v1+json"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", lambda app, _: write_lessons(Path(app.srcdir, "lessons")))
    return {"parallel_read_safe": True}


def write_lessons(folder: Path) -> None:
    """Writes every lesson to a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(HERE / BADGE, folder)
    for source in list_sources():
        notebook = json.loads(execute_lesson(source).read_text("utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                # The badge was copied to the folder of the lessons.
                cell["source"] = "".join(cell["source"]).replace(f"](../{BADGE})", f"]({BADGE})")
            for output in cell.get("outputs", []):
                if PLOTLY in output.get("data", {}):
                    output["data"] = {"text/html": _to_script(output["data"][PLOTLY])}
        (folder / f"{source.stem}.ipynb").write_text(json.dumps(notebook), "utf-8")


def _to_script(figure: dict[str, Any]) -> str:
    """Returns a figure as data, which static/figures.js draws."""
    data = json.dumps(figure).replace("</", "<\\/")
    return f'<script type="application/json" data-plotly>{data}</script>'
