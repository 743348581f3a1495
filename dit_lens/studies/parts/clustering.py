"""How tokens become a mask of the subject, and how well a mask fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dit_lens.analysis import clusters
from dit_lens.analysis.clusters import DEGENERATE_SHARE, chance_iou, ious, segment, upsample
from dit_lens.analysis.subjects import distance_from_border, threshold
from dit_lens.errors import OpError, check_choice
from dit_lens.studies.parts.saliency import select_largest

POLARITIES = ("distance", *clusters.POLARITIES, "oracle")


class TokenMask(NamedTuple):
    """A mask of the image tokens.

    mask: bool [h, w].
    sizes: number of tokens in each cluster that it was made from, from cold to hot, or from near to far.
    """

    mask: np.ndarray
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ClusteringOptions:
    """How tokens become a mask; raises OpError for options that do not exist.

    n_clusters: number of clusters, at least 2.
    method: how channels are scaled, one of ``clusters.METHODS``.
    polarity: what is in front: "distance", which needs no clusters, "border", "heat" or "oracle".
    """

    n_clusters: int
    method: str
    polarity: str

    def __post_init__(self) -> None:
        choices = (("method", self.method, clusters.METHODS), ("polarity", self.polarity, POLARITIES))
        for name, asked, known in choices:
            check_choice(asked, known, name)
        if self.n_clusters < 2:
            raise OpError(f"n_clusters={self.n_clusters} separates nothing. Choose 2 or more.")
        if self.n_clusters > 2 and self.polarity == "distance":
            raise OpError(
                f"polarity='distance' parts the tokens in two, and n_clusters={self.n_clusters} is of K-means. Pass "
                "polarity='border' with it."
            )

    @property
    def rule(self) -> str:
        """The polarity by which the front is found without the truth."""
        return "border" if self.polarity == "oracle" else self.polarity

    def cluster(self, x: Any, grid: tuple[int, ...]) -> TokenMask:
        """The tokens in front, by K-means, or by their distance from those on the border.

        x: [n, k].
        grid: token grid, (h, w).
        """
        if self.rule == "distance":
            distance = distance_from_border(x, grid, self.method)
            mask = distance > threshold(distance)
            return TokenMask(mask, (int((~mask).sum()), int(mask.sum())))
        found = segment(x, grid, n_clusters=self.n_clusters, method=self.method, polarity=self.rule)
        return TokenMask(found.mask, found.sizes)

    def threshold(self, values: np.ndarray, size: int, grid: tuple[int, ...]) -> TokenMask:
        """The tokens that stand out most in a map.

        values: [n].
        size: number of tokens in front.
        grid: token grid, (h, w).
        """
        return TokenMask(select_largest(values, size, grid, self.rule), (values.size - size, size))

    def measure(self, found: Mapping[tuple[str, int], TokenMask], truth: np.ndarray) -> list[dict[str, Any]]:
        """One row of the table per mask.

        found: (arm, draw) -> mask.
        truth: mask of the subject, bool [H, W].
        """
        masks = np.stack([one.mask for one in found.values()])
        score = score_masks(masks, truth[None], self.polarity)[:, 0]
        front = [int(upsample(mask, truth.shape).sum()) for mask in masks]
        return [
            {
                "arm": arm,
                "draw": draw,
                "iou": float(score[i]),
                "chance": chance_iou(truth, front[i], oracle=self.polarity == "oracle"),
                "size": float(masks[i].mean()),
                "clusters": list(one.sizes),
                "degenerate": float(min(one.sizes) < DEGENERATE_SHARE * masks[i].size),
            }
            for i, ((arm, draw), one) in enumerate(found.items())
        ]


def score_masks(masks: np.ndarray, truths: np.ndarray, polarity: str) -> np.ndarray:
    """IoU of every mask with every truth, [m, t]; of an oracle, that of the mask or its complement if that is larger.

    masks: bool [m, h, w].
    truths: bool [t, H, W].
    polarity: as in :class:`ClusteringOptions`.
    """
    score = ious(masks, truths)
    return np.maximum(score, ious(~masks, truths)) if polarity == "oracle" else score
