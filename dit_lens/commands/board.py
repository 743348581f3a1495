"""Many model reports side by side: one table as a page that sorts, as CSV and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from dit_lens.arguments.checks import checked
from dit_lens.commands.study_verdicts import find_weakest
from dit_lens.core.runs.files import check_place, write_json, write_text
from dit_lens.errors import OpError
from dit_lens.studies import ModelReport

PAGE, TABLE, DATA = "board.html", "board.csv", "board.json"
TOLD = 6  # folders in a warning


@checked
def board(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Writes board.html, board.csv and board.json about the reports in folders; returns the path of the page.

    Raises StoreError, which names the file and what is wrong, for a folder without a report. Where reports were made by
    other protocols or prompts the page says so above the table.

    folders: folders that ``dit-lens study`` wrote.
    out: folder of the three files, in which other files stay.
    """
    if not folders:
        raise OpError("there is nothing to lay side by side. Name the folders that dit-lens study wrote.")
    for name in (PAGE, TABLE, DATA):
        check_place(Path(out) / name)
    reports = {str(folder): ModelReport.load(folder) for folder in folders}
    lines = [_describe(folder, report.content) for folder, report in reports.items()]
    claims = list(dict.fromkeys(one["claim"] for report in reports.values() for one in report.content["verdicts"]))
    kinds = {name: "name" if name == "model" else "plain" for name in lines[0] if name not in claims}
    names = ["model", *claims, *(name for name in kinds if name != "model")]
    columns = [{"name": name, "kind": kinds.get(name, "claim")} for name in names]
    content = {"columns": columns, "rows": lines, "warnings": find_differences(reports)}
    out = Path(out)
    write_json(out / DATA, content)
    write_text(out / TABLE, pd.DataFrame([_flatten(line, names) for line in lines]).to_csv(index=False))
    page = (resources.files("dit_lens.commands") / "static" / PAGE).read_text("utf-8")
    # Inside a script element only "<" could end the element.
    return write_text(
        out / PAGE, page.replace("BOARD", json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))
    )


def find_differences(reports: Mapping[str, ModelReport]) -> list[str]:
    """What makes reports other measurements than each other, in words. reports: folder -> its report."""
    found = []
    for what, describe in (
        ("protocols", lambda one: f"{one['protocol']['name']} ({one['protocol']['digest']})"),
        ("arguments in place of the protocol's", lambda one: json.dumps(one["protocol"]["given"], sort_keys=True)),
        ("prompts", lambda one: f"{one['prompts']['n']} of {one['prompts']['source']} ({one['prompts']['digest']})"),
        ("seeds", lambda one: f"{len(one['prompts']['seeds'])} seeds"),
        ("judges", lambda one: one["settings"]["judge"] or "none"),
        ("masks", lambda one: one["settings"]["masks"] or "none"),
        ("releases of dit-lens", lambda one: one["versions"]["dit-lens"]),
    ):
        groups: dict[str, list[str]] = {}
        for folder, report in reports.items():
            groups.setdefault(describe(report.content), []).append(Path(folder).name)
        if len(groups) > 1:
            told = "; ".join(f"{value}: {_list(folders)}" for value, folders in groups.items())
            found.append(f"{what} differ: {told}")
    return found


def _list(folders: Sequence[str]) -> str:
    more = f" and {len(folders) - TOLD} more" if len(folders) > TOLD else ""
    return f"{', '.join(folders[:TOLD])}{more}"


def _describe(folder: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the board."""
    model, prompts, settings = content["model"], content["prompts"], content["settings"]
    ceiling = {one["what"]: (one["estimate"] or {}).get("mean") for one in content["ceiling"]}
    return {
        "model": model["id"],
        **{one["claim"]: _describe_claim(one) for one in content["verdicts"]},
        "energy share": content["energy_share"],
        "ceiling: fidelity": ceiling.get("fidelity of untouched images"),
        "family": model["family"],
        "k": settings["k"],
        "k / width": settings["k"] / model["width"],
        "blocks": model["blocks"],
        "prompts": prompts["n"],
        "seeds": len(prompts["seeds"]),
        "steps": settings["steps"],
        "protocol": content["protocol"]["name"],
        "device": f"{content['dtype']} on {content['device']}",
        "dit-lens": content["versions"]["dit-lens"],
        "date": content["date"],
        "revision": model["revision"],
        "weights": model["weights"],
        "folder": folder,
    }


def _describe_claim(one: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict, and the difference from the control with the largest corrected p-value."""
    found: dict[str, Any] = {name: one[name] for name in ("verdict", "reason", "value")}
    found |= {"difference": None, "from": None}
    if (weakest := find_weakest(one["differences"])) is not None:
        found |= {"difference": weakest["estimate"], "from": weakest["from"], "p_corrected": weakest["p_corrected"]}
    return found


def _flatten(line: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A line with a column for every number of a claim."""
    found: dict[str, Any] = {}
    for name in names:
        value = line.get(name)
        if not isinstance(value, dict):
            found[name] = value
            continue
        found[name] = value["verdict"]
        for part in ("value", "difference"):
            found |= {f"{name}: {part} {end}": (value[part] or {}).get(end) for end in ("mean", "low", "high")}
        found |= {f"{name}: from": value["from"], f"{name}: p": value.get("p_corrected")}
    return found
