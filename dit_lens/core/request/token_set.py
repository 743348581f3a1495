"""Tokens that are others at every site and step, such as registers and sinks of a run: plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.arguments.mappings import NamedMapping
from dit_lens.arguments.numbers import to_int
from dit_lens.arguments.saving import saved_by
from dit_lens.errors import OpError, SiteError, nearest, show

PARTS = ("tokens", "kind", "count", "peaks")  # of its JSON


@checked_fields
@dataclass(frozen=True, repr=False)
class TokenSet(NamedMapping[tuple[tuple[int, ...], ...]]):
    """For every site the tokens at every step of a run: a mapping site -> (tokens of step 0, of step 1, ...).

    >>> found = TokenSet({"blocks.3.img": [[7], [7, 9], []]})
    >>> found["blocks.3.img"], found.sizes
    (((7,), (7, 9), ()), {'blocks.3.img': (1, 2, 0)})

    Wherever ``tokens=`` is: an op or a read takes at each of its sites and steps the tokens of the set. A step that has
    none is left alone by edits. Raises OpError for what is no whole number from 0 up, and for steps that differ in
    number from site to site.

    tokens: site -> for every step its tokens, ascending.
    kind: what they are, for messages.
    count: how many tokens the stream has; None where that is not known.
    peaks: site -> for every step how far the strongest token stands out, where the set was found by that.
    """

    tokens: Mapping[str, Sequence[Sequence[int]]]
    kind: str = "tokens"
    count: int | None = None
    peaks: Mapping[str, Sequence[float]] = field(default_factory=dict)

    save = saved_by("json.dumps(tokens.to_json()) is its text, and TokenSet.from_json(data) the way back.")

    def __post_init__(self) -> None:
        plain = {str(site): tuple(_as_tokens(site, some) for some in steps) for site, steps in self.tokens.items()}
        object.__setattr__(self, "tokens", plain)
        object.__setattr__(self, "peaks", {site: tuple(map(float, some)) for site, some in self.peaks.items()})
        if not plain:
            raise OpError("a TokenSet of no site chooses no tokens. Give site -> tokens of every step.")
        if len({len(steps) for steps in plain.values()}) > 1:
            raise OpError("a TokenSet has the tokens of one run: its sites have other numbers of steps each.")
        if self.count is not None and any(token >= self.count for some in self._each() for token in some):
            raise OpError(f"a TokenSet of {self.count} tokens names others, beyond {self.count - 1}.")

    @property
    def steps(self) -> int:
        """How many steps the run has that they are of."""
        return len(next(iter(self.tokens.values())))

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """How many tokens there are at every site and step."""
        return {site: tuple(map(len, steps)) for site, steps in self.tokens.items()}

    @property
    def is_empty(self) -> bool:
        """Whether there is no token anywhere."""
        return not any(map(len, self._each()))

    @checked
    def at(self, site: str, step: int, steps: int, count: int | None) -> list[int]:
        """The tokens of a site and step of a run; OpError where the set is of another kind of run.

        site: name of the site.
        step: the step.
        steps: how many steps the run has.
        count: how many tokens the site's stream has, if that is known.
        """
        if site not in self.tokens:
            raise OpError(
                f"tokens= are {self.kind} of {_list(self.tokens)}, and {site} is not among them. Narrow the op's site "
                "to those, for instance site=list(tokens)."
            )
        if steps != self.steps:
            raise OpError(
                f"tokens= are {self.kind} of a run of {self.steps} steps, and this one has {steps}. Find them in a run "
                "of as many."
            )
        if None not in (count, self.count) and count != self.count:
            raise OpError(
                f"tokens= are {self.kind} among {self.count} tokens, and {site} has {count}. Find them at the same "
                "size of image."
            )
        if not 0 <= step < steps:
            raise OpError(f"step {step} does not exist: there are {steps}, 0 to {steps - 1}.")
        found = list(self.tokens[site][step])
        if count is not None and found and found[-1] >= count:
            raise OpError(
                f"tokens= are {self.kind} with token {found[-1]} at {site}, step {step}, which has {count}, 0 to "
                f"{count - 1}."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, which :meth:`from_json` takes back."""
        peaks = {site: list(values) for site, values in self.peaks.items()}
        tokens = {site: [list(some) for some in steps] for site, steps in self.tokens.items()}
        return {"tokens": tokens, "kind": self.kind, "count": self.count, "peaks": peaks}

    @classmethod
    @checked
    def from_json(cls, data: Mapping[str, Any]) -> TokenSet:
        """The set that :meth:`to_json` wrote; OpError if it is none.

        >>> TokenSet.from_json(TokenSet({"blocks.0.img": [[1]]}, "sinks").to_json())
        TokenSet of sinks: 1 site, 1 step, 1 token
        """
        if not isinstance(data.get("tokens"), Mapping) or not set(data) <= set(PARTS):
            raise OpError(f"this is not the JSON of a TokenSet, which has tokens, kind, count and peaks: {show(data)}.")
        return cls(**data)

    def __getitem__(self, site: str) -> tuple[tuple[int, ...], ...]:
        if not isinstance(site, str) or site not in self.tokens:
            raise SiteError(f"this TokenSet has no {show(site)}.{nearest(site, self.tokens)}")
        return self.tokens[site]  # ty: ignore[invalid-explicit-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        sizes = [size for some in self.sizes.values() for size in some]
        least, most = min(sizes), max(sizes)
        held = f"{most} token{'s' * (most != 1)}" if least == most else f"{least} to {most} tokens"
        return (
            f"TokenSet of {self.kind}: {len(self)} site{'s' * (len(self) != 1)}, {self.steps} "
            f"step{'s' * (self.steps != 1)}, {held}"
        )

    def _each(self) -> Iterator[Sequence[int]]:
        return (some for steps in self.tokens.values() for some in steps)


def _as_tokens(site: Any, some: Any) -> tuple[int, ...]:
    found = [to_int(token) for token in (some.tolist() if hasattr(some, "tolist") else some)]
    whole = sorted(token for token in found if token is not None and token >= 0)
    if len(whole) < len(found) or len(set(whole)) < len(whole):
        raise OpError(f"the tokens {show(some)} of {site} are not different whole numbers from 0 up.")
    return tuple(whole)


def _list(sites: Mapping[str, Any]) -> str:
    return ", ".join(list(sites)[:4]) + (" ..." if len(sites) > 4 else "")
