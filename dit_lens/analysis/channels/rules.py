"""The rules that choose channels from their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from dit_lens.analysis.channels.channel_set import ChannelSet
from dit_lens.analysis.channels.statistics import (
    energy_share,
    gini,
    jaccard,
    mad_outliers,
    median_of,
    ranked,
    share_holders,
    top_median_ratio,
    vector,
)
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# The rules that choose channels.

TOP = 12


def rule_of(
    widths: Mapping[str, int], k: int | None = None, share: float | None = None, mad: float | None = None
) -> Callable[..., ChannelSet]:
    """The one rule that is meant, to be called with scores and energy; the top 12 where none is given.

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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
