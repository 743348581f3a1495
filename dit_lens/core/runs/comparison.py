"""Two runs side by side: how far apart their images and reads are, and what differed in how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.distances import read_distances, relative_distance
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from dit_lens.core.runs.run import Run


@dataclass(frozen=True)
class Comparison:
    """How two runs compare.

    a, b: the runs.
    differences: (where, value in a, value in b) for everything in spec and provenance that is not equal.
    table: per image rmse (0 to 255) and psnr (dB; infinite when equal).
    reads: site -> relative L2 distance of what both runs have read there: the same steps, branches, rows, tokens and
        channels by their numbers, whatever the order in which they were named.
    latents: relative L2 distance of the latents, where both runs have them.
    not_compared: site -> what of its reads has no counterpart, and why.
    """

    a: Run
    b: Run
    differences: tuple[tuple[str, Any, Any], ...]
    table: pd.DataFrame
    reads: dict[str, float]
    latents: float | None = None
    not_compared: dict[str, str] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether every image, every number of the latents, and every number that both runs have read is equal."""
        return self._draws_the_same and not any(self.reads.values())

    @property
    def _draws_the_same(self) -> bool:
        return bool((self.table["rmse"] == 0).all()) and self.latents in (None, 0.0)

    @property
    def images(self) -> Image:
        """Rows of a above rows of b."""
        from PIL import Image

        rows = [run.images for run in (self.a, self.b)]
        width, height = (
            max(image.width for row in rows for image in row),
            max(image.height for row in rows for image in row),
        )
        sheet = Image.new("RGB", (width * max(map(len, rows)), height * 2))
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                sheet.paste(image, (x * width, y * height))
        return sheet

    def __repr__(self) -> str:
        lines = [f"  {where}: {_short(one)} | {_short(other)}" for where, one, other in self.differences]
        what = "images" if len(self.table) else "latents"
        if self._draws_the_same:
            head = f"identical {what}"
        elif len(self.table):
            head = f"mean rmse {self.table['rmse'].mean():.3g} of 255 over {len(self.table)} images"
        else:
            head = f"latents {self.latents:.3g} apart (relative L2 distance)"
        if apart := {site: distance for site, distance in self.reads.items() if distance}:
            furthest = max(apart, key=lambda site: apart[site])
            head += f", reads apart at {len(apart)} of {len(self.reads)} (most at {furthest}: {apart[furthest]:.3g})"
        odd = [f"  {site} is not compared: {why}" for site, why in self.not_compared.items()]
        return "\n".join([f"Comparison: {head}, {len(lines)} differences in how they were made", *lines, *odd])


@checked
def compare(a: Run, b: Run) -> Comparison:
    """Compares two runs, image by image, or by their latents where those were asked for.

    Raises OpError when they do not have the same number of images of the same size, or latents of other shapes.
    """
    import pandas as pd

    from dit_lens.analysis.metrics import psnr, rmse

    if len(a.images) != len(b.images) or any(
        one.size != other.size for one, other in zip(a.images, b.images, strict=False)
    ):
        sizes = [f"{len(run.images)} of {run.images[0].size if run.images else 'none'}" for run in (a, b)]
        raise OpError(
            f"only runs with equally many images of equal size can be compared: {sizes[0]} against {sizes[1]}."
        )
    lines = [
        {"image": i, "rmse": float(rmse(one, other)), "psnr": float(psnr(one, other))}
        for i, (one, other) in enumerate(zip(a.images, b.images, strict=True))
    ]
    found = [*_differences("spec", a.spec, b.spec), *_differences("provenance", a.provenance, b.provenance)]
    table = pd.DataFrame(lines, columns=["image", "rmse", "psnr"])
    reads, odd = read_distances(a.readings, b.readings)
    return Comparison(a, b, tuple(found), table, reads, _latent_distance(a, b), odd)


def _latent_distance(a: Run, b: Run) -> float | None:
    """How far latents lie apart, 0 only where they are equal; None where there are none."""
    if a.latents is None and b.latents is None:
        return None
    if a.latents is None or b.latents is None or a.latents.shape != b.latents.shape:
        shapes = ["none" if run.latents is None else list(run.latents.shape) for run in (a, b)]
        raise OpError(f"only runs with latents of equal shape can be compared: {shapes[0]} against {shapes[1]}.")
    return relative_distance(a.latents, b.latents)


def _differences(where: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [line for key in keys for line in _differences(f"{where}.{key}", a.get(key), b.get(key))]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            line
            for i, (one, other) in enumerate(zip(a, b, strict=True))
            for line in _differences(f"{where}[{i}]", one, other)
        ]
    return [] if a == b else [(where, a, b)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
