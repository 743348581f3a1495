"""Which channels, and which to compare them with: scores over channels, the sets they single out, and matched controls.

Knows no model: tensors in, sets and numbers out. Letters: d channel, k chosen channels.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.channel_maps import hits_of, matched_map, random_map
from dit_lens.channel_stats import (
    RunningStats,
    energy_share,
    gini,
    jaccard,
    mad_outliers,
    median_of,
    ranked,
    ratio,
    share_holders,
    top_median_ratio,
    vector,
)
from dit_lens.errors import OpError, SiteError, nearest

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ARMS",
    "MEDIAN",
    "SCORES",
    "ChannelSet",
    "RunningStats",
    "absolute_channels",
    "definitions",
    "energy_share",
    "gini",
    "jaccard",
    "mad_channels",
    "mad_outliers",
    "rule_of",
    "share_channels",
    "top_channels",
    "top_median_ratio",
]

ARMS = ("top", "bottom", "random", "energy-matched", "given")

# An energy-matched control counts as matched while its energy stays within this factor of the set it stands for.
ENERGY_TOLERANCE = 0.8


@dataclass(frozen=True, eq=False, repr=False)
class ChannelSet(Mapping[str, tuple[int, ...]]):
    """Channels per site, with the scores that chose them and the controls they call for.

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


# The rules that choose channels.

TOP = 12


def rule_of(
    widths: Mapping[str, int], k: int | None = None, share: float | None = None, mad: float | None = None
) -> Callable[..., ChannelSet]:
    """The one rule that is meant, to be called with scores and energy; the top 12 where none is given.

    >>> values = {"a": torch.tensor([3.0, 1.0, 1.0, 2.0])}
    >>> rule_of({"a": 4}, share=0.8)(values, {"a": values["a"] ** 2})["a"]
    (0, 3)

    widths: site -> channels. Raises OpError where two rules are given, or k does not fit a site.
    """
    given = {name: value for name, value in (("k", k), ("share", share), ("mad", mad)) if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value}" for name, value in given.items())
        raise OpError(f"{listed} are two rules for which channels are massive. Give one of them.")
    if share is not None:
        _check_share(share)
        return partial(share_channels, share=share)
    if mad is not None:
        if not mad > 0:
            raise OpError(f"mad={mad!r} must be above 0: so many median absolute deviations above the median.")
        return partial(mad_channels, threshold=mad)
    k = TOP if k is None else k
    for site, width in widths.items():
        _check_k(k, site, width)
    return partial(top_channels, k=k)


def top_channels(
    scores: Mapping[str, Tensor], energy: Mapping[str, Tensor], k: int, score: str = "|mean|"
) -> ChannelSet:
    """The k channels with the highest scores at every site; equal scores go to the lower channel.

    >>> top_channels(
    ...     {"blocks.3.img": torch.tensor([1.0, 9.0, 5.0])}, {"blocks.3.img": torch.tensor([1.0, 81.0, 25.0])}, k=2
    ... )["blocks.3.img"]
    (1, 2)

    scores, energy: site -> [d]; see ChannelSet. k: 1 to d. score: the name of the score.
    Raises OpError when k does not fit a site, before anything is chosen.
    Source: T_k(l) of arXiv 2605.13974, with score |mean over image tokens|.
    """
    for site, values in scores.items():
        _check_k(k, site, len(vector(values, f"The scores of {site}")))
    chosen = {site: ranked(values, descending=True)[:k] for site, values in scores.items()}
    return ChannelSet(chosen, dict(scores), dict(energy), score=score)


def share_channels(
    scores: Mapping[str, Tensor], energy: Mapping[str, Tensor], share: float = 0.5, score: str = "|mean|"
) -> ChannelSet:
    """As few of the highest scores as hold a share of the squared energy, at every site.

    >>> values = {"a": torch.tensor([3.0, 1.0, 1.0, 2.0])}
    >>> share_channels(values, {"a": values["a"] ** 2}, share=0.8)["a"]
    (0, 3)

    scores, energy: site -> [d]; see ChannelSet. share: in (0, 1]. A site without energy gives (). k may differ.
    Source: SPARK's concentration measure, turned round.
    """
    _check_share(share)
    chosen = {site: share_holders(scores[site], _energy_of(energy, site), share) for site in scores}
    note = f"as few as hold {100 * share:g} % of the energy"
    return ChannelSet(chosen, dict(scores), dict(energy), score=score, note=note)


def mad_channels(
    scores: Mapping[str, Tensor], energy: Mapping[str, Tensor], threshold: float = 1000.0, score: str = "|mean|"
) -> ChannelSet:
    """The channels whose score is an outlier: over ``threshold`` median absolute deviations above the median.

    >>> values = {"a": torch.tensor([1.0, 2.0, 3.0, 9000.0])}
    >>> mad_channels(values, values)["a"]
    (3,)

    scores, energy: site -> [d]; see ChannelSet. A site may have none. See :func:`mad_outliers`.
    """
    chosen = {site: mad_outliers(values, threshold) for site, values in scores.items()}
    note = f"scores over {threshold:g} median absolute deviations above the median"
    return ChannelSet(chosen, dict(scores), dict(energy), score=score, note=note)


def absolute_channels(
    peaks: Mapping[str, Tensor],
    medians: Mapping[str, Tensor],
    energy: Mapping[str, Tensor],
    least: float = 100.0,
    times: float = 1000.0,
) -> ChannelSet:
    """The channels that reach ``least`` and ``times`` the median magnitude somewhere, at every site.

    >>> peaks, medians = {"a": torch.tensor([2.0, 700.0, 90.0])}, {"a": torch.tensor([0.1, 0.5, 0.1])}
    >>> absolute_channels(peaks, medians, peaks)["a"]
    (1,)

    peaks, medians: site -> [d], the largest |x| ("max") and the median |x| ("p50") of each channel over tokens. The
    median over channels of ``medians`` stands for the median |x| of the site. energy: site -> [d], the mean square.
    A site may have none: the thresholds were set for language models, and DiTs seldom pass |x| = 150.
    Source: Sun et al., arXiv 2402.17762.
    """
    chosen = {
        site: tuple(
            c
            for c in ranked(values, descending=True)
            if values[c] > least and values[c] >= times * median_of(vector(medians[site], f"The medians of {site}"))
        )
        for site, values in peaks.items()
    }
    return ChannelSet(chosen, dict(peaks), dict(energy), score="max")


# What definitions() compares: reductions over tokens, the first the score of arXiv 2605.13974.
SCORES = ("|mean|", "mean|x|", "rms", "max", "p99.9")
MEDIAN = "p50"


def definitions(
    scores: Mapping[str, Tensor], k: int = 12, share: float = 0.5, threshold: float = 1000.0
) -> pd.DataFrame:
    """Every definition of massive channels beside each other, for one site.

    >>> mean, rms = torch.tensor([9.0, 0.1, 0.2, 0.1]), torch.tensor([9.0, 0.5, 4.0, 0.2])
    >>> table = definitions({"|mean|": mean, "rms": rms}, k=2)
    >>> table[["score", "rule", "k", "jaccard"]].to_dict("split")["data"][:2]
    [['|mean|', 'top 2', 2, 1.0], ['|mean|', '50 % of energy', 1, 0.5]]

    scores: name -> [d], with "rms" among them: those of ``SCORES`` that were read, and ``MEDIAN`` for the absolute
    rule. k, share, threshold: of the rules.

    A row per score and rule: k and k/d, the share of squared energy that the set holds, the Gini coefficient of the
    score and its top over its median, and the Jaccard overlap with the top k of the first score.
    """
    import pandas as pd

    if "rms" not in scores:
        raise OpError(
            f"The energy of channels is the square of 'rms', which is not among {', '.join(scores)}. Read it."
        )
    energy = {"": vector(scores["rms"], "The rms").square()}
    names = [name for name in scores if name != MEDIAN]
    first = top_channels({"": scores[names[0]]}, energy, k)[""]
    rows = []
    for name in names:
        values = {"": vector(scores[name], f"The scores {name}")}
        rules = {
            f"top {k}": top_channels(values, energy, k),
            f"{share:.0%} of energy".replace("%", " %"): share_channels(values, energy, share),
            f"over {threshold:g} MAD": mad_channels(values, energy, threshold),
        }
        if name == "max" and MEDIAN in scores:
            rules["|x| > 100 and 1,000 medians"] = absolute_channels(values, {"": scores[MEDIAN]}, energy)
        rows += [_definition(name, rule, found[""], values[""], energy[""], first) for rule, found in rules.items()]
    return pd.DataFrame(rows)


def _definition(
    name: str, rule: str, chosen: tuple[int, ...], values: Tensor, energy: Tensor, first: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "score": name,
        "rule": rule,
        "k": len(chosen),
        "k/d": len(chosen) / len(values),
        "energy share": energy_share(energy, chosen),
        "gini": gini(values),
        "top/median": top_median_ratio(values),
        "jaccard": jaccard(chosen, first),
    }


def _check_k(k: Any, site: str, width: int) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= width:
        raise OpError(
            f"k={k!r} channels were asked for, but {site} has {width}. Choose a whole number from 1 to {width}."
        )


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise OpError(f"share={share!r} must be in (0, 1]: the part of the energy that the channels are to hold.")


def _energy_of(energy: Mapping[str, Tensor], site: str) -> Tensor:
    if site not in energy:
        raise OpError(f"scores and energy must name the same sites; {site} has no energy.")
    return energy[site]


def _one(values: dict[str, int]) -> int | dict[str, int]:
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else values


def _of_wanted(found: float, wanted: float) -> float:
    return 1.0 if found == wanted else found / wanted if wanted else float("inf")


def _some(words: str, sites: Iterable[str]) -> str:
    names = list(sites)
    return f"{words} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}."
