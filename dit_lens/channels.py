"""Which channels, and which to compare them with: scores over channels, the sets they single out, and matched controls.

Knows no model: tensors in, sets and numbers out. Letters: d channel, k chosen channels.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dit_lens.errors import OpError, SiteError, nearest

if TYPE_CHECKING:
    import pandas as pd

ARMS = ("top", "bottom", "random", "energy-matched", "given")

# An energy-matched control counts as matched while its energy stays within this factor of the set it stands for.
ENERGY_TOLERANCE = 0.8

# Draws that the search for an energy match compares; those within 1 % of the wanted energy count as equally good.
_DRAWS, _NEAR = 16, 0.01


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
        scores = {site: _vector(self.scores[site], f"The scores of {site}") for site in self.channels}
        energy = {site: _vector(self.energy[site], f"The energy of {site}") for site in self.channels}
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
        chosen = {site: _order(self.scores[site], descending=False)[: len(top)] for site, top in self.channels.items()}
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
        chosen: dict[str, tuple[int, ...]] = {}
        notes = []
        for width in sorted({len(scores) for scores in self.scores.values()}):
            family = {site: top for site, top in self.channels.items() if len(self.scores[site]) == width}
            union = sorted(set().union(*family.values()))
            images = _random_map(union, list(family.values()), width, rng)
            chosen |= {site: tuple(images[c] for c in top) for site, top in family.items()}
            if 2 * len(union) > width:
                hits = sum(len(set(chosen[site]) & set(top)) for site, top in family.items())
                total = sum(map(len, family.values()))
                notes.append(
                    f"the union over sites, {len(union)} of {width} channels, does not fit outside itself: "
                    f"{hits} of {total} control channels are in the set they control for"
                )
        ordered = {site: chosen[site] for site in self.channels}
        return replace(self, channels=ordered, arm="random", matched=not notes, note="; ".join(notes))

    def energy_matched(self, seed: int) -> ChannelSet:
        """As many channels per site, from outside that site's set, whose energies sum as nearly as can be to the set's.

        >>> energy = {"a": torch.tensor([8.0, 7.0, 2.0, 1.0, 1.0])}
        >>> control = top_channels(energy, energy, k=1).energy_matched(seed=0)
        >>> control["a"], control.matched
        ((1,), True)

        Channels are ordered by score. ``seed`` picks among draws whose energy is within 1 % of the best; where all the
        strongest channels outside are needed there is nothing to draw. ``matched`` is False where a site's energy is
        not within a factor of 0.8 of its set's, and ``note`` says how far off; ``table`` has the achieved shares.
        Sites are drawn one by one, so the control usually touches more distinct channels than the set: ``note`` says.
        Raises OpError where fewer than k channels are outside.
        """
        rng = np.random.default_rng(seed)
        chosen, ratios = {}, {}
        for site, top in self.channels.items():
            scores, energy = self.scores[site], self.energy[site].double().numpy()
            outside = np.setdiff1d(np.arange(len(scores)), top)
            if len(outside) < len(top):
                raise OpError(
                    f"{site} has {len(outside)} channels outside its set of {len(top)}, too few for a control of the "
                    f"same size. Take k of at most {len(scores) // 2}: .take({len(scores) // 2})."
                )
            wanted = float(energy[list(top)].sum())
            drawn = set(outside[_match_sum(energy[outside], wanted, len(top), rng)].tolist())
            found = float(energy[list(drawn)].sum())
            ratios[site] = 1.0 if found == wanted else found / wanted if wanted else float("inf")
            chosen[site] = tuple(c for c in _order(scores, descending=True) if c in drawn)
        off = [site for site, ratio in ratios.items() if not ENERGY_TOLERANCE <= ratio <= 1 / ENERGY_TOLERANCE]
        notes = [f"distinct channels touched: {_distinct(chosen)}, by the set itself: {_distinct(self.channels)}"]
        if off:
            worst = min(off, key=lambda site: ratios[site])
            reach = f"{worst} reaches {ratios[worst]:.3g} of its set's"
            notes.insert(0, f"energy unmatched at {len(off)} of {len(self)} sites; {reach}")
        return replace(self, channels=chosen, arm="energy-matched", matched=not off, note="; ".join(notes))

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
            scores, median = self.scores[site], _median(self.scores[site])
            rank = {c: i for i, c in enumerate(_order(scores, descending=True), start=1)}
            rows += [
                (
                    site,
                    rank[c],
                    c,
                    float(scores[c]),
                    _ratio(float(scores[c]), median),
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
        width = len(_vector(values, f"The scores of {site}"))
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= width:
            raise OpError(
                f"k={k!r} channels were asked of {site}, which has {width}. Choose a whole number from 1 to {width}."
            )
    chosen = {site: _order(values, descending=True)[:k] for site, values in scores.items()}
    return ChannelSet(chosen, dict(scores), dict(energy), score=score)


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Shared channels over all channels of two sets; 1 for two empty sets.

    >>> jaccard([1, 2, 3], [2, 3, 4])
    0.5
    """
    first, second = set(a), set(b)
    return len(first & second) / len(first | second) if first | second else 1.0


def energy_share(energy: Tensor, channels: Iterable[int]) -> float:
    """The share of squared energy that some channels hold; 0 where there is no energy.

    >>> energy_share(torch.tensor([6.0, 1.0, 1.0]), [0])
    0.75

    energy: [d], mean square per channel, not negative. channels: indices, each once.
    Source: SPARK's concentration measure (8 channels hold 68.8 % of the hidden-stream energy of its model).
    """
    values = _vector(energy, "The energy").double()
    chosen = list(channels)
    if any(not 0 <= c < len(values) for c in chosen):
        raise OpError(f"The energy has channels 0 to {len(values) - 1}; got {chosen}.")
    total = float(values.sum())
    return float(values[chosen].sum()) / total if total else 0.0


def top_median_ratio(scores: Tensor) -> float:
    """The highest score over the median score.

    >>> top_median_ratio(torch.tensor([1.0, 2.0, 50.0]))
    25.0

    scores: [d], not negative. Infinite when the median is 0, and NaN when every score is.
    Source: Sun et al., arXiv 2402.17762, call about 1,000 massive (with |x| > 100) in language models.
    """
    values = _vector(scores, "The scores")
    return _ratio(float(values.max()), _median(values))


def gini(values: Tensor) -> float:
    """How unequally values are spread over channels: 0 when all are equal, (d - 1) / d when one holds everything.

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    0.75

    values: [d], not negative. All zero counts as equal. Raises OpError for negative values.
    Source: Gini's mean difference over twice the mean, in its sorted form.
    """
    ordered = _vector(values, "The values").double().sort().values
    if float(ordered[0]) < 0:
        raise OpError("The Gini coefficient is defined for values >= 0. Take magnitudes or energies first.")
    total, d = float(ordered.sum()), len(ordered)
    index = torch.arange(1, d + 1, dtype=torch.float64)
    return float((2 * index - d - 1) @ ordered) / (d * total) if total else 0.0


def mad_outliers(scores: Tensor, threshold: float = 1000.0) -> tuple[int, ...]:
    """Channels whose score lies more than ``threshold`` median absolute deviations above the median, highest first.

    >>> mad_outliers(torch.tensor([1.0, 2.0, 3.0, 9000.0]))
    (3,)

    scores: [d]. The deviation is the plain median of |score - median|, without the factor 1.4826 of normal data.
    Where it is 0 every score above the median is an outlier.
    """
    values = _vector(scores, "The scores").double()
    median = _median(values)
    above = values - median
    return tuple(c for c in _order(values, descending=True) if above[c] > threshold * _median(above.abs()))


class RunningStats:
    """Mean, mean square, least and greatest of every channel over any number of batches, in constant memory.

    >>> stats = RunningStats()
    >>> stats.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> stats.update(torch.tensor([[5.0, 6.0]]))
    >>> stats.count, stats.mean.tolist(), stats.max.tolist()
    (3, [3.0, 2.0], [5.0, 6.0])

    Every statistic is [d] in float64 on the CPU. Source: the parallel update of Chan, Golub & LeVeque (1979), which
    keeps the variance of channels with a mean far from 0, where E[x^2] - E[x]^2 would cancel.
    """

    # Rows that become float64 at a time, in elements: bounds the scratch memory at 8 MB a copy.
    _CHUNK = 2**20

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._square_deviations = self._min = self._max = torch.empty(0, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Adds a batch [*, d] of any floating dtype on any device. Raises OpError when d is not that of the others."""
        if x.ndim == 0 or not x.is_floating_point():
            raise OpError(f"Running statistics take floating-point values [*, d], and got {x.dtype} {list(x.shape)}.")
        rows = x.detach().reshape(-1, x.shape[-1])
        for part in rows.split(max(1, self._CHUNK // max(1, x.shape[-1]))):
            if len(part):
                # Apple's GPUs have no float64.
                self.merge(self._of((part.cpu() if part.device.type == "mps" else part).double()))

    def merge(self, other: RunningStats) -> None:
        """Adds everything that ``other`` has seen. Raises OpError when the two count different channels."""
        if other.count == 0:
            return
        if self.count and len(self._mean) != len(other._mean):
            raise OpError(
                f"These statistics are over {len(self._mean)} channels and the new values have {len(other._mean)}. "
                "Keep one RunningStats per site."
            )
        if self.count == 0:
            self._mean, self._square_deviations = other._mean, other._square_deviations
            self._min, self._max = other._min, other._max
        else:
            total = self.count + other.count
            delta = other._mean - self._mean
            self._mean = self._mean + delta * (other.count / total)
            between = delta.square() * (self.count * other.count / total)
            self._square_deviations = self._square_deviations + other._square_deviations + between
            self._min, self._max = torch.minimum(self._min, other._min), torch.maximum(self._max, other._max)
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        """[d], over all values seen."""
        return self._seen(self._mean)

    @property
    def variance(self) -> Tensor:
        """[d], of all values seen: squared deviations over their count."""
        return self._seen(self._square_deviations) / self.count

    @property
    def mean_square(self) -> Tensor:
        """[d]: the energy that ChannelSet takes."""
        return self.mean.square() + self.variance

    @property
    def min(self) -> Tensor:
        """[d], the least value seen."""
        return self._seen(self._min)

    @property
    def max(self) -> Tensor:
        """[d], the greatest value seen."""
        return self._seen(self._max)

    def __repr__(self) -> str:
        return f"RunningStats: {self.count} values of each of {len(self._mean)} channels"

    def _seen(self, values: Tensor) -> Tensor:
        if self.count == 0:
            raise OpError("These statistics have seen no values. Call update(x) first.")
        return values

    @staticmethod
    def _of(rows: Tensor) -> RunningStats:
        stats = RunningStats()
        stats.count = len(rows)
        mean = rows.mean(0)
        stats._mean, stats._square_deviations = mean.cpu(), (rows - mean).square().sum(0).cpu()
        stats._min, stats._max = rows.amin(0).cpu(), rows.amax(0).cpu()
        return stats


def _vector(values: Tensor, what: str) -> Tensor:
    """A float32 copy on the CPU of one finite number per channel."""
    vector = torch.as_tensor(values).detach().to("cpu", torch.float32, copy=True)
    if vector.ndim != 1 or not len(vector):
        raise OpError(f"{what} must be one number per channel, [d], and have shape {list(vector.shape)}.")
    if not bool(vector.isfinite().all()):
        bad = (~vector.isfinite()).nonzero()[:8, 0].tolist()
        raise OpError(
            f"{what} are not finite, first in channels {bad}. The run overflowed: repeat it in float32 or bfloat16."
        )
    return vector


def _order(scores: Tensor, *, descending: bool) -> tuple[int, ...]:
    # Stable, so that equal scores go to the lower channel on every machine; torch.topk promises no order.
    return tuple(_vector(scores, "The scores").sort(descending=descending, stable=True).indices.tolist())


def _median(values: Tensor) -> float:
    # torch.median takes the lower of two middle values, numpy their mean.
    return float(np.median(values.double().numpy()))


def _ratio(value: float, median: float) -> float:
    return value / median if median else float("inf") if value else float("nan")


def _one(values: dict[str, int]) -> int | dict[str, int]:
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else values


def _distinct(channels: Mapping[str, Iterable[int]]) -> int:
    return len(set().union(*channels.values()))


def _some(words: str, sites: Iterable[str]) -> str:
    names = list(sites)
    return f"{words} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}."


def _random_map(
    union: list[int], family: list[tuple[int, ...]], width: int, rng: np.random.Generator
) -> dict[int, int]:
    """A random injective map of ``union`` into channels 0 to width - 1, out of the union where that is possible."""
    outside = np.setdiff1d(np.arange(width), union)
    if len(union) <= len(outside):
        return dict(zip(union, rng.permutation(outside)[: len(union)].tolist(), strict=True))
    # A map's hits are a sum over pairs (channel, image) of how many sites hold both: an assignment problem, solved
    # exactly. Between maps with equally few hits those that leave the union win, and then chance does.
    member = np.zeros((len(family), width))
    for row, chosen in zip(member, family, strict=True):
        row[list(chosen)] = 1
    hits = member[:, union].T @ member  # [union, d]
    inside = member.any(0).astype(float)
    chance = rng.random(hits.shape) / (2 * len(union))
    images = linear_sum_assignment(hits * (len(union) + 1) + inside + chance)[1]
    return dict(zip(union, images.tolist(), strict=True))


def _match_sum(energy: np.ndarray, wanted: float, k: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of k of ``energy`` [m] whose sum is near ``wanted``: a random one of the best draws."""
    order = np.argsort(energy, kind="stable")
    if wanted >= energy[order[len(order) - k :]].sum():
        return order[len(order) - k :]
    draws = np.arange(_DRAWS)
    taken = np.zeros((_DRAWS, len(energy)), dtype=bool)
    picks = np.zeros((_DRAWS, k), dtype=np.int64)
    total = np.zeros(_DRAWS)
    # Every draw splits the wanted energy its own way over the k channels, from nearly all in one (a single dominant
    # channel may be what is needed) to nearly even. It takes for each part the free channel nearest to it, carrying
    # what is missing over to the next. Then each in turn is exchanged for the channel that closes the gap best.
    evenness = np.logspace(-2, 1, _DRAWS)[:, None]
    parts = rng.gamma(evenness, size=(_DRAWS, k)) + 1e-9  # so that no rest of them sums to 0
    remaining = np.cumsum(parts[:, ::-1], axis=1)[:, ::-1]  # what this and later parts add up to
    for sweep in range(2):
        for p in range(k):
            if sweep == 0:
                aim = (wanted - total) * parts[:, p] / remaining[:, p]
            else:
                taken[draws, picks[:, p]] = False
                total -= energy[picks[:, p]]
                aim = wanted - total
            picks[:, p] = np.where(taken, np.inf, np.abs(energy - aim[:, None])).argmin(1)
            taken[draws, picks[:, p]] = True
            total += energy[picks[:, p]]
    error = np.abs(total - wanted)
    return picks[rng.choice(np.flatnonzero(error <= error.min() + _NEAR * wanted))]
