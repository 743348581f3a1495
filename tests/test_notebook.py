"""The first lesson runs from top to bottom as a script."""

import runpy
from pathlib import Path

import plotly.graph_objects as go

from dit_lens import DiTLens

LESSON = Path(__file__).parent.parent / "notebooks" / "quick_start.py"


def test_the_quick_start_runs(monkeypatch):
    load = DiTLens.toy

    def quick(*args, **kwargs):
        lens = load(*args, **kwargs)
        lens.defaults["num_inference_steps"] = 3
        lens.pipe.set_progress_bar_config(disable=True)
        return lens

    monkeypatch.setattr(DiTLens, "toy", quick)
    found = runpy.run_path(str(LESSON))
    assert len(found["result"].table)
    assert isinstance(found["result"].figure(), go.Figure)
    assert len(found["t"].images) == 2
