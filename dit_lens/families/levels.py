"""What noise level a time means. Torch and plain data only: it travels to a server by source.

A level is 1 for noise and 0 for a clean image. A flow (arXiv 2210.02747) blends both: x = (1 - level) x0 + level noise.
Other samplers keep the variance: x = sqrt(1 - level^2) x0 + level noise (DDPM, arXiv 2006.11239, eq. 4), where level^2
is 1 - alpha bar. Schedulers that count noise beside data, as ``sigmas``, mean level = sigma / sqrt(sigma^2 + data^2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_lens.families.locations import TimeRule


def pick_time(value: Any, rule: TimeRule) -> Any:
    """The time of a step out of what the transformer is given: a number, or a tensor of one.

    Where tokens have times of their own, as where the first frame of a video is given, it is that of the noisiest.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.detach().flatten()
    return value.amin() if rule["scale"] < 0 else value.amax()


def level_at(time: float, rule: TimeRule) -> float:
    """The noise level of a time, as the transformer is given it.

    >>> half = {"levels": [0.0, 0.6, 0.8], "data": None, "scale": 1e-3, "offset": 0.0}
    >>> [round(level_at(time, half), 4) for time in (1, 1.5, 2)]  # 0.6 is 3/4 of noise beside data, and 0.8 is 4/3
    [0.6, 0.7214, 0.8]
    """
    if rule["levels"] is not None:
        usual = (rule["offset"], rule["scale"]) == (0.0, 1e-3)  # the time is the scheduler's
        return _interpolate(
            rule["levels"], time if usual else len(rule["levels"]) * (rule["offset"] + rule["scale"] * time)
        )
    if rule["data"] is not None:  # EDM (arXiv 2206.00364, table 1): the time is log(sigma) / 4
        return to_level(math.exp(4 * time), rule["data"])
    return rule["offset"] + rule["scale"] * time


def spread_level(value: Any, level: float, tokens: Tensor, rows: range, rule: TimeRule) -> Tensor | float:
    """The noise level of every token of a flow, [row, token, 1], where they have times of their own; else of the step.

    value: the time, as the transformer is given it: one for each row, frame or token.
    level: of the step, which the noisiest have.
    tokens: [row, token, channel].
    rows: which of the forward pass they are.
    rule: of the time.
    """
    own = value.flatten(1) if isinstance(value, Tensor) and value.ndim > 1 else None
    if own is None or own.shape[1] == 1 or tokens.shape[1] % own.shape[1]:
        return level
    own = own[rows.start : rows.stop].repeat_interleave(tokens.shape[1] // own.shape[1], 1)
    made = rule["offset"] + rule["scale"] * own
    return torch.where(own == pick_time(value, rule), level, made)[..., None].to(tokens)


def to_level(sigma: float, data: float = 1.0) -> float:
    """The level of noise beside data whose standard deviation is ``data``."""
    return sigma / math.hypot(sigma, data)


def _interpolate(levels: Sequence[float], time: float) -> float:
    """The level at a time between two of a table: schedulers go straight from noise beside data to the next."""
    time = min(max(time, 0.0), len(levels) - 1.0)
    below = int(time)
    if below == time:
        return levels[below]
    noise = [level / math.sqrt(max(1 - level**2, 1e-12)) for level in levels[below : below + 2]]
    return to_level(noise[0] + (time - below) * (noise[1] - noise[0]))


def list_levels(rule: TimeRule, timesteps: Sequence[float], sigmas: Sequence[float]) -> list[float]:
    """The noise level of every step as a scheduler itself has it; empty where it does not tell.

    rule: of the time.
    timesteps, sigmas: of the scheduler, for these steps; the latter perhaps none.
    """
    if rule["levels"] is None:
        return list(sigmas) if rule["data"] is None else [to_level(sigma, rule["data"]) for sigma in sigmas]
    own = [to_level(sigma) for sigma in sigmas] if len(sigmas) == len(timesteps) else []
    found = []
    for step, time in enumerate(timesteps):
        made, level = _interpolate(rule["levels"], time), own[step] if own else None
        # Times may be rounded to whole ones, where noise levels lie closer together; the scheduler steps by the latter.
        low, high = (_interpolate(rule["levels"], t) for t in (math.ceil(time) - 1, math.floor(time) + 1))
        rounded = level is not None and abs(level - made) > 1e-5 and low <= level <= high
        found.append(level if rounded and level is not None else made)
    return found


def choose_level(made: float, own: Sequence[float], step: int, within: float) -> float:
    """The scheduler's own noise level of a step, where that which was made of the time is the same but for rounding.

    made: of the time.
    own: of every step; perhaps none.
    step: its number.
    within: how far rounding may lead.
    """
    return own[step] if step < len(own) and abs(own[step] - made) <= within else made


def read_schedule(scheduler: Any, skipped: int, steps: int) -> tuple[list[float], list[float]]:
    """The timesteps and sigmas of a scheduler that has been set up; none where it keeps none. It waits for a GPU.

    skipped: how many of its steps come before those that run.
    steps: how many run.
    """
    found = []
    for name in ("timesteps", "sigmas"):
        values = getattr(scheduler, name, None)
        kept = isinstance(values, Tensor) and skipped >= 0
        found.append(values[skipped : skipped + steps].tolist() if kept and isinstance(values, Tensor) else [])
    return found[0], found[1]


def measure_rounding(scheduler: Any) -> float:
    """How far a noise level that is made of a scheduler's time may be from its own: it may keep whole times only."""
    timesteps = getattr(scheduler, "timesteps", None)
    if isinstance(timesteps, Tensor) and not timesteps.is_floating_point():
        return 1.001 / scheduler.config.get("num_train_timesteps", 1000)
    return 1e-4


def is_exact(value: Any) -> bool:
    """Whether a time is not rounded to half precision, in which neighbouring timesteps may be equal."""
    return not isinstance(value, Tensor) or value.dtype not in (torch.float16, torch.bfloat16)
