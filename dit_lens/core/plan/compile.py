"""Ops become a plan: plain data in execution order, every row, token and channel explicit, every error raised here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_lens.core.plan.aliases import name_once, without_name
from dit_lens.core.plan.lowering import SiteLowering, check_allowed, check_keys, check_origin, describe_keys
from dit_lens.core.plan.selection import Group, select_channels, select_groups, select_rows
from dit_lens.core.request.ops import EDITS, OPS, Op, Read, ReadFeatures, SigmaInterval
from dit_lens.core.runs.record import is_text
from dit_lens.errors import DitLensError, OpError
from dit_lens.families import Anatomy
from dit_lens.families.locations import TensorLocation
from dit_lens.families.sites import POINTS, Site, match

if TYPE_CHECKING:
    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.plan.program import Action, Forward, Part, Program
    from dit_lens.families.locations import Location


@dataclass(frozen=True)
class PlannedRead:
    """How the pieces of one read are put together.

    op: the number of the read.
    name: its key, or "" where each site is a key of its own.
    sites, steps, branches, rows: what it keeps, in this order; while the run goes on, rows ascend.
    both: whether it keeps both branches on an axis of their own.
    channels: of each site; None means all.
    tokens: None means all; branch -> those of each row, where they are not the same in all.
    reduce: how tokens are reduced, as it was asked for.
    image: whether it holds image tokens.
    features: whether its channels are features of a dictionary.
    groups: (branch, row) of each group, where tokens are chosen by the text.
    """

    op: int
    name: str
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    branches: tuple[str, ...]
    both: bool
    rows: tuple[int, ...]
    channels: Mapping[str, tuple[int, ...] | None]
    tokens: tuple[int, ...] | dict[str, tuple[tuple[int, ...], ...]] | None
    reduce: str | None
    image: bool
    features: bool = False
    groups: tuple[tuple[str, int], ...] = ()


@dataclass
class Plan:
    """Ops laid out for one run.

    program: plain data for the executor.
    payload: tensors and functions it refers to by key.
    reads: how what is read is put together.
    visits: for every op, how often it will be carried out.
    selections: (op, site, group) -> rows, tokens, channels.
    keys: (op, site, group, branch) -> what attention reads no longer there, in words.
    outline: the run it is for.
    """

    program: Program
    payload: dict[str, Any]
    reads: list[PlannedRead]
    visits: dict[int, int]
    selections: dict[tuple[int, str, int], tuple[tuple[int, ...] | None, ...]]
    keys: dict[tuple[int, str, int, str], str]
    outline: Outline


def compile_plan(ops: Sequence[Op], anatomy: Anatomy, outline: Outline) -> Plan:
    """Checks every op against the model and the run, and lays them out in execution order."""
    compiler = _Compiler(anatomy, outline)
    for number, op in enumerate(ops):
        if not isinstance(op, Op):
            raise OpError(f"ops[{number}] is a {type(op).__name__}, not an op. Ops are {', '.join(OPS)}.")
        compiler.add(number, op)
    return Plan(
        compiler.program(),
        compiler.payload,
        compiler.reads,
        compiler.visits,
        compiler.selections,
        compiler.keys,
        compiler.outline,
    )


@dataclass
class _Compiler:
    anatomy: Anatomy
    outline: Outline
    payload: dict[str, Any] = field(default_factory=dict)
    reads: list[PlannedRead] = field(default_factory=list)
    visits: dict[int, int] = field(default_factory=dict)
    selections: dict[tuple[int, str, int], tuple[tuple[int, ...] | None, ...]] = field(default_factory=dict)
    keys: dict[tuple[int, str, int, str], str] = field(default_factory=dict)
    # (number of the forward pass, site) -> actions in the order of the ops
    actions: dict[tuple[int, Site], list[Action]] = field(default_factory=dict)
    source_levels: dict[tuple[int, float, str], None] = field(default_factory=dict)
    by_mask: bool = False  # whether an op chose its tokens by their places in the image
    by_sigma: bool = False  # whether an op chose its steps by their noise

    def add(self, number: int, op: Op) -> None:
        """Lays one op out at all of its sites."""
        anatomy, timeline = self.anatomy, self.outline.timeline
        check_origin(op, anatomy, self.outline)
        sites = self._match(number, op)
        check_keys(op, anatomy)
        op, sites = op.prepare(sites, anatomy, self.outline)
        for site in sites:
            check_allowed(op, site, anatomy, timeline.kind)
        steps = timeline.select(op.steps)
        self.by_sigma |= isinstance(op.steps, SigmaInterval)
        self.by_mask |= op.mask is not None
        groups = select_groups(op, sites, steps, self.outline)
        self.visits[number] = 0
        channels = {site: select_channels(op, site, anatomy.channels(site)) for site in sites}
        if isinstance(op, Read):
            self._plan_read(number, op, steps, groups, channels)
        else:
            channels = name_once(op, channels, anatomy)
        for site in channels:
            for group_number, group in enumerate(groups):
                self._lower(number, op, site, steps, (group_number, group), channels[site])
        if not self.visits[number] and groups[0].branch is not None and not op.does_nothing():
            raise OpError(
                f"{op!r} has nothing to touch: {op.tokens!r} is in {groups[0].branch} only, which its source does not "
                "hold. Read that branch in the source run."
            )

    def _match(self, number: int, op: Op) -> list[Site]:
        """The sites of an op. What a function of the user's raises is passed on, with a note on where it stands."""
        anatomy = self.anatomy
        try:
            return match(op.site, anatomy.sites, anatomy.stacks, anatomy.why_not)
        except DitLensError:
            raise
        except Exception as problem:
            problem.add_note(f"raised by a function in the site of ops[{number}], {op!r}")
            raise

    def _lower(
        self,
        number: int,
        op: Op,
        site: Site,
        steps: list[int],
        numbered_group: tuple[int, Group],
        channels: list[int] | None,
    ) -> None:
        """Adds the actions of an op at one site and group of rows, in every forward pass they belong to.

        number: the index of the op.
        op: the op.
        site: where it acts.
        steps: the steps it acts at.
        numbered_group: the index of the group among those of the op, and its rows and tokens.
        channels: those it selects here; None means all.
        """
        group_number, group = numbered_group
        if group.at is not None:
            if group.at[0] != site.name:
                return
            group_number = 0 if isinstance(op, Read) else group_number  # what is read at all steps is one tensor
        chosen = (group.rows, group.tokens, channels)
        self.selections[number, site.name, group_number] = tuple(None if c is None else tuple(c) for c in chosen)
        at = SiteLowering(
            op=op,
            number=number,
            where=site,
            steps=steps,
            group=group,
            channels=channels,
            anatomy=self.anatomy,
            outline=self.outline,
            payload=self.payload,
            source_levels=self.source_levels,
        )
        timeline, nothing = self.outline.timeline, op.does_nothing()
        for branch, details in op.lower(at):
            if nothing:
                continue
            if details["kind"] not in ("Read", *EDITS):
                raise OpError(
                    f"{type(op).__name__} makes an edit {details['kind']!r}, which is not in dit_lens.ops.EDITS."
                )
            if "key_tokens" in details:
                self.keys[number, site.name, group_number, branch] = describe_keys(details)
            offset, branch_index = timeline.locate(branch)
            for step_index, step in enumerate(steps):
                if not group.holds(site.name, step):
                    continue
                action: Action = {
                    "op": number,
                    "group": group_number,
                    "branch_index": branch_index,
                    "step_index": step_index,
                    "rows": group.rows,
                    "tokens": group.tokens,
                    "channels": channels,
                    "highest_token": self._highest_token(site, group.tokens),
                    "text_tokens": group.text_tokens,
                    **details,
                }
                self.actions.setdefault((step * len(timeline.forwards) + offset, site), []).append(action)
                self.visits[number] += 1

    def _highest_token(self, site: Site, tokens: list[int] | None) -> int | None:
        """The last token of a selection, where only the run can tell whether it exists."""
        unknown = tokens is not None and (site.stream == "txt" or self.outline.tokens(site.stream) is None)
        return max(tokens or (), default=None) if unknown else None

    def _plan_read(
        self,
        number: int,
        op: Read,
        steps: list[int],
        groups: list[Group],
        channels: dict[Site, list[int] | None],
    ) -> None:
        """Notes how a read is to be put together; OpError where its pieces would not fit.

        number: the index of the read among the ops.
        op: the read.
        steps: the steps it reads.
        groups: its rows and tokens.
        channels: site -> the channels it reads there; None means all.
        """
        timeline = self.outline.timeline
        if op.name is not None and not is_text(op.name):
            raise OpError(f"name={op.name!r} is not a name. Give the read a string of whole characters.")
        if op.reduce is not None and any(group.tokens == [] for group in groups):
            raise OpError(
                f"reduce={op.reduce!r} needs tokens to reduce, and tokens=[] chooses none. Leave tokens= out."
            )
        if op.reduce is not None:
            self._check_data(op, groups, channels)
        taken = {key for read in self.reads for key in ([read.name] if read.name else read.sites)}
        for key in [op.name] if op.name is not None else [site.name for site in channels]:
            if key in taken:
                raise OpError(f"two reads are called {key!r}. Give one of them another name=.")
        if isinstance(op.branch, str) and op.branch == "both" and len(timeline.branches) == 1:
            why = "guidance is off" if timeline.guided else "this pipeline gives this transformer no other"
            raise OpError(
                f"branch='both': this call has only the {timeline.branches[0]!r} branch, as {why}. Leave branch= out."
            )
        kept = dict.fromkeys(channels, op.dictionary.choose(op.features)) if isinstance(op, ReadFeatures) else channels
        self.reads.append(
            PlannedRead(
                op=number,
                name=op.name or "",
                sites=tuple(site.name for site in channels),
                steps=tuple(steps),
                branches=tuple(timeline.select_branches(op.default_branch if op.branch is None else op.branch)),
                both=op.branch == "both",
                rows=tuple(select_rows(op, self.outline) or range(self.outline.rows)),
                channels={site.name: None if chosen is None else tuple(chosen) for site, chosen in kept.items()},
                tokens=list_tokens(
                    [group.branch if group.at is None else group.at[0] for group in groups],
                    [group.tokens for group in groups],
                ),
                reduce=op.reduce,
                image=any(site.is_image for site in channels),
                features=isinstance(op, ReadFeatures),
                groups=tuple((group.branch, (group.rows or [0])[0]) for group in groups if group.branch is not None),
            )
        )

    def _check_data(self, op: Read, groups: list[Group], sites: Iterable[Site]) -> None:
        """OpError where a reduction of text would find nothing but masked tokens in some row."""
        if not any(site.stream == "txt" and not site.point.startswith("mod.") for site in sites):
            return
        text, branches = self.outline.text(), self.outline.timeline.select_branches(op.branch or op.default_branch)
        for group, branch in itertools.product(groups, branches):
            for row in range(self.outline.rows) if group.rows is None else group.rows:
                data = None if group.tokens is None else text.is_data(branch, row, group.tokens)
                if group.branch in (None, branch) and data is not None and not any(data):
                    raise OpError(
                        f"reduce={op.reduce!r} needs tokens that are data: the pipeline masks all {len(data)} tokens "
                        f"of tokens={op.tokens!r} in row {row} ({branch}). Choose others, or read them without reduce=."
                    )

    def program(self) -> Program:
        """All forward passes with their visits, in the order in which the model computes them."""
        timeline, anatomy = self.outline.timeline, self.anatomy
        grid = self.outline.find_grid() if self.by_mask else self.outline.grid
        forwards: list[Forward] = [
            {"step": step, "branches": list(branches), "visits": []}
            for step in range(timeline.steps)
            for branches in timeline.forwards
        ]
        for number, parts in self._parts():
            visits = forwards[number]["visits"]
            for location, part in parts:
                if visits and (visits[-1]["module"], visits[-1]["side"]) == (location.module, location.side):
                    visits[-1]["parts"].append(part)
                else:
                    visits.append({"module": location.module, "side": location.side, "parts": [part]})
        return {
            "denoiser": "transformer",
            "rows": self.outline.rows,
            "time": timeline.rule or anatomy.time_rule(),
            "repeats": list(timeline.repeats),
            "sigmas": list(timeline.sigmas or ()) if self.by_sigma else None,
            "source_levels": [list(one) for one in self.source_levels],
            "grid": anatomy.grid_rule,
            "text": anatomy.text_rule,
            "readout": anatomy.readout_rule,
            "expected_grid": None if grid is None else list(grid),
            "record": False,
            "replayed": range(0),
            "forwards": forwards,
        }

    def _parts(self) -> Iterator[tuple[int, list[tuple[TensorLocation, Part]]]]:
        """For every forward pass its parts in the order in which the model computes them, gates included."""
        of_site = {site: self._parts_of(site) for site in dict.fromkeys(site for _, site in self.actions)}
        forwards: dict[int, dict[tuple, tuple[TensorLocation, Part]]] = {}
        called: dict[int, dict[tuple, tuple[TensorLocation, Part]]] = {}  # the same inside of attentions
        for (number, site), actions in self.actions.items():
            for rank, location, part in of_site[site]:
                # The part with the site's name carries the actions; those beside it keep what it needs.
                acts = part["role"] in ("site", "readout") and part["name"] == site.name
                parts = (called if location.side == "attention" else forwards).setdefault(number, {})
                parts[rank] = (location, {**part, "actions": actions} if acts else part)
            for name in {action["held"] for action in actions if "held" in action}:
                rank, location, part = self._source_part(name)
                forwards.setdefault(number, {})[rank] = (location, part)
        for number, parts in called.items():
            forwards.setdefault(number, {}).update(self._wait_for_calls(parts))
        for number, parts in sorted(forwards.items()):
            yield number, list(_in_order_of_ops([parts[rank] for rank in sorted(parts)]))

    def _parts_of(self, site: Site) -> list[tuple[tuple, TensorLocation, Part]]:
        """What is to be done for a site in one forward pass: the rank in the model's order, the location, the part."""
        anatomy, location = self.anatomy, self.anatomy.locate(site)
        rank = anatomy.place(site)
        if site.block is not None and site.point == "x0":
            return self._readout_parts(site, rank, location)
        gate = location.gate
        if gate is None:
            return [(rank, location, _part("site", site.name, location, sizes=self._sizes(site)))]
        key = repr(gate)
        return [
            ((*anatomy.rank(gate), -1, key), gate, _part("gate", key, gate)),
            (rank, location, _part("site", site.name, location, key, self._sizes(site))),
        ]

    def _wait_for_calls(
        self, parts: Mapping[tuple, tuple[TensorLocation, Part]]
    ) -> Iterator[tuple[tuple, tuple[TensorLocation, Part]]]:
        """What is done inside of attentions, as parts of their modules: where one is entered, and where it is left.

        parts: rank -> location and part.
        """
        of_module: dict[str, list[tuple[TensorLocation, Part]]] = {}
        for rank in sorted(parts):
            of_module.setdefault(parts[rank][0].module, []).append(parts[rank])
        for module, inside in of_module.items():
            # After all that is done to what enters the module, and before all that is done to what leaves it.
            for side, role, place in (("input", "attend", len(POINTS)), ("output", "attended", -2)):
                at = TensorLocation(module, side, "call")
                part = _part(role, module, at)
                if role == "attend":
                    part["inside"] = [one for _, one in _in_order_of_ops(inside)]
                yield (*self.anatomy.rank(at), place, 0, module), (at, part)

    def _source_part(self, name: str) -> tuple[tuple, TensorLocation, Part]:
        """Keeps the tokens of a site for actions that take values from them, after what is done there."""
        site = self.anatomy.site(name)
        location = self.anatomy.locate(site)
        return (*self.anatomy.place(site), "held"), location, _part("hold", name, location)

    def _sizes(self, site: Site) -> tuple[int | None, int]:
        """The tokens and channels that selections at a site were counted in."""
        tokens = None if site.point.startswith("mod.") else self.outline.tokens(site.stream)
        return tokens, self.anatomy.channels(site)

    def _readout_parts(
        self, site: Site, rank: tuple, location: TensorLocation
    ) -> list[tuple[tuple, TensorLocation, Part]]:
        """A block's tokens are held until the final norm is called, and then go through it and what follows."""
        final, shift = self.anatomy.final, self.anatomy.shift
        found = [
            (rank, location, _part("hold", site.name, location)),
            (
                (*self.anatomy.rank(final), -1, site.order, site.name),
                final,
                _part("readout", site.name, final, sizes=self._sizes(site)),
            ),
        ]
        if shift is not None:
            found.append(((*self.anatomy.rank(shift), -1, ""), shift, _part("hold", "shift", shift)))
        return found


def _in_order_of_ops(parts: list[tuple[TensorLocation, Part]]) -> Iterator[tuple[TensorLocation, Part]]:
    """Neighbours that are one tensor under two names act in the order of the ops, as at one site.

    A block of both streams has one modulation, which is ``img.mod.gate`` as well as ``txt.mod.gate``.
    """
    for _, run in itertools.groupby(parts, key=lambda one: without_name(one[0])):
        same = list(run)
        if len(same) == 1 or any(part["role"] not in ("site", "hold") for _, part in same):
            yield from same
            continue
        single: list[tuple[TensorLocation, Part]] = [
            (at, {**part, "actions": [action]}) for at, part in same for action in part["actions"]
        ]
        yield from sorted(single, key=lambda one: one[1]["actions"][0]["op"])
        yield from (one for one in same if one[1]["role"] == "hold")


def list_tokens(
    branches: Sequence[str | None], tokens: Sequence[Sequence[int] | None]
) -> tuple[int, ...] | dict[str, tuple[tuple[int, ...], ...]] | None:
    """The tokens of a read: the same in all of its groups, or branch -> those of each row, or site -> of each step.

    branches, tokens: of each group; where steps have others, its site in place of the branch.
    """
    chosen = [None if some is None else tuple(some) for some in tokens]
    if len(set(chosen)) == 1:
        return chosen[0]
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    for branch, some in zip(branches, chosen, strict=True):
        found[str(branch)] = (*found.get(str(branch), ()), some or ())
    return found


def _part(
    role: Any,
    name: str,
    location: TensorLocation,
    gate: str | None = None,
    sizes: tuple[int | None, int | None] = (None, None),
) -> Part:
    tokens, channels = sizes
    where: Location = {**location.plain(), "name": name}
    return {
        "role": role,
        "name": name,
        "location": where,
        "gate": gate,
        "tokens": tokens,
        "channels": channels,
        "actions": [],
    }
