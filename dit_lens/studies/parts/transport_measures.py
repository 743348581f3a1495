"""How far a transport went: what changed and where, arms compared at equal distance, and what is only read out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.clusters import upsample
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

MATCHED = ("to_target", "fidelity_source", "fidelity_target")
_CURVE = ["prompt", "seed", "masked", "k", "arm", "draw"]


def interpolate_at_distance(distance: Any, measure: Any, wanted: Any) -> np.ndarray:
    """The value of a measure where a curve first comes as near as is wanted.

    >>> interpolate_at_distance([80.0, 40.0, 0.0], [0.0, 10.0, 60.0], [60.0, 20.0, -1.0]).tolist()
    [5.0, 35.0, nan]

    Returns float64 [w]: linear between the points of the curve, NaN if it never comes so near. Raises OpError for
    curves of unequal length, or without points.

    distance: [m], along the curve, from strength 0 up.
    measure: [m], at the same points.
    wanted: distances, [w].
    """
    near, values, goal = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (distance, measure, wanted))
    if near.shape != values.shape or near.ndim != 1 or not near.size:
        raise OpError(f"A curve is two equal lists of numbers, and got {list(near.shape)} and {list(values.shape)}.")
    reached = near[None, :] <= goal[:, None]  # [w, m]
    after = reached.argmax(1)
    before = np.maximum(after - 1, 0)
    step = near[before] - near[after]
    part = np.divide(near[before] - goal, step, out=np.ones_like(goal), where=step > 0)
    found = values[before] + np.where(after > 0, part, 0.0) * (values[after] - values[before])
    return np.where(reached.any(1), found, np.nan)


def explained_share(change: Any, part: Any) -> float:
    """The share of a change that a part of it explains: 1 - |change - part|^2 / |change|^2.

    >>> explained_share([3.0, 4.0], [3.0, 0.0])
    0.36

    1 if the part is all of it; below 0 if the part leads elsewhere; NaN if nothing changed.
    change, part: arrays of one shape.
    """
    whole, some = (np.asarray(x, dtype=np.float64) for x in (change, part))
    if whole.shape != some.shape:
        raise OpError(f"A change and its part have one shape, and got {list(whole.shape)} and {list(some.shape)}.")
    size = float(np.square(whole).sum())
    return 1 - float(np.square(whole - some).sum()) / size if size else float("nan")


def measure_change(result: Image, untouched: Image, mask: np.ndarray) -> tuple[float, float]:
    """Rmse between two images, inside and outside a mask; NaN if there is no inside or outside.

    >>> from PIL import Image
    >>> black, grey = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), (10, 10, 10))
    >>> measure_change(grey, black, np.array([[True, False]]))
    (10.0, 10.0)

    result: the image after an edit.
    untouched: the image before it.
    mask: mask of the token grid, bool [h, w].
    """
    difference = (np.asarray(result, float) - np.asarray(untouched, float)) ** 2
    where = upsample(mask, difference.shape[:2])
    inside, outside = (float(np.sqrt(difference[part].mean())) if part.any() else np.nan for part in (where, ~where))
    return inside, outside


def add_matched_measures(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every arm measured where it comes as near to the source as the top arm does at that strength.

    Adds ``reached`` (1.0 or 0.0) and ``matched_to_target``, ``matched_fidelity_source``, ``matched_fidelity_target``,
    NaN if the arm never comes so near. An arm without a k of its own is compared with the smallest.

    table: rows of a transport, the untouched ones (strength 0, where every curve begins) included.
    """
    measures = [name for name in MATCHED if name in table]
    start = table[table["arm"] == "untouched"].set_index(["prompt", "seed"])
    moved = table[table["arm"] != "untouched"]
    top = dict(iter(moved[moved["arm"] == "top"].groupby(_CURVE[:4])))
    found = table.assign(reached=np.nan, **{f"matched_{name}": np.nan for name in measures})
    if not top:  # a study that was interrupted early
        return found
    ks = sorted({key[3] for key in top})
    for (prompt, seed, masked, k, *_), points in moved.groupby(_CURVE):
        reference = top.get((prompt, seed, masked, k if k in ks else ks[0]))
        if reference is None:
            continue
        goal = reference.groupby("strength")["to_source"].first()
        rows = points[points["strength"].isin(goal.index)].sort_values("strength")
        near = np.array([start.loc[(prompt, seed), "to_source"], *rows["to_source"]], float)
        wanted = goal[rows["strength"]].to_numpy(float)
        found.loc[rows.index, "reached"] = (near.min() <= wanted).astype(float)
        for name in measures:
            curve = np.array([start.loc[(prompt, seed), name], *rows[name]], float)
            found.loc[rows.index, f"matched_{name}"] = interpolate_at_distance(near, curve, wanted)
    return found
