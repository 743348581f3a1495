"""What reads and edits cost beside a plain pipeline, plain torch hooks, raw nnsight and two separate runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

import dit_lens as dl
from benchmarks.measure import ROUNDS, Row, Work, alternate, peak_bytes
from benchmarks.models import SIZES, Size, make_call, make_pipeline, make_transformer

EVERY = "blocks.*.img"
CHANNELS = range(12)


class Bench:
    """One random FLUX, looked at in every way.

    size: its size.
    steps: denoising steps of a run.
    """

    def __init__(
        self, size: Size, steps: int = 4, device: str = "cpu", dtype: torch.dtype = torch.float32, rounds: int = ROUNDS
    ) -> None:
        self.size, self.steps, self.device, self.dtype, self.rounds = size, steps, device, dtype, rounds
        self.transformer = make_transformer(size, device, dtype)
        self.plain_pipe = make_pipeline(self.transformer)
        self.lens = dl.DiTLens(make_pipeline(self.transformer))
        self.blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        self.calls = {rows: make_call(size, rows, steps, device, dtype) for rows in (1, 2)}

    def plain(self, rows: int = 1) -> Work:
        """The pipeline as it is."""
        call = self.calls[rows]
        return lambda: self.plain_pipe(**call, generator=[torch.Generator().manual_seed(0) for _ in range(rows)])

    def looked(self, ops: Sequence[dl.ops.Op], rows: int = 1) -> Work:
        """The same through the lens."""
        return lambda: self.lens.run(None, list(ops), seed=0, **self.calls[rows])

    def hooked(self, hook: Callable[[Any, list[Tensor]], Any], rows: int = 1) -> Work:
        """The same with a torch hook of one's own on every block; what it keeps comes to the CPU at the end."""
        plain = self.plain(rows)

        def run() -> list[Tensor]:
            kept: list[Tensor] = []
            handles = [block.register_forward_hook(lambda _m, _i, out: hook(out, kept)) for block in self.blocks]
            try:
                plain()
            finally:
                for handle in handles:
                    handle.remove()
            return [tensor.cpu() for tensor in kept]

        return run

    def traced(self, cache: bool) -> Work:
        """The same in raw nnsight: a trace that saves every block's mean, or its cache of whole hidden states."""
        model = nnsight.NNsight(self.transformer)
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        inputs = self._forward_inputs()

        def read() -> list[Tensor]:
            kept = []
            for _ in range(self.steps):
                with model.trace(**inputs):
                    saved = nnsight.save([block.output[1].mean(1).abs() for block in blocks])
                kept += saved
            return kept

        def keep() -> list[Any]:
            kept = []
            for _ in range(self.steps):
                with model.trace(**inputs) as tracer:
                    saved = tracer.cache(modules=blocks)
                kept.append(saved)
            return kept

        return keep if cache else read

    def forwards(self) -> Work:
        """As many plain forward passes of the transformer as a run has steps: what raw nnsight is compared with."""
        inputs = self._forward_inputs()

        def run() -> None:
            with torch.no_grad():
                for _ in range(self.steps):
                    self.transformer(**inputs)

        return run

    def _forward_inputs(self) -> dict[str, Tensor]:
        """What the pipeline gives its transformer in its first step."""
        found: dict[str, Any] = {}

        def look(_: Any, __: Any, given: dict[str, Any]) -> None:
            found.update(given)

        handle = self.transformer.register_forward_pre_hook(look, with_kwargs=True)
        self.plain()()
        handle.remove()
        return found

    def row(
        self, name: str, one: Work, other: Work, target: float | None = None, note: str = "", group: str = "runs"
    ) -> Row:
        """One line of the table."""
        return Row(group, name, target=target, note=note, **alternate(one, other, self.rounds, self.device))


class Toy(Bench):
    """The toy that comes with the library, drawn as its card says: encoders, denoising, autoencoder."""

    def __init__(self, rounds: int) -> None:
        self.lens, twin = dl.DiTLens.toy(), dl.DiTLens.toy()
        self.plain_pipe, self.device, self.rounds = twin.pipe, "cpu", rounds
        self.plain_pipe.set_progress_bar_config(disable=True)
        self.lens.pipe.set_progress_bar_config(disable=True)
        self.blocks = [*twin.pipe.transformer.transformer_blocks, *twin.pipe.transformer.single_transformer_blocks]
        prompts = ["a big red circle left on a checkered blue background"] * 2
        self.calls = {rows: {**self.lens.defaults, "prompt": prompts[:rows]} for rows in (1, 2)}

    def looked(self, ops: Sequence[dl.ops.Op], rows: int = 1) -> Work:
        return lambda: self.lens.run(self.calls[rows]["prompt"], list(ops), seed=0)


def mean(out: Any, kept: list[Tensor]) -> None:
    """A hook that keeps |mean over tokens|."""
    kept.append(out[1].mean(1, dtype=torch.float32).abs())


def zero(out: Any, _: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A hook that zeroes channels."""
    hidden = out[1].clone()
    hidden[..., : len(CHANNELS)] = 0
    return out[0], hidden


def swap(out: Any, _: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A hook that gives the second picture the channels of the first."""
    hidden = out[1].clone()
    hidden[1, :, : len(CHANNELS)] = hidden[0, :, : len(CHANNELS)]
    return out[0], hidden


READ = (dl.Read(EVERY, reduce="|mean|"),)
ZERO = (dl.Zero(EVERY, channels=CHANNELS),)
SWAP = (dl.Swap(EVERY, source="row:0", rows=1, channels=CHANNELS),)


def measure_runs(bench: Bench) -> Iterator[Row]:
    """Reads and edits of a model whose blocks take longer than the looking."""
    plain, pair = bench.plain(), bench.plain(2)
    yield bench.row("no ops / plain pipeline", bench.looked([]), plain, 1.01)
    yield bench.row("|mean| of all blocks and steps / plain pipeline", bench.looked(READ), plain, 1.03)
    yield bench.row("|mean| of all blocks and steps / own hooks", bench.looked(READ), bench.hooked(mean), 1.02)
    yield bench.row("12 channels of all blocks zeroed / plain pipeline", bench.looked(ZERO), plain, 1.05)
    yield bench.row("12 channels of all blocks zeroed / own hooks", bench.looked(ZERO), bench.hooked(zero), 1.02)
    yield bench.row("lockstep transport, all blocks / plain batch of 2", bench.looked(SWAP, 2), pair, 1.05)
    yield bench.row("lockstep transport, all blocks / own hooks", bench.looked(SWAP, 2), bench.hooked(swap, 2))


def measure_small(bench: Bench) -> Iterator[Row]:
    """The same of a model so small that the looking shows."""
    group = "small model"
    yield bench.row("no ops / plain pipeline", bench.looked([]), bench.plain(), 1.03, group=group)
    yield bench.row("|mean| of all blocks / own hooks", bench.looked(READ), bench.hooked(mean), 1.05, group=group)
    yield bench.row("12 channels zeroed / own hooks", bench.looked(ZERO), bench.hooked(zero), 1.05, group=group)


def measure_others(bench: Bench) -> Iterator[Row]:
    """What people use today, each beside the lens doing the same."""
    group = "beside other ways"
    whole = (dl.Read(EVERY),)
    yield bench.row(
        "raw nnsight, |mean| of all blocks / plain forward passes",
        bench.traced(cache=False),
        bench.forwards(),
        note="transformer alone",
        group=group,
    )
    yield bench.row(
        "nnsight's cache of all blocks / plain forward passes",
        bench.traced(cache=True),
        bench.forwards(),
        note="transformer alone; whole hidden states",
        group=group,
    )
    yield bench.row("every token of all blocks read / plain pipeline", bench.looked(whole), bench.plain(), group=group)
    yield bench.row(
        "lockstep transport / two runs, trajectory stored",
        bench.looked(SWAP, 2),
        _stored(bench),
        note="the source's channels of all blocks and steps kept, then put into the second run",
        group=group,
    )


def _stored(bench: Bench) -> Work:
    """Transport as people write it: one run whose channels are kept, then another that is given them."""

    def run() -> None:
        kept: list[Tensor] = []
        bench.hooked(lambda out, _: kept.append(out[1][..., : len(CHANNELS)].clone()))()
        left = iter(kept)

        def put(out: Any, _: list[Tensor]) -> tuple[Tensor, Tensor]:
            hidden = out[1].clone()
            hidden[..., : len(CHANNELS)] = next(left)
            return out[0], hidden

        bench.hooked(put)()

    return run


def measure_growth(size: Size, rounds: int, steps: int = 2) -> Iterator[Row]:
    """Whether the cost of looking grows with tokens, blocks, steps, channels or ops."""
    from dataclasses import replace

    group = "growth"
    for side in (256, 512, 1024):
        bench = Bench(replace(size, side=side), steps, rounds=rounds)
        tokens = (side // 16) ** 2
        yield bench.row(
            f"|mean| of all blocks / plain, {tokens} tokens", bench.looked(READ), bench.plain(), group=group
        )
    for blocks in (6, 24):
        bench = Bench(replace(size, double=blocks // 3, single=blocks - blocks // 3), steps, rounds=rounds)
        yield bench.row(
            f"|mean| of all blocks / plain, {blocks} blocks", bench.looked(READ), bench.plain(), group=group
        )
    bench = Bench(size, steps, rounds=rounds)
    for k in (1, 128, size.width):
        ops = (dl.Zero(EVERY, channels=range(k)),)
        yield bench.row(f"zeroing / plain, {k} channels", bench.looked(ops), bench.plain(), group=group)
    for count in (1, 4, 16):
        ops = [dl.Scale(EVERY, channels=[c], factor=0.5) for c in range(count)]
        yield bench.row(f"scaling / plain, {count} ops", bench.looked(ops), bench.plain(), group=group)


def measure_peak(bench: Bench) -> Iterator[Row]:
    """Memory that a read of 12 channels of all blocks and steps takes beside the plain run."""
    ops = (dl.Read(EVERY, channels=CHANNELS),)
    captured = bench.lens.cost(None, ops, **bench.calls[1]).bytes
    size = bench.size
    hidden = (size.side // 16) ** 2 * size.width * torch.empty(0, dtype=bench.dtype).element_size()
    extra = peak_bytes(bench.looked(ops)) - peak_bytes(bench.plain())
    mib = 2**20
    yield Row(
        "memory",
        "peak beside the plain run: 12 channels of all blocks and steps",
        "MiB",
        *(extra / mib,) * 3,
        target=(captured + hidden) / mib,
        note="target: bytes captured plus one hidden state",
    )


def make(name: str, rounds: int, steps: int = 4) -> Bench:
    """A bench of a size of the table."""
    return Bench(SIZES[name], steps, rounds=rounds)
