"""Massive channels: scores, rules that choose channels, sets of channels and their controls; import all from here."""

from dit_lens.analysis.channels.channel_set import ARMS, ChannelSet
from dit_lens.analysis.channels.rules import (
    MEDIAN,
    SCORES,
    absolute_channels,
    definitions,
    mad_channels,
    rule_of,
    share_channels,
    top_channels,
)
from dit_lens.analysis.channels.statistics import (
    RunningStats,
    energy_share,
    gini,
    jaccard,
    mad_outliers,
    top_median_ratio,
)

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
