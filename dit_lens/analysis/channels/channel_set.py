"""Which channels, and which to compare them with: scores over channels, the sets they single out, and matched controls.

Knows no model: tensors in, sets and numbers out. Letters: d channel, k chosen channels.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.analysis.channels.controls import hits_of, matched_map, random_map
from dit_lens.analysis.channels.statistics import (
    energy_share,
    jaccard,
    median_of,
    ranked,
    ratio,
    vector,
)
from dit_lens.errors import OpError, SiteError, nearest

if TYPE_CHECKING:
    import pandas as pd

ARMS = ("top", "bottom", "random", "energy-matched", "given")

# An energy-matched control counts as matched while its energy stays within this factor of the set it stands for.
ENERGY_TOLERANCE = 0.8


@dataclass(frozen=True, eq=False, repr=False)
class ChannelSet(Mapping[str, tuple[int, ...]]):
    """Channels per site, with the scores that chose them and the controls they call for.

    >>> from dit_lens.channels import top_channels
    >>> scores = {
    ...     "blocks.0.img": torch.tensor([9.0, 1.0, 7.0, 2.0]),
    ...     "blocks.1.img": torch.tensor([8.0, 3.0, 1.0, 2.0]),
    ... }
    >>> massive = top_channels(scores, {site: s**2 for site, s in scores.items()}, k=1)
    >>> massive["blocks.1.img"], massive.bottom()["blocks.1.img"], massive.random(seed=0).arm
    ((0,), (2,), 'random')
    >>> massive
    ChannelSet: top 1 of 4 channels by |mean|, at 2 sites
      energy share: 0.6 to 0.82
      most frequent: 0 (2 of 2 sites)
      next: .table  .bottom()  .random(seed)  .energy_matched(seed)  .take(k)

    A mapping: site name -> channels in the order in which ``take`` takes them (highest score first; in the bottom arm
    lowest first; in a random arm, the images of the original's channels in its order). Equal when the channels are.

    channels: site -> channel indices, without repeats. ``()`` is legal and names nothing.
    scores, energy: site -> [d], finite: the score that ranks, and the mean square of each channel over tokens.
        Kept as float32 copies on the CPU.
    score: what the score is. arm: one of ``ARMS``; "given" is a choice of your own.
    matched: False when a control falls short of what it controls for; ``note`` then says by how much.
    Raises OpError for sites, shapes or channels that do not fit together.
    """

    channels: dict[str, tuple[int, ...]]
    scores: dict[str, Tensor]
    energy: dict[str, Tensor]
    score: str = "|mean|"
    arm: str = "top"
    matched: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise OpError(f"There is no arm {self.arm!r}.{nearest(self.arm, ARMS)}")
        for what, values in (("scores", self.scores), ("energy", self.energy)):
            if set(values) != set(self.channels):
                odd = ", ".join(sorted(set(values) ^ set(self.channels)))
                raise OpError(f"channels and {what} must name the same sites; these are in one only: {odd}.")
        scores = {site: vector(self.scores[site], f"The scores of {site}") for site in self.channels}
        energy = {site: vector(self.energy[site], f"The energy of {site}") for site in self.channels}
        channels = {site: tuple(int(c) for c in chosen) for site, chosen in self.channels.items()}
        for site, chosen in channels.items():
            width = len(scores[site])
            if len(energy[site]) != width:
                raise OpError(
                    f"{site} has {width} scores and {len(energy[site])} energies. Give one of each per channel."
                )
            if bool((energy[site] < 0).any()):
                raise OpError(f"The energy of {site} is negative somewhere. Give the mean square of each channel.")
            if len(set(chosen)) < len(chosen) or any(not 0 <= c < width for c in chosen):
                raise OpError(f"{site} has channels 0 to {width - 1}, each named once at most; got {list(chosen)}.")
        for name, value in (("channels", channels), ("scores", scores), ("energy", energy)):
            object.__setattr__(self, name, value)

    # The mapping. A SiteError is no KeyError, so the two methods of Mapping that catch KeyError are written out.

    def __getitem__(self, site: str) -> tuple[int, ...]:
        if site not in self.channels:
            raise SiteError(f"This ChannelSet has no site {site!r}.{nearest(str(site), self.channels, 'Its sites')}")
        return self.channels[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def __contains__(self, site: object) -> bool:
        return site in self.channels

    def get(self, site: object, default: Any = None, /) -> Any:
        """The channels of a site, or ``default`` when the set has no such site."""
        return self.channels[site] if isinstance(site, str) and site in self.channels else default

    @property
    def k(self) -> int | dict[str, int]:
        """How many channels are chosen: one number where all sites agree, else one per site."""
        return _one({site: len(chosen) for site, chosen in self.channels.items()})

    @property
    def width(self) -> int | dict[str, int]:
        """How many channels there are: one number where all sites agree, else one per site."""
        return _one({site: len(scores) for site, scores in self.scores.items()})

    # Smaller sets.

    def take(self, k: int) -> ChannelSet:
        """The first ``k`` channels of every site: a sweep over k without a new run.

        >>> from dit_lens.channels import top_channels
        >>> top_channels({"a": torch.tensor([1.0, 3.0, 2.0])}, {"a": torch.ones(3)}, k=3).take(2)["a"]
        (1, 2)

        Raises OpError when a site has fewer, or for an energy-matched set, whose parts match nothing.
        """
        if self.arm == "energy-matched":
            raise OpError(
                "Part of an energy-matched set matches no energy. Take first: top.take(k).energy_matched(seed)."
            )
        for site, chosen in self.channels.items():
            if not 1 <= k <= len(chosen):
                raise OpError(f"take({k}) was asked, and {site} has {len(chosen)} channels. Take 1 to {len(chosen)}.")
        return replace(self, channels={site: chosen[:k] for site, chosen in self.channels.items()})

    def restrict(self, sites: str | Iterable[str]) -> ChannelSet:
        """The same set at fewer sites, in the order given. Raises SiteError for a site that it does not have."""
        sites = [sites] if isinstance(sites, str) else list(sites)
        return replace(
            self,
            channels={site: self[site] for site in sites},
            scores={site: self.scores[site] for site in sites},
            energy={site: self.energy[site] for site in sites},
        )

    # Controls.

    def bottom(self) -> ChannelSet:
        """As many channels per site, with the lowest scores: the control of arXiv 2605.13974."""
        chosen = {site: ranked(self.scores[site], descending=False)[: len(top)] for site, top in self.channels.items()}
        shared = sum(len(set(chosen[site]) & set(top)) for site, top in self.channels.items())
        note = f"k is so near the width that {shared} channels are in both sets." if shared else ""
        return replace(self, channels=chosen, arm="bottom", matched=not shared, note=note)

    def random(self, seed: int) -> ChannelSet:
        """One random map of the channels, applied at every site.

        >>> from dit_lens.channels import top_channels
        >>> top = top_channels(
        ...     {"a": torch.arange(9.0), "b": torch.arange(9.0)}, {"a": torch.ones(9), "b": torch.ones(9)}, k=2
        ... )
        >>> control = top.random(seed=0)
        >>> control["a"] == control["b"], set(control["a"]) & set(top["a"])
        (True, set())

        Channels redrawn at every block would touch far more of the residual stream than a set that repeats from block
        to block. One injective map keeps every overlap between sites: what two sites share, their controls share.
        The map leads out of the union of the set over sites where the width allows. Where it does not, the map with
        the fewest hits (channels of a site's control that are in that site's set) is taken, ``matched`` is False, and
        ``note`` counts them. Sites of equal width share a map.

        seed: names the map; an interval over arms needs ten or more.
        """
        rng = np.random.default_rng(seed)
        return self._mapped("random", lambda family, width: random_map(list(family.values()), width, rng))

    def energy_matched(self, seed: int) -> ChannelSet:
        """One map of the channels for all sites, whose images hold as nearly as can be the energy of the set at each.

        >>> from dit_lens.channels import top_channels
        >>> energy = {"a": torch.tensor([8.0, 7.0, 2.0, 1.0, 1.0])}
        >>> control = top_channels(energy, energy, k=1).energy_matched(seed=0)
        >>> control["a"], control.matched
        ((1,), True)

        The map leads where that of :meth:`random` does, so the control touches as many distinct channels as the set.
        ``seed`` picks among maps whose relative error, averaged over sites, is within 1 % of the best found; where all
        the strongest channels are needed there is nothing to pick. ``matched`` is False where a site's energy is not
        within a factor of 0.8 of its set's, and ``note`` says how far off; ``table`` has the achieved shares.
        Raises OpError where fewer than k channels are outside a site's set.
        """
        for site, top in self.channels.items():
            width = len(self.scores[site])
            if 2 * len(top) > width:
                raise OpError(
                    f"{site} has {width - len(top)} channels outside its set of {len(top)}, too few for a control of "
                    f"the same size. Take k of at most {width // 2}: .take({width // 2})."
                )
        rng = np.random.default_rng(seed)

        def near(family: Mapping[str, tuple[int, ...]], _: int) -> dict[int, int]:
            energy = np.stack([self.energy[site].double().numpy() for site in family])
            return matched_map(list(family.values()), energy, rng)

        control = self._mapped("energy-matched", near)
        ratios = {
            site: _of_wanted(float(energy[list(control[site])].sum()), float(energy[list(self[site])].sum()))
            for site, energy in self.energy.items()
        }
        off = [site for site, found in ratios.items() if not ENERGY_TOLERANCE <= found <= 1 / ENERGY_TOLERANCE]
        if not off:
            return control
        worst = max(off, key=lambda site: abs(np.log(max(ratios[site], 1e-300))))
        note = f"energy unmatched at {len(off)} of {len(self)} sites; {worst} reaches {ratios[worst]:.3g} of its set's"
        return replace(control, matched=False, note="; ".join(filter(None, [note, control.note])))

    def _mapped(
        self, arm: str, mapping: Callable[[Mapping[str, tuple[int, ...]], int], Mapping[int, int]]
    ) -> ChannelSet:
        """The images of the set under one map for all sites of equal width; hits are noted."""
        chosen: dict[str, tuple[int, ...]] = {}
        notes = []
        for width in sorted({len(scores) for scores in self.scores.values()}):
            family = {site: top for site, top in self.channels.items() if len(self.scores[site]) == width}
            images = mapping(family, width)
            chosen |= {site: tuple(images[c] for c in top) for site, top in family.items()}
            if 2 * len(images) > width:
                notes.append(
                    f"the union over sites, {len(images)} of {width} channels, does not fit outside itself: "
                    f"{hits_of(list(family.values()), images)} of {sum(map(len, family.values()))} control channels "
                    "are in the set they control for"
                )
        ordered = {site: chosen[site] for site in self.channels}
        return replace(self, channels=ordered, arm=arm, matched=not notes, note="; ".join(notes))

    # What the set is like.

    def energy_share(self) -> dict[str, float]:
        """Site -> share of the squared energy that the chosen channels hold, in [0, 1]."""
        return {site: energy_share(self.energy[site], chosen) for site, chosen in self.channels.items()}

    def jaccard(self, other: Mapping[str, Iterable[int]]) -> dict[str, float]:
        """Site -> overlap with ``other``, for the sites both have. Raises OpError when they share none."""
        shared = [site for site in self.channels if site in other]
        if not shared:
            raise OpError(f"The two sets share no site. {_some('This one has', self)} {_some('The other has', other)}")
        return {site: jaccard(self[site], other[site]) for site in shared}

    def union(self) -> tuple[int, ...]:
        """Every channel that is chosen at some site, ascending. Raises OpError when the sites differ in width."""
        if len({len(scores) for scores in self.scores.values()}) > 1:
            raise OpError(
                "Channel numbers mean different things at sites of different width. Use .restrict(sites) first."
            )
        return tuple(sorted(set().union(*self.channels.values())))

    @property
    def table(self) -> pd.DataFrame:
        """One row per site and chosen channel.

        rank: place of its score among all channels of the site, 1 = highest. score/median: its score over the site's
        median score. energy share: its part of the site's squared energy.
        """
        import pandas as pd  # half a second that a run without a table need not pay

        rows = []
        for site, chosen in self.channels.items():
            scores, median = self.scores[site], median_of(self.scores[site])
            rank = {c: i for i, c in enumerate(ranked(scores, descending=True), start=1)}
            rows += [
                (
                    site,
                    rank[c],
                    c,
                    float(scores[c]),
                    ratio(float(scores[c]), median),
                    energy_share(self.energy[site], [c]),
                )
                for c in chosen
            ]
        return pd.DataFrame(rows, columns=["site", "rank", "channel", "score", "score/median", "energy share"])

    def __repr__(self) -> str:
        return "\n  ".join([self._heading(), *self._facts()])

    def _repr_html_(self) -> str:
        shares = self.energy_share()
        rows = "".join(
            f"<tr><td>{html.escape(site)}</td><td>{', '.join(map(str, chosen))}</td><td>{shares[site]:.3f}</td></tr>"
            for site, chosen in self.channels.items()
        )
        facts = "".join(f"<div>{html.escape(fact)}</div>" for fact in self._facts())
        head = "<tr><th>site</th><th>channels</th><th>energy share</th></tr>"
        return f"<b>{html.escape(self._heading())}</b>{facts}<table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def _heading(self) -> str:
        sites = f"{len(self)} site{'' if len(self) == 1 else 's'}"
        k, width = (f"{value}" if isinstance(value, int) else "differing" for value in (self.k, self.width))
        unmatched = "" if self.matched else ", NOT matched"
        return f"ChannelSet: {self.arm} {k} of {width} channels by {self.score}, at {sites}{unmatched}"

    def _facts(self) -> list[str]:
        if not self.channels:
            return []
        shares = self.energy_share().values()
        counts = Counter(c for chosen in self.channels.values() for c in chosen).most_common(8)
        frequent = ", ".join(
            f"{c} ({count} of {len(self)} sites)" if i == 0 else f"{c} ({count})" for i, (c, count) in enumerate(counts)
        )
        return [
            f"energy share: {min(shares):.2g} to {max(shares):.2g}",
            f"most frequent: {frequent or 'none'}",
            *([f"note: {self.note}"] if self.note else []),
            "next: .table  .bottom()  .random(seed)  .energy_matched(seed)  .take(k)",
        ]

    # JSON.

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``from_json`` turns back into this set, number for number."""
        return {
            "score": self.score,
            "arm": self.arm,
            "matched": self.matched,
            "note": self.note,
            "channels": {site: list(chosen) for site, chosen in self.channels.items()},
            "scores": {site: values.tolist() for site, values in self.scores.items()},
            "energy": {site: values.tolist() for site, values in self.energy.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelSet:
        """The set that ``to_json`` described. Raises OpError when fields are missing or unknown."""
        fields = set(cls.__dataclass_fields__)
        if set(data) != fields:
            odd = ", ".join(sorted(set(data) ^ fields))
            raise OpError(f"A ChannelSet is made of {', '.join(sorted(fields))}; missing or unknown here: {odd}.")
        tensors = {name: {site: torch.tensor(v) for site, v in data[name].items()} for name in ("scores", "energy")}
        fresh: dict[str, Any] = {**data, **tensors}
        return cls(**fresh)


def _one(values: dict[str, int]) -> int | dict[str, int]:
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else values


def _of_wanted(found: float, wanted: float) -> float:
    return 1.0 if found == wanted else found / wanted if wanted else float("inf")


def _some(words: str, sites: Iterable[str]) -> str:
    names = list(sites)
    return f"{words} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}."
