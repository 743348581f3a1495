"""The images and places in which features of a dictionary are strongest.

Letters: s step, b row, h w token grid, f feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dit_lens.analysis.clusters import upsample
from dit_lens.arguments.checks import checked
from dit_lens.arguments.lists import as_prompts, as_seeds
from dit_lens.arguments.saving import saved_by
from dit_lens.core.request.ops import ReadFeatures
from dit_lens.errors import OpError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from PIL.Image import Image

    from dit_lens.core.request.dictionaries import Dictionary
    from dit_lens.core.request.ops import Steps
    from dit_lens.core.session import Session

SHADE = 0.25  # how bright an image stays where a feature is not


@dataclass(frozen=True)
class TopImage:
    """One image in which a feature is strong.

    prompt, seed: what it was drawn from.
    value: the largest activation of the feature, at ``step`` and at the token (row, column) ``place``.
    active: the share of tokens in which it is active at that step.
    heat: its activations at that step [h, w].
    image: the image.
    """

    prompt: str
    seed: int
    value: float
    step: int
    place: tuple[int, int]
    active: float
    heat: np.ndarray = field(repr=False)
    image: Image = field(repr=False)


@dataclass(frozen=True)
class TopImages:
    """For each feature the images in which it is strongest, the strongest first.

    found: feature -> images; none where it was active in no image.
    site: where it was read.
    images: how many images were drawn.
    """

    found: dict[int, list[TopImage]]
    site: str
    images: int

    save = saved_by("found.table.to_csv(file) has its numbers, found.figure().write_html(file) its images.")

    def __getitem__(self, feature: int) -> list[TopImage]:
        if feature not in self.found:
            raise OpError(f"there is no feature {feature!r} here.{nearest(str(feature), map(str, self.found))}")
        return self.found[feature]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each feature and image: rank, prompt, seed, value, step, place (h, w), share of active tokens."""
        import pandas as pd

        lines = [
            (feature, rank, one.prompt, one.seed, one.value, one.step, *one.place, one.active)
            for feature, some in self.found.items()
            for rank, one in enumerate(some)
        ]
        columns = ["feature", "rank", "prompt", "seed", "value", "step", "h", "w", "active"]
        return pd.DataFrame(lines, columns=columns)

    @checked
    def figure(self, features: int | Sequence[int] | None = None) -> go.Figure:
        """A sheet: a row of images for each feature, dark where the feature is not.

        features: those to show; all that were active by default.
        """
        from PIL import Image

        from dit_lens.plots import sheet

        asked = [features] if isinstance(features, int) else self.found if features is None else features
        shown = {feature: self[feature] for feature in asked if self[feature]}
        if not shown:
            raise OpError("none of these features was active in any image. Draw more prompts, or choose others.")
        width = max(map(len, shown.values()))
        blank = Image.new("RGB", next(iter(shown.values()))[0].image.size, "white")
        rows = [[_light(one) for one in some] + [blank] * (width - len(some)) for some in shown.values()]
        labels = [f"feature {feature}, up to {some[0].value:.3g}" for feature, some in shown.items()]
        facts = f"{self.site}; the strongest of n = {self.images} images, dark where the feature is not"
        columns = [str(rank) for rank in range(1, width + 1)]
        return sheet(rows, labels, columns, title="Where features are strongest", subtitle=facts)


def _light(one: TopImage) -> Image:
    """An image in the light of a feature's activations."""
    from PIL import Image

    heat = one.heat / max(one.heat.max(), np.finfo(np.float32).tiny)
    light = upsample(heat, (one.image.height, one.image.width))
    pixels = np.asarray(one.image.convert("RGB"), np.float32)
    return Image.fromarray((pixels * (SHADE + (1 - SHADE) * light[..., None])).astype(np.uint8))


def find_top_images(
    lens: Session,
    dictionary: Dictionary,
    prompts: str | Sequence[str],
    site: str,
    *,
    features: int | Sequence[int],
    k: int,
    steps: Steps,
    seeds: int | Sequence[int],
    batch_size: int,
    **call: Any,
) -> TopImages:
    """See :meth:`dit_lens.DiTLens.top_images`."""
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    chosen = dictionary.choose(features)
    if k < 1 or batch_size < 1:
        raise OpError(f"top_images: k={k} and batch_size={batch_size} are to be 1 or more.")
    if len(names := lens.sites(site)) != 1 or ".txt" in names[0]:
        raise OpError(f"top_images looks at one site of image tokens, and {site!r} means {', '.join(names[:4])}.")
    read = ReadFeatures(names[0], dictionary, chosen, steps=steps)
    images = [(prompt, seed) for prompt in prompts for seed in seeds]
    found: dict[int, list[TopImage]] = {feature: [] for feature in chosen}
    with lens.quiet():
        for start in tqdm(range(0, len(images), batch_size), desc="images"):
            some = images[start : start + batch_size]
            run = lens.run([prompt for prompt, _ in some], read, seed=[seed for _, seed in some], **call)
            if not run.images:
                raise OpError("top_images shows images, and this call keeps latents. Leave output_type= out.")
            heat = run.readings[0][names[0]].grid()  # [s, b, h, w, f]
            if heat.ndim != 5:
                raise OpError("top_images shows images, and this pipeline draws videos.")
            for row, (prompt, seed) in enumerate(some):
                for number, feature in enumerate(chosen):
                    one = _describe(heat[:, row, ..., number], run.readings[0].steps, run.images[row], prompt, seed)
                    if one is not None:
                        found[feature] = sorted([*found[feature], one], key=lambda top: -top.value)[:k]
    return TopImages(found, names[0], len(images))


def _describe(heat: Tensor, steps: Sequence[int], image: Image, prompt: str, seed: int) -> TopImage | None:
    """What a feature does in one image; None where it is not active.

    heat: its activations [s, h, w].
    steps: the steps that they are of.
    image, prompt, seed: of the image.
    """
    s, h, w = (int(i) for i in np.unravel_index(int(heat.argmax()), heat.shape))
    value = float(heat[s, h, w])
    if value <= 0:
        return None
    active = float((heat[s] > 0).float().mean())
    return TopImage(prompt, seed, value, steps[s], (h, w), active, heat[s].to(torch.float32).numpy(), image)
