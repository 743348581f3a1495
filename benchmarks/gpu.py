"""What looking costs on a GPU, at the sizes that people use: random weights in bf16, 1024 pixels, under nine minutes.

    python -m benchmarks.gpu --json FILE                              on a GPU
    python -m benchmarks.gpu --tiny --device cpu --json FILE          every part in small, on a CPU

Parts follow each other; one that fails says so in the table, and the next begins. After ``--minutes`` no part is begun.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dit_lens as dl
from benchmarks import measure
from benchmarks.measure import Row, alternate, wait_for
from benchmarks.models import SIZES
from benchmarks.others import OTHERS, Other
from benchmarks.runs import CHANNELS, EVERY, READ, SWAP, ZERO, Bench, measure_runs
from dit_lens.commands.doctor import examine

MIB = 2**20


class Machine:
    """Where and how large everything is.

    tiny: whether models are as small as a CPU bears.
    device: where they work.
    rounds: measurements of a ratio.
    steps: denoising steps of a run.
    """

    def __init__(self, *, tiny: bool, device: str, rounds: int, steps: int) -> None:
        self.tiny, self.device, self.rounds, self.steps = tiny, device, rounds, steps
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.cuda = device.startswith("cuda")

    def flux(self) -> Bench:
        """FLUX.1-dev of random weights."""
        return Bench(SIZES["tiny" if self.tiny else "flux"], self.steps, self.device, self.dtype, self.rounds)

    def peak(self, work: Callable[[], Any]) -> float:
        """MiB that a piece of work held at most, models included; on a CPU what it added."""
        if not self.cuda:
            return measure.peak_bytes(work) / MIB
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / MIB


def one(group: str, name: str, value: float, unit: str, note: str = "", target: float | None = None) -> Row:
    """A figure that was measured once."""
    return Row(group, name, unit, value, value, value, target=target, note=note)


def flux_ratios(machine: Machine) -> Iterator[Row]:
    """The ratios of the table on FLUX.1-dev."""
    bench = machine.flux()
    for row in measure_runs(bench):
        yield replace(row, group="FLUX.1-dev")


def flux_memory(machine: Machine) -> Iterator[Row]:
    """Peak memory of runs that read, edit and transport."""
    bench, group = machine.flux(), "FLUX.1-dev memory"
    works = {
        "plain": bench.plain(),
        "12 channels of all blocks and steps read": bench.looked((dl.Read(EVERY, channels=CHANNELS),)),
        "every token of all blocks read in one step": bench.looked((dl.Read(EVERY, steps=[0]),)),
        "12 channels of all blocks zeroed": bench.looked(ZERO),
        "plain batch of 2": bench.plain(2),
        "lockstep transport": bench.looked(SWAP, 2),
    }
    for name, work in works.items():
        yield one(group, name, machine.peak(work), "MiB")


def flux_waits(machine: Machine) -> Iterator[Row]:
    """How often a run waits for the device inside its loop, beyond what the plain pipeline does."""
    bench = machine.flux()
    for name, ops in {"no ops": (), "|mean| of all blocks": READ, "12 channels zeroed": ZERO}.items():
        waits = count_waits(machine, bench.looked(ops)) - count_waits(machine, bench.plain())
        yield one("FLUX.1-dev waits", f"{name}, in {machine.steps} steps", waits, "waits")


def count_waits(machine: Machine, work: Callable[[], Any]) -> int:
    """Waits for the device that CUDA reports; on a CPU numbers that Python asked of tensors."""
    import warnings

    if not machine.cuda:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)


def flux_offload(machine: Machine) -> Iterator[Row]:
    """Whether reads are the same where weights are moved in and out, and what a step takes then."""
    if not machine.cuda:
        return
    bench, group = machine.flux(), "FLUX.1-dev offloaded"
    expected = bench.looked(READ)()["blocks.3.img"]
    ways: dict[str, Callable[[Any], Any]] = {
        "model": lambda pipe: pipe.enable_model_cpu_offload(),
        "group": lambda pipe: pipe.transformer.enable_group_offload(
            torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True
        ),
    }
    for name, offload in ways.items():
        pipe = bench.lens.pipe
        offload(pipe)
        lens = dl.DiTLens(pipe)
        began = time.perf_counter()
        found = lens.run(None, list(READ), seed=0, **bench.calls[1])["blocks.3.img"]
        took = time.perf_counter() - began
        pipe.remove_all_hooks()
        note = "the same reads" if torch.equal(found, expected) else "OTHER READS"
        yield one(group, f"{name} offload, seconds a step", took / machine.steps, "s", note)


def flux_quantised(machine: Machine) -> Iterator[Row]:
    """Ratios on weights of int8 and fp8."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, quantize_

    configs = {"int8": Int8WeightOnlyConfig()} | (
        {"fp8": Float8DynamicActivationFloat8WeightConfig()} if machine.cuda else {}
    )
    for name, config in configs.items():
        bench = machine.flux()
        quantize_(bench.transformer, config)
        bench.lens = dl.DiTLens(bench.lens.pipe)
        group = f"FLUX.1-dev, {name}"
        yield bench.row("|mean| of all blocks / plain pipeline", bench.looked(READ), bench.plain(), 1.05, group=group)
        yield bench.row("12 channels zeroed / plain pipeline", bench.looked(ZERO), bench.plain(), 1.05, group=group)
        yield one(group, "peak memory, plain", machine.peak(bench.plain()), "MiB")


def other_ratios(other: Other, machine: Machine) -> Iterator[Row]:
    """The ratios of another family."""
    pipe, call = other.make(tiny=machine.tiny, device=machine.device, dtype=machine.dtype)
    lens = dl.DiTLens(pipe)
    call["num_inference_steps"] = machine.steps

    def plain() -> None:
        pipe(**call, generator=torch.Generator().manual_seed(0))

    def looked(ops: tuple[dl.ops.Op, ...]) -> Callable[[], Any]:
        return lambda: lens.run(None, list(ops), seed=0, **call)

    for name, ops, target in (
        ("no ops", (), 1.01),
        ("|mean| of all blocks", READ, 1.03),
        ("12 channels zeroed", ZERO, 1.05),
    ):
        found = alternate(looked(ops), plain, machine.rounds, machine.device)
        yield Row(other.name, f"{name} / plain pipeline", target=target, **found)
    yield one(other.name, "peak memory, plain", machine.peak(plain), "MiB")


def examined(machine: Machine) -> Iterator[Row]:
    """What ``dit-lens doctor`` says of the toy on this device."""
    lens = dl.DiTLens.toy().to(machine.device)
    found = examine(lens).findings
    failed = [f"{finding.name}: {finding.says}" for finding in found if finding.state == "failed"]
    yield one("doctor", "findings that failed", len(failed), "findings", "; ".join(failed), target=0)


def toy_studies(machine: Machine) -> Iterator[Row]:
    """Seconds of three studies of one prompt pair on the toy, beside the pictures that they draw."""
    lens = dl.DiTLens.toy().to(machine.device)
    prompts = [
        "a big red circle left on a plain blue background",
        "a big white square right on a plain green background",
    ]
    options = {"num_inference_steps": 2 if machine.tiny else 12}
    studies: dict[str, Callable[[], Any]] = {
        "disruption": lambda: dl.studies.disruption(lens, prompts, k=[8], seeds=[0], draws=1, **options),
        "organisation": lambda: dl.studies.organisation(lens, prompts, k=8, seeds=[0], draws=1, **options),
        "transfer": lambda: dl.studies.transfer(lens, [tuple(prompts)], k=8, seeds=[0], draws=1, **options),
    }
    lens.run(prompts, seed=0, **options)
    for name, study in studies.items():
        wait_for(machine.device)
        began = time.perf_counter()
        study()
        wait_for(machine.device)
        yield one("studies of the toy", name, time.perf_counter() - began, "s")


PARTS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "FLUX.1-dev": flux_ratios,
    "memory": flux_memory,
    "waits": flux_waits,
    "offload": flux_offload,
    **{other.name: partial(other_ratios, other) for other in OTHERS},
    "quantised": flux_quantised,
    "doctor": examined,
    "studies": toy_studies,
}


@contextmanager
def freed(machine: Machine) -> Iterator[None]:
    """Gives memory back after a part."""
    try:
        yield
    finally:
        gc.collect()
        if machine.cuda:
            torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    """Measures part by part, and writes the JSON file after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU bears")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8.5, help="after these no part is begun")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = Machine(tiny=options.tiny, device=options.device, rounds=options.rounds, steps=options.steps)
    head, rows, failed = measure.machine(options.device), [], []
    began = time.monotonic()
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    for name in options.only:
        if time.monotonic() - began > 60 * options.minutes:
            failed.append({"part": name, "says": "not begun: the time was up"})
            continue
        try:
            with freed(machine), torch.no_grad():
                for row in PARTS[name](machine):
                    rows.append(row)
                    print(row, flush=True)
        except Exception as problem:  # noqa: BLE001 the other parts are worth as much
            failed.append({"part": name, "says": "".join(traceback.format_exception_only(problem)).strip()})
            traceback.print_exc()
        if options.json:
            measure.save(options.json, head, rows, failed=failed)
    for part in failed:
        print(f"{part['part']}: {part['says']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
