"""Executed lessons as pages of the site: their figures are drawn by the site's one plotly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from build import BADGE, HERE, executed, sources

PLOTLY = "application/vnd.plotly.v1+json"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", lambda app, _: write(Path(app.srcdir, "lessons")))
    return {"parallel_read_safe": True}


def write(folder: Path) -> None:
    """Writes every lesson into a folder that holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(HERE / BADGE, folder)
    for source in sources():
        notebook = json.loads(executed(source).read_text("utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = "".join(cell["source"]).replace(f"](../{BADGE})", f"]({BADGE})")  # it lies here
            for output in cell.get("outputs", []):
                if PLOTLY in output.get("data", {}):
                    output["data"] = {"text/html": _figure(output["data"][PLOTLY])}
        (folder / f"{source.stem}.ipynb").write_text(json.dumps(notebook), "utf-8")


def _figure(figure: dict[str, Any]) -> str:
    """A figure as data, which static/figures.js draws."""
    data = json.dumps(figure).replace("</", "<\\/")
    return f'<script type="application/json" data-plotly>{data}</script>'
