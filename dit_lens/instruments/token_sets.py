"""Registers and sinks: the tokens of an image that stand out in a run, at every site and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.arguments.numbers import check_number
from dit_lens.core.execution.at_weights import Probe
from dit_lens.core.request.ops import Apply
from dit_lens.core.request.token_set import TokenSet
from dit_lens.errors import OpError, PromptError, SiteError, check_choice, warn
from dit_lens.instruments.attention_patterns import read_incoming
from dit_lens.instruments.massive import find_massive_channels

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.request.ops import Pattern
    from dit_lens.core.session import Session

OVER = {"registers": 5.0, "sinks": 10.0}  # how many medians a token has to reach
VALUES = {"registers": "norm without massive channels", "sinks": "incoming attention"}


def find_token_set(
    lens: Session,
    prompt: str,
    kind: str,
    *,
    over: float | None = None,
    k: int | None = None,
    without: int = 8,
    site: Pattern = "blocks.*.img",
    **call: Any,
) -> TokenSet:
    """See :meth:`dit_lens.DiTLens.find_tokens`."""
    lens.engine.check_weights("finding tokens needs")  # norms and patterns are taken beside the run
    check_choice(kind, tuple(OVER), "kind of tokens")
    if over is not None and k is not None:
        raise OpError("over= and k= are two rules for the same tokens. Give one of them.")
    if over is not None:
        check_number("over", over, 1)
    if k is not None:
        check_number("k", k, 1)
    check_number("without", without, 0)
    outline = lens.outline(prompt, **call)
    if outline.rows != 1:
        raise PromptError(
            f"tokens are of one image, and this call draws {outline.rows}. Pass one prompt, and leave "
            "num_images_per_prompt= out; other images have other seeds (seed=)."
        )
    sites = lens.sites(site)
    if odd := [name for name in sites if name.count(".") != 2 or not name.startswith("blocks.")]:
        raise SiteError(f"{kind} are of the tokens that a block leaves, as at 'blocks.*.img'; {odd[0]} is none.")
    for name in sites:
        count = outline.tokens(name.split(".")[2])
        if k is not None and count is not None and k > count:
            raise OpError(f"k={k} tokens are asked for, and {name} has {count}.")
    if kind == "registers":
        found = _measure_norms(lens, prompt, sites, outline.steps, without, call)
    else:
        found = _measure_attention(lens, prompt, sites, outline.steps, call)
    least = OVER[kind] if over is None else float(over)
    chosen = {name: [_choose(values, least, k) for values in steps] for name, steps in found.items()}
    peaks = {name: [_stand_out(values) for values in steps] for name, steps in found.items()}
    count = {len(values) for steps in found.values() for values in steps}
    tokens = TokenSet(chosen, kind, count.pop() if len(count) == 1 else None, peaks)
    if tokens.is_empty:
        name = max(peaks, key=lambda one: max(peaks[one]))
        step = int(np.argmax(peaks[name]))
        warn(
            f"there are no {kind}: no token has {least:g} times the median {VALUES[kind]}; the most is "
            f"{peaks[name][step]:.2g} times, at {name}, step {step}. Look for less (over=), or for the strongest (k=)."
        )
    return tokens


def _choose(values: np.ndarray, over: float, k: int | None) -> list[int]:
    """The tokens that stand out: the k largest, or those that reach so many medians."""
    order = np.argsort(-values, kind="stable")
    if k is not None:
        return sorted(order[:k].tolist())
    return np.flatnonzero(values >= over * np.median(values)).tolist() if np.median(values) > 0 else []


def _stand_out(values: np.ndarray) -> float:
    """How many medians the strongest token has."""
    median = float(np.median(values))
    return float(values.max()) / median if median > 0 else float("nan")


def _measure_norms(
    lens: Session, prompt: str, sites: list[str], steps: int, without: int, call: Mapping[str, Any]
) -> dict[str, list[np.ndarray]]:
    """Site -> for every step the norm of every token, massive channels left out."""
    given = dict(call)
    given.pop("output_type", None)
    if given.get("seed") is None:  # both runs are of one image
        given["seed"] = 0
    massive = find_massive_channels(lens, prompt, without, site=sites, **given) if without else {}
    kept = {
        name: sorted({*range(lens.anatomy.channels(lens.anatomy.site(name)))} - {*massive.get(name, ())})
        for name in sites
    }
    found = TokenNorms(kept)
    with lens.engine.within(found):
        lens.run(prompt, [Apply(name, fn=found.note, branch="cond") for name in sites], **given)
    return {name: [found.norms[name, step].cpu().numpy() for step in range(steps)] for name in sites}


@dataclass(eq=False)
class TokenNorms(Probe):
    """Keeps the norm of every token of the first row.

    channels: site -> those that count.
    norms: (site, step) -> [n].
    """

    channels: dict[str, list[int]]
    norms: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)

    def note(self, x: Tensor, hook: Any) -> None:
        """What :class:`~dit_lens.Apply` calls."""
        self.norms[hook.name, hook.step] = torch.linalg.vector_norm(x[0][:, self.channels[hook.name]].float(), dim=-1)


def _measure_attention(
    lens: Session,
    prompt: str,
    sites: list[str],
    steps: int,
    call: Mapping[str, Any],
) -> dict[str, list[np.ndarray]]:
    """Site -> for every step how much attention each token of the stream gets, mean over heads and queries."""
    blocks = {name: int(name.split(".")[1]) for name in sites}
    streams = {name: name.split(".")[2] for name in sites}
    found = read_incoming(lens, prompt, sorted({*blocks.values()}), {*streams.values()}, **call)
    return {name: [found[blocks[name], streams[name]][step, 0].numpy() for step in range(steps)] for name in sites}
