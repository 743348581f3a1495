"""An atlas: what some prompts do in a model, as one file to share that needs neither weights nor kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.errors import OpError
from dit_lens.explorer.code import lens_code
from dit_lens.explorer.explorer import Explorer
from dit_lens.explorer.views import THUMB, explorer_reads, of_runs

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

# Bytes of a page per byte of maps: base64 adds a third, and gzip saves little of maps with grain.
PACKED = 1.3
STEPS, SIDE = 8, 32  # what is kept before groups of channels are given up


@dataclass(frozen=True)
class Extent:
    """How much of a run an atlas holds: denoising steps, tokens of the longer side, groups of channels."""

    steps: int
    side: int
    groups: int = 3


def atlas(
    lens: DiTLens,
    path: str | Path,
    prompts: Sequence[str],
    *,
    k: int = 8,
    seed: int = 0,
    megabytes: float = 10.0,
    batch_size: int | None = None,
    **call: Any,
) -> Path:
    """Writes an explorer of some prompts as one HTML file of at most about ``megabytes``, and returns its path.

    >>> import tempfile
    >>> from dit_lens import DiTLens
    >>> prompts = ["a big red circle left on a plain blue background"]
    >>> page = atlas(DiTLens.toy(), Path(tempfile.mkdtemp()) / "atlas.html", prompts, k=4, num_inference_steps=2)
    >>> page.name
    'atlas.html'

    It holds the images, the scores of every channel, maps of the k massive channels (and as many bottom and random
    ones) at all blocks, and their clusters. Where that is too much, first steps are left out, then maps are averaged to
    32 tokens a side, then controls are left out, then maps shrink further; the page says so.

    prompts: drawn with ``seed`` each; k: channels of a block, by |mean| averaged over prompts and steps.
    Raises OpError where even one step of a coarse map would not fit.
    """
    prompts = list(prompts)
    if not prompts:
        raise OpError("there are no prompts. Give at least one.")
    massive = lens.massive_channels(prompts, k, seed=seed, batch_size=batch_size, **call)
    outline = lens.outline(prompts[:1], **call)
    grid, steps = outline.grid, outline.steps
    extent = fitted(len(prompts) * len(massive), k, grid or (SIDE, SIDE), steps, megabytes * 2**20)
    kept = _spread(steps, extent.steps)
    reads = [replace(read, steps=kept) for read in explorer_reads(massive)[: extent.groups]]
    run = lens.run(prompts, reads, seed=seed, batch_size=batch_size, **call)
    code = _code(run, prompts, k, seed, megabytes, call)
    shown = of_runs([run], channels=massive, k=k, clusters=2, code=code, side=extent.side)
    title = f"{run.provenance['family']}: massive channels of {len(prompts)} prompts"
    return Explorer(replace(shown, note=_note(run, extent, shown.grid))).to_html(path, title=title)


def fitted(images: int, k: int, grid: Sequence[int], steps: int, budget: float) -> Extent:
    """The largest extent whose page stays within a budget of bytes.

    >>> fitted(8 * 8, 8, (16, 16), 12, 10 * 2**20)
    Extent(steps=12, side=16, groups=3)
    >>> fitted(4 * 57, 8, (64, 64), 28, 10 * 2**20)
    Extent(steps=2, side=32, groups=1)

    images: prompts times sites. A token takes a byte in every map, and one for its cluster.
    """
    extent = Extent(steps, max(grid))

    def size(some: Extent) -> float:
        tokens = prod(grid) * (some.side / max(grid)) ** 2
        map_bytes = k * (tokens + min(tokens, THUMB**2) + 12)  # with its thumbnail, range and mean
        return PACKED * images * some.steps * some.groups * (map_bytes + tokens)

    while size(extent) > budget:
        smaller = _smaller(extent)
        if smaller is None:
            raise OpError(
                f"an atlas of {budget / 2**20:.3g} MB cannot hold one step of {images} maps. Give fewer prompts, a "
                "smaller k, or more megabytes."
            )
        extent = smaller
    return extent


def _smaller(extent: Extent) -> Extent | None:
    """The next extent to try: what is missed least goes first."""
    steps, side, groups = extent.steps, extent.side, extent.groups
    if steps > STEPS:
        return Extent(max(STEPS, steps // 2), side, groups)
    if side > SIDE:
        return Extent(steps, max(SIDE, side // 2), groups)
    if groups > 1:
        return Extent(steps, side, 1)
    if steps > 1:
        return Extent(steps // 2, side, groups)
    return Extent(steps, side // 2, groups) if side > SIDE // 4 else None


def _spread(steps: int, kept: int) -> list[int]:
    """Steps at equal distances, the last among them."""
    return sorted({steps - 1 - (i * steps) // kept for i in range(kept)})


def _note(run: Run, extent: Extent, grid: tuple[int, int]) -> str:
    left = []
    if extent.steps < len(run.clock):
        left.append(f"{extent.steps} of {len(run.clock)} steps")
    if grid != run.grid:
        left.append(f"maps averaged from {run.grid[0]} x {run.grid[1]} to {grid[0]} x {grid[1]} tokens")
    if extent.groups < 3:
        left.append("no control channels")
    made = f"Drawn on {run.provenance['device']} in {run.provenance['dtype']}."
    return f"To keep this file small: {', '.join(left)}. {made}" if left else made


def _code(run: Run, prompts: list[str], k: int, seed: int, megabytes: float, call: dict[str, Any]) -> str:
    extra = "".join(f", {name}={value!r}" for name, value in call.items())
    return (
        f"import dit_lens as dl\n\n{lens_code(run)}\nprompts = {prompts!r}\n"
        f"dl.atlas(lens, 'atlas.html', prompts, k={k}, seed={seed}, megabytes={megabytes:g}{extra})"
    )
