"""``ChannelSet``: the chosen channels of every site, the scores that chose them, and matched control sets.

Independent of any model: tensors in, sets and numbers out. Letters: d channel, k chosen channels.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.channels.controls import count_hits, matched_map, random_map
from dit_lens.analysis.channels.statistics import (
    count_from_start,
    energy_share,
    jaccard,
    median_of,
    rank_channels,
    ratio,
    to_vector,
)
from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.arguments.mappings import NamedMapping
from dit_lens.arguments.saving import saved_by
from dit_lens.errors import OpError, SiteError, check_choice, nearest, show

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

ARMS = ("top", "bottom", "random", "energy-matched", "given")

# An energy-matched control counts as matched if its energy is between 0.8 and 1 / 0.8 times the energy of the set.
ENERGY_TOLERANCE = 0.8


@checked_fields
@dataclass(frozen=True, eq=False, repr=False)
class ChannelSet(NamedMapping[tuple[int, ...]]):
    """Chosen channels per site, with the scores that chose them; makes its own control sets.

    >>> import torch
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

    A mapping from site names to channels. The order of the channels is the order in which ``take`` takes them: highest
    score first; lowest first in the bottom arm; in a random or energy-matched arm, the order of the channels that they
    replace. Two sets are equal if their channels are equal. ``a | b``, ``a & b`` and ``a - b`` are sets of the arm
    "given", site by site, in the order of ``a``.

    channels: site -> channel indices, each at most once; an empty tuple is allowed.
    scores: site -> [d], finite, the score by which channels are ranked. Kept as a float32 copy on the CPU.
    energy: site -> [d], finite, mean square of each channel over tokens. Kept as a float32 copy on the CPU.
    score: name of the score.
    arm: one of ``ARMS``; "given" means channels that were not chosen by a rule.
    matched: False if a control set misses what it should match.
    note: what is missed and by how much, if anything.
    Raises OpError if sites, shapes or channels do not fit together.
    """

    channels: dict[str, tuple[int, ...]]
    scores: dict[str, Tensor]
    energy: dict[str, Tensor]
    score: str = "|mean|"
    arm: str = "top"
    matched: bool = True
    note: str = ""

    save = saved_by("json.dumps(channels.to_json()) is its text, and ChannelSet.from_json(data) the way back.")

    def __post_init__(self) -> None:
        check_choice(self.arm, ARMS, "arm")
        for what, values in (("scores", self.scores), ("energy", self.energy)):
            if set(values) != set(self.channels):
                odd = ", ".join(sorted(set(values) ^ set(self.channels)))
                raise OpError(f"channels and {what} must name the same sites; these are only in one of them: {odd}.")
        scores = {site: to_vector(self.scores[site], f"The scores of {site}") for site in self.channels}
        energy = {site: to_vector(self.energy[site], f"The energy of {site}") for site in self.channels}
        channels = {site: tuple(int(c) for c in chosen) for site, chosen in self.channels.items()}
        for site, chosen in channels.items():
            width = len(scores[site])
            if len(energy[site]) != width:
                raise OpError(
                    f"{site} has {width} scores and {len(energy[site])} energies. Give one of each per channel."
                )
            if bool((energy[site] < 0).any()):
                raise OpError(f"The energy of {site} has negative values. Give the mean square of each channel.")
            if len(set(chosen)) < len(chosen) or any(not 0 <= c < width for c in chosen):
                raise OpError(f"{site} has channels 0 to {width - 1}, each allowed once; got {list(chosen)}.")
        for name, value in (("channels", channels), ("scores", scores), ("energy", energy)):
            object.__setattr__(self, name, value)

    def __getitem__(self, site: str) -> tuple[int, ...]:
        if not isinstance(site, str) or site not in self.channels:
            raise SiteError(f"This ChannelSet has no site {show(site)}.{nearest(site, self.channels, 'Its sites')}")
        return self.channels[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    @property
    def k(self) -> int | dict[str, int]:
        """Number of chosen channels: an int if it is the same at all sites, otherwise site -> int."""
        return _common_value({site: len(chosen) for site, chosen in self.channels.items()})

    @property
    def width(self) -> int | dict[str, int]:
        """Number of channels d: an int if it is the same at all sites, otherwise site -> int."""
        return _common_value({site: len(scores) for site, scores in self.scores.items()})

    # Sets of two: what either chose, what both did, and what only the first did.

    def __or__(self, other: object) -> ChannelSet:
        return self._combine(other, [*self, *_sites_of(other)], lambda one, two: dict.fromkeys([*one, *two]))

    def __and__(self, other: object) -> ChannelSet:
        shared = [site for site in self if site in _sites_of(other)]
        return self._combine(other, shared, lambda one, two: [c for c in one if c in two])

    def __sub__(self, other: object) -> ChannelSet:
        return self._combine(other, list(self), lambda one, two: [c for c in one if c not in two])

    def _combine(
        self, other: object, sites: Sequence[str], choose: Callable[[Sequence[int], Sequence[int]], Iterable[int]]
    ) -> ChannelSet:
        """A set of the channels that two sets make at some sites; scores are of the first that has a site.

        choose: (channels here, channels of the other) -> those of the new set, in order.
        """
        if not isinstance(other, ChannelSet):
            raise OpError(f"A ChannelSet goes together with a ChannelSet; it was given {show(other)}.")
        for site in self:
            if site in other and len(self.scores[site]) != len(other.scores[site]):
                raise OpError(
                    f"{site} has {len(self.scores[site])} channels in this set and {len(other.scores[site])} in the "
                    "other, so their numbers mean different channels. Use sets of one model."
                )
        return replace(
            self,
            channels={site: tuple(choose(self.channels.get(site, ()), other.channels.get(site, ()))) for site in sites},
            scores={site: (self if site in self else other).scores[site] for site in sites},
            energy={site: (self if site in self else other).energy[site] for site in sites},
            arm="given",
            matched=True,
            note="",
        )

    # Smaller sets.

    @checked
    def take(self, k: int) -> ChannelSet:
        """Returns the first ``k`` channels of every site: a sweep over k that needs no new run.

        >>> import torch
        >>> from dit_lens.channels import top_channels
        >>> top_channels({"a": torch.tensor([1.0, 3.0, 2.0])}, {"a": torch.ones(3)}, k=3).take(2)["a"]
        (1, 2)

        Raises OpError if a site has fewer channels, and for an energy-matched set, a part of which is not matched.
        """
        if self.arm == "energy-matched":
            raise OpError(
                "Part of an energy-matched set is not energy-matched. Take first: top.take(k).energy_matched(seed)."
            )
        for site, chosen in self.channels.items():
            if not 1 <= k <= len(chosen):
                raise OpError(
                    f"take({k}) was asked for, but {site} has {len(chosen)} channels. Take 1 to {len(chosen)}."
                )
        return replace(self, channels={site: chosen[:k] for site, chosen in self.channels.items()})

    @checked
    def restrict(self, sites: str | Iterable[str]) -> ChannelSet:
        """Returns the set at some of its sites, in the given order. Raises SiteError for a site it does not have."""
        sites = [sites] if isinstance(sites, str) else list(sites)
        return replace(
            self,
            channels={site: self[site] for site in sites},
            scores={site: self.scores[site] for site in sites},
            energy={site: self.energy[site] for site in sites},
        )

    # Control sets.

    def bottom(self) -> ChannelSet:
        """Returns the same number of channels per site with the lowest scores: the control of arXiv 2605.13974."""
        chosen = {
            site: rank_channels(self.scores[site], descending=False)[: len(top)] for site, top in self.channels.items()
        }
        shared = sum(len(set(chosen[site]) & set(top)) for site, top in self.channels.items())
        note = f"k is so close to the width that {shared} channels are in both sets." if shared else ""
        return replace(self, channels=chosen, arm="bottom", matched=not shared, note=note)

    @checked
    def random(self, seed: int) -> ChannelSet:
        """Replaces every channel by a random other one, the same at every site.

        >>> import torch
        >>> from dit_lens.channels import top_channels
        >>> top = top_channels(
        ...     {"a": torch.arange(9.0), "b": torch.arange(9.0)}, {"a": torch.ones(9), "b": torch.ones(9)}, k=2
        ... )
        >>> control = top.random(seed=0)
        >>> control["a"] == control["b"], set(control["a"]) & set(top["a"])
        (True, set())

        Random channels drawn independently for every block would touch far more distinct channels of the residual
        stream than a set that repeats from block to block. One injective map for all sites of equal width keeps the
        overlaps: two control sets share as many channels as the two original sets.
        No channel is mapped to one that the set has at any site. If the width is too small for that, the map with
        the fewest hits is taken (a hit: a channel of a site's control that is in that site's set), ``matched`` is
        False, and ``note`` counts the hits.

        seed: seed of the map. An interval over random arms needs ten or more seeds.
        """
        rng = np.random.default_rng(seed)
        return self._map_channels("random", lambda sets, width: random_map(list(sets.values()), width, rng))

    @checked
    def energy_matched(self, seed: int) -> ChannelSet:
        """Replaces every channel by another, the same at every site, so that each site's energy is kept closely.

        >>> import torch
        >>> from dit_lens.channels import top_channels
        >>> energy = {"a": torch.tensor([8.0, 7.0, 2.0, 1.0, 1.0])}
        >>> control = top_channels(energy, energy, k=1).energy_matched(seed=0)
        >>> control["a"], control.matched
        ((1,), True)

        The map avoids the channels that :meth:`random` avoids, so the control has as many distinct channels as the set.
        ``matched`` is False if the energy at a site is not within a factor of 0.8 of its set's energy; ``note`` then
        gives the ratio, and ``table`` has the achieved shares. Raises OpError if a site has fewer than k channels
        outside its set.

        seed: chooses among the maps whose relative error, averaged over sites, is within 1 % of the best map found. If
          all of the strongest channels are needed, every seed gives the same map.
        """
        for site, top in self.channels.items():
            width = len(self.scores[site])
            if 2 * len(top) > width:
                raise OpError(
                    f"{site} has {width - len(top)} channels outside its set of {len(top)}, too few for a control of "
                    f"the same size. Take k of at most {width // 2}: .take({width // 2})."
                )
        rng = np.random.default_rng(seed)

        def find_map(sets: Mapping[str, tuple[int, ...]], _: int) -> dict[int, int]:
            energy = np.stack([self.energy[site].double().numpy() for site in sets])
            return matched_map(list(sets.values()), energy, rng)

        control = self._map_channels("energy-matched", find_map)
        ratios = {
            site: _energy_ratio(float(energy[list(control[site])].sum()), float(energy[list(self[site])].sum()))
            for site, energy in self.energy.items()
        }
        off = [site for site, found in ratios.items() if not ENERGY_TOLERANCE <= found <= 1 / ENERGY_TOLERANCE]
        if not off:
            return control
        worst = max(off, key=lambda site: abs(np.log(max(ratios[site], 1e-300))))
        note = f"energy unmatched at {len(off)} of {len(self)} sites; {worst} reaches {ratios[worst]:.3g} of its set's"
        return replace(control, matched=False, note="; ".join(filter(None, [note, control.note])))

    def _map_channels(
        self, arm: str, find_map: Callable[[Mapping[str, tuple[int, ...]], int], Mapping[int, int]]
    ) -> ChannelSet:
        """Applies one map (channel -> control channel) to all sites of equal width, and notes hits.

        arm: name of the new set's arm.
        find_map: makes the map from the sets of the sites (site -> channels) and their width.
        """
        chosen: dict[str, tuple[int, ...]] = {}
        notes = []
        for width in sorted({len(scores) for scores in self.scores.values()}):
            sets = {site: top for site, top in self.channels.items() if len(self.scores[site]) == width}
            images = find_map(sets, width)
            chosen |= {site: tuple(images[c] for c in top) for site, top in sets.items()}
            if 2 * len(images) > width:
                notes.append(
                    f"the union over sites, {len(images)} of {width} channels, does not fit outside itself: "
                    f"{count_hits(list(sets.values()), images)} of {sum(map(len, sets.values()))} control channels "
                    "are in the set they control for"
                )
        ordered = {site: chosen[site] for site in self.channels}
        return replace(self, channels=ordered, arm=arm, matched=not notes, note="; ".join(notes))

    # Properties of the set.

    def energy_share(self) -> dict[str, float]:
        """Returns site -> share of the energy that the chosen channels hold, in [0, 1]."""
        return {site: energy_share(self.energy[site], chosen) for site, chosen in self.channels.items()}

    @checked
    def jaccard(self, other: Mapping[str, Iterable[int]]) -> dict[str, float]:
        """Returns site -> Jaccard overlap with ``other``, for the sites that both have.

        other: site -> channels; negative ones count from the end, as in ops.
        Raises OpError if they share no site, and for a channel that a site does not have.
        """
        shared = [site for site in self.channels if site in other]
        if not shared:
            raise OpError(
                f"The two sets share no site. This one has {_list_sites(self)}. The other has {_list_sites(other)}."
            )
        widths = {site: len(self.scores[site]) for site in shared}
        if isinstance(other, ChannelSet) and (
            odd := [site for site in shared if len(other.scores[site]) != widths[site]]
        ):
            raise OpError(
                f"{odd[0]} has {widths[odd[0]]} channels in this set and {len(other.scores[odd[0]])} in the other, so "
                "their numbers mean different channels. Compare sets of one model."
            )
        return {site: jaccard(self[site], count_from_start(set(other[site]), widths[site], site)) for site in shared}

    def union(self) -> tuple[int, ...]:
        """Returns every channel that is chosen at any site, ascending. Raises OpError if the sites differ in width."""
        if len({len(scores) for scores in self.scores.values()}) > 1:
            raise OpError(
                "Channel numbers mean different things at sites of different width. Use .restrict(sites) first."
            )
        return tuple(sorted(set().union(*self.channels.values())))

    @property
    def table(self) -> pd.DataFrame:
        """One row per site and chosen channel.

        - rank: rank of its score among all channels of the site, 1 = highest.
        - score/median: its score divided by the site's median score.
        - energy share: its share of the energy of the site.
        """
        import pandas as pd  # takes half a second, which a run without a table does not need

        rows = []
        for site, chosen in self.channels.items():
            scores, median = self.scores[site], median_of(self.scores[site])
            rank = {c: i for i, c in enumerate(rank_channels(scores, descending=True), start=1)}
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
        return "\n  ".join([self._heading(), *self._summary_lines()])

    def _repr_html_(self) -> str:
        shares = self.energy_share()
        rows = "".join(
            f"<tr><td>{html.escape(site)}</td><td>{', '.join(map(str, chosen))}</td><td>{shares[site]:.3f}</td></tr>"
            for site, chosen in self.channels.items()
        )
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self._summary_lines())
        head = "<tr><th>site</th><th>channels</th><th>energy share</th></tr>"
        return f"<b>{html.escape(self._heading())}</b>{lines}<table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def _heading(self) -> str:
        sites = f"{len(self)} site{'' if len(self) == 1 else 's'}"
        k, width = (f"{value}" if isinstance(value, int) else "differing" for value in (self.k, self.width))
        unmatched = "" if self.matched else ", NOT matched"
        return f"ChannelSet: {self.arm} {k} of {width} channels by {self.score}, at {sites}{unmatched}"

    def _summary_lines(self) -> list[str]:
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
        """Returns data for ``json.dumps``, from which ``from_json`` makes an exactly equal set."""
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
    @checked
    def from_json(cls, data: Mapping[str, Any]) -> ChannelSet:
        """Makes the set that ``to_json`` wrote. Raises OpError if fields are missing or unknown."""
        fields = set(cls.__dataclass_fields__)
        if set(data) != fields:
            odd = ", ".join(sorted(map(str, set(data) ^ fields)))
            raise OpError(f"A ChannelSet is made of {', '.join(sorted(fields))}; missing or unknown here: {odd}.")
        return cls(**data)


def _sites_of(other: object) -> tuple[str, ...]:
    return tuple(other) if isinstance(other, ChannelSet) else ()


def _common_value(values: dict[str, int]) -> int | dict[str, int]:
    """Returns the value that all sites share, or the whole mapping if they differ."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else values


def _energy_ratio(found: float, wanted: float) -> float:
    return 1.0 if found == wanted else found / wanted if wanted else float("inf")


def _list_sites(sites: Iterable[str]) -> str:
    names = list(sites)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
