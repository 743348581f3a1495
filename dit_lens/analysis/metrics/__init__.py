"""Distances between images, confidence intervals, and judges of images; import everything from here."""

from dit_lens.analysis.metrics.distances import DISTANCES, Distance, distances, mean_abs, psnr, rmse
from dit_lens.analysis.metrics.intervals import Interval, mean_ci, paired_difference_ci, wilson
from dit_lens.analysis.metrics.perceptual import Clip, clip_judge, lpips, ssim
from dit_lens.old_names import find_old_names

__all__ = [
    "DISTANCES",
    "Clip",
    "Distance",
    "Interval",
    "clip_judge",
    "distances",
    "lpips",
    "mean_abs",
    "mean_ci",
    "paired_difference_ci",
    "psnr",
    "rmse",
    "ssim",
    "wilson",
]

__getattr__ = find_old_names(__name__, {"bootstrap_ci": "mean_ci"})
