"""Two things timed in turn, and what their ratio is."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROUNDS = 9
UNREADABLE = 0.06  # a spread of a ratio, third quartile minus first, that hides what the targets are about

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One figure of the table.

    group: what kind of thing it measures.
    name: what was measured, and beside what.
    unit: "ratio", "s", "ms" or "MiB".
    value: median.
    low, high: first and third quartile.
    target: what it should be at most, or None.
    rounds: number of measurements.
    base: seconds that the denominator of a ratio took (median), or None.
    clock: "CPU", seconds of the processor, or "wall".
    note: what a reader needs besides.
    """

    group: str
    name: str
    unit: str
    value: float
    low: float
    high: float
    target: float | None = None
    rounds: int = 1
    base: float | None = None
    clock: str = "wall"
    note: str = ""

    @property
    def state(self) -> str:
        """Whether the target is met: by the median, and only where the spread lets that be read."""
        if self.unit == "ratio" and self.high - self.low > UNREADABLE * max(1.0, self.value):
            return (
                "spread too wide to say" if self.target is None or self.low <= self.target <= self.high else self._met
            )
        return self._met

    @property
    def _met(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.value <= self.target else "missed"

    def __str__(self) -> str:
        target = "" if self.target is None else f"<= {self.target:g}"
        spread = f"({self.low:.3f} to {self.high:.3f})"
        return f"{self.group:18} {self.name:72} {self.value:8.3f} {self.unit:6} {spread:20} {target:10} {self.state}"


def wait_for(device: str) -> None:
    """Waits until the device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def alternate(one: Work, other: Work, rounds: int = ROUNDS, device: str = "cpu") -> dict[str, Any]:
    """Seconds of one thing over those of the other, measured in turn: now this one first, now that one.

    On a CPU processor time is counted, which a busy neighbour disturbs less than the clock on the wall.
    """
    one(), other()  # warm
    clock = time.perf_counter if device != "cpu" else time.process_time
    ratios, bases = [], []
    for number in range(rounds):
        spent = {}
        for work in (one, other) if number % 2 else (other, one):
            gc.collect()
            wait_for(device)
            began = clock()
            work()
            wait_for(device)
            spent[work] = clock() - began
        ratios.append(spent[one] / spent[other])
        bases.append(spent[other])
    return {
        **quartiles(ratios),
        "unit": "ratio",
        "rounds": rounds,
        "base": float(np.median(bases)),
        "clock": "wall" if device != "cpu" else "CPU",
    }


def repeat(work: Work, rounds: int = ROUNDS, device: str = "cpu") -> dict[str, Any]:
    """Seconds that one thing takes."""
    work()
    clock = time.perf_counter if device != "cpu" else time.process_time
    spent = []
    for _ in range(rounds):
        wait_for(device)
        began = clock()
        work()
        wait_for(device)
        spent.append(clock() - began)
    return {**quartiles(spent), "unit": "s", "rounds": rounds, "clock": "wall" if device != "cpu" else "CPU"}


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    low, value, high = np.percentile(values, [25, 50, 75])
    return {"value": float(value), "low": float(low), "high": float(high)}


def peak_bytes(work: Work) -> int:
    """The most memory that tensors made during a piece of work on the CPU held at one time."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on, and with."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "nnsight", "dit_lens")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save(path: Path, head: dict[str, Any], rows: list[Row], **more: Any) -> None:
    """Writes the figures so far. head: the machine. more: what else the file holds."""
    found = {"machine": head, "rows": [asdict(row) for row in rows], **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def moved(rows: list[Row], earlier: dict[str, Any]) -> Iterator[str]:
    """The figures that lie beyond an earlier measurement by more than both spreads.

    earlier: what the JSON file of that measurement holds.
    """
    if earlier["machine"]["device"] != machine()["device"]:
        yield f"another machine: {earlier['machine']['device']}; only ratios can be compared"
    before = {(old["group"], old["name"]): old for old in earlier["rows"]}
    for row in rows:
        old = before.get((row.group, row.name))
        if old is None:
            continue
        if row.low > old["high"] and row.value > 1.02 * old["value"]:
            yield f"slower: {row.group}, {row.name}: {old['value']:.3f} -> {row.value:.3f} {row.unit}"
        elif row.high < old["low"] and row.value < 0.98 * old["value"]:
            yield f"faster: {row.group}, {row.name}: {old['value']:.3f} -> {row.value:.3f} {row.unit}"
