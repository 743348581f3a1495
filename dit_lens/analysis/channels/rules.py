"""Rules that choose channels from their scores, and a table that compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dit_lens.analysis.channels.channel_set import ChannelSet
from dit_lens.analysis.channels.statistics import (
    energy_share,
    gini,
    jaccard,
    mad_outliers,
    median_of,
    rank_channels,
    select_share,
    to_vector,
    top_median_ratio,
)
from dit_lens.arguments.checks import checked, checked_but
from dit_lens.arguments.numbers import to_int
from dit_lens.errors import OpError, show

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# Channels per site if no rule is given.
TOP = 12


@checked_but("k")
def rule_of(
    widths: Mapping[str, int], k: int | None = None, share: float | None = None, mad: float | None = None
) -> Callable[..., ChannelSet]:
    """Returns the rule that the arguments ask for, to be called with scores and energy; by default the top 12.

    >>> import torch
    >>> values = {"a": torch.tensor([3.0, 1.0, 1.0, 2.0])}
    >>> rule_of({"a": 4}, share=0.8)(values, {"a": values["a"] ** 2})["a"]
    (0, 3)

    widths: site -> number of channels.
    k: number of channels per site, for :func:`top_channels`.
    share: share of the energy in (0, 1], for :func:`share_channels`.
    mad: threshold in median absolute deviations, for :func:`mad_channels`.
    Raises OpError if more than one rule is given, or if k does not fit a site.
    """
    given = {name: value for name, value in (("k", k), ("share", share), ("mad", mad)) if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value}" for name, value in given.items())
        raise OpError(f"{listed} are different rules for choosing massive channels. Give one of them.")
    if share is not None:
        _check_share(share)
        return partial(share_channels, share=share)
    if mad is not None:
        if not mad > 0:
            raise OpError(f"mad={mad:g} must be above 0: the threshold in median absolute deviations.")
        return partial(mad_channels, threshold=mad)
    k = TOP if k is None else k
    for site, width in widths.items():
        k = _check_k(k, site, width)
    return partial(top_channels, k=k)


@checked_but("k")
def top_channels(
    scores: Mapping[str, Tensor], energy: Mapping[str, Tensor], k: int, score: str = "|mean|"
) -> ChannelSet:
    """Chooses the k channels with the highest scores at every site; of equal scores, the lower channel comes first.

    >>> import torch
    >>> top_channels(
    ...     {"blocks.3.img": torch.tensor([1.0, 9.0, 5.0])}, {"blocks.3.img": torch.tensor([1.0, 81.0, 25.0])}, k=2
    ... )["blocks.3.img"]
    (1, 2)

    scores: site -> [d], the score of each channel.
    energy: site -> [d], mean square of each channel.
    k: number of channels per site, 1 to d.
    score: name of the score.
    Raises OpError if k does not fit a site.
    Source: T_k(l) of arXiv 2605.13974, with score |mean over image tokens|.
    """
    for site, values in scores.items():
        k = _check_k(k, site, len(to_vector(values, f"The scores of {site}")))
    chosen = {site: rank_channels(values, descending=True)[:k] for site, values in scores.items()}
    return ChannelSet(chosen, dict(scores), dict(energy), score=score)


@checked
def share_channels(
    scores: Mapping[str, Tensor], energy: Mapping[str, Tensor], share: float = 0.5, score: str = "|mean|"
) -> ChannelSet:
    """Chooses the channels with the highest scores, as few as hold a share of the energy, at every site.

    >>> import torch
    >>> values = {"a": torch.tensor([3.0, 1.0, 1.0, 2.0])}
    >>> share_channels(values, {"a": values["a"] ** 2}, share=0.8)["a"]
    (0, 3)

    The number of channels may differ between sites; it is 0 at a site without energy.

    scores: site -> [d], the score of each channel.
    energy: site -> [d], mean square of each channel.
    share: share of the energy, in (0, 1].
    score: name of the score.
    Source: the concentration measure of SPARK (see :func:`energy_share`), solved for the number of channels.
    """
    _check_share(share)
    chosen = {site: select_share(scores[site], _get_energy(energy, site), share) for site in scores}
    note = f"the fewest that hold {100 * share:g} % of the energy"
    return ChannelSet(chosen, dict(scores), dict(energy), score=score, note=note)


@checked
def mad_channels(
    scores: Mapping[str, Tensor], energy: Mapping[str, Tensor], threshold: float = 1000.0, score: str = "|mean|"
) -> ChannelSet:
    """Chooses the channels whose score is an outlier: ``threshold`` median absolute deviations above the median.

    >>> import torch
    >>> values = {"a": torch.tensor([1.0, 2.0, 3.0, 9000.0])}
    >>> mad_channels(values, values)["a"]
    (3,)

    The number of channels may differ between sites and may be 0.

    scores: site -> [d], the score of each channel.
    energy: site -> [d], mean square of each channel.
    threshold: in median absolute deviations; see :func:`mad_outliers`.
    score: name of the score.
    """
    chosen = {site: mad_outliers(values, threshold) for site, values in scores.items()}
    note = f"scores over {threshold:g} median absolute deviations above the median"
    return ChannelSet(chosen, dict(scores), dict(energy), score=score, note=note)


@checked
def absolute_channels(
    peaks: Mapping[str, Tensor],
    medians: Mapping[str, Tensor],
    energy: Mapping[str, Tensor],
    least: float = 100.0,
    times: float = 1000.0,
) -> ChannelSet:
    """Chooses the channels that exceed ``least`` and ``times`` the median magnitude at some token, at every site.

    >>> import torch
    >>> peaks, medians = {"a": torch.tensor([2.0, 700.0, 90.0])}, {"a": torch.tensor([0.1, 0.5, 0.1])}
    >>> absolute_channels(peaks, medians, peaks)["a"]
    (1,)

    Often no channel does: the thresholds were set for language models, and |x| in DiTs is seldom above 150.

    peaks: site -> [d], the largest |x| of each channel over tokens (the reduction "max").
    medians: site -> [d], the median |x| of each channel over tokens ("p50"). Its median over channels is taken as the
      median |x| of the site.
    energy: site -> [d], mean square of each channel.
    least: lower bound of the peak.
    times: lower bound of the peak, as a multiple of the site's median.
    Source: the definition of massive activations by Sun et al., arXiv 2402.17762.
    """
    if set(medians) != set(peaks):
        raise OpError(f"peaks and medians must name the same sites; got {', '.join(peaks)} and {', '.join(medians)}.")
    typical = {site: median_of(to_vector(medians[site], f"The medians of {site}")) for site in peaks}
    chosen = {
        site: tuple(
            c
            for c in rank_channels(values, descending=True)
            if values[c] > least and values[c] >= times * typical[site]
        )
        for site, values in peaks.items()
    }
    return ChannelSet(chosen, dict(peaks), dict(energy), score="max")


# Reductions over tokens that definitions() compares; the first is the score of arXiv 2605.13974.
SCORES = ("|mean|", "mean|x|", "rms", "max", "p99.9")

# The reduction that the absolute rule needs besides "max".
MEDIAN = "p50"


@checked
def definitions(
    scores: Mapping[str, Tensor], k: int = 12, share: float = 0.5, threshold: float = 1000.0
) -> pd.DataFrame:
    """Compares definitions of massive channels (scores times rules) at one site, as a table.

    >>> import torch
    >>> mean, rms = torch.tensor([9.0, 0.1, 0.2, 0.1]), torch.tensor([9.0, 0.5, 4.0, 0.2])
    >>> table = definitions({"|mean|": mean, "rms": rms}, k=2)
    >>> table[["score", "rule", "k", "jaccard"]].to_dict("split")["data"][:2]
    [['|mean|', 'top 2', 2, 1.0], ['|mean|', '50 % of energy', 1, 0.5]]

    Returns a row per score and rule with the number of channels k and k/d, the share of the energy that they hold, the
    Gini coefficient of the score, its highest value divided by its median, and the Jaccard overlap of the channels with
    the top k of the first score.

    scores: name of the score -> [d]. Must include "rms"; the absolute rule also needs "max" and ``MEDIAN``.
    k: number of channels of the rule "top k".
    share: share of the energy, of the second rule.
    threshold: in median absolute deviations, of the third rule.
    """
    import pandas as pd

    if "rms" not in scores:
        raise OpError(
            f"The energy of channels is the square of 'rms', which is not among {', '.join(scores)}. Read it."
        )
    energy = {"": to_vector(scores["rms"], "The rms").square()}
    names = [name for name in scores if name != MEDIAN]
    first = top_channels({"": scores[names[0]]}, energy, k)[""]
    rows = []
    for name in names:
        values = {"": to_vector(scores[name], f"The scores {name}")}
        rules = {
            f"top {k}": top_channels(values, energy, k),
            f"{share:.0%} of energy".replace("%", " %"): share_channels(values, energy, share),
            f"over {threshold:g} MAD": mad_channels(values, energy, threshold),
        }
        if name == "max" and MEDIAN in scores:
            rules["|x| > 100 and 1,000 medians"] = absolute_channels(values, {"": scores[MEDIAN]}, energy)
        rows += [
            {"score": name, "rule": rule, **_measure_choice(found[""], values[""], energy[""], first)}
            for rule, found in rules.items()
        ]
    return pd.DataFrame(rows)


def _measure_choice(chosen: tuple[int, ...], values: Tensor, energy: Tensor, first: tuple[int, ...]) -> dict[str, Any]:
    """Returns the measured columns of a row of :func:`definitions`.

    chosen: channels that the rule chose.
    values: [d], their score.
    energy: [d], mean square per channel.
    first: channels to compare with: the top k of the first score.
    """
    return {
        "k": len(chosen),
        "k/d": len(chosen) / len(values),
        "energy share": energy_share(energy, chosen),
        "gini": gini(values),
        "top/median": top_median_ratio(values),
        "jaccard": jaccard(chosen, first),
    }


def _check_k(k: Any, site: str, width: int) -> int:
    found = to_int(k)
    if found is None or not 1 <= found <= width:
        raise OpError(
            f"k={show(k)} channels were asked for, but {site} has {width}. Choose a whole number from 1 to {width}."
        )
    return found


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise OpError(f"share={share!r} must be in (0, 1]: the share of the energy that the channels should hold.")


def _get_energy(energy: Mapping[str, Tensor], site: str) -> Tensor:
    if site not in energy:
        raise OpError(f"scores and energy must name the same sites; {site} has no energy.")
    return energy[site]
