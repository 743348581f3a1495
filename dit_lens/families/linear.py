"""Whether a projection makes of a part of its input that part of what it makes of the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dit_lens.families.live import find_forward

if TYPE_CHECKING:
    from torch import Tensor


def why_inexact(module: nn.Module) -> str | None:
    """Why the parts of a projection's input do not add up to its output; None where they do.

    A plain ``nn.Linear`` is known to be exact. Anything else (a LoRA, quantised weights, a patch) is tried on two
    random tokens, as the parts would be made in a run.

    >>> why_inexact(nn.Linear(4, 2)), why_inexact(nn.Sequential(nn.Linear(4, 2), nn.GELU()))
    (None, 'is not linear')
    """
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear and find_forward(module) is nn.Linear.forward
    hooked = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 torch has no public way to list them
    if plain and not hooked and type(weight) is nn.Parameter and type(weight.data) is torch.Tensor:
        return None
    found = next((one for one in module.parameters() if one.is_floating_point()), None)
    if found is None or found.is_meta:
        return None if plain and not hooked else "cannot be tried without its weights"
    width = getattr(module, "in_features", None)
    if width is None:
        width = next(one.in_features for one in module.modules() if isinstance(one, nn.Linear))
    with torch.no_grad(), torch.random.fork_rng():
        one, other = torch.randn(2, 1, 2, width, device=found.device, dtype=found.dtype)
        before = _random_state(found.device)
        try:
            parts = module(one) + module(other) - module(torch.zeros_like(one))
            drew = not torch.equal(before, _random_state(found.device))
            whole = module(one + other)
        except RuntimeError as problem:
            return f"cannot be tried ({problem})"
    if drew:
        return "draws random numbers, as dropout does in training mode; call pipe.transformer.eval() first"
    error = (parts - whole).abs().max() / whole.abs().max().clamp_min(torch.finfo(whole.dtype).tiny)
    return None if error <= max(1e-4, 4 * torch.finfo(whole.dtype).eps) else "is not linear"


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
