"""What the library computes besides running a model: plans, clusters, statistics, sweeps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

import dit_lens as dl
from benchmarks.measure import Row, alternate, peak_bytes, repeat
from benchmarks.models import SIZES, make_call, make_pipeline, make_transformer
from benchmarks.runs import CHANNELS, EVERY, Bench
from dit_lens.analysis.channels import RunningStats

OPS = (
    dl.Read(EVERY, reduce="|mean|"),
    dl.Read(EVERY, channels=CHANNELS, name="top"),
    dl.Zero(EVERY, channels=CHANNELS),
    dl.Scale(EVERY, channels=CHANNELS, factor=0.5),
)


def measure_plans(rounds: int) -> Iterator[Row]:
    """A lens on FLUX.1 without weights, and plans for it."""
    group, size = "plan", SIZES["flux"]
    pipe = make_pipeline(make_transformer(size, "meta"))
    made = repeat(lambda: dl.DiTLens(pipe), rounds)
    yield Row(group, "DiTLens(pipe), FLUX.1 without weights", target=0.5, **made)
    lens, call = dl.DiTLens(pipe), make_call(size, steps=50)
    planned = repeat(lambda: lens.cost(None, OPS, **call), rounds)
    yield Row(group, "plan of 57 blocks x 50 steps x 4 ops", target=0.5, **planned)
    few = {**call, "num_inference_steps": 4}

    def plan(count: int) -> None:
        lens.cost(None, [dl.Zero("blocks.3.img", channels=[c]) for c in range(count)], **few)

    grown = alternate(lambda: plan(1000), lambda: plan(250), rounds)
    yield Row(group, "plan of 1,000 ops / of 250 ops at one site", target=4.4, note="4 where it is linear", **grown)


def measure_clusters(rounds: int, maps: int = 57) -> Iterator[Row]:
    """Clusters of token maps beside scikit-learn's K-means on the same numbers."""
    from sklearn.cluster import KMeans

    from dit_lens.clusters import cluster, normalise

    rng = np.random.default_rng(0)
    side = 64
    y, x = np.mgrid[:side, :side] / side
    found = []
    for _ in range(maps):
        centre, spread = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.3)
        subject = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / spread**2).reshape(-1, 1)
        found.append(subject * rng.normal(size=12) + 0.2 * rng.normal(size=(side * side, 12)))

    def ours() -> list[np.ndarray]:
        return [cluster(one) for one in found]

    def theirs() -> list[np.ndarray]:
        return [KMeans(2, n_init=10, random_state=0).fit_predict(normalise(one)) for one in found]

    same = all(np.array_equal(a, b) or np.array_equal(a, 1 - b) for a, b in zip(ours(), theirs(), strict=True))
    yield Row(
        "clusters",
        f"clusters of {maps} maps of 4,096 tokens x 12 channels / a loop of scikit-learn",
        target=0.3,
        note="the same labels" if same else "OTHER LABELS",
        **alternate(ours, theirs, max(3, rounds // 3)),
    )


def measure_statistics() -> Iterator[Row]:
    """Whether statistics over many prompts take more memory than over few."""

    def gather(prompts: int) -> None:
        stats = RunningStats()
        seeded = torch.Generator().manual_seed(0)
        for _ in range(prompts):
            stats.update(torch.randn(256, 512, generator=seeded))

    few, many = peak_bytes(lambda: gather(10)), peak_bytes(lambda: gather(1000))
    yield Row("memory", "statistics over 1,000 prompts / over 10", "ratio", *(many / few,) * 3, target=1.01)


def measure_sweeps(bench: Bench, rounds: int) -> Iterator[Row]:
    """A sweep over blocks, in which what comes before the edited step is taken from a recorded run."""
    steps = bench.steps
    edits = [
        dl.Zero(f"blocks.{b}.img", channels=CHANNELS, steps=[s])
        for s in range(steps)
        for b in (0, bench.size.blocks // 2)
    ]
    call = bench.calls[1]

    def naive() -> None:
        for edit in edits:
            bench.lens.run(None, [edit], seed=0, **call)

    def reused() -> None:
        clean = bench.lens.run(None, seed=0, record=True, **call)
        for edit in edits:
            bench.lens.run(None, [edit], seed=0, prefix=clean, **call)

    yield Row(
        "sweep", "edits at each step, prefix reused / each run whole", target=0.6, **alternate(reused, naive, rounds)
    )


def measure_studies(rounds: int) -> Iterator[Row]:
    """A study beside the pictures that it draws."""
    lens = dl.DiTLens.toy()
    prompts = [
        "a big red circle left on a plain blue background",
        "a big white square right on a plain green background",
    ]
    options = {"num_inference_steps": 4}
    drawn = 0

    def study() -> None:
        nonlocal drawn
        result = dl.studies.disruption(lens, prompts, k=[8], seeds=[0], draws=1, confounds=False, **options)
        drawn = len(result.table)

    study()

    def pictures() -> None:
        with lens.quiet():
            for _ in range(drawn // 2):
                lens.run(prompts, seed=0, **options)

    yield Row(
        "studies",
        "disruption / the pictures that it draws",
        target=1.05,
        note=f"{drawn} pictures of 4 steps",
        **alternate(study, pictures, max(3, rounds // 3)),
    )
