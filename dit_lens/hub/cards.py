"""The README of what is shared: what it is, how it was made, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dit_lens.hub.privacy import hide_places

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.request.dictionaries import Dictionary
    from dit_lens.core.runs.run import Run
    from dit_lens.instruments.steering_vectors import Steering
    from dit_lens.studies import Result

SHOWN, LONGEST = 4, 300  # entries of a list and characters of a value that a card shows
CARD = """\
---
library_name: dit_lens
tags: [dit_lens, diffusion, interpretability]
{head}---

# {title}

{what}

| | |
| --- | --- |
{facts}

```python
import dit_lens as dl

{load}
```
{note}
"""


def write_card(
    repo_id: str, what: str, name: str, facts: Mapping[str, Any], note: str, head: Mapping[str, str] | None = None
) -> str:
    """The text of a README.

    repo_id: of the repository.
    what: in a sentence or two.
    name: the variable of the line that loads it; "" for what is looked at instead.
    facts: how it was made.
    note: of the user.
    head: further lines of its metadata.
    """
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value not in (None, "", [], {})]
    return (
        CARD.format(
            head="".join(f"{key}: {json.dumps(value)}\n" for key, value in (head or {}).items()),
            title=repo_id.rsplit("/", maxsplit=1)[-1],
            what=what,
            facts="\n".join([*lines, f"| dit_lens | {find_version()} |"]),
            load=f'{name} = dl.from_hub("{repo_id}")' if name else "# open this page in a browser",
            note=f"\n{note}\n" if note else "",
        ).rstrip("\n")
        + "\n"
    )


def find_version() -> str:
    """Of this library."""
    try:
        return version("dit-lens")
    except PackageNotFoundError:
        return "a source folder that is not installed"


def describe_run(run: Run) -> dict[str, Any]:
    """How a run was made."""
    made = hide_places(run.provenance)
    ops = [str(op.get("op", op.get("unsaved", "?"))) for op in run.spec["ops"]]
    return {
        "prompt": run.spec.get("prompt"),
        "seed": run.spec.get("seed"),
        **{name: made.get(name) for name in ("model", "revision", "family", "pipeline", "dtype", "device")},
        "steps": len(run.clock),
        "call": hide_places(run.spec["call"]),
        "ops": ops,
        "reads": list(run),
    }


def describe_result(result: Result) -> dict[str, Any]:
    """How a study was made."""
    settings = {name: value for name, value in hide_places(result.settings).items() if not isinstance(value, Mapping)}
    return {
        "study": result.study,
        "measurements": len(result.table),
        "images": len(result.images),
        **settings,
        "notes": result.notes,
    }


def describe_steering(steering: Steering) -> dict[str, Any]:
    """How directions were found."""
    return {
        "method": steering.method,
        "differences": steering.n,
        "pairs": [f"{start} -> {to}" for start, to in steering.pairs],
        "family": steering.family,
        "sites": list(steering.vectors),
        "shape": [list(vector.shape) for vector in steering.vectors.values()][:1],
    }


def describe_channels(channels: ChannelSet) -> dict[str, Any]:
    """How channels were chosen."""
    return {
        "chosen": repr(channels).splitlines()[0],
        "score": channels.score,
        "arm": channels.arm,
        "sites": list(channels),
        "note": channels.note,
    }


def describe_dictionary(dictionary: Dictionary) -> dict[str, Any]:
    """What a dictionary is."""
    return {"dictionary": repr(dictionary), "origin": dictionary.origin, "checksum": dictionary.checksum}


def _cell(value: Any) -> str:
    """A value in one cell of a table."""
    if isinstance(value, Mapping):
        value = [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = f" ... ({len(value)} in all)" if len(value) > SHOWN else ""
        value = ", ".join(map(str, value[:SHOWN])) + more
    text = " ".join(str(value).replace("|", "\\|").replace("`", "'").split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
