"""Ops become a plan: plain data in execution order, every row, token and channel explicit, every error raised here.

The program inside a plan is what ``execute`` carries out; its format is described there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_lens.core.plan.selection import Batch, _indices
from dit_lens.core.plan.sources import Values, given_values, resampled_rows
from dit_lens.core.request.ops import Add, Apply, MeanAblate, Op, Read, Resample, Scale, Swap, TokenMean, Zero
from dit_lens.core.request.reduce import parse
from dit_lens.core.request.timeline import Timeline
from dit_lens.errors import OpError, nearest
from dit_lens.families import Anatomy
from dit_lens.families.sites import Site, holds_image_tokens, match

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families.anatomy import TensorLocation


@dataclass(frozen=True)
class PlannedRead:
    """How the pieces of one read are put together: its key, and per site the channels, in the order of the plan."""

    op: int
    name: str
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    branches: tuple[str, ...]
    both: bool
    rows: tuple[int, ...]
    channels: Mapping[str, tuple[int, ...] | None]
    tokens: tuple[int, ...] | None
    reduce: str | None
    image: bool


@dataclass
class Plan:
    """Ops laid out for one run.

    program: plain data for the executor. given: tensors and functions it refers to by key. reads: see PlannedRead.
    visits: for every op, how often it will be carried out. selections: (op, site, group) -> rows, tokens, channels.
    text_tokens: length of the text stream, where known.
    """

    program: dict[str, Any]
    given: dict[str, Any]
    reads: list[PlannedRead]
    visits: dict[int, int]
    selections: dict[tuple[int, str, int], tuple[tuple[int, ...] | None, ...]]
    text_tokens: int | None


def compile_plan(ops: Sequence[Op], anatomy: Anatomy, timeline: Timeline, batch: Batch) -> Plan:
    """Checks every op against the model and the run, and lays them out call by call in execution order."""
    compiler = _Compiler(anatomy, timeline, batch)
    for number, op in enumerate(ops):
        if not isinstance(op, Op):
            raise OpError(
                f"ops[{number}] is a {type(op).__name__}, not an op. "
                "Ops are Read, Zero, Swap, Scale, Add, TokenMean, MeanAblate, Resample, Apply."
            )
        compiler.add(number, op)
    return compiler.finish()


@dataclass
class _Compiler:
    anatomy: Anatomy
    timeline: Timeline
    batch: Batch
    given: dict[str, Any] = field(default_factory=dict)
    reads: list[PlannedRead] = field(default_factory=list)
    visits: dict[int, int] = field(default_factory=dict)
    selections: dict[tuple[int, str, int], tuple[tuple[int, ...] | None, ...]] = field(default_factory=dict)
    # (call, site) -> actions in the order of the ops
    actions: dict[tuple[int, Site], list[dict[str, Any]]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def add(self, number: int, op: Op) -> None:
        sites = match(op.site, self.anatomy.sites, self.anatomy.stacks, self.anatomy.why_not)
        for site in sites:
            self._allowed(op, site)
        steps = self.timeline.select(op.steps)
        groups = self._groups(op, sites)
        self.visits[number] = 0
        if isinstance(op, Swap) and _checked_strength(op) == 0:
            return
        channels = {site: self._channels(op, site) for site in sites}
        if isinstance(op, Read):
            self._read(number, op, sites, steps, groups, channels)
        for site in sites:
            for group, (rows, tokens) in enumerate(groups):
                selection = tuple(
                    None if chosen is None else tuple(chosen) for chosen in (rows, tokens, channels[site])
                )
                self.selections[number, site.name, group] = selection
                for branch, detail in self._details(number, op, site, steps, rows, tokens, channels[site]):
                    action = {
                        "op": number,
                        "group": group,
                        "rows": rows,
                        "tokens": tokens,
                        "highest": self._unchecked(site, tokens),
                        "channels": channels[site],
                        **detail,
                    }
                    self._place(action, site, steps, branch)

    def _unchecked(self, site: Site, tokens: list[int] | None) -> int | None:
        """The last token of a selection, where only the run can tell whether it exists."""
        return max(tokens, default=None) if tokens is not None and self.batch.tokens(site.stream) is None else None

    def _allowed(self, op: Op, site: Site) -> None:
        """Points that are computed can be read; they are written where that is exact, and refused elsewhere."""
        if site.point == "x0" and self.timeline.kind is None:
            raise OpError(
                f"x0 cannot be computed: what {self.anatomy.family.name} predicts under this scheduler is neither a "
                "flow, noise nor v. Read velocity instead."
            )
        if isinstance(op, Read):
            return
        if self.anatomy.address(site).table is not None:
            raise OpError(
                f"{type(op).__name__} at {site}: this is a sum of a table and the time, so it can only be read. "
                f"Scale blocks.{site.block}.{site.stream}.attn_out or mlp_out instead."
            )
        if site.point in ("x0", "resid_mid"):
            instead = "velocity" if site.point == "x0" else f"blocks.{site.block}.{site.stream}.mlp_out or resid_post"
            raise OpError(
                f"{type(op).__name__} at {site}: this point is computed from others, so it can only be read. "
                f"Write {instead}."
            )
        if self.anatomy.address(site).half is not None:
            raise OpError(
                f"{type(op).__name__} at {site}: one projection adds up what attention and MLP write, so that either "
                f"can only be read. Write blocks.{site.block}.{site.stream}.attn.z or mlp.post, which enter it."
            )
        if self.anatomy.address(site).gate is not None and not isinstance(op, Zero | Scale):
            raise OpError(
                f"{type(op).__name__} at {site}: the module's output is multiplied by a gate before it is added, so "
                "that only Zero and Scale are exact here. Use those, or write resid_post."
            )

    def finish(self) -> Plan:
        calls: list[dict[str, Any]] = [
            {"step": step, "branches": list(branches), "visits": []}
            for step in range(self.timeline.steps)
            for branches in self.timeline.calls
        ]
        for call, planned in self._parts():
            for address, part in planned:
                visits = calls[call]["visits"]
                if visits and visits[-1][:2] == [address.module, address.side]:
                    visits[-1][2].append(part)
                else:
                    visits.append([address.module, address.side, [part]])
        program = {
            "denoiser": "transformer",
            "rows": self.batch.rows,
            "time": self.anatomy.time_rule(self.timeline.time, self.timeline.levels, self.timeline.kind),
            "repeats": list(self.timeline.repeats),
            "grid": self.anatomy.grid_rule,
            "readout": self.anatomy.readout_rule,
            "expected": None if self.batch.grid is None else list(self.batch.grid),
            "record": False,
            "replayed": range(0),
            "calls": calls,
        }
        return Plan(program, self.given, self.reads, self.visits, self.selections, self.batch.text_tokens)

    def _parts(self) -> Iterator[tuple[int, list[tuple[TensorLocation, dict[str, Any]]]]]:
        """For every call its parts in the order in which the model computes them, gates included."""
        placed = {site: self._placed(site) for site in dict.fromkeys(site for _, site in self.actions)}
        calls: dict[int, dict[tuple, tuple[TensorLocation, dict[str, Any]]]] = {}
        for (call, site), actions in self.actions.items():
            for place, address, part in placed[site]:
                # The part that bears the site's name does the work; those beside it keep what it needs.
                filled = {**part, "actions": actions} if part.get("site") == site.name else part
                calls.setdefault(call, {})[place] = (address, filled)
        for call, parts in sorted(calls.items()):
            yield call, [parts[place] for place in sorted(parts)]

    def _placed(self, site: Site) -> list[tuple[tuple, TensorLocation, dict[str, Any]]]:
        """What is to be done for a site in one call: the place in the model's order, the address, the part."""
        anatomy, address = self.anatomy, self.anatomy.address(site)
        place = (*anatomy.rank(address), *site.order[1:], site.name)
        if site.block is not None and site.point == "x0":
            return self._read_out(site, place, address)
        if address.gate is None:
            return [(place, address, {**_fields(address), "gate": None, "site": site.name})]
        key = repr(address.gate)
        gate = ((*anatomy.rank(address.gate), -1, key), address.gate, {**_fields(address.gate), "keep": key})
        return [gate, (place, address, {**_fields(address), "gate": key, "site": site.name})]

    def _read_out(
        self, site: Site, place: tuple, address: TensorLocation
    ) -> list[tuple[tuple, TensorLocation, dict[str, Any]]]:
        """A block's tokens are held until the final norm is called, and then go through it and what follows."""
        final, shift = self.anatomy.final, self.anatomy.shift
        read = {**_fields(final), "gate": None, "site": site.name, "readout": site.name}
        found = [
            (place, address, {**_fields(address), "hold": site.name}),
            ((*self.anatomy.rank(final), -1, site.order, site.name), final, read),
        ]
        if shift is not None:
            found.append(((*self.anatomy.rank(shift), -1, ""), shift, {**_fields(shift), "hold": "shift"}))
        return found

    def _place(self, action: dict[str, Any], site: Site, steps: list[int], branch: str) -> None:
        offset, block = self.timeline.place(branch)
        for at, step in enumerate(steps):
            call = step * len(self.timeline.calls) + offset
            self.actions.setdefault((call, site), []).append({**action, "at": at, "block": block})
            self.visits[action["op"]] += 1

    def _details(
        self,
        number: int,
        op: Op,
        site: Site,
        steps: list[int],
        rows: list[int] | None,
        tokens: list[int] | None,
        channels: list[int] | None,
    ) -> list[tuple[str, dict[str, Any]]]:
        """For every branch an op touches, what its action holds beside the selection."""
        if isinstance(op, Swap | Resample | MeanAblate):
            return self._sourced(number, op, site, steps, rows, tokens, channels)
        detail: dict[str, Any] = {"kind": type(op).__name__}
        if isinstance(op, Read):
            detail["reduce"] = None if op.reduce is None else _parsed(op.reduce)
        elif isinstance(op, Scale):
            detail["factor"] = float(op.factor)
        elif isinstance(op, Add):
            detail["key"] = self._give(f"{number}", _added(op, site, channels, self.anatomy.channels(site)))
        elif isinstance(op, TokenMean):
            if op.keep not in ("mean", "residual"):
                raise OpError(f"keep={op.keep!r} is no part of a channel.{nearest(str(op.keep), ('mean', 'residual'))}")
            detail["keep"] = op.keep
        elif isinstance(op, Apply):
            if not callable(op.fn):
                raise OpError(f"Apply at {site} needs a function fn(tensor, hook); it was given {op.fn!r}.")
            detail["key"] = self._give(f"{number}", op.fn)
        return [(branch, detail) for branch in self.timeline.branches_of(op)]

    def _sourced(
        self,
        number: int,
        op: Swap | Resample | MeanAblate,
        site: Site,
        steps: list[int],
        rows: list[int] | None,
        tokens: list[int] | None,
        channels: list[int] | None,
    ) -> list[tuple[str, dict[str, Any]]]:
        strength = op.strength if isinstance(op, Swap) else 1.0
        if isinstance(op, Swap) and isinstance(op.source, str):
            source = self._source_rows(op)
            return [
                (branch, {"kind": "CopyRow", "source_rows": source, "strength": strength})
                for branch in self.timeline.branches_of(op)
            ]
        source = op.mean if isinstance(op, MeanAblate) else op.source
        wanted = Values(
            self.anatomy.family.name,
            site,
            steps,
            self.timeline,
            tokens,
            channels,
            self.batch,
            self.anatomy.channels(site),
        )
        values = given_values(op, source, wanted)
        targets = list(range(self.batch.rows)) if rows is None else rows
        found = []
        for branch in self.timeline.branches_of(op, default=_branch_of(values)):
            tensor = values.get(branch, values.get(None))
            if tensor is None:
                raise OpError(
                    f"{type(op).__name__} at {site}: the source holds {', '.join(map(str, values))} only, not the "
                    f"{branch!r} branch. Read with branch='both', or pass branch={next(iter(values))!r}."
                )
            source_rows = resampled_rows(op.seed, tensor.shape[1], targets) if isinstance(op, Resample) else targets
            if 1 < tensor.shape[1] <= max(source_rows):
                raise OpError(
                    f"{type(op).__name__} at {site}: the source has {tensor.shape[1]} rows, but row {max(source_rows)} "
                    "is to be replaced. Choose rows=, or give a source of one row."
                )
            key = self._give(f"{number}/{site}/{branch}", tensor)
            found.append((branch, {"kind": "Put", "key": key, "source_rows": source_rows, "strength": strength}))
        return found

    def _read(
        self,
        number: int,
        op: Read,
        sites: list[Site],
        steps: list[int],
        groups: list,
        channels: dict[Site, list[int] | None],
    ) -> None:
        for key in [op.name] if op.name is not None else [site.name for site in sites]:
            if key in self.names:
                raise OpError(f"two reads are called {key!r}. Give one of them another name=.")
            self.names.add(key)
        if len({None if tokens is None else len(tokens) for _, tokens in groups}) > 1:
            raise OpError(
                f"tokens={op.tokens!r} is a different number of text tokens in different rows. "
                "Read the rows one by one with rows=."
            )
        if op.branch == "both" and len(self.timeline.branches) == 1:
            raise OpError(
                f"branch='both': this call has only the {self.timeline.branches[0]!r} branch, as guidance is off. "
                "Leave branch= out."
            )
        self.reads.append(
            PlannedRead(
                op=number,
                name=op.name or "",
                sites=tuple(site.name for site in sites),
                steps=tuple(steps),
                branches=tuple(self.timeline.branches_of(op)),
                both=op.branch == "both",
                rows=tuple(row for rows, _ in groups for row in (range(self.batch.rows) if rows is None else rows)),
                channels={site.name: None if chosen is None else tuple(chosen) for site, chosen in channels.items()},
                tokens=None if groups[0][1] is None else tuple(groups[0][1]),
                reduce=op.reduce,
                image=any(holds_image_tokens(site.name) for site in sites),
            )
        )

    def _groups(self, op: Op, sites: list[Site]) -> list[tuple[list[int] | None, list[int] | None]]:
        """Rows that share their tokens: one group, except where a word stands elsewhere in each row's prompt."""
        rows = self._rows(op)
        streams = {site.stream for site in sites}
        if isinstance(op.tokens, str):
            if streams != {"txt"}:
                raise OpError(
                    f"tokens={op.tokens!r} names a word, which only the txt stream has; {op.site!r} is not that. "
                    "Use mask= or token indices."
                )
            return [
                ([row], self.batch.find_word(row, op.tokens))
                for row in (range(self.batch.rows) if rows is None else rows)
            ]
        if (op.mask is not None or op.tokens is not None) and any(site.point.startswith("mod.") for site in sites):
            raise OpError(f"{op.site!r} is one vector for each image, not tokens. Use channels=, not tokens= or mask=.")
        if op.mask is not None:
            if streams != {"img"} or op.tokens is not None:
                raise OpError("mask= chooses image tokens: use it on the img stream, and without tokens=.")
            return [(rows, self._mask(op))]
        return [(rows, self._tokens(op, streams))]

    def _rows(self, op: Op) -> list[int] | None:
        return None if op.rows is None else sorted(_indices(op.rows, self.batch.rows, "row", "this run has", "images"))

    def _tokens(self, op: Op, streams: set[str]) -> list[int] | None:
        if op.tokens is None:
            return None
        sizes = [size for size in map(self.batch.tokens, streams) if size is not None]
        return _indices(
            op.tokens, min(sizes, default=None), "token", f"the {' and '.join(sorted(streams))} stream has", "tokens"
        )

    def _mask(self, op: Op) -> list[int]:
        import numpy as np

        given: Any = op.mask
        mask = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
        if mask.ndim != 2 or (mask.dtype != bool and not np.isin(mask, (0, 1)).all()):
            raise OpError(
                f"mask= must be a bool array [h, w]; it has shape {list(mask.shape)} and dtype {mask.dtype}. "
                "Threshold it first."
            )
        if self.batch.grid is None:
            raise OpError(
                "mask= needs the token grid, which this pipeline decides while it runs. "
                "Pass height= and width=, or tokens=."
            )
        if mask.shape != self.batch.grid:
            raise OpError(
                f"the mask is {mask.shape[0]} x {mask.shape[1]}, but this run has a grid of {self.batch.grid[0]} x "
                f"{self.batch.grid[1]} image tokens. Resize it to the grid (dit_lens.clusters.to_grid), or change "
                "height= and width=."
            )
        if not mask.any():
            raise OpError("mask= chooses no token: every entry is False. Leave the op out, or choose another mask.")
        return [int(token) for token in np.flatnonzero(mask)]

    def _channels(self, op: Op, site: Site) -> list[int] | None:
        chosen, width = op.channels, self.anatomy.channels(site)
        if chosen is None:
            return None
        if isinstance(chosen, Mapping):
            if site.name not in chosen:
                raise OpError(
                    f"channels= has no entry for {site}. It has "
                    f"{', '.join(list(chosen)[:8])}{' ...' if len(chosen) > 8 else ''}. "
                    "Narrow the op's site to those, for instance site=list(channels)."
                )
            chosen = chosen[site.name]
        return _indices(chosen, width, "channel", f"{site} has", "channels")

    def _source_rows(self, op: Swap) -> list[int]:
        named = re.fullmatch(r"row:(-?\d+)", str(op.source))
        if named is None:
            raise OpError(
                f"source={op.source!r} is no source. Write 'row:0' for another image of the batch, or give a Run, a "
                "tensor, or site -> tensor."
            )
        return _indices(int(named[1]), self.batch.rows, "row", "this run has", "images")

    def _give(self, key: str, value: Any) -> str:
        self.given[key] = value
        return key


def _fields(address: TensorLocation) -> dict[str, Any]:
    """An address as the plain data of a part."""
    return {name: value for name, value in vars(address).items() if name not in ("module", "side", "gate")}


def _checked_strength(op: Swap) -> float:
    if not 0 <= op.strength <= 1:
        raise OpError(
            f"strength={op.strength} lies outside [0, 1]: 0 leaves the target as it is, 1 replaces it. "
            "To exaggerate, use Scale or Apply."
        )
    return op.strength


def _parsed(text: str) -> list[Any]:
    try:
        return parse(text)
    except ValueError as problem:
        raise OpError(f"reduce={text!r}: {problem}") from None


def _added(op: Add, site: Site, channels: list[int] | None, width: int) -> Tensor:
    import torch

    value = torch.as_tensor(op.value)
    size = width if channels is None else len(channels)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, size)):
        raise OpError(
            f"Add at {site}: value has shape {list(value.shape)}; it must be a number or a vector over the {size} "
            "chosen channels."
        )
    return value


def _branch_of(values: Mapping[str | None, Tensor]) -> str | None:
    """The branch a source has, when it has just one; a source without branches applies to the op's default."""
    named = [branch for branch in values if branch is not None]
    return named[0] if len(named) == 1 else ("both" if named else None)
