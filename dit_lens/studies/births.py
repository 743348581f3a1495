"""Where are massive channels born? What every attention and MLP writes into them, and whether their gates stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from dit_lens.core.request.ops import Read
from dit_lens.errors import SiteError
from dit_lens.studies.shared.arguments import as_prompts, as_seeds, check_k, share_of_width
from dit_lens.studies.shared.arms import kept_scores, score_ops, sets_of
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import Batch, batches
from dit_lens.studies.shared.result import Result, summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

# What is neither written by a block that was read nor there before the first one.
INPUT, REST = "input", "rest"
WHOLE = "block"


def births(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int = 12,
    seeds: int | Sequence[int] = (0,),
    site: Pattern = "blocks.-1.img",
    steps: Steps = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Which attention or MLP writes the channels that are massive at the end, and the AdaLN gates they pass.

    >>> from dit_lens import DiTLens
    >>> result = births(DiTLens.toy(), "a big red circle left on a plain blue background", k=4, num_inference_steps=2)
    >>> rest = result.table.loc[result.table["point"] == "rest", "share"]
    >>> bool(rest.abs().max() < 1e-3)  # what no write explains
    True

    The residual stream is a sum, so the token mean of a channel at ``site`` is the sum of the token means that every
    write added. ``share`` is a write's part of it, over all steps: sum_s(write x final) / sum_s(final^2); the parts add
    up to 1, and a write against the final sign is negative. This is the direct contribution: what a write causes by way
    of later blocks is counted there. Points are attn_out, cross_out and mlp_out where a family has them, else "block",
    the whole of what a block adds; "input" is what enters the first block, and "rest" what no write read here explains.

    ``gate`` is |gate| of the channel over the median of that gate's channels, averaged over steps, and ``percentile``
    the share of the other channels whose |gate| is smaller (0.5 by chance; ties count half). The arm "random" has the
    same for other channels, one random map of the set.

    k: channels per image, by |mean| at ``site``, averaged over steps. site: one site at a block's end. steps: which
    denoising steps count. batch_size, out: see :func:`disruption`. Notes say what a family lacks, and why.
    Sources: direct contributions as in TransformerLens; gate spikes, arXiv 2510.11538.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    end = _end(lens, site)
    tree = _writes(lens, end)
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "site": end,
        "steps": str(steps),
        "writes": [asdict(write) for write in tree],
        "gates": _gates(lens, end),
        "lacks": _lacks(lens, tree),
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.channels(lens.anatomy.site(end)),
    }
    reads = [
        *score_ops(end, "|mean|", steps),
        Read(sorted({end, *(site for write in tree for site in write.sites)}), reduce="mean", steps=steps, name="mean"),
        *([Read(settings["gates"], reduce="mean|x|", steps=steps, name="gate")] if settings["gates"] else []),
    ]
    parts = batches(prompts, seeds, batch_size)
    with Cells("births", settings, lens=lens, total=len(parts), out=out) as cells:
        for part in parts:
            cells.get(part.key, partial(_traced, lens, part, reads, tree, end, k, call))
        return cells.result()


@dataclass(frozen=True)
class _Write:
    """One term of the residual stream: the site that holds it, or the two whose difference it is (later, earlier)."""

    block: int | None
    point: str
    sites: tuple[str, ...]


def _end(lens: DiTLens, site: Pattern) -> str:
    names = lens.sites(site)
    place = lens.anatomy.site(names[0])
    if len(names) != 1 or place.block is None or place.point != "resid_post":
        raise SiteError(
            f"{site!r} means {', '.join(names[:4])}. Births are traced from the end of one block: "
            "name one such as 'blocks.-1.img'."
        )
    return names[0]


def _writes(lens: DiTLens, end: str) -> list[_Write]:
    """What adds up to the residual stream at ``end``: the input, and what every block writes."""
    last, stream = lens.anatomy.site(end).block or 0, lens.anatomy.site(end).stream
    have = set(lens.sites())
    found: list[_Write] = []
    for block in range(last + 1):
        before, after = f"blocks.{block}.{stream}.resid_pre", f"blocks.{block}.{stream}"
        if not {before, after} <= have:
            continue
        if not found:
            found.append(_Write(None, INPUT, (before,)))
        points = [p for p in ("attn_out", "attn2_out", "cross_out", "mlp_out") if f"{after}.{p}" in have]
        if {"attn_out", "mlp_out"} <= set(points):
            found += [_Write(block, point, (f"{after}.{point}",)) for point in points]
        else:
            found.append(_Write(block, WHOLE, (after, before)))
    return found


def _gates(lens: DiTLens, end: str) -> list[str]:
    """The gates of the blocks up to ``end``, on its stream."""
    last, stream = lens.anatomy.site(end).block or 0, lens.anatomy.site(end).stream
    return [
        site.name
        for site in lens.anatomy.sites
        if site.block is not None and site.block <= last and site.stream == stream and site.point.endswith(".gate")
    ]


def _lacks(lens: DiTLens, tree: Sequence[_Write]) -> list[str]:
    """Why blocks are not split into attention and MLP, and why there are no gates; each reason once."""
    why, stream = lens.anatomy.why_not, tree[-1].sites[0].split(".")[2] if tree else "img"
    reasons = [
        why(write.block, stream, point)
        for write in tree
        if write.block is not None and write.point == WHOLE
        for point in ("attn_out", "mlp_out")
    ]
    gates = ("mod.gate", "mod.attn.gate", "mod.mlp.gate")
    for block in sorted({write.block for write in tree if write.block is not None}):
        whys = [why(block, stream, point) for point in gates]
        reasons += [whys[1]] if all(whys) else []
    return list(dict.fromkeys(reason for reason in reasons if reason))


def _traced(
    lens: DiTLens, part: Batch, reads: Sequence[Read], tree: Sequence[_Write], end: str, k: int, call: Mapping[str, Any]
) -> Cell:
    run, cell = lens.run(part.prompts, reads, seed=part.seed, **call), Cell()
    final = run["mean"][end].float().numpy()  # [s, b, d]
    added = np.stack([_added(run, write) for write in tree])  # [w, s, b, d]
    for row, (prompt, top) in enumerate(zip(part.prompts, sets_of(kept_scores(run), k, "|mean|"), strict=True)):
        share = shares(added[:, :, row], final[:, row])  # [w, d]
        gates = _passed(run, row)
        for arm in (top, top.random(part.seed)):
            chosen = list(arm[end])
            about = {"prompt": prompt, "seed": part.seed, "arm": arm.arm}
            cell.lines += _share_lines(about, chosen, tree, share[:, chosen])
            cell.lines += [
                {**about, "channel": c, **place, "gate": float(gate[c]), "percentile": float(percentile[c])}
                for place, gate, percentile in gates
                for c in chosen
            ]
    return cell


def _added(run: Run, write: _Write) -> np.ndarray:
    """The token means of a write, [s, b, d]."""
    values = [run["mean"][site].float().numpy() for site in write.sites]
    return values[0] - values[1] if len(values) == 2 else values[0]


def shares(writes: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The part that every write has of the sum of all.

    >>> shares(np.array([[[1.0]], [[3.0]]]), np.array([[4.0]])).tolist()
    [[0.25], [0.75]]

    writes: [w, s, d]. final: [s, d], their sum where nothing is missing. Returns [w, d], the projection of each write
    on the final values over s; 0 where these are all 0.
    """
    energy = (final.astype(float) ** 2).sum(0)
    along = (writes.astype(float) * final).sum(1)
    return np.divide(along, energy, out=np.zeros_like(along), where=energy > 0)


def _share_lines(
    about: Mapping[str, Any], chosen: Sequence[int], tree: Sequence[_Write], share: np.ndarray
) -> list[dict[str, Any]]:
    places = [*((write.block, write.point) for write in tree), (None, REST)]
    whole = np.concatenate([share, 1 - share.sum(0, keepdims=True)])
    return [
        {**about, "channel": c, "block": block, "point": point, "share": float(whole[w, i])}
        for w, (block, point) in enumerate(places)
        for i, c in enumerate(chosen)
    ]


def _passed(run: Run, row: int) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Per gate its place, every channel's |gate| over the median, and the percentile of that; [d] each."""
    found = []
    for site, value in run["gate"].items() if "gate" in run.keys() else ():  # noqa: SIM118 a Run is no mapping
        size = value[:, row].float().mean(0).numpy()
        _, block, _, point = site.split(".", 3)
        middle = float(np.median(size))
        gate = size / middle if middle else np.full(len(size), np.nan)
        found.append(({"block": int(block), "point": point.removeprefix("mod.")}, gate, percentiles(size)))
    return found


def percentiles(values: np.ndarray) -> np.ndarray:
    """For every value the share of the others that are smaller, ties counting half; [d], 0.5 on average.

    >>> percentiles(np.array([3.0, 1.0, 2.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    return (rankdata(values) - 1) / max(len(values) - 1, 1)


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    measures = [name for name in ("share", "gate", "percentile") if name in table]
    summary = summarise(table, ("arm", "block", "point"), measures)
    return Result("births", table, summary, dict(settings), notes=_notes(settings, summary))


def _notes(settings: Mapping[str, Any], summary: pd.DataFrame) -> list[str]:
    notes = [share_of_width(settings["k"], settings["width"])]
    top = summary[summary["arm"] == "top"]
    written = top[top["share"].notna() & (top["point"] != REST)].nlargest(3, "share")
    notes.append(f"most of what is massive at {settings['site']} is written by: {_listed(written, 'share')}")
    rest = float(top.loc[top["point"] == REST, "share"].iloc[0])
    if abs(rest) > 0.01:
        notes.append(f"a share of {rest:.2f} is explained by no write read here")
    if settings["gates"]:
        notes.append(
            "gates in which massive channels stand out most, by the share of channels with a smaller gate: "
            f"{_listed(top.nlargest(3, 'percentile'), 'percentile')}"
        )
    return [*notes, *settings["lacks"]]


def _listed(rows: pd.DataFrame, measure: str) -> str:
    return ", ".join(
        f"{point if pd.isna(block) else f'blocks.{block:g} {point}'} ({value:.2f})"
        for block, point, value in zip(rows["block"], rows["point"], rows[measure], strict=True)
    )
