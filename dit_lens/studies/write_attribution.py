"""Where are massive channels written? What every attention and MLP adds to them, and whether their gates stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from dit_lens.arguments.lists import as_prompts, as_seeds
from dit_lens.core.request.ops import Read
from dit_lens.errors import SiteError
from dit_lens.plots import write_attribution_figure
from dit_lens.studies.shared.arguments import check_k, describe_k, find_meant
from dit_lens.studies.shared.arms import average_scores, make_score_reads, select_top_channels
from dit_lens.studies.shared.batches import PromptBatch, divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.streams import make_stream
from dit_lens.studies.shared.tables import summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

INPUT = "input"  # what is there before the first block
REST = "rest"  # what no block that was read explains
WHOLE = "block"  # all that a block adds


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    measures = [name for name in ("share", "gate", "percentile") if name in table]
    summary = summarise(table, ("arm", "block", "point"), measures)
    return Result("write_attribution", table, summary, dict(settings), notes=_notes(settings, summary))


@study(
    question="Where are they written?",
    assemble=assemble,
    figure=write_attribution_figure,
    old_names=("births",),
)
def write_attribution(
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
    >>> prompt = "a big red circle left on a plain blue background"
    >>> result = write_attribution(DiTLens.toy(), prompt, k=4, num_inference_steps=2)
    >>> rest = result.table.loc[result.table["point"] == "rest", "share"]
    >>> bool(rest.abs().max() < 1e-3)  # what no write explains
    True

    The residual stream is a sum, so the token mean of a channel at ``site`` is the sum of the token means that every
    write added. ``share`` is a write's part of it, over all steps: sum_s(write x final) / sum_s(final^2); the parts add
    up to 1, and a write against the final sign is negative. This is the direct contribution: what a write causes by way
    of later blocks is counted there. Points are attn_out, cross_out and mlp_out where a family has them, else "block",
    all that a block adds; "input" is what enters the first block, and "rest" what no write read here explains.

    ``gate`` is |gate| of the channel over the median of that gate's channels, averaged over steps, and ``percentile``
    the share of the other channels whose |gate| is smaller (0.5 by chance; ties count half). The arm "random" has the
    same for other channels, one random map of the set.

    lens: lens on the model.
    prompts: one prompt or several.
    k: number of channels per image, by |mean| at ``site``, averaged over steps.
    seeds: seeds of the noise; every prompt is run with each.
    site: one site at the end of a block.
    steps: denoising steps that count; all by default.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Notes say what a family lacks, and why.
    Sources: direct contributions as in TransformerLens; gate spikes, arXiv 2510.11538.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    end = _find_end(lens, site)
    writes = _list_writes(lens, end)
    gates = _list_gates(lens, end)
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "site": end,
        "steps": str(steps),
        "writes": [asdict(write) for write in writes],
        "gates": gates,
        "lacks": _explain_gaps(lens, writes),
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.channels(lens.anatomy.site(end)),
    }
    terms = sorted({end, *(site for write in writes for site in write.sites)})
    reads = [*make_score_reads(end, "|mean|", steps), Read(terms, reduce="mean", steps=steps, name="mean")]
    if gates:
        reads.append(Read(gates, reduce="mean|x|", steps=steps, name="gate"))
    batches = make_batches(prompts, seeds, batch_size, divide_call(lens, call, len(prompts), images=False))
    meant = find_meant(lens, batches[0].prompts, batches[0].call, end, steps)
    total, images = len(batches), len(prompts) * len(seeds)
    with StudyCheckpoints(
        "write_attribution", settings, lens=lens, total=total, out=out, meant=meant, images=images
    ) as cells:
        for batch in batches:
            cells.get(batch.key, partial(_trace_batch, lens, batch, reads, writes, end, k))
        return cells.result()


@dataclass(frozen=True)
class _Write:
    """One term of the residual stream.

    block: number of the block that adds it; None for the input.
    point: what adds it, such as "mlp_out".
    sites: the site that holds it, or the two whose difference it is (later, earlier).
    """

    block: int | None
    point: str
    sites: tuple[str, ...]


def _find_end(lens: DiTLens, site: Pattern) -> str:
    """The one site that a pattern means; SiteError if it is not the end of a block."""
    names = lens.sites(site)
    found = lens.anatomy.site(names[0])
    if len(names) != 1 or found.block is None or found.point != "resid_post":
        raise SiteError(
            f"{site!r} means {', '.join(names[:4])}. Writes are traced from the end of one block: "
            "name one such as 'blocks.-1.img'."
        )
    return names[0]


def _list_writes(lens: DiTLens, end: str) -> list[_Write]:
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
        points = [p for p in ("attn_out", "attn2_out", "cross_out", "mlp_out", "ip_out") if f"{after}.{p}" in have]
        if {"attn_out", "mlp_out"} <= set(points):
            found += [_Write(block, point, (f"{after}.{point}",)) for point in points]
        else:
            found.append(_Write(block, WHOLE, (after, before)))
    return found


def _list_gates(lens: DiTLens, end: str) -> list[str]:
    """The gates of the blocks up to ``end``, on its stream."""
    last, stream = lens.anatomy.site(end).block or 0, lens.anatomy.site(end).stream
    return [
        site.name
        for site in lens.anatomy.sites
        if site.block is not None and site.block <= last and site.stream == stream and site.point.endswith(".gate")
    ]


def _explain_gaps(lens: DiTLens, writes: Sequence[_Write]) -> list[str]:
    """Why blocks are not split into attention and MLP, and why there are no gates; each reason once."""
    why, stream = lens.anatomy.why_not, writes[-1].sites[0].split(".")[2] if writes else "img"
    reasons = [
        why(write.block, stream, point)
        for write in writes
        if write.block is not None and write.point == WHOLE
        for point in ("attn_out", "mlp_out")
    ]
    gates = ("mod.gate", "mod.attn.gate", "mod.mlp.gate")
    for block in sorted({write.block for write in writes if write.block is not None}):
        whys = [why(block, stream, point) for point in gates]
        reasons += [whys[1]] if all(whys) else []
    return list(dict.fromkeys(reason for reason in reasons if reason))


def _trace_batch(
    lens: DiTLens,
    batch: PromptBatch,
    reads: Sequence[Read],
    writes: Sequence[_Write],
    end: str,
    k: int,
) -> Cell:
    """Runs a batch, and traces the massive channels of its images.

    lens: lens on the model.
    batch: the prompts and their seed.
    reads: what is read.
    writes: the terms of the residual stream.
    end: the site at which channels are massive.
    k: number of channels.
    """
    run, cell = lens.run(batch.prompts, reads, seed=batch.seed, **batch.call), Cell()
    final = run["mean"][end].float().numpy()  # [s, b, d]
    added = np.stack([_token_means(run, write) for write in writes])  # [w, s, b, d]
    sets = select_top_channels(average_scores(run), k, "|mean|")
    for row, (prompt, top) in enumerate(zip(batch.prompts, sets, strict=True)):
        share = shares(added[:, :, row], final[:, row])  # [w, d]
        gates = _measure_gates(run, row)
        for arm in (top, top.random(make_stream(batch.seed, prompt, "random", 0))):
            chosen = list(arm[end])
            about = {"prompt": prompt, "seed": batch.seed, "arm": arm.arm}
            cell.lines += _share_lines(about, chosen, writes, share[:, chosen])
            cell.lines += [
                {**about, "channel": c, **where, "gate": float(gate[c]), "percentile": float(percentile[c])}
                for where, gate, percentile in gates
                for c in chosen
            ]
    return cell


def _token_means(run: Run, write: _Write) -> np.ndarray:
    """The token means of a write, [s, b, d]."""
    values = [run["mean"][site].float().numpy() for site in write.sites]
    return values[0] - values[1] if len(values) == 2 else values[0]


def shares(writes: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The share that every write has in the sum of all: its projection on the sum over s; 0 where the sum is 0.

    >>> shares(np.array([[[1.0]], [[3.0]]]), np.array([[4.0]])).tolist()
    [[0.25], [0.75]]

    writes: [w, s, d].
    final: [s, d], the sum of the writes if none is missing.
    """
    energy = (final.astype(float) ** 2).sum(0)
    along = (writes.astype(float) * final).sum(1)
    return np.divide(along, energy, out=np.zeros_like(along), where=energy > 0)  # [w, d]


def _share_lines(
    about: Mapping[str, Any], chosen: Sequence[int], writes: Sequence[_Write], share: np.ndarray
) -> list[dict[str, Any]]:
    """One row of the table per write and channel, and per channel what no write explains.

    about: columns that all rows share.
    chosen: the channels.
    writes: the terms of the residual stream.
    share: share of every write in every channel, [w, channel].
    """
    terms = [*((write.block, write.point) for write in writes), (None, REST)]
    whole = np.concatenate([share, 1 - share.sum(0, keepdims=True)])
    return [
        {**about, "channel": c, "block": block, "point": point, "share": float(whole[w, i])}
        for w, (block, point) in enumerate(terms)
        for i, c in enumerate(chosen)
    ]


def _measure_gates(run: Run, row: int) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Per gate its block and point, every channel's |gate| over the median, and the percentile of that; [d] each."""
    found = []
    for site, value in run["gate"].items() if "gate" in run else ():
        size = value[:, row].float().mean(0).numpy()
        _, block, _, point = site.split(".", 3)
        median = float(np.median(size))
        gate = size / median if median else np.full(len(size), np.nan)
        found.append(({"block": int(block), "point": point.removeprefix("mod.")}, gate, percentiles(size)))
    return found


def percentiles(values: np.ndarray) -> np.ndarray:
    """For every value the share of the others that are smaller, ties counting half; [d], 0.5 on average.

    >>> percentiles(np.array([3.0, 1.0, 2.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    return (rankdata(values) - 1) / max(len(values) - 1, 1)


def _notes(settings: Mapping[str, Any], summary: pd.DataFrame) -> list[str]:
    notes = [describe_k(settings["k"], settings["width"])]
    top = summary[summary["arm"] == "top"]
    written = top[top["share"].notna() & (top["point"] != REST)].nlargest(3, "share")
    notes.append(f"most of what is massive at {settings['site']} is written by: {_format_points(written, 'share')}")
    rest = float(top.loc[top["point"] == REST, "share"].iloc[0])
    if abs(rest) > 0.01:
        notes.append(f"a share of {rest:.2f} is explained by no write read here")
    if settings["gates"]:
        notes.append(
            "gates in which massive channels stand out most, by the share of channels with a smaller gate: "
            f"{_format_points(top.nlargest(3, 'percentile'), 'percentile')}"
        )
    return [*notes, *settings["lacks"]]


def _format_points(rows: pd.DataFrame, measure: str) -> str:
    return ", ".join(
        f"{point if pd.isna(block) else f'blocks.{block:g} {point}'} ({value:.2f})"
        for block, point, value in zip(rows["block"], rows["point"], rows[measure], strict=True)
    )
