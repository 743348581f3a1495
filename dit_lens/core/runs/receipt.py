"""Receipts: for every edit, the exact elements it touched and what that did to their norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.arguments.saving import saved_by
from dit_lens.core.runs.record import ENTRY, check_record

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Entry:
    """One op at one site and branch.

    op: its index in the list of ops.
    kind: its name.
    site, branch: where it acted.
    steps: those it ran at.
    rows, tokens, channels: the elements; None means all of that axis.
    elements: how many numbers at each step.
    before, after: their L2 norm at each step.
    keys: what an AttentionMask knocked out in any row or step, such as "txt 4, 7-9"; None for other ops.
    """

    op: int
    kind: str
    site: str
    branch: str
    steps: tuple[int, ...]
    rows: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    channels: tuple[int, ...] | None
    elements: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    keys: str | None = None

    def __str__(self) -> str:
        parts = (
            ", ".join(
                f"{_count(chosen)} {word}{'' if chosen is not None and len(chosen) == 1 else 's'}"
                for word, chosen in (("row", self.rows), ("token", self.tokens), ("channel", self.channels))
            )
            if self.steps
            else "nothing"
        )
        steps = f"{len(self.steps)} step{'' if len(self.steps) == 1 else 's'}"
        cut = "" if self.keys is None else f", without {self.keys}"
        norms = f"|x| {_mean(self.before):.4g} -> {_mean(self.after):.4g}" if self.steps else "strength 0"
        return f"[{self.op}] {self.kind} {self.site} ({self.branch}): {steps}, {parts}{cut}, {norms}"


@dataclass(frozen=True)
class Receipt:
    """What every edit of a run touched; ``table`` has one line per op, site and branch."""

    entries: tuple[Entry, ...] = ()

    save = saved_by("It is saved with its run, run.save(folder); its table writes itself: receipt.table.to_csv(file).")

    @property
    def table(self) -> pd.DataFrame:
        """One line per entry.

        Columns: op, kind, site, branch, steps, rows, tokens, channels, elements (per step), before, after (mean norms),
        keys.
        """
        import pandas as pd

        lines = [
            {
                "op": entry.op,
                "kind": entry.kind,
                "site": entry.site,
                "branch": entry.branch,
                "steps": len(entry.steps),
                "rows": _count(entry.rows),
                "tokens": _count(entry.tokens),
                "channels": _count(entry.channels),
                "elements": entry.elements,
                "before": _mean(entry.before),
                "after": _mean(entry.after),
                "keys": entry.keys,
            }
            for entry in self.entries
        ]
        return pd.DataFrame(lines)

    def __repr__(self) -> str:
        shown = [str(entry) for entry in self.entries[:12]]
        more = [f"... and {len(self.entries) - 12} more (see .table)"] if len(self.entries) > 12 else []
        return "\n".join([f"Receipt: {count_sites(self.entries)}", *shown, *more])

    def _repr_html_(self) -> str:
        return (
            self.table.to_html(index=False, float_format="{:.4g}".format, border=0)
            if self.entries
            else "Receipt: no edits"
        )

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    @classmethod
    @checked
    def from_json(cls, data: Iterable[dict[str, Any]]) -> Receipt:
        return cls(tuple(_entry_from(line) for line in data))


def count_sites(entries: Iterable[Entry]) -> str:
    """How many sites were touched, in words."""
    n = len({entry.site for entry in entries})
    return "no edits" if n == 0 else f"{n} site{'' if n == 1 else 's'} touched"


def _entry_from(line: dict[str, Any]) -> Entry:
    check_record(line, ENTRY, "a receipt")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}
    return Entry(**values)


def _count(chosen: tuple[int, ...] | None) -> str:
    return "all" if chosen is None else str(len(chosen))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else float("nan")
