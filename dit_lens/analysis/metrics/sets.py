"""Distances between two sets of images: FID and KID by torchmetrics, and CMMD."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.analysis.metrics.perceptual import Clip
from dit_lens.arguments.checks import checked
from dit_lens.arguments.images import WORDS, to_image
from dit_lens.arguments.numbers import list_entries
from dit_lens.arguments.paths import expand_user
from dit_lens.errors import OpError, StoreError, check_choice, show

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

MEASURES = ("fid", "kid", "cmmd")
SIGMA, SCALE = 10, 1000  # of CMMD, by its paper
AT_ONCE, SUBSET = 32, 1000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WEIGHTS = "weights-inception-2015-12-05-6cffb8a4.pth"

Images = Sequence[Any] | str | Path


@checked
def set_distances(
    a: Images,
    b: Images,
    measures: Sequence[str] = MEASURES,
    *,
    features: nn.Module | None = None,
    clip: Clip | None = None,
) -> dict[str, float]:
    """How far one set of images lies from another: measure -> distance, about 0 for sets of the same distribution.

        images = dl.studies.Result.load("results/flux/cells/disruption").images
        top, random = ([images[key] for key in images if key.endswith(f"/{arm}")] for arm in ("top", "random"))
        clip = dl.metrics.clip_judge("openai/clip-vit-large-patch14-336")
        dl.metrics.set_distances(top, random, clip=clip)

    - fid: Fréchet distance of the features' normal distributions. Of fewer images than features it says little;
      compare it between sets of equal size alone.
    - kid: squared MMD of the features with a polynomial kernel; unbiased, so it may be below 0. Up to 1,000 images are
      one subset.
    - cmmd: 1,000 times the squared MMD of CLIP's embeddings with a Gaussian kernel of width 10, biased estimate, as
      published (there with CLIP ViT-L/14 at 336 pixels).

    a, b: images, or folders of .png, .jpg or .webp; two or more each.
    measures: some of "fid", "kid" and "cmmd".
    features: function of uint8 images [b, 3, h, w] -> features [b, d], as a torch module; Inception v3 by default,
        which torchmetrics loads with the package torch-fidelity.
    clip: CLIP for "cmmd", see :func:`clip_judge`.
    Raises OpError for sets that cannot be compared or a package that is not installed, and StoreError for a folder
    without images, or weights that could not be loaded.
    Sources: Heusel et al. 2017; Binkowski et al. 2018; Jayasumana et al. 2024 (arXiv 2401.09603).
    """
    for measure in measures:
        check_choice(measure, MEASURES, "measure")
    if "cmmd" in measures and not callable(getattr(clip, "embed", None)):
        raise OpError("cmmd compares embeddings of CLIP. Pass clip=dl.metrics.clip_judge(...), or leave cmmd out.")
    if features is not None and not isinstance(features, torch.nn.Module):
        raise OpError(f"features={show(features)} is no torch module of images [b, 3, h, w] -> features [b, d].")
    first, second = _as_images(a, "a"), _as_images(b, "b")
    found: dict[str, float] = {}
    for measure in measures:
        if measure == "cmmd" and clip is not None:
            found[measure] = _mmd(*(torch.stack([clip.embed(image) for image in some]) for some in (first, second)))
        else:
            found[measure] = _measure(measure, first, second, features)
    return found


def _measure(measure: str, first: Sequence[Image], second: Sequence[Image], features: nn.Module | None) -> float:
    """FID or KID, by torchmetrics."""
    size = min(SUBSET, len(first), len(second))
    # Of one subset that is the whole set, the order in which KID draws it does not matter.
    subsets = 1 if size == len(first) == len(second) else 100
    kind, options = {
        "fid": ("FrechetInceptionDistance", {}),
        "kid": ("KernelInceptionDistance", {"subset_size": size, "subsets": subsets}),
    }[measure]
    metric = _make(measure, kind, {"feature": 2048 if features is None else features, **options})
    for some, real in ((first, True), (second, False)):
        for start in range(0, len(some), AT_ONCE):
            metric.update(_stack(some[start : start + AT_ONCE]), real=real)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs, too
        value = metric.compute()
    return float(value[0] if measure == "kid" else value)


def _make(measure: str, kind: str, options: dict[str, Any]) -> Any:
    """A metric of torchmetrics; what is missing is said."""
    try:
        module = importlib.import_module(f"torchmetrics.image.{measure}")
        return getattr(module, kind)(**options)
    except ImportError as missing:
        name = missing.name or "torch-fidelity"
        raise OpError(
            f"{measure} is computed by torchmetrics from the features of Inception v3, which torch-fidelity loads; "
            f"{name} is not installed: pip install 'dit-lens[perceptual]' torch-fidelity. It downloads {WEIGHTS} once. "
            "Or pass features=, a torch module of your own."
        ) from missing
    except OSError as problem:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise StoreError(
            f"the weights of Inception v3 could not be loaded: {problem}. Put {WEIGHTS}, from the releases of "
            f"github.com/toshas/torch-fidelity, into {folder}, or pass features=, a torch module of your own."
        ) from problem


@torch.no_grad()
def _mmd(x: Tensor, y: Tensor) -> float:
    """CMMD of embeddings [n, d] and [m, d]."""
    x, y = (torch.nn.functional.normalize(one.double(), dim=-1) for one in (x, y))

    def mean_kernel(one: Tensor, other: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one, other).square() / (2 * SIGMA**2)).mean()

    return SCALE * float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def _as_images(given: Images, name: str) -> list[Image]:
    """A set as PIL images, in RGB."""
    if isinstance(given, str | Path):
        folder = Path(expand_user(given))
        entries: list[Any] | None = sorted(file for file in _list_files(folder) if file.suffix.lower() in SUFFIXES)
        if not entries:
            raise StoreError(f"{show(str(folder))} has no images ({', '.join(SUFFIXES)}).")
    else:
        entries = list_entries(given)
    if entries is None or len(entries) < 2:
        count = show(given) if entries is None else f"{len(entries)} image{'s' * (len(entries) != 1)}"
        raise OpError(f"the set {name} is {count}, and a distance of sets takes two images or more, or a folder.")
    found = []
    for i, entry in enumerate(entries):
        image = to_image(entry)
        if image is None:
            raise OpError(f"{name}[{i}] is {show(entry)}, which is no image. Give {WORDS}.")
        found.append(image.convert("RGB"))
    return found


def _list_files(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.glob("*") if file.is_file()]
    except (OSError, ValueError):  # a name that no folder can have
        return []


def _stack(images: Sequence[Image]) -> Tensor:
    """Images as uint8 [b, 3, h, w]."""
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        told = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise OpError(f"images of one set must have one size; these have {told}. Resize them first.")
    return torch.from_numpy(np.stack([np.array(image) for image in images])).movedim(-1, 1)
