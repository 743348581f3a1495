"""All studies on the toys, and pages that say in plain words what they found, with the numbers beside the words.

Every sentence with a number is made from a result; whether a claim holds is decided by a rule, not by hand.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from dit_lens.analysis.channels import gini, top_median_ratio
from dit_lens.arguments.checks import checked
from dit_lens.commands import sentences
from dit_lens.commands.chapters import CHAPTERS, Size
from dit_lens.commands.heat_sheet import draw_heat_sheet
from dit_lens.commands.page import write_figures
from dit_lens.core.runs.files import (
    check_folder,
    check_place,
    check_regular,
    read_json,
    report_damage,
    whole_folder,
    write_text,
)
from dit_lens.core.session import DEFAULTS_FILE
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.studies.shared.tables import format_summary
from dit_lens.toys import path, train_command

if TYPE_CHECKING:
    from dit_lens.studies import Result

MARK = "glance.csv"  # the row of a toy in the overview
SHEET = "heat-and-masks"
# What the folder of a toy has.
_NAMES = "|".join((MARK.removesuffix(".csv"), SHEET, "concentration", *(one.name for one in CHAPTERS)))
FILES = rf"index\.md|({_NAMES})\.(csv|csv\.gz|webp)"
# GitHub and Sphinx both show these in colour, on light and on dark pages; the word beside it says the same.
MARKS = {"holds": "🟢", "fails": "🔴", "undecided": "🟡"}

INTRO = """# Findings

What the studies of dit_lens find on the toys: small Diffusion Transformers trained on drawn scenes. They are not the
models of the paper (Turri et al., arXiv 2605.13974), and a training run is one sample: nothing here is evidence about
an architecture. Compare toys that differ by the seed and the length of their training before you believe one. The pages
show what the instruments measure where the truth can be checked, and they say so where a claim does not hold. They are
written by `dit-lens findings`; every number in them comes from the tables beside it.

Intervals are 95 %, of new prompts, and of new seeds where a study has several ([how](../concepts/statistics.md)). Arms
are compared image by image: the same prompt, the same seed. A claim *holds* where the massive channels lie beyond each
control of equal size, by p-values corrected for the number of controls (Holm), *fails* where they lie on the other side
of one by the same rule, and is *undecided* between. Claim 2 has nulls to exceed as well, at a block that one half of
the prompts chose and the other half judges. Distances between images are RMSE over grey levels, 0 to 255.

A reader who distrusts a number makes it again: every study's page has the code that draws it, and every image's
measurements as a compressed table, from which any verdict follows, as in
`sentences.decide_claim(pandas.read_csv("flux/disruption.csv.gz"), "rmse")` with `dit_lens.commands.sentences`.
`tests/studies/test_headline.py` recomputes the kinds of numbers by plain torch, without this library.
"""


CARRIER = "carrier or detail"
VERDICTS = [*(chapter.claim for chapter in CHAPTERS if chapter.claim), CARRIER]
SCALE = ["k of the width", "top sets of two prompts overlap by", "strongest over median"]
MARKED = (
    "🟢 holds, 🔴 fails, 🟡 undecided; 🔵 a verdict without sides. Iterations are those in which the transformer was "
    "trained; energy share is that of the top channels, mean over blocks, and in brackets before training."
)
SCALED = (
    f"In the literature {sentences.LITERATURE[0]} of {sentences.LITERATURE[1]:,} channels of FLUX count as massive "
    f"({100 * sentences.LITERATURE[0] / sentences.LITERATURE[1]:.1f} % of its width), the same few for all "
    "prompts. The toys' are more of the width and change from prompt to prompt; so what holds of them need not hold "
    "there."
)
RESTS = (
    "What each verdict rests on, for the massive channels; the same for the strongest control; the mean difference of "
    "the two; and the largest corrected p-value of all that have to be exceeded."
)
OVER_TRAINING = (
    "When massive channels appear in a training, and when they begin to matter: [over training](training/index.md)."
)


@checked
def findings(
    out: str | Path,
    *,
    toys: Sequence[str] = ("flux",),
    size: Size = Size(),  # noqa: B008 frozen
    cells: str | Path | None = None,
) -> Path:
    """Runs every study on every toy; returns ``out/index.md``, about all toys whose pages are in ``out``.

    out: folder of the pages; a toy's page, figures and tables are in ``out/TOY``, which is replaced when its studies
      are done. The folders of other toys stay.
    toys: names of the toys.
    size: how much is drawn.
    cells: folder for finished cells, from which an interrupted call continues.
    """
    # First of all, so that a name that does not exist does not cost the hours of the toys before it.
    cards = check_places(out, toys, cells)
    out, folders = Path(out), {toy: None if cells is None else Path(cells) / toy for toy in toys}
    for toy, card in tqdm(cards.items(), desc="toys", disable=len(cards) == 1):
        lens = DiTLens.toy(toy)
        concentration = _measure_concentration(lens, DiTLens.toy(toy, untrained=True), size)
        results = run_chapters(lens, size, folders[toy])
        with whole_folder(out / toy, mark=MARK, own=FILES) as fresh:
            lines = [f"# Findings on {toy}", *_write_toy(fresh, toy, card, lens, concentration, results, size)]
            (fresh / "index.md").write_text("\n".join(lines), encoding="utf-8")
            scale = _measure_scale(lens, concentration, results, size)
            said = f"{scale[0]} of {scale[1]}", f"{scale[2]:.2f}", f"{scale[3]:.0f}"
            _summarise_toy(toy, card, concentration, results, said).to_csv(fresh / MARK, index=False)
        write_overview(out)
    return out / "index.md"


def check_places(out: str | Path, toys: Sequence[str], cells: str | Path | None) -> dict[str, Mapping[str, Any]]:
    """The cards of toys; StoreError for one that is not there, and where pages or cells could not be written.

    Pages would also not take the place of somebody else's.

    out, toys, cells: as :func:`findings` takes them.
    """
    cards = {toy: read_json(path(toy) / DEFAULTS_FILE, "the card of a toy") for toy in toys}
    page = Path(out) / "index.md"
    if page.exists():
        with report_damage(page, "Move it, or choose another folder."):
            foreign = not check_regular(page).read_text("utf-8").startswith(INTRO.partition("\n\n")[0])
        if foreign:
            raise StoreError(f"{page} is a page of something else, so it is not replaced. Choose another folder.")
    check_place(page)
    for toy in toys:
        check_folder(Path(out) / toy, MARK)
        if cells is not None:
            check_place(Path(cells) / toy / CHAPTERS[0].name / "study.json")
    return cards


def write_overview(out: Path) -> None:
    """The page about all toys of a folder, from the row that each keeps beside its own page."""
    lines = [pd.read_csv(check_regular(file), dtype=str) for file in sorted(out.glob(f"[!.]*/{MARK}"))]
    table = pd.concat(lines, ignore_index=True).fillna("")
    table["toy"] = [f"[{toy}]({toy}/index.md)" for toy in table["toy"]]
    claims = [name for name in VERDICTS if name in table]
    glance, rests = table.drop(columns=[*SCALE, *claims], errors="ignore"), table[["toy", *claims]]
    for name in claims:
        glance[name.partition(":")[0]] = [mark_verdict(said) for said in table[name]]
        rests[name] = [said.removeprefix("is ") for said in table[name]]
    page = [INTRO, "## At a glance", "", *_format_table(glance), "", MARKED, ""]
    if set(SCALE) <= set(table):
        page += [
            "## How the toys differ from the literature",
            "",
            SCALED,
            "",
            *_format_table(table[["toy", *SCALE]]),
            "",
        ]
    page += ["## What the verdicts rest on", "", RESTS, "", *_format_table(rests), ""]
    page += [OVER_TRAINING, ""] if (out / "training" / "index.md").exists() else []
    write_text(out / "index.md", "\n".join(page))


def mark_verdict(said: str) -> str:
    """A verdict in a word behind its colour.

    >>> mark_verdict("is undecided: 19.3 (17.3 to 21.4)"), mark_verdict("necessary, movable")
    ('🟡 undecided', '🔵 necessary, movable')

    said: a verdict, with what it rests on or without.
    """
    word = said.partition(":")[0].removeprefix("is ")
    return f"{MARKS.get(word, '🔵')} {word}" if word else ""


def run_chapters(lens: DiTLens, size: Size, folder: Path | None) -> list[Result]:
    """Runs the study of every chapter.

    lens: lens on the toy.
    size: how much is drawn.
    folder: folder for finished cells, or None to keep them in memory.
    """
    return [
        chapter.study.function(lens, **chapter.arguments(size), out=folder and folder / chapter.name)
        for chapter in CHAPTERS
    ]


def _measure_concentration(lens: DiTLens, twin: DiTLens, size: Size) -> pd.DataFrame:
    """How much the top channels of every block hold, in a toy and in its twin before training."""
    lines = []
    for name, one in (("trained", lens), ("untrained twin", twin)):
        with one.quiet():
            found = one.massive_channels(size.texts, size.k, seed=0, **size.call)
        shares = found.energy_share()
        for site, scores in found.scores.items():
            measures = {"top/median": top_median_ratio(scores), "Gini of energy": gini(found.energy[site])}
            lines.append({"model": name, "site": site, "energy share": shares[site], **measures})
    return pd.DataFrame(lines)


def _summarise_toy(
    toy: str, card: Mapping[str, Any], concentration: pd.DataFrame, results: Sequence[Result], scale: Sequence[str]
) -> pd.DataFrame:
    """A toy in one row: how long it was trained, whether it has massive channels, and the verdicts on the claims.

    toy: name of the toy.
    card: its card.
    concentration: what its top channels hold.
    results: results of the chapters.
    scale: how its massive channels differ from the literature's, as SCALE names it.
    """
    found = {result.study: result for result in results}
    shares = concentration.groupby("model")["energy share"].mean()
    line = {"toy": toy, "iterations": _count_iterations(card)}
    line["energy share (untrained)"] = f"{shares['trained']:.2f} ({shares['untrained twin']:.2f})"
    line |= {chapter.claim: chapter.compare(found[chapter.name]).brief for chapter in CHAPTERS if chapter.compare}
    rows = found["carrier_or_detail"].summary.set_index(["measure", "part"])
    line |= {CARRIER: rows.loc[("verdict", "overall"), "says"], **dict(zip(SCALE, scale, strict=True))}
    return pd.DataFrame([line])


def _measure_scale(
    lens: DiTLens, concentration: pd.DataFrame, results: Sequence[Result], size: Size
) -> tuple[int, int, float, float]:
    """k, width, overlap and ratio, as :func:`~dit_lens.commands.sentences.describe_scale` takes them."""
    stable = next(result for result in results if result.study == "stability")
    ratio = concentration.groupby("model")["top/median"].mean()["trained"]
    return size.k, lens.anatomy.width, sentences.find_overlap(stable), ratio


def _count_iterations(card: Mapping[str, Any]) -> str:
    """The number of iterations in which the transformer of a toy was trained."""
    return f"{card['training']['stages']['transformer']['iterations']:,}"


def describe_training(card: Mapping[str, Any]) -> str:
    """The card of a toy in words: how it was trained and, where that was measured, how well it draws."""
    said = f"Trained from seed {card['training']['seed']} for {_count_iterations(card)} iterations."
    if "quality" not in card:
        return f"{said} How well it draws was not measured."
    quality = card["quality"]
    right = ", ".join(f"{name} {share:.2f}" for name, (share, *_) in quality["generated"].items())
    return f"{said} Shares right in images of {quality['prompts']} held-out prompts: {right}."


def describe_retraining(card: Mapping[str, Any]) -> list[str]:
    """How a toy is trained anew whose weights are not in the repository, which has those of seed 0."""
    training = card["training"]
    if training["seed"] == 0:
        return []
    name = f"{card['toy']}-seed{training['seed']}"
    iterations = training["stages"]["transformer"]["iterations"]
    return [
        (
            f"Its weights are not in the repository. `{train_command(name)} --iterations {iterations}` trains it anew "
            f"from the same beginning; it was trained on {training['hardware']}. "
            f'`DiTLens.toy("{name}")` loads it when `DIR/pipeline` is moved to `toys/{name}` of a checkout.'
        ),
        "",
    ]


def _write_toy(
    folder: Path,
    toy: str,
    card: Mapping[str, Any],
    lens: DiTLens,
    concentration: pd.DataFrame,
    results: Sequence[Result],
    size: Size,
) -> list[str]:
    """The page of one toy below its title; its figures and tables are written beside it.

    folder: folder of the page.
    toy: name of the toy.
    card: card of the toy.
    lens: lens on the toy.
    concentration: what its top channels hold.
    results: results of the chapters, in their order.
    size: how much was drawn.
    """
    share = f"k = {size.k} of {lens.anatomy.width} channels ({size.k / lens.anatomy.width:.1%})"
    means = concentration.groupby("model", sort=False)[["energy share", "top/median", "Gini of energy"]].mean()
    lines = [
        (
            f"{type(lens.pipe).__name__}, {lens.anatomy.depth} blocks, {share}; held-out prompts, as many as each "
            f"study says. [What the words mean](../index.md)."
        ),
        "",
        describe_training(card),
        "",
        *describe_retraining(card),
        "Are there massive channels, and did training make them? Means over blocks:",
        "",
        *_format_table(means.reset_index()),
        "",
        sentences.describe_scale(*_measure_scale(lens, concentration, results, size)),
        "",
    ]
    figures = {folder / f"{result.study}.webp": result.figure() for result in results}
    sheet = draw_heat_sheet(lens, size.texts, k=size.k, **size.call)
    drawn = write_figures({**figures, folder / f"{SHEET}.webp": sheet})
    made = f"dit-lens findings --toys {toy} --prompts {size.prompts} --seeds {size.seeds} --draws {size.draws}"
    lines += [f"Everything on this page is made by `{made}`.", ""]
    if folder / f"{SHEET}.webp" in drawn:
        lines += ["What channels show of one image, block by block, at the last step:", ""]
        lines += [f"![Heat and masks of top, bottom and random channels]({SHEET}.webp)", ""]
    for chapter, result in zip(CHAPTERS, results, strict=True):
        name, question = chapter.name, chapter.study.question
        result.summary.to_csv(folder / f"{name}.csv", index=False)
        write_table(folder / f"{name}.csv.gz", result.table)
        lines += [
            f"## {question}",
            describe_sizes(result),
            "",
            chapter.describe(result),
            "",
            f"*Published:* {chapter.published}",
            "",
        ]
        lines += [f"![{question}]({name}.webp)", ""] if folder / f"{name}.webp" in drawn else []
        lines += [f"All numbers: [{name}.csv]({name}.csv); of every image: [{name}.csv.gz]({name}.csv.gz). Made by", ""]
        lines += ["```{code-block} python", chapter.write_code(toy, size).rstrip(), "```", ""]
        lines += [*(f"- {note}" for note in result.notes), ""]
    concentration.to_csv(folder / "concentration.csv", index=False)
    return lines


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Writes every measurement of a study, compressed; equal tables are equal files."""
    text = table.to_csv(index=False, float_format="%.7g")
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def describe_sizes(result: Result) -> str:
    """How much a study drew, counted in its table: prompts or pairs of them, seeds, and draws of controls."""
    table = result.table
    what = "pair of prompts" if result.study in ("transfer", "patching") else "prompt"
    counts = [_count(table["prompt"].dropna().nunique(), what), _count(table["seed"].dropna().nunique(), "seed")]
    said = " x ".join(counts)
    if {"arm", "draw"} <= set(table):
        draws = table.groupby("arm")["draw"].nunique()
        drawn = draws[draws.index.isin(["random", "energy-matched"])]
        repeated = [f"{_count(int(n), 'draw')} of {arm}" for arm, n in drawn.items()]
        said += f"; {', '.join(repeated)}" if repeated else ""
    return f"*Size:* {said}."


def _count(n: int, what: str) -> str:
    """A number of things, such as "2 seeds"."""
    head, space, tail = what.partition(" ")
    return f"{n} {head}{'s' if n != 1 else ''}{space}{tail}"


def _format_table(frame: pd.DataFrame) -> list[str]:
    """A small table in Markdown."""
    text = format_summary(frame).astype(str)
    rows = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return [f"| {' | '.join(row)} |" for row in rows]
