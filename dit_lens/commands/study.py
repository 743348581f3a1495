"""A protocol's studies on any pipeline: what they would cost, what they found as a page, and as a file to compare."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from dit_lens.commands.study_inputs import StudyOptions, find_judge, find_masks, read_prompts
from dit_lens.commands.study_page import write_study_page
from dit_lens.commands.study_plan import StudyPlan, time_image
from dit_lens.commands.study_verdicts import find_ceiling, find_energy_share, find_verdicts
from dit_lens.core.runs.files import check_place
from dit_lens.core.runs.provenance import describe
from dit_lens.errors import StoreError
from dit_lens.studies import ModelReport
from dit_lens.studies.model_report import REPORT
from dit_lens.studies.shared import protocols
from dit_lens.studies.shared.checkpoints import share_progress_bar
from dit_lens.studies.shared.folders import describe_settings
from dit_lens.studies.shared.registry import get_study

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens
    from dit_lens.studies import Result

CELLS = "cells"


def make_plan(lens: DiTLens, model: str, options: StudyOptions) -> StudyPlan:
    """What a run of all studies of a protocol would be; draws two short images, and writes nothing.

    lens: lens on the model.
    model: repository or folder, as it was given.
    options: what was asked for.
    """
    protocol, device = protocols.get(options.protocol), lens.pipe.device
    row = protocol.find_row(model)
    call: dict[str, Any] = dict(row.call) if row else {}
    call |= options.make_call()
    given, dtype = options.make_given(), str(lens.pipe.transformer.dtype).removeprefix("torch.")
    if row is not None and dtype != row.settings["dtype"].value:
        given["dtype"] = dtype
    prompts = read_prompts(lens, options.prompts)
    masks = find_masks(options.masks, prompts.names, device, trust_remote_code=options.trust_remote_code)
    judge = find_judge(options.judge, device)
    timed, seconds = time_image(lens, prompts.texts[0], call)
    return StudyPlan(
        lens=lens,
        model=model,
        command=options.write_command(model),
        protocol=protocol,
        row=row,
        prompts=prompts,
        seeds=list(range(options.seeds)),
        given=given,
        call=call,
        judge=judge,
        masks=masks,
        timed=timed,
        seconds=seconds,
    )


def check_out(out: Path) -> None:
    """Raises StoreError where the folder of a study could not be written, or is something else's."""
    check_place(out / REPORT)
    if out.exists() and any(out.iterdir()) and not (out / CELLS).is_dir():
        raise StoreError(f"{out} holds other files and no study. Choose a new folder for --out.")


def run_plan(plan: StudyPlan, out: Path, share: Mapping[str, Any] = MappingProxyType({})) -> ModelReport | str:
    """Runs every study of a plan, and writes index.md and result.json; goes on from the cells in the folder.

    Returns the report; or what there is so far, in words, where cells of other shards are missing.

    plan: what is run.
    out: folder of the page, the figures and tables, result.json, and finished cells.
    share: ``shard`` or ``workers`` of every study, if either is given.
    """
    jobs = plan.arguments()
    cells = sum(count for count, _ in plan.counts.values())
    with share_progress_bar("study", cells, by_cell=True):
        results = {
            name: get_study(name).function(plan.lens, **arguments, out=out / CELLS / name, **share)
            for name, arguments in jobs.items()
        }
    if missing := [note for result in results.values() for note in result.notes if result.table.empty]:
        return "\n".join([*missing, "The same command without --shard writes the page when all shards have run."])
    report = make_report(plan, results)
    write_study_page(out, plan, results, report)
    report.save(out)
    return report


def make_report(plan: StudyPlan, results: Mapping[str, Result]) -> ModelReport:
    """The report of what studies found.

    plan: what was run.
    results: study -> its result.
    """
    made = describe(plan.lens.pipe, plan.lens.family)
    anatomy, prompts = plan.lens.anatomy, plan.prompts
    tables = [result.table.assign(study=name) for name, result in results.items()]
    table = pd.concat([one.astype(object) for one in tables], ignore_index=True)
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "model": {
            "id": plan.model,
            **{name: made[name] for name in ("revision", "weights", "pipeline", "family")},
            "width": anatomy.width,
            "blocks": anatomy.depth,
        },
        "protocol": {
            "name": plan.protocol.name,
            "digest": plan.protocol.digest,
            "given": describe_settings(plan.given),
        },
        "prompts": {
            "digest": prompts.digest,
            "n": len(prompts.texts),
            "pairs": len(prompts.pairs),
            "seeds": plan.seeds,
            "source": prompts.source,
        },
        "settings": {
            "k": plan.setting("k"),
            "steps": plan.steps,
            "draws": plan.setting("draws"),
            "call": describe_settings(plan.call),
            "judge": _name(plan.judge),
            "masks": _name(plan.masks),
        },
        "studies": [
            {"study": name, "rows": len(result.table), "notes": list(result.notes)} for name, result in results.items()
        ],
        "left_out": dict(plan.left_out),
        "energy_share": find_energy_share(results),
        "verdicts": find_verdicts(results),
        "ceiling": find_ceiling(results),
        "versions": made["versions"],
        "device": made["device"],
        "dtype": made["dtype"],
    }
    return ModelReport(content, table[["study", *(name for name in table if name != "study")]])


def _name(given: Any) -> str | None:
    """A judge or masks in one word."""
    if isinstance(given, list):
        return "images of a folder"
    return None if given is None else describe_settings({"one": given})["one"]
