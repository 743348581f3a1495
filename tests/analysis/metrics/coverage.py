"""How often intervals cover the truth, by simulation: ``python -m tests.analysis.metrics.coverage`` prints the table.

The table is in docs/concepts/statistics.md. Letters: r run of the simulation, p prompt, s seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from dit_lens.analysis.metrics.crossed import crossed_bounds

PROMPTS = (2, 3, 4, 8, 15, 32, 64)
SEEDS = (1, 2, 4)

Draw = Callable[[np.random.Generator, int, int, int], np.ndarray]


def crossed(prompt: float, seed: float, noise: float) -> Draw:
    """Normal effects of prompts, seeds and single images, with these standard deviations; the truth is 0."""
    return lambda rng, r, p, s: (
        prompt * rng.normal(size=(r, p, 1)) + seed * rng.normal(size=(r, 1, s)) + noise * rng.normal(size=(r, p, s))
    )


def skewed(draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], truth: float) -> Draw:
    """Effects of prompts of another distribution, and a little noise of single images."""
    return lambda rng, r, p, s: draw(rng, (r, p, 1)) - truth + 0.2 * rng.normal(size=(r, p, s))


def rare(share: float) -> Draw:
    """Paired differences of a fidelity: this share of prompts falls, by a sixth to all, in most of its seeds."""

    def draw(rng: np.random.Generator, r: int, p: int, s: int) -> np.ndarray:
        falls = (rng.random((r, p, 1)) < share) & (rng.random((r, p, s)) < 0.7)
        return share * 0.7 * 0.5 - falls * rng.choice([1 / 6, 1 / 3, 1 / 2, 1.0], size=(r, p, s))

    return draw


CASES: dict[str, Draw] = {
    "prompts differ": crossed(1, 0, 0.5),
    "only single images differ": crossed(0, 0, 1),
    "seeds differ a little": crossed(1, 0.2, 0.5),
    "seeds differ half as much": crossed(1, 0.5, 0.5),
    "seeds differ twice as much": crossed(0.5, 1, 0.5),
    "skewed (exponential)": skewed(lambda rng, size: rng.exponential(size=size), 1),
    "very skewed (lognormal)": skewed(lambda rng, size: rng.lognormal(size=size), np.exp(0.5)),
    "heavy tails (t, 3 degrees)": skewed(lambda rng, size: rng.standard_t(3, size=size), 0),
    "falls for 1 of 20 prompts": rare(0.05),
    "falls for 1 of 5 prompts": rare(0.2),
    "falls for 1 of 2 prompts": rare(0.5),
}


def simulate(runs: int, seed: int = 0) -> Iterator[tuple[str, int, int, float, float]]:
    """Case, seeds, prompts, the share of intervals that cover the truth, and the share of runs that have one."""
    for i, (name, s, p) in enumerate(product(CASES, SEEDS, PROMPTS)):
        if name.startswith("seeds") and s == 1:
            continue  # seeds are crossed with nothing
        _, low, high = crossed_bounds(CASES[name](np.random.default_rng([seed, i]), runs, p, s))
        given = ~np.isnan(low)
        covered = (low[given] <= 0) & (high[given] >= 0)
        yield name, s, p, float(covered.mean()) if given.any() else np.nan, float(given.mean())


def print_table(runs: int = 20_000) -> None:
    """The table as Markdown: per cent covered, and in brackets per cent of runs that have an interval, below 99."""
    found = {(name, s, p): (cover, given) for name, s, p, cover, given in simulate(runs)}
    print(f"| values | seeds | {' | '.join(f'n = {p}' for p in PROMPTS)} |")
    print("|---|---|" + "---|" * len(PROMPTS))
    for name, s in dict.fromkeys(key[:2] for key in found):
        cells = [found[name, s, p] for p in PROMPTS]
        shown = [f"{cover:.1%}" + f" ({given:.0%})" * (given < 0.99) for cover, given in cells]
        print(f"| {name} | {s} | {' | '.join(shown).replace('%', '')} |")


if __name__ == "__main__":
    print_table()
