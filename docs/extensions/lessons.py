"""Executed lessons as pages of the site: their figures drawn by the site's one plotly, their widgets as static pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from build import executed

ROOT = Path(__file__).resolve().parents[2]
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", lambda app, _: write(Path(app.srcdir, "lessons")))
    return {"parallel_read_safe": True}


def write(folder: Path) -> None:
    """Writes every lesson into a folder that holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in sorted((ROOT / "notebooks").glob("*.py")):
        if source.name != "build.py":
            notebook = json.loads(executed(source).read_text("utf-8"))
            (folder / f"{source.stem}.ipynb").write_text(json.dumps(_for_the_site(notebook)), "utf-8")


def _for_the_site(notebook: dict[str, Any]) -> dict[str, Any]:
    notebook["metadata"].pop("widgets", None)  # the state of widgets, which is of use to a kernel alone
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "data" in output:
                output["data"] = _shown(output["data"])
    return notebook


def _shown(data: dict[str, Any]) -> dict[str, Any]:
    """One form of what a cell answers: a figure as data for static/figures.js, anything else as it is, HTML first."""
    if PLOTLY in data:
        figure = json.dumps(data[PLOTLY]).replace("</", "<\\/")
        return {"text/html": f'<script type="application/json" data-plotly>{figure}</script>'}
    return {kind: value for kind, value in data.items() if kind != WIDGET}
