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

    def __str__(self) -> str:
        parts = (
            (f"{_count(self.rows)} rows, {_count(self.tokens)} tokens, {_count(self.channels)} channels")
            if self.steps
            else "nothing"
        )
        norms = f"|x| {_mean(self.before):.4g} -> {_mean(self.after):.4g}" if self.steps else "strength 0"
        return f"[{self.op}] {self.kind} {self.site} ({self.branch}): {len(self.steps)} steps, {parts}, {norms}"


@dataclass(frozen=True)
class Receipt:
    """What every edit of a run touched; ``table`` has one line per op, site and branch."""

    entries: tuple[Entry, ...] = ()

    save = saved_by("It is saved with its run, run.save(folder); its table writes itself: receipt.table.to_csv(file).")

    @property
    def table(self) -> pd.DataFrame:
        """One line per entry.

        Columns: op, kind, site, branch, steps, rows, tokens, channels, elements (per step), before, after (mean norms).
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
            }
            for entry in self.entries
        ]
        return pd.DataFrame(lines)

    def __repr__(self) -> str:
        shown = [str(entry) for entry in self.entries[:12]]
        more = [f"... and {len(self.entries) - 12} more (see .table)"] if len(self.entries) > 12 else []
        return "\n".join(
            ["Receipt: " + ("no edits" if not shown else f"{len(self.entries)} sites touched"), *shown, *more]
        )

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


def _entry_from(line: dict[str, Any]) -> Entry:
    check_record(line, ENTRY, "a receipt")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}
    return Entry(**values)


def _count(chosen: tuple[int, ...] | None) -> str:
    return "all" if chosen is None else str(len(chosen))


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else float("nan")
