"""How an op is laid out at one site: the actions it becomes, with what they need in the payload."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

from dit_lens.analysis.channels import ChannelSet
from dit_lens.core.plan.selection import Group, list_named, select_mask, select_rows
from dit_lens.core.plan.sources import (
    Wanted,
    is_by_branch,
    list_some,
    match_words,
    pick_branch,
    pick_vectors,
    source_values,
)
from dit_lens.core.request.directions import Directions
from dit_lens.core.request.indices import to_indices
from dit_lens.core.request.ops import Op
from dit_lens.core.request.token_set import TokenSet
from dit_lens.core.runs.run import Run
from dit_lens.errors import OpError, nearest
from dit_lens.families.linear import why_inexact
from dit_lens.families.stack import UNGATED

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.request.op import ActionDetails, Lowered
    from dit_lens.families import Anatomy
    from dit_lens.families.sites import Site

AXES = ("steps", "rows", "tokens", "channels")  # that an op names, one by one


@dataclass(frozen=True, kw_only=True)
class SiteLowering:
    """What an op may ask while it is laid out (``dit_lens.core.request.ops.Lowering``).

    op, number: the op, and its index in the list of ops.
    where: the site.
    steps: the steps it acts at.
    group: its rows and tokens.
    channels: those it selects here; None means all.
    anatomy, outline: of the model and of the run.
    payload: receives tensors and functions.
    source_levels: receives (step, noise level there, op and site) of every step that is taken from another run.
    """

    op: Op
    number: int
    where: Site
    steps: list[int]
    group: Group
    channels: list[int] | None
    anatomy: Anatomy
    outline: Outline
    payload: dict[str, Any]
    source_levels: dict[tuple[int, float, str], None]

    @property
    def site(self) -> str:
        return self.where.name

    @property
    def size(self) -> int:
        return self.anatomy.channels(self.where) if self.channels is None else len(self.channels)

    def on_branches(self, **action: Unpack[ActionDetails]) -> Lowered:
        return [(branch, action) for branch in self._branches()]

    def give(self, value: Any) -> str:
        return self._give(f"{self.number}", value)

    def add(self, value: Any) -> Lowered:
        of_branches = pick_vectors(value, self._wanted(means=True))
        found: Lowered = []
        for branch in self._branches(default=_branch_of(of_branches)):
            key = self._give(f"{self.number}/{self.site}/{branch}", pick_branch(of_branches, branch, self._name))
            found.append((branch, {"kind": "Add", "key": key}))
        return found

    def copy(self, source: str, *, strength: float = 1.0) -> Lowered:
        if source.startswith("site:"):
            held = find_source(self.anatomy, self.where, source.removeprefix("site:"), self.size, self.channels)
            return self.on_branches(kind="CopySite", held=held, strength=strength)
        row = self._find_row(source)
        of_text = self.where.stream == "txt" and not self.where.point.startswith("mod.")
        found: Lowered = []
        for branch in self._branches():
            action: ActionDetails = {"kind": "CopyRow", "source_rows": [row], "strength": strength}
            tokens = self.group.tokens
            if of_text and self.group.branch is not None and row not in self.targets:
                tokens = match_words(self._wanted(means=False), self.outline.text(), branch, row)
                action["source_tokens"] = tokens
            if of_text:
                text = self.outline.text()
                asked = range(len(text.data.get((branch, row), ()))) if tokens is None else tokens
                if (held := text.is_data(branch, row, asked)) is not None:
                    self._check_data(branch, {row: held}, [row] * len(self.targets))
            found.append((branch, action))
        return found

    def hold(self, source: str) -> str:
        return find_source(
            self.anatomy, self.where, source, self.anatomy.channels(self.anatomy.find_site(source)), None
        )

    def attend(self, keys: str, tokens: Any, mask: Any) -> Lowered:
        block, stream = self.where.block or 0, self.where.stream
        if self.group.tokens == []:
            raise OpError("tokens=[] chooses no token that reads. Leave it out for all of them, or leave the op out.")
        _, layout = self.anatomy.find_call(block, stream, keys)
        size = 1 if self.channels is None else len(self.anatomy.heads(self.where)[0])
        how = {
            "stream": stream,
            "queries": self.anatomy.locate(self.where).layout,
            "keys": keys,
            "layout": layout,
            "heads": None if self.channels is None else [channel // size for channel in self.channels[::size]],
        }
        found: Lowered = []
        for branch in self._branches():
            selected = select_keys(self, branch, keys, tokens, mask)
            if selected is None or any(row for rows in selected for row in rows):
                found.append((branch, {"kind": "AttentionMask", "parameters": how, "key_tokens": selected}))
        if not found:
            raise OpError(
                f"{type(self.op).__name__} at {self.site}: key_tokens={tokens!r} are in no prompt of the chosen rows "
                "and branches. lens.to_str_tokens(prompt) lists the tokens of a prompt."
            )
        return found

    def turn_back(self) -> Lowered:
        how = {"norm": self.anatomy.find_norm(self.where), "head": len(self.anatomy.heads(self.where)[0])}
        return self.on_branches(kind="Rope", held=self.hold(self.site.removesuffix("_rot")), parameters=how)

    def _find_row(self, source: str) -> int:
        """The row that "row:0" names."""
        named = re.fullmatch(r"row:(-?\d{1,9})", source)
        if named is None:
            raise OpError(
                f"source={source!r} is not a valid source. Write 'row:0' for another image of the batch, "
                "'site:blocks.3.img' for another site, or give a Run, a tensor, or site -> tensor."
            )
        return to_indices(int(named[1]), self.outline.rows, "row", "this run has", "images")[0]

    def put(
        self,
        source: Any,
        *,
        strength: float = 1.0,
        means: bool = False,
        pick_rows: Callable[[Sequence[int], list[int]], list[int]] | None = None,
    ) -> Lowered:
        single = self.group.at is not None and not means  # then nothing but its own step is taken of the source
        steps = [step for step in self.steps if self.group.holds(self.site, step)] if single else self.steps
        values = source_values(source, replace(self._wanted(means), steps=steps))
        there = values.by_branch
        if values.levels is not None:
            known = [step for step in steps if step < len(values.levels)]
            self.source_levels.update({(step, values.levels[step], self._name): None for step in known})
        source_rows = self._source_rows(values.rows, pick_rows)
        found: Lowered = []
        for branch in self._branches(default=_branch_of(there)):
            key = f"{self.number}/{self.site}/{branch}/{self.group.rows}"
            key += f"/{steps[0]}" if single else ""
            self._give(key, pick_branch(there, branch, self._name))
            action: ActionDetails = {"kind": "Put", "key": key, "source_rows": source_rows, "strength": strength}
            for row in [values.rows[i] for i in source_rows]:
                if row in values.unmatched:
                    raise OpError(values.unmatched[row])
            mask = values.masks.get(branch, values.masks.get(None))
            if mask is not None and not mask[source_rows].all():
                held = {row: mask[i].tolist() for i, row in enumerate(values.rows)}
                self._check_data(branch, held, [values.rows[i] for i in source_rows])
                action["source_mask"] = self._give(f"{key}/mask", mask)
            found.append((branch, action))
        return found

    def _check_data(self, branch: str, held: Mapping[int, Sequence[bool]], rows: Sequence[int]) -> None:
        """OpError where a source has no data at a token that is data in this run.

        branch: of the run.
        held: row of the source -> which of the chosen tokens it has.
        rows: for every target its row in the source.
        """
        for target, row in zip(self.targets, rows, strict=True):
            tokens = range(len(held[row])) if self.group.tokens is None else self.group.tokens
            needed = self.outline.text().is_data(branch, target, tokens)
            if needed is None:  # the run will compare
                continue
            lacking = [one for one, need, has in zip(tokens, needed, held[row], strict=True) if need and not has]
            if lacking:
                raise OpError(
                    f"{self._name}: row {target} of this run has {sum(needed)} tokens of text to replace, and row "
                    f"{row} of the source has {sum(needed) - len(lacking)} of them ({branch}): none at "
                    f"{list_some(lacking)}. Choose tokens= that both have, such as a word, take prompts of equal "
                    "length in tokens, or read the source row by row (rows=)."
                )

    def _source_rows(
        self, rows: Sequence[int], pick_rows: Callable[[Sequence[int], list[int]], list[int]] | None
    ) -> list[int]:
        """For every target the position of its row in the source, whose rows have these numbers."""
        targets = self.targets
        if len(rows) == 1:
            return [0] * len(targets)
        chosen = targets if pick_rows is None else pick_rows(rows, targets)
        positions = {row: i for i, row in enumerate(rows)}
        if missing := [row for row in chosen if row not in positions]:
            raise OpError(
                f"{type(self.op).__name__} at {self.site}: the source has {len(rows)} rows ({', '.join(map(str, rows))}"
                f"), but row {missing[0]} is to be replaced. Choose rows=, or give a source of one row."
            )
        return [positions[row] for row in chosen]

    @property
    def targets(self) -> list[int]:
        """The rows it acts on."""
        return list(range(self.outline.rows)) if self.group.rows is None else self.group.rows

    @property
    def _name(self) -> str:
        return f"{type(self.op).__name__} at {self.site}"

    def _wanted(self, means: bool) -> Wanted:
        return Wanted(
            op=type(self.op).__name__,
            means=means,
            family=self.anatomy.family.name,
            site=self.where,
            steps=self.steps,
            rows=select_rows(self.op, self.outline),
            tokens=self.group.tokens,
            words=None if self.group.branch is None else (self.op.tokens, self.group.branch, self.targets[0]),
            channels=self.channels,
            unordered=frozenset(name for name in AXES if self._is_set(getattr(self.op, name))),
            outline=self.outline,
            width=self.anatomy.channels(self.where),
        )

    def _is_set(self, value: Any) -> bool:
        here = value[self.site] if isinstance(value, Mapping) and self.site in value else value
        return isinstance(here, set | frozenset)

    def _branches(self, default: str | None = None) -> Sequence[str]:
        asked = self.op.branch
        chosen = self.outline.timeline.select_branches((default or self.op.default_branch) if asked is None else asked)
        return [branch for branch in chosen if self.group.branch in (None, branch)]

    def _give(self, key: str, value: Any) -> str:
        self.payload[key] = value
        return key


def select_keys(at: SiteLowering, branch: str, keys: str, tokens: Any, mask: Any) -> list[list[list[int]]] | None:
    """For every step, or for all, and every target row the tokens that are no longer read; None: all.

    at: where the op is laid out.
    branch: of the run.
    keys: the stream they are of.
    tokens, mask: which of its tokens, as an op names them.
    """
    outline, targets = at.outline, at.targets
    if mask is not None:
        return [[select_mask(mask, outline)] * len(targets)]
    if tokens is None:
        return None
    if isinstance(tokens, TokenSet):
        name = f"blocks.{at.where.block}.{keys}"
        steps = [tokens.at(name, step, outline.steps, outline.tokens(keys)) for step in at.steps]
        return [[some] * len(targets) for some in steps]
    if list_named(tokens):
        if keys != "txt":
            raise OpError(f"key_tokens={tokens!r} names words, which only text has. Use key_mask= or token indices.")
        return [[outline.text().find(branch, row, tokens) for row in targets]]
    some = to_indices(tokens, outline.tokens(keys), "token", f"the {keys} stream has", "tokens")
    if not some:
        raise OpError("key_tokens=[] chooses no key. Leave it out for all of them, or leave the op out.")
    return [[some] * len(targets)]


def describe_keys(action: ActionDetails) -> str:
    """The keys that are knocked out in any row or step: "txt 4, 7-9"."""
    stream, named = action["parameters"]["keys"], action.get("key_tokens")
    if named is None:
        return f"all {stream} tokens"
    tokens = sorted({token for step in named for row in step for token in row})
    spans = [
        [token for _, token in span] for _, span in itertools.groupby(enumerate(tokens), lambda pair: pair[1] - pair[0])
    ]
    return f"{stream} {', '.join(f'{span[0]}-{span[-1]}' if len(span) > 1 else str(span[0]) for span in spans)}"


def find_source(anatomy: Anatomy, target: Site, name: str, size: int, channels: Sequence[int] | None) -> str:
    """The name of a site whose values replace those of another; OpError where they do not fit or are not there yet.

    anatomy: of the model.
    target: where they go.
    name: of the site they come from.
    size, channels: of the selection at the target.
    """
    source = anatomy.find_site(name)
    what = f"source='site:{name}' at {target}"
    if source.block is None or source.stream != target.stream or source.point.startswith("mod."):
        raise OpError(f"{what}: values come from tokens of the same stream, {target.stream}, of a block.")
    if target.block is None or target.point.startswith("mod."):
        raise OpError(f"{what}: only tokens of a block are replaced by those of another site.")
    location = anatomy.locate(source)
    if source.point == "x0" or location.gate or location.half or location.table or location.entry:
        raise OpError(f"{what}: {source} is computed from others or multiplied by a gate, so it is no source.")
    if location == anatomy.locate(target) or anatomy.place(source) >= anatomy.place(target):
        raise OpError(f"{what}: {source} is not computed before {target}. Swap from a Run that read it.")
    width, most = anatomy.channels(source), max(channels, default=-1) if channels is not None else -1
    if (channels is None and width != size) or most >= width:
        raise OpError(
            f"{what}: it has {width} channels, and {most + 1 if channels is not None else size} are asked for."
        )
    return source.name


def check_allowed(op: Op, site: Site, anatomy: Anatomy, kind: str | None) -> None:
    """Points that are computed can be read; they are written where that is exact, and refused elsewhere.

    op, site: what is asked, and where.
    anatomy: of the model.
    kind: what is predicted; None where it is neither a flow, noise nor v.
    """
    name, block = type(op).__name__, f"blocks.{site.block}.{site.stream}"
    if site.point == "x0" and kind is None:
        raise OpError(
            f"x0 cannot be computed: what {anatomy.family.name} predicts under this scheduler is neither a "
            "flow, noise nor v. Read velocity instead."
        )
    location = anatomy.locate(site)
    if location.half is not None and not op.edits:
        path = location.module.removeprefix("transformer.")
        if (why := why_inexact(anatomy.modules.get(path))) is not None:
            raise OpError(
                f"{name} at {site}: it is made of a part of what enters {path}, which {why}. Read {block}.attn.z or "
                "mlp.post, which enter it."
            )
    if not op.edits:
        return
    if location.table is not None:
        raise OpError(
            f"{name} at {site}: this is a sum of a table and the time, so it can only be read. "
            f"Scale {block}.attn_out or mlp_out instead."
        )
    if site.point in ("x0", "resid_mid"):
        instead = "velocity" if site.point == "x0" else f"{block}.mlp_out or resid_post"
        raise OpError(f"{name} at {site}: this point is computed from others, so it can only be read. Write {instead}.")
    if location.entry is not None:
        raise OpError(
            f"{name} at {site}: a ControlNet gives these residuals, and several blocks may share one, so they can only "
            f"be read. Write the resid_pre of the next block, or {block}."
        )
    if location.half is not None:
        raise OpError(
            f"{name} at {site}: one projection adds up what attention and MLP write, so that either "
            f"can only be read. Write {block}.attn.z or mlp.post, which enter it."
        )
    if location.gate is not None and not op.exact_under_gate:
        before = next((f"{block}.{point}" for point, out in UNGATED.items() if out == site.point), None)
        instead = "resid_post" if before is None else f"{before}, which the gate multiplies (v / gate there adds v)"
        raise OpError(
            f"{name} at {site}: the module's output is multiplied by a gate before it is added, so "
            f"that only Zero and Scale are exact here. Use those, or write {instead}."
        )


def check_origin(op: Op, anatomy: Anatomy, outline: Outline) -> None:
    """Raises OpError for directions or channels that were found on a model of another kind, whatever their sites.

    op: what is asked.
    anatomy, outline: of the model and of the run.
    """
    if isinstance(value := getattr(op, "value", None), Directions):
        value.check(type(op).__name__, anatomy.family.name, outline.steps)
    if isinstance(op.channels, ChannelSet):
        for site in anatomy.sites:
            scores = op.channels.scores.get(site.name)
            if scores is not None and len(scores) != anatomy.channels(site):
                raise OpError(
                    f"{type(op).__name__}: channels= were ranked among {len(scores)} at {site}, "
                    f"which has {anatomy.channels(site)} here. Rank channels of this model."
                )


def check_keys(op: Op, anatomy: Anatomy) -> None:
    """Raises OpError where a mapping from sites has a key that is no site of the model, and so would do nothing."""
    known = [site.name for site in anatomy.sites]
    for name in ("channels", "source", "mean", "value"):
        given = getattr(op, name, None)
        if not isinstance(given, Mapping) or isinstance(given, Run) or (name == "value" and is_by_branch(given)):
            continue
        if unknown := [key for key in given if key not in known]:
            close = nearest(str(unknown[0]), known).split(" There are:")[0]
            raise OpError(
                f"{type(op).__name__}: {name}= has the key {unknown[0]!r}, which is no site of this model.{close} "
                "lens.sites() lists them."
            )


def _branch_of(values: Mapping[str | None, Tensor]) -> str | None:
    """The branch a source has, when it has just one; a source without branches applies to the op's default."""
    named = [branch for branch in values if branch is not None]
    return named[0] if len(named) == 1 else ("both" if named else None)
