"""Writes docs/performance.md from what was measured: ``python docs/performance.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = Path(__file__).with_name("performance.md")

HEAD = """# Performance

What looking costs, beside what a person would use instead. Written by `python docs/performance.py` from
`benchmarks/results`; `python3 dev.py bench` measures it on your machine, `python -m benchmarks.gpu` on a GPU.

Every ratio is of two things that took turns in one process: median, and the quartiles of its rounds in brackets. On a
CPU seconds of the processor are counted, which a busy neighbour disturbs less than the clock on the wall; where
quartiles still lie too far apart to compare with the target, the table says so instead of judging.

Inside a run nothing asks a GPU for a number: reads go to pinned memory, times and receipts are fetched once at the end.

Where a target is missed beside own hooks: each visited module costs two events of nnsight beside the read or edit. In a
profile of the small model with 12 channels zeroed they are about two fifths of what a visit takes; the rest is the copy
of the hidden state, the gathering of the channels, and the norms that the receipt states, which own hooks do without.
"""

NO_GPU = """
## On a GPU

Not measured on a GPU yet: none was at hand. `python -m benchmarks.gpu --json FILE` takes nine minutes on a card of
80 GB."""


def page() -> str:
    """The whole page."""
    files = {name: RESULTS / f"{name}.json" for name in ("cpu", "gpu")}
    parts = [HEAD]
    for name, title in (("cpu", "On a CPU"), ("gpu", "On a GPU")):
        if files[name].exists():
            parts += ["", f"## {title}", *describe(json.loads(files[name].read_text("utf-8")))]
    return "\n".join([*parts, *([] if files["gpu"].exists() else [NO_GPU]), ""])


def describe(found: dict[str, Any]) -> Iterator[str]:
    """The lines of one file of figures."""
    machine = found["machine"]
    yield ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None) + "."
    yield ""
    yield "| what | measured | target | |"
    yield "| --- | --- | --- | --- |"
    for line in found["rows"]:
        row = Row(**line)
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        spread = f" ({row.low:.3g} to {row.high:.3g})" if row.high > row.low else ""
        target = "" if row.target is None else f"{row.target:.3g}{unit}"
        note = "; ".join(filter(None, [row.state, row.note]))
        yield _cells(f"{row.group}: {row.name}", f"{row.value:.3f}{unit}{spread}", target, note)
    for part in found.get("failed", []):
        yield _cells(part["part"], "not measured", "", part["says"])


def _cells(*texts: str) -> str:
    """A row of a table; a bar in a text stays in its cell."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
