"""What a large study takes beside its images: ``python -m benchmarks.scaling`` measures it on this machine.

    python -m benchmarks.scaling --json benchmarks/results/scaling.json             # all of it, some minutes
    python -m benchmarks.scaling --json benchmarks/results/scaling.json cells       # one part, into the same file

``python docs/scaling.py`` writes docs/scaling.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.measure import machine
from dit_lens import DiTLens, RayWorkers, studies
from dit_lens.studies.shared import prompts
from dit_lens.studies.shared.cells import Cell, pack_cell, read_cell, write_packed
from dit_lens.studies.shared.dealer import Dealer
from dit_lens.studies.shared.orders import Died, Made, Make, Ready
from dit_lens.studies.shared.ray_workers import RayCrew
from dit_lens.studies.shared.shares import StudyJob
from dit_lens.studies.shared.slots import Slot

BLOCKS, WIDTH, PIXELS, BATCH = 57, 3072, 1024, 8  # of FLUX.1, at its own size
ROUNDS = 5


def picture(seed: int) -> Image.Image:
    """As hard to compress as a photograph: smooth shapes, with fine noise on them."""
    random = np.random.default_rng(seed)
    rough = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((PIXELS, PIXELS))
    smooth = np.asarray(rough.filter(ImageFilter.GaussianBlur(8)), np.float32)
    return Image.fromarray(np.clip(smooth + random.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8))


def cells() -> dict[str, Cell]:
    """The kinds of cells of ``disruption``, for a batch of FLUX.1's size: untouched at some blocks, and an arm."""
    images = {str(i): picture(i) for i in range(BATCH)}
    lines = [{"prompt": "x" * 80, "seed": 0, "k": 12, "arm": "top", "rmse": 1.0 / (i + 3)} for i in range(BATCH)]
    arrays = {
        blocks: {
            f"{i}/{what}/blocks.{block}.img": np.random.default_rng(block).standard_normal(WIDTH).astype(np.float32)
            for i in range(BATCH)
            for what in ("score", "rms", "energy at first")
            for block in range(blocks)
        }
        for blocks in (1, BLOCKS)
    }
    untouched = {f"untouched, blocks: {blocks}": Cell(lines, images, arrays=some) for blocks, some in arrays.items()}
    return {**untouched, "arm": Cell(lines, images)}


def seconds(work: Callable[[], Any]) -> float:
    """The median of some rounds."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measure_cells() -> dict[str, Any]:
    """Bytes of a cell, and what packing it (in a worker), keeping it (in the driver) and reading it takes."""
    found: dict[str, Any] = {}
    for kind, cell in cells().items():
        with tempfile.TemporaryDirectory() as place:
            folder, files = Path(place) / "000000", pack_cell("key", cell)
            found[kind] = {
                "bytes": sum(map(len, files.values())),
                "image_bytes": sum(len(file) for name, file in files.items() if name.endswith(".png")) / BATCH,
                "pack": seconds(lambda cell=cell: pack_cell("key", cell)),
                "keep": seconds(lambda folder=folder, files=files: write_packed(folder, files)),
                "read": seconds(lambda folder=folder: read_cell(folder, "disruption")),
            }
    return found


class Sleeper:
    """A worker whose cells take a time of their own and nothing else. load: (mean seconds, share that kills)."""

    def __init__(self, load: tuple[float, float]):
        self.mean, self.dying = load
        self.random = np.random.default_rng()

    def begin(self, job: StudyJob) -> Any:  # noqa: ARG002
        return Ready()

    def answer(self, order: Any) -> Any:
        time.sleep(self.mean * 2 * self.random.random())
        if self.random.random() < self.dying:
            self.die()
        cell = {"key": str(order.number), "lines": [], "images": {}, "parts": []}
        return Made(order.number, {"cell.json": json.dumps(cell).encode()})

    def die(self) -> None:
        """As a process does that runs out of memory."""
        os.kill(os.getpid(), signal.SIGKILL)


class DeadError(Exception):
    """A worker in a thread has died."""


class ThreadSleeper(Sleeper):
    """The same in a thread."""

    def die(self) -> None:
        raise DeadError


class ThreadCrew:
    """Sleepers in threads of this process."""

    def __init__(self, size: int, load: tuple[float, float]):
        self.size, self.load, self.deaths = size, load, 0
        self.orders: dict[int, queue.SimpleQueue] = {}
        self.replies: queue.SimpleQueue = queue.SimpleQueue()

    def begin(self, worker: int, job: StudyJob) -> None:  # noqa: ARG002
        self.orders[worker] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(worker, self.orders[worker]), daemon=True).start()

    def _work(self, worker: int, orders: queue.SimpleQueue) -> None:
        sleeper = ThreadSleeper(self.load)
        self.replies.put((worker, Ready()))
        try:
            while True:
                self.replies.put((worker, sleeper.answer(orders.get())))
        except DeadError:
            self.replies.put((worker, Died("killed")))

    def send(self, worker: int, order: Make) -> None:
        self.orders[worker].put(order)

    def receive(self, timeout: float | None) -> Any:
        try:
            found = self.replies.get(timeout=timeout) if timeout != 0 else self.replies.get_nowait()
        except queue.Empty:
            return None
        self.deaths += isinstance(found[1], Died)
        return found


def simulate(crew: Any, count: int, *, needing: int = 0) -> dict[str, Any]:
    """Deals so many cells to a crew, and counts what is in the folder.

    crew: the workers.
    count: number of cells.
    needing: how many cells come first, of which the code looks into each before it asks for the others.
    """
    kept: Counter[str] = Counter()

    class CountedSlot(Slot):
        def take(self, files: Any) -> None:
            super().take(files)
            kept[self.key] += 1

    with tempfile.TemporaryDirectory() as place:
        began, done = time.perf_counter(), []
        dealer = Dealer(crew, StudyJob(study="disruption", arguments={}), dict)
        first = []
        for number in range(count):
            slot = CountedSlot(
                study="disruption",
                number=number,
                key=str(number),
                group=str(number),
                folder=Path(place) / f"{number:06d}",
                closed=None,
                create=list,
            )
            first.append(dealer.get(slot, lambda: done.append(1)))
            if number + 1 == needing:
                [cell.lines for cell in first]
        dealer.finish()
        took = time.perf_counter() - began
        there = sum(1 for folder in Path(place).glob("[0-9]*") if folder.is_dir())
    return {
        "cells": count,
        "workers": crew.size,
        "kept": there,
        "kept_twice": sum(times > 1 for times in kept.values()),
        "counted": len(done),
        "seconds": took,
        "deaths": crew.deaths,
    }


class CountedRayCrew(RayCrew):
    """Counts the actors that died."""

    deaths = 0

    def receive(self, timeout: float | None) -> Any:
        found = super().receive(timeout)
        self.deaths += found is not None and isinstance(found[1], Died)
        return found


def measure_actors(sizes: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Cells per second of a small study on the toy with one actor and with two, once all have begun.

    Equal tables are asserted.
    """
    texts = prompts.scenes(4, 0).texts
    how: dict[str, Any] = {"k": 8, "draws": 6, "batch_size": 2, "num_inference_steps": 2}
    expected, found = studies.disruption(DiTLens.toy(), texts, **how), {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            result = studies.disruption(DiTLens.toy(), texts, **how, out=out, workers=RayWorkers(DiTLens.toy, size))
            assert result.table.equals(expected.table)
            times = sorted(file.stat().st_mtime for file in out.glob("cells/*/cell.json"))
        times = times[len(times) // 2 :]  # the first ones come before all workers have begun
        found[str(size)] = (len(times) - 1) / (times[-1] - times[0])
    return {"cells_per_second": found, "cells": len(times), "load": os.getloadavg()}


def main() -> None:
    """Measures, and writes a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all by default")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        found = json.loads(options.json.read_text()) if options.json.exists() else {}
        found |= {"machine": machine(), part: PARTS[part]()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(part, json.dumps(found[part], indent=1))


def simulate_actors() -> dict[str, Any]:
    """Cells that sleep in processes of Ray, some of which kill themselves."""
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    crew = CountedRayCrew(ray, (0.2, 0.02), 4, 0, Sleeper)
    try:
        return simulate(crew, 500, needing=50)
    finally:
        crew.close()
        ray.shutdown()


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "cells": measure_cells,
    "threads": lambda: simulate(ThreadCrew(64, (0.05, 0.05)), 10_000, needing=1000),
    "ray": simulate_actors,
    "actors": measure_actors,
}


if __name__ == "__main__":
    main()
