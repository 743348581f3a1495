"""Distances between images and sets of them, intervals, judges of images, masks; import everything from here."""

from dit_lens.analysis.metrics.distances import DISTANCES, Distance, distances, mean_abs, psnr, rmse
from dit_lens.analysis.metrics.intervals import Interval, mean_ci, paired_difference_ci, wilson
from dit_lens.analysis.metrics.perceptual import Clip, clip_judge, lpips, ssim
from dit_lens.analysis.metrics.question import Vqa, vqa_judge
from dit_lens.analysis.metrics.sets import set_distances
from dit_lens.analysis.metrics.vision import birefnet_masks, dino_distance
from dit_lens.old_names import find_old_names

__all__ = [
    "DISTANCES",
    "Clip",
    "Distance",
    "Interval",
    "Vqa",
    "birefnet_masks",
    "clip_judge",
    "dino_distance",
    "distances",
    "lpips",
    "mean_abs",
    "mean_ci",
    "paired_difference_ci",
    "psnr",
    "rmse",
    "set_distances",
    "ssim",
    "vqa_judge",
    "wilson",
]

__getattr__ = find_old_names(__name__, {"bootstrap_ci": "mean_ci"})
