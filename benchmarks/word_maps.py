"""How well maps of words fit the subjects that toys draw: mean IoU by method and block.

    python benchmarks/word_maps.py --toys sana flux2 --scenes 32

The true subject is read back from the image; scenes are held out of training. Otsu's threshold cuts each map, the mean
over steps. "mean" is the map averaged over blocks before it is cut.
"""

from __future__ import annotations

import argparse

import numpy as np

import dit_lens as dl
from dit_lens.analysis.clusters import iou, upsample
from dit_lens.toys.scenes import recognise_scene, sample_scenes

METHODS = {"attention": {}, "concept": {"method": "concept"}}


def measure(toy: str, method: str, scenes: int) -> dict[str, np.ndarray]:
    """Block, or "mean" -> IoU of every scene whose image can be read back."""
    lens, found = dl.DiTLens.toy(toy), {}
    for scene in sample_scenes(scenes, seed=0, held_out=True, distinct=True):
        words = scene.shape if method == "attention" else [scene.shape, "background"]
        with lens.quiet():
            maps = lens.word_map(scene.caption, words, seed=0, **METHODS[method])
        truth = recognise_scene(maps.run.images[0])
        if truth.scene is None:
            continue
        for block in (*maps.blocks, None):
            mask = upsample(maps.mask(scene.shape, block=block), truth.mask.shape)
            found.setdefault("mean" if block is None else str(block), []).append(iou(mask, truth.mask))
    return {block: np.array(values) for block, values in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toys", nargs="+", default=["flux", "flux2", "qwen-image", "sana"])
    parser.add_argument("--scenes", type=int, default=32)
    given = parser.parse_args()
    for toy in given.toys:
        for method in METHODS:
            try:
                found = measure(toy, method, given.scenes)
            except dl.errors.SiteError:
                continue
            means = {block: float(values.mean()) for block, values in found.items()}
            best = max((block for block in means if block != "mean"), key=means.__getitem__)
            print(
                f"{toy} {method} n={len(found['mean'])}:",
                {block: round(value, 2) for block, value in means.items()},
                best,
            )
