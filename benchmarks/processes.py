"""What takes a fresh process: imports, loading a toy, the demo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.measure import Row, quartiles

TOY = "from dit_lens import DiTLens; DiTLens.toy()"
PLAIN = "from diffusers import FluxPipeline; from dit_lens import toys; FluxPipeline.from_pretrained(toys.path('flux'))"
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def measure_imports(rounds: int) -> Iterator[Row]:
    """Imports, and a toy beside the same folder loaded by diffusers."""
    group = "fresh process"
    yield Row(
        group, "import dit_lens / import torch", target=0.1, **_compare("import dit_lens", "import torch", rounds)
    )
    yield Row(
        group,
        "DiTLens.toy() / FluxPipeline.from_pretrained, imports included",
        target=1.05,
        **_compare(TOY, PLAIN, rounds),
    )


def measure_demo() -> Iterator[Row]:
    """The demo, from the command to its page."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dit_lens.commands.cli", "demo", "--out", str(Path(folder) / "demo")],
            check=True,
            capture_output=True,
        )
        took = time.perf_counter() - began
    yield Row("fresh process", "dit-lens demo", "s", took, took, took, target=60, note="with all cores")


def _compare(one: str, other: str, rounds: int) -> dict[str, object]:
    """Processor seconds of one script over those of another, less those of an empty one."""
    ratios, bases = [], []
    for number in range(rounds):
        spent = {}
        for script in (one, other) if number % 2 else (other, one):
            spent[script] = _seconds(script) - _seconds("pass")
        ratios.append(spent[one] / spent[other])
        bases.append(spent[other])
    return {**quartiles(ratios), "unit": "ratio", "rounds": rounds, "base": float(np.median(bases)), "clock": "CPU"}


def _seconds(script: str) -> float:
    """Processor seconds of a fresh interpreter that runs a script."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, env=os.environ | QUIET
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
