"""An atlas: the explorer of several prompts as one HTML file, which needs neither weights nor a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import check_number
from dit_lens.arguments.signatures import sets
from dit_lens.core.runs.files import check_place
from dit_lens.errors import OpError
from dit_lens.explorer.code import code_of_lens
from dit_lens.explorer.explorer import Explorer
from dit_lens.explorer.maps import THUMB
from dit_lens.explorer.runs import explorer_reads, view_runs

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

# Bytes of a page per byte of maps: base64 adds a third, and gzip compresses noisy maps only a little.
BYTES_PER_BYTE = 1.3
SITES = "blocks.*.img"
STEPS, SIDE = 8, 32  # control channels are left out only when steps and maps have been reduced to these


@dataclass(frozen=True)
class Extent:
    """How much of a run an atlas has.

    steps: number of denoising steps.
    side: longer side of the maps, in tokens.
    groups: number of groups of channels.
    """

    steps: int
    side: int
    groups: int = 3


@checked
@sets("prompt", "ops", "site")
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

    It has the images, the scores of every channel, maps of the k massive channels (and of as many bottom and random
    ones) at all blocks, and their clusters. If that is too large, steps are left out first, then maps are averaged to
    32 tokens per side, then control channels are left out, then maps are averaged further; the page states what was
    reduced.

    lens: lens of the model.
    path: HTML file to write.
    prompts: one or more prompts.
    k: number of channels per block, by |mean| averaged over prompts and steps.
    seed: seed of the noise, the same for every prompt.
    megabytes: approximate limit for the size of the file.
    batch_size: prompts that run at once; all if None.
    call: arguments of the pipeline's call.
    Raises OpError if not even one step of coarse maps fits.
    """
    check_number("megabytes", megabytes, 0, open_ends=True)
    check_place(path, room=megabytes * 2**20)
    prompts = list(prompts)
    if not prompts:
        raise OpError("there are no prompts. Give at least one.")
    outline, sites = lens.outline(prompts, seed=seed, **call), lens.sites(SITES)
    grid, steps = outline.grid, outline.steps
    extent = fit_extent(len(prompts) * len(sites), k, grid or (SIDE, SIDE), steps, megabytes * 2**20)
    massive = lens.massive_channels(prompts, k, site=SITES, seed=seed, batch_size=batch_size, **call)
    kept = _choose_steps(steps, extent.steps)
    reads = [replace(read, steps=kept) for read in explorer_reads(massive)[: extent.groups]]
    run = lens.run(prompts, reads, seed=seed, batch_size=batch_size, **call)
    code = _code(run, prompts, k, seed, megabytes, call)
    views = view_runs([run], channels=massive, k=k, clusters=2, code=code, side=extent.side)
    title = f"{run.provenance['family']}: massive channels of {len(prompts)} prompts"
    return Explorer(replace(views, note=_note(run, extent, views.grid))).to_html(path, title=title)


def fit_extent(images: int, k: int, grid: Sequence[int], steps: int, budget: float) -> Extent:
    """Returns the largest extent whose page fits a budget.

    >>> fit_extent(8 * 8, 8, (16, 16), 12, 10 * 2**20)
    Extent(steps=12, side=16, groups=3)
    >>> fit_extent(4 * 57, 8, (64, 64), 28, 10 * 2**20)
    Extent(steps=2, side=32, groups=1)

    images: number of prompts times number of sites.
    k: channels per group.
    grid: (h, w) of the run.
    steps: denoising steps of the run.
    budget: in bytes.
    Raises OpError if nothing fits.
    """
    extent = Extent(steps, max(grid))

    def estimate_bytes(extent: Extent) -> float:
        # A token takes one byte in every map and one for its cluster; a map also has a thumbnail, a range and a mean.
        tokens = prod(grid) * (extent.side / max(grid)) ** 2
        map_bytes = k * (tokens + min(tokens, THUMB**2) + 12)
        return BYTES_PER_BYTE * images * extent.steps * extent.groups * (map_bytes + tokens)

    while estimate_bytes(extent) > budget:
        smaller = _reduce(extent)
        if smaller is None:
            raise OpError(
                f"an atlas of {budget / 2**20:.3g} MB cannot hold one step of {images} maps. Give fewer prompts, a "
                "smaller k, or more megabytes."
            )
        extent = smaller
    return extent


def _reduce(extent: Extent) -> Extent | None:
    """Returns the next smaller extent, reduced where it matters least; None if there is none."""
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


def _choose_steps(steps: int, kept: int) -> list[int]:
    """Steps at equal distances, the last among them."""
    return sorted({steps - 1 - (i * steps) // kept for i in range(kept)})


def _note(run: Run, extent: Extent, grid: tuple[int, int]) -> str:
    """Returns the text below the views: what was reduced, and the machine. grid: (h, w) of the maps."""
    reduced = []
    if extent.steps < len(run.clock):
        reduced.append(f"{extent.steps} of {len(run.clock)} steps")
    if grid != run.grid:
        reduced.append(f"maps averaged from {run.grid[0]} x {run.grid[1]} to {grid[0]} x {grid[1]} tokens")
    if extent.groups < 3:
        reduced.append("no control channels")
    machine = f"Drawn on {run.provenance['device']} in {run.provenance['dtype']}."
    return f"To keep this file small: {', '.join(reduced)}. {machine}" if reduced else machine


def _code(run: Run, prompts: list[str], k: int, seed: int, megabytes: float, call: dict[str, Any]) -> str:
    """Returns the code that makes an atlas; the parameters are those of :func:`atlas`. run: a run of the lens."""
    extra = "".join(f", {name}={value!r}" for name, value in call.items())
    return (
        f"import dit_lens as dl\n\n{code_of_lens(run)}\nprompts = {prompts!r}\n"
        f"dl.atlas(lens, 'atlas.html', prompts, k={k}, seed={seed}, megabytes={megabytes:g}{extra})"
    )
