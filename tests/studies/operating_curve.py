"""How often the verdict says what, by simulation: ``python -m tests.studies.operating_curve`` draws the figure.

The figure and its table are in docs/concepts/carrier-or-detail.md. A simulated study has the tables that a real one
makes: six attributes of every prompt, of which channels carry a share, its strength. Strengths differ from prompt to
prompt, every edit harms some attributes and some images, and moving all channels brings nearly all of the source's.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.commands.page import write_figures
from dit_lens.plots.theme import Look, set_title
from dit_lens.studies.parts.verdict import (
    CELLS,
    UNDECIDED,
    Thresholds,
    decide_necessity,
    decide_sufficiency,
    name_cell,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIGURE = Path(__file__).parents[2] / "docs/concepts/images/verdict.webp"
STRENGTHS = (0.0, 0.1, 0.3, 0.5, 1.0)
PROMPTS = (8, 16, 32, 64)
CONTROLS = ("bottom", "random", "energy-matched")
DRAWS = {"bottom": 1, "random": 3, "energy-matched": 3}
ATTRIBUTES = 6
HARM = 0.03  # share of attributes that any edit changes, whatever it edits
DESTROYED = {"top": 0.1, "bottom": 0.0, "random": 0.02, "energy-matched": 0.05}  # share of images
LIKE = 2.0  # how alike prompts are: their strengths have a beta distribution with this many pseudo-counts


def simulate(
    rng: np.random.Generator, prompts: int, necessity: float, sufficiency: float, seeds: int = 1
) -> tuple[str, str, str]:
    """The cell and both answers of one study.

    rng: random numbers.
    prompts: number of prompts.
    necessity: share of a prompt's attributes that is lost without the channels.
    sufficiency: share of a source's attributes that is gained with them.
    seeds: number of seeds, crossed with prompts.
    """
    size = (prompts, seeds)
    shared = rng.random((*size, ATTRIBUTES)) < 1 / 5  # attributes that source and target have in common

    def keep_readable(arm: str, effect: np.ndarray) -> np.ndarray:
        return np.where(rng.random(size) < DESTROYED[arm], np.nan, effect)

    def remove(arm: str) -> np.ndarray:
        lost = _draw_carried(rng, prompts, necessity if arm == "top" else 0.0, seeds)
        return keep_readable(arm, (lost | (rng.random(lost.shape) < HARM)).mean(-1))

    def move(arm: str, share: float) -> np.ndarray:
        moved = _draw_carried(rng, prompts, share, seeds)
        harmed = rng.random(moved.shape) < HARM
        gained = (~shared & moved & ~harmed).mean(-1) - (shared & harmed).mean(-1)
        return keep_readable(arm, gained)

    def average(draws: list[np.ndarray]) -> np.ndarray:
        there = sum(~np.isnan(one) for one in draws)
        return np.where(there > 0, sum(np.nan_to_num(one) for one in draws) / np.maximum(there, 1), np.nan)

    limits = Thresholds()
    lost, gained = remove("top"), move("top", sufficiency)
    lost_by = {arm: average([remove(arm) for _ in range(DRAWS[arm])]) for arm in CONTROLS}
    gained_by = {arm: average([move(arm, 0.0) for _ in range(DRAWS[arm])]) for arm in CONTROLS}
    missing = 1 - shared.mean(-1)
    missing[missing == 0] = np.nan
    every = move("bottom", 1.0)
    need = decide_necessity(lost, lost_by, np.ones(size), float(1 - np.isnan(lost).mean()), limits).says
    bring = decide_sufficiency(gained, gained_by, every, missing, float(1 - np.isnan(gained).mean()), limits).says
    return name_cell(need, bring), need, bring


def count_answers(
    runs: int, prompts: int, necessity: float, sufficiency: float, *, seeds: int = 1, seed: int = 0
) -> dict[str, float]:
    """The share of studies that name each cell, and that answer "yes", "no" or not to either question.

    runs: number of studies. seed: of the simulation. Others: as of :func:`simulate`.
    """
    rng = np.random.default_rng([seed, prompts, seeds, int(100 * necessity), int(100 * sufficiency)])
    found: Counter[str] = Counter()
    for _ in range(runs):
        cell, need, bring = simulate(rng, prompts, necessity, sufficiency, seeds)
        found.update([cell, f"necessary: {need}", f"movable: {bring}"])
    return {name: count / runs for name, count in found.items()}


def _draw_carried(rng: np.random.Generator, prompts: int, share: float, seeds: int) -> np.ndarray:
    """Which attributes of every image channels carry, bool [p, s, attribute]; all seeds of a prompt share its share."""
    if not 0 < share < 1:
        return np.full((prompts, seeds, ATTRIBUTES), share == 1)
    of_prompt = rng.beta(share * LIKE, (1 - share) * LIKE, (prompts, 1, 1))
    return rng.random((prompts, seeds, ATTRIBUTES)) < of_prompt


def draw_curve(counts: dict[tuple[int, float], dict[str, float]]) -> go.Figure:
    """The chance of each verdict against the strength, a panel for each number of prompts.

    counts: (prompts, strength) -> the share of studies with each verdict.
    """
    panels = sorted({prompts for prompts, _ in counts})
    titles = [f"<b>{prompts} prompts</b>" for prompts in panels]
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=titles)
    figure.update_annotations(font_size=12)
    for column, prompts in enumerate(panels, start=1):
        at = sorted(strength for n, strength in counts if n == prompts)
        for name, look in LOOKS.items():
            share = [sum(counts[prompts, s].get(cell, 0.0) for cell in CELLS_OF[name]) for s in at]
            figure.add_scatter(
                x=at, y=share, name=name, legendgroup=name, showlegend=column == 1, mode="lines+markers",
                line={"color": look.colour, "width": 2}, marker={"symbol": look.symbol, "size": 8},
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title="strength", range=[-0.06, 1.06], tickvals=list(STRENGTHS))
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_yaxes(title="share of studies", col=1)
    small = "planted strength: share of the attributes lost without the channels, and gained where they are moved"
    set_title(figure, "What the verdict says of planted models", small, height=400)
    return figure.update_layout(margin={"t": 88, "b": 92})


CELLS_OF = {
    "necessary and movable": ["necessary and movable"],
    "neither": ["neither"],
    "one of the two": ["necessary, not movable", "movable, not necessary"],
    "undecided": ["undecided"],
}
LOOKS = {
    "necessary and movable": Look("", "#D55E00", "circle"),
    "neither": Look("", "#0072B2", "square"),
    "one of the two": Look("", "#CC79A7", "diamond"),
    "undecided": Look("", "#8A8A8A", "x"),
}


def main(runs: int = 1000) -> None:
    """Prints the counts as Markdown tables, and draws the figure into the docs."""
    counts = {(n, s): count_answers(runs, n, s, s) for n in PROMPTS for s in STRENGTHS}
    print(f"| prompts | {' | '.join(f'strength {s:g}' for s in STRENGTHS)} |\n|---|{'---|' * len(STRENGTHS)}")
    for n in PROMPTS:
        print(f"| {n} | {' | '.join(_format(counts[n, s]) for s in STRENGTHS)} |")
    for seeds in (2, 3, 4):
        found = [_format(count_answers(runs // 2, 64, s, s, seeds=seeds)) for s in (0.0, 0.3)]
        print(f"64 prompts x {seeds} seeds, strengths 0 and 0.3: {found}")
    for pair in ((1.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.0, 0.3)):
        print(f"64 prompts, necessity and sufficiency {pair}: {_format(count_answers(runs // 2, 64, *pair))}")
    write_figures({FIGURE: draw_curve(counts)}, width=900)


def _format(found: dict[str, float]) -> str:
    """The verdicts that were given, by their shares."""
    named = sorted(((found[name], name) for name in (*CELLS.values(), UNDECIDED) if name in found), reverse=True)
    return ", ".join(f"{name} {share:.1%}" for share, name in named)


if __name__ == "__main__":
    main()
