"""Distances between images, confidence intervals, and judges of images; import everything from here."""

from dit_lens.analysis.metrics.distances import DISTANCES, Distance, distances, mean_abs, psnr, rmse
from dit_lens.analysis.metrics.intervals import Interval, bootstrap_ci, paired_difference_ci, wilson
from dit_lens.analysis.metrics.perceptual import Clip, clip_judge, lpips, ssim

__all__ = [
    "DISTANCES",
    "Clip",
    "Distance",
    "Interval",
    "bootstrap_ci",
    "clip_judge",
    "distances",
    "lpips",
    "mean_abs",
    "paired_difference_ci",
    "psnr",
    "rmse",
    "ssim",
    "wilson",
]
