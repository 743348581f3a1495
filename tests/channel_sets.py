"""Sets of channels for tests: chosen from random scores, or given."""

from __future__ import annotations

import numpy as np
import torch

from dit_lens.analysis.channels import ChannelSet, top_channels


def sample_set(seed: int, sites: int = 3, width: int = 40, k: int = 4) -> ChannelSet:
    rng = np.random.default_rng(seed)
    scores = {f"blocks.{i}.img": torch.tensor(rng.lognormal(size=width), dtype=torch.float32) for i in range(sites)}
    return top_channels(scores, {site: s**2 for site, s in scores.items()}, k)


def given_set(*sets: tuple[int, ...], width: int) -> ChannelSet:
    """A set of given channels, whose scores and energy do not matter."""
    channels = {f"s{i}": chosen for i, chosen in enumerate(sets)}
    ones = {site: torch.ones(width) for site in channels}
    return ChannelSet(channels, ones, ones, arm="given")
