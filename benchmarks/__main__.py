"""What looking costs, in one table and one JSON file.

    python3 dev.py bench                                 everything; about 20 minutes on two quiet cores
    python3 dev.py bench --only runs plan                some groups
    python3 dev.py bench --out benchmarks/results/cpu.json
    python3 dev.py bench --against benchmarks/results/cpu.json

Every ratio is of two things that take turns in one process (or of pairs of processes). Threads are pinned to one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import browser, measure, processes, runs, work
from benchmarks.measure import Row

GROUPS: dict[str, Callable[[int], Iterator[Row]]] = {
    "runs": lambda rounds: runs.measure_runs(runs.make("wide", rounds)),
    "small": lambda rounds: runs.measure_small(runs.Toy(rounds)),
    "others": lambda rounds: runs.measure_others(runs.make("wide", rounds)),
    "memory": lambda rounds: _all(runs.measure_peak(runs.make("wide", rounds)), work.measure_statistics()),
    "plan": work.measure_plans,
    "sweep": lambda rounds: work.measure_sweeps(runs.make("wide", rounds), max(3, rounds // 3)),
    "clusters": work.measure_clusters,
    "studies": work.measure_studies,
    "processes": processes.measure_imports,
    "demo": lambda _: processes.measure_demo(),
    "explorer": lambda _: browser.measure_explorer(),
    "growth": lambda rounds: runs.measure_growth(runs.SIZES["wide"], max(3, rounds // 3)),
}


def _all(*parts: Iterator[Row]) -> Iterator[Row]:
    for part in parts:
        yield from part


def main(arguments: list[str]) -> int:
    """Measures, prints the table, and writes or compares."""
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS, help="measurements of each ratio, 9 by default")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--against", type=Path, help="an earlier JSON file; what moved beyond its spread is named")
    options = parser.parse_args(arguments)
    earlier = json.loads(options.against.read_text("utf-8")) if options.against else None
    torch.set_num_threads(1)
    head, rows = measure.machine(), []
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    for group in options.only:
        for row in GROUPS[group](options.rounds):
            rows.append(row)
            print(row, flush=True)
        if options.out:  # after every group, so that an interruption loses one at most
            measure.save(options.out, head, rows)
    moved = list(measure.moved(rows, earlier)) if earlier else []
    print(*moved, sep="\n", end="\n" if moved else "")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
