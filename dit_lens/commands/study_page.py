"""The page about one model: index.md, with a figure, a table and a sentence for each study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dit_lens.commands.chapters import CHAPTERS
from dit_lens.commands.findings import describe_sizes
from dit_lens.commands.page import write_figures
from dit_lens.commands.sentences import write_interval
from dit_lens.commands.study_verdicts import find_weakest
from dit_lens.core.runs.files import write_bytes, write_text
from dit_lens.studies import power
from dit_lens.studies.model_report import PICTURES, REPORT
from dit_lens.studies.parts.chosen_block import CONTROLS

if TYPE_CHECKING:
    from dit_lens.commands.chapters import Chapter
    from dit_lens.commands.study_plan import StudyPlan
    from dit_lens.studies import ModelReport, Result

ENDS = ("mean", "low", "high")
JUDGED = ("transfer", "carrier_or_detail")  # whose sentences tell of attributes, which a judge sees


def write_study_page(out: Path, plan: StudyPlan, results: Mapping[str, Result], report: ModelReport) -> Path:
    """Writes index.md, and beside it a figure and a table of every study; returns its path.

    out: the folder.
    plan: what was run.
    results: study -> its result.
    report: what it found.
    """
    drawn = _draw_figures(out, results)
    chapters = {chapter.name: chapter for chapter in CHAPTERS}
    lines = [*_write_head(plan, report)]
    for name, result in results.items():
        write_text(out / f"{name}.csv", result.summary.to_csv(index=False))
        chapter = chapters[name]
        lines += [f"## {chapter.study.question}", "", describe_sizes(result), ""]
        lines += [_describe(chapter, result, judged=plan.judged), "", f"*Published:* {chapter.published}", ""]
        lines += [f"![{chapter.study.question}]({name}.webp)", ""] if name in drawn else []
        lines += [_describe_power(result), ""] if name == "disruption" else []
        lines += [f"All numbers: [{name}.csv]({name}.csv). Made by", "", "```python", result.code.rstrip(), "```", ""]
        lines += [*(f"- {note}" for note in result.notes), ""]
    return write_text(out / "index.md", "\n".join(lines))


def _draw_figures(out: Path, results: Mapping[str, Result]) -> set[str]:
    """Writes the figure of every study, where figures can be drawn; returns the names of those studies."""
    with TemporaryDirectory() as folder:
        drawn = write_figures({Path(folder) / f"{name}.webp": result.figure() for name, result in results.items()})
        return {write_bytes(out / file.name, file.read_bytes()).stem for file in drawn}


def _describe(chapter: Chapter, result: Result, *, judged: bool) -> str:
    """What a study found, in words."""
    if judged or chapter.name not in JUDGED:
        return chapter.describe(result)
    return f"**The claim {chapter.compare(result).brief}.**" if chapter.compare else ""


def _describe_power(result: Result) -> str:
    """How many prompts would decide each difference, if it is as large as it was here."""
    table = power(result)
    needs = {row["arm"]: row["needs"] for _, row in table[table["arm"].isin(CONTROLS)].iterrows()}
    told = ", ".join(f"{arm} {'more than 100,000' if math.isnan(n) else f'{n:,.0f}'}" for arm, n in needs.items())
    return f"Prompts that decide a difference as large as this one, with a chance of 80 %: {told}."


def _write_head(plan: StudyPlan, report: ModelReport) -> list[str]:
    """What stands above the studies: the model, the verdicts at a glance, and the rules."""
    content = report.content
    model, versions = content["model"], content["versions"]
    told = ", ".join(f"{name} {versions[name]}" for name in ("dit-lens", "diffusers", "torch", "nnsight"))
    verdicts = [f"- **{one['claim']}**: {_write_verdict(one)}" for one in content["verdicts"]]
    ceiling = [f"- ceiling: {one['what']} {_write_estimate(one['estimate'])}" for one in content["ceiling"]]
    known = ", ".join(f"{name} {model[name]}" for name in ("revision", "weights") if model[name])
    made = f"{content['dtype']} on {content['device']}; {told}. {content['date']}."
    return [
        f"# {model['id']} by {content['protocol']['name']}",
        "",
        f"{model['pipeline']}, {model['blocks']} blocks of {model['width']} channels{f'; {known}' if known else ''}.",
        f"{made} The numbers of this page are also in [{REPORT}]({REPORT}),",
        f"and every measurement is in [{PICTURES}]({PICTURES}). Made, on a device of choice, by",
        "",
        "```sh",
        plan.command,
        "```",
        "",
        "## At a glance",
        "",
        *verdicts,
        *ceiling,
        "",
        "Of each claim: the verdict, the massive channels, and by how much they exceed the control with the largest",
        f"corrected p-value. Intervals are 95 %, of {plan.whose}.",
        "",
        "```text",
        plan.describe(),
        "```",
        "",
    ]


def _write_verdict(one: Mapping) -> str:
    """A verdict with its numbers, and in words what it rests on."""
    why = f" ({one['reason']})" if one["reason"] else ""
    if one["value"] is None or one["value"]["mean"] is None:
        return f"{one['verdict']}{why}"
    said = f"{one['verdict']}{why}: {one['measure'] or ''} {_write_estimate(one['value'])}".replace(":  ", ": ")
    weakest = find_weakest(one["differences"])
    if weakest is None:
        return said
    return f"{said}; {_write_estimate(weakest['estimate'], '+.3g')} from {weakest['from']}"


def _write_estimate(estimate: Mapping | None, form: str = ".3g") -> str:
    numbers = [math.nan if estimate is None or estimate[name] is None else estimate[name] for name in ENDS]
    return write_interval(*numbers, form)
