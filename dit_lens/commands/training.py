"""What becomes of massive channels while a toy is trained: studies of the transformers that its training kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from dit_lens import studies
from dit_lens.arguments.checks import checked
from dit_lens.commands.chapters import Size
from dit_lens.commands.page import write_figures
from dit_lens.core.runs.files import check_folder, whole_folder
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.plots import training_figure
from dit_lens.studies.shared.tables import compare_arms, format_summary, summarise
from dit_lens.toys.kept import build_pipeline, list_iterations, load_iteration
from dit_lens.toys.kinds import kind
from dit_lens.toys.scenes import VOCABULARY

MARK = "training.csv"  # what the folder of the page has
FILES = r"index\.md|training\.(csv|webp)"

INTRO = """# Massive channels over training

When do massive channels appear, and when do they begin to matter? Each point is a transformer that a training kept on
its way. Fidelity: attributes right in untouched images. Energy share: of the top channels of every image, mean over
blocks. Damage: by how many grey levels (RMSE) zeroing the top channels changes an image more than zeroing as many
channels of nearly as much energy. IoU: of the top channels' masks with the subject, mean over blocks, and of random
channels; missing where no image can be read back, so that there is no subject yet. Intervals are 95 %.
"""


@checked
def training(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    size: Size = Size(prompts=16, seeds=1, draws=1),  # noqa: B008 frozen
    cells: str | Path | None = None,
) -> Path:
    """Follows massive channels through trainings; returns ``out/index.md``, beside which table and figure lie.

    folders: what ``train-toy --keep-every N --out`` named, one for each training; it may still be in training.
    out: folder of the page, which is replaced as a whole.
    size: how much is drawn at every point.
    cells: folder for finished cells, from which an interrupted call continues, also with transformers kept since.
    """
    runs = {Path(folder).name: Path(folder) for folder in folders}
    if len(runs) < len(folders):
        raise StoreError(f"two of the folders have the same name, by which runs are told apart: {sorted(runs)}.")
    iterations = {name: list_iterations(folder) for name, folder in runs.items()}
    check_folder(Path(out), MARK)
    lines = []
    with tqdm(total=sum(map(len, iterations.values())), desc="transformers") as bar:
        for name, folder in runs.items():
            toy, pipe = build_pipeline(folder)
            for iteration in iterations[name]:
                load_iteration(pipe, folder, iteration)
                lens = DiTLens(pipe, defaults=kind(toy).CALL)
                lens.vocabulary = list(VOCABULARY)
                at = None if cells is None else Path(cells) / name / f"{iteration:06d}"
                lines.append({"run": name, "iteration": iteration, **measure(lens, size, at)})
                bar.update()
    table = pd.DataFrame(lines)
    with whole_folder(out, mark=MARK, own=FILES) as fresh:
        table.to_csv(fresh / MARK, index=False)
        drawn = write_figures({fresh / "training.webp": training_figure(table)})
        (fresh / "index.md").write_text(write_page(table, shown=bool(drawn)), encoding="utf-8")
    return Path(out) / "index.md"


def measure(lens: DiTLens, size: Size, cells: Path | None) -> dict[str, Any]:
    """What the massive channels of one transformer hold, do and show.

    lens: lens on it.
    size: how much is drawn.
    cells: folder for finished cells, or None to keep them in memory.
    """
    shared: dict[str, Any] = {**size.shared, "draws": size.draws}
    damaged = studies.disruption(lens, size.texts, **shared, confounds=False, out=cells and cells / "disruption")
    untouched = damaged.table[damaged.table["arm"] == "untouched"]
    top = damaged.summary.set_index("arm").loc["top"]
    compared = compare_arms(damaged.table[damaged.table["k"] > 0], ["k"], ["rmse"]).set_index("arm")
    line = {"n": int(untouched["prompt"].nunique()), "fidelity": untouched["fidelity"].mean()}
    line |= {f"energy_share{end}": top[f"energy_share{end}"] for end in ("", "_low", "_high")}
    line |= {f"damage{end}": compared.loc["energy-matched", f"rmse_top_minus{end}"] for end in ("", "_low", "_high")}
    return {**line, "rmse": top["rmse"], **_measure_overlap(lens, size, shared, cells, untouched["readable"].any())}


def _measure_overlap(
    lens: DiTLens, size: Size, shared: dict[str, Any], cells: Path | None, readable: bool
) -> dict[str, float]:
    """Mean IoU over blocks, of top and random channels; missing where no image is readable."""
    names = ("iou", "iou_low", "iou_high")
    if not readable:
        return dict.fromkeys((*names, "iou_random"), float("nan"))
    found = studies.organisation(lens, size.texts, **shared, words=[], out=cells and cells / "organisation")
    means = summarise(found.table, ["arm"], ["iou"]).set_index("arm")
    return {**means.loc["top", list(names)], "iou_random": means.loc["random", "iou"]}


def write_page(table: pd.DataFrame, *, shown: bool) -> str:
    """The page in Markdown.

    table: one row for every transformer.
    shown: whether the figure could be drawn.
    """
    text = format_summary(table).astype(str)
    rows = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    lines = [INTRO, *(["![Massive channels over training](training.webp)", ""] if shown else [])]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"All numbers: [{MARK}]({MARK}). Made by `dit-lens training DIR... --out PAGE`.", ""])
