"""All studies on the toys, and a page that says in plain words what they found, with the numbers beside the words.

Every sentence with a number is made from a result; whether a claim holds is decided by intervals, not by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from dit_lens import studies
from dit_lens.channels import gini, top_median_ratio
from dit_lens.lens import DiTLens
from dit_lens.page import write_pngs
from dit_lens.store import whole_folder
from dit_lens.studies.result import readable
from dit_lens.toys import path
from dit_lens.toys.scenes import sample_scenes
from dit_lens.words import CLAIMS, QUESTIONS

if TYPE_CHECKING:
    from dit_lens.studies import Result

# The least pictures from which an interval says something, in about half an hour for a toy on two cores.
PROMPTS, SEEDS, DRAWS, K = 16, 2, 10, 8

INTRO = """# Findings

What the studies of dit_lens find on the toys: small Diffusion Transformers trained on drawn scenes. They are not the
models of the paper (Turri et al., arXiv 2605.13974), and one training run is one sample, so nothing here is evidence
about an architecture. The page shows what the instruments measure where the truth can be checked, and it says so where
a claim does not hold. It is written by `dit-lens findings`; every number in it comes from the tables beside it.

Intervals are 95 % hierarchical bootstrap over prompts, then seeds and draws. Arms are compared picture by picture: the
same prompt, the same seed. A claim *holds* where the interval of the mean difference between the massive channels and
each control of equal size lies wholly beyond 0, *fails* where it lies wholly on the other side for one of them, and is
*undecided* between. Distances between pictures are RMSE over grey levels, 0 to 255.
"""


@dataclass(frozen=True)
class Size:
    """How much is drawn: held-out prompts, seeds of each, draws of random controls, and k."""

    prompts: int = PROMPTS
    seeds: int = SEEDS
    draws: int = DRAWS
    k: int = K
    call: dict[str, Any] = field(default_factory=dict)


def findings(out: Path, *, toys: Sequence[str] = ("flux",), size: Size = Size(), cells: Path | None = None) -> Path:
    """Runs every study on every toy and writes ``out/index.md``, its figures and its tables; returns the page.

    cells: a folder for finished cells, from which an interrupted call goes on. A page that is there is replaced.
    """
    for toy in toys:
        path(toy)  # a name that does not exist costs no hour of the toys before it
    pages = []
    for toy in tqdm(toys, desc="toys", disable=len(toys) == 1):
        lens, folder = DiTLens.toy(toy), None if cells is None else cells / toy
        pages.append(
            (toy, lens, _concentration(lens, DiTLens.toy(toy, untrained=True), size), _results(lens, size, folder))
        )
    with whole_folder(out) as fresh:
        lines = [INTRO, *_overview(pages)]
        for toy, lens, concentration, results in pages:
            lines += _of_toy(fresh, toy, lens, concentration, results, size)
        (fresh / "index.md").write_text("\n".join(lines), encoding="utf-8")
    return out / "index.md"


def _results(lens: DiTLens, size: Size, folder: Path | None) -> list[Result]:
    prompts = [scene.caption for scene in sample_scenes(size.prompts, seed=100, held_out=True)]
    pairs = list(zip(prompts[::2], prompts[1::2], strict=False))
    shared = {"k": size.k, "seeds": list(range(size.seeds)), "batch_size": 8, **size.call}
    controlled = {**shared, "draws": size.draws}
    of_patching = {name: value for name, value in shared.items() if name != "batch_size"}
    few = {**shared, "draws": min(size.draws, 3)}  # a picture more for every draw, part and strength
    plan = {
        "stability": (prompts, shared),
        "births": (prompts, shared),
        "disruption": (prompts, controlled),
        "organisation": (prompts, controlled),
        "transfer": (pairs, {**few, "strengths": (0.5, 1.0), "mask_from": None}),
        "patching": (pairs[:2], {**of_patching, "over": "block x channel group", "seeds": [0], "draws": 1}),
        "carrier_or_detail": (prompts, few),
    }
    results = []
    for name, (subjects, choices) in plan.items():
        where = None if folder is None else folder / name
        results.append(getattr(studies, name)(lens, subjects, out=where, **choices))
    return results


def _concentration(lens: DiTLens, twin: DiTLens, size: Size) -> pd.DataFrame:
    """How much the top channels of every block hold, in a toy and in its twin before training."""
    prompts = [scene.caption for scene in sample_scenes(size.prompts, seed=100, held_out=True)]
    lines = []
    for name, one in (("trained", lens), ("untrained twin", twin)):
        with one.quiet():
            found = one.massive_channels(prompts, size.k, seed=0, **size.call)
        shares = found.energy_share()
        for site, scores in found.scores.items():
            measures = {"top/median": top_median_ratio(scores), "Gini of energy": gini(found.energy[site])}
            lines.append({"model": name, "site": site, "energy share": shares[site], **measures})
    return pd.DataFrame(lines)


def _overview(pages: Sequence[tuple[str, DiTLens, pd.DataFrame, list[Result]]]) -> list[str]:
    """One line for each toy: are there massive channels, and what became of the claims."""
    lines = []
    for toy, _, concentration, results in pages:
        found = {result.study: result for result in results}
        shares = concentration.groupby("model")["energy share"].mean()
        line = {"toy": toy, "energy share (untrained)": f"{shares['trained']:.2f} ({shares['untrained twin']:.2f})"}
        line |= {column: contest(found[study]).brief for study, (column, contest) in CLAIMS.items()}
        rows = found["carrier_or_detail"].summary.set_index(["measure", "part"])
        lines.append({**line, "carrier or detail": rows.loc[("verdict", "overall"), "says"]})
    said = (
        "A claim's verdict: what it rests on, for the massive channels; the same for the strongest control; the mean "
        "difference of the two."
    )
    return ["## At a glance", said, "", *_table(pd.DataFrame(lines)), ""]


def _of_toy(
    folder: Path, toy: str, lens: DiTLens, concentration: pd.DataFrame, results: Sequence[Result], size: Size
) -> list[str]:
    """The lines of one toy; its figures and tables are written beside the page."""
    share = f"k = {size.k} of {lens.anatomy.width} channels ({size.k / lens.anatomy.width:.1%})"
    means = concentration.groupby("model", sort=False)[["energy share", "top/median", "Gini of energy"]].mean()
    lines = [
        f"## {toy}",
        (
            f"{type(lens.pipe).__name__}, {lens.anatomy.depth} blocks, {share}; {size.prompts} held-out prompts x "
            f"{size.seeds} seeds, {size.draws} draws of random controls."
        ),
        "",
        "Are there massive channels, and did training make them? Means over blocks:",
        "",
        *_table(means.reset_index()),
        "",
    ]
    drawn = write_pngs({folder / f"{toy}-{result.study}.png": result.figure() for result in results})
    for result in results:
        name, question = f"{toy}-{result.study}", QUESTIONS[result.study]
        result.summary.to_csv(folder / f"{name}.csv", index=False)
        lines += [f"### {question.title}", question.say(result), "", f"*Published:* {question.published}", ""]
        lines += [f"![{question.title}]({name}.png)", ""] if folder / f"{name}.png" in drawn else []
        lines += [f"All numbers: [{name}.csv]({name}.csv)", ""]
        lines += [*(f"- {note}" for note in result.notes), ""]
    concentration.to_csv(folder / f"{toy}-concentration.csv", index=False)
    return lines


def _table(frame: pd.DataFrame) -> list[str]:
    """A small table in Markdown."""
    text = readable(frame).astype(str)
    rows = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return [f"| {' | '.join(row)} |" for row in rows]
