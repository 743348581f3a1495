"""How far a direction from pairs of prompts turns subjects blue, beside a random one and beside the prompt itself.

    python benchmarks/steering.py [--toy flux2] [--pairs 12] [--scenes 12]

Pairs differ in the subject's colour, red to blue; images of held-out scenes with red subjects are read back. "blue":
share of images whose subject is blue; "readable"; "kept": whose shape and position are those of the prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import dit_lens as dl
from dit_lens.toys.scenes import Scene, recognise_scene, sample_scenes

if TYPE_CHECKING:
    from PIL.Image import Image

SITES = ("blocks.2.img", "blocks[1:3].{img,txt}", "blocks.*.img")
STRENGTHS = (0.5, 1, 2, 4)


def red_scenes(count: int, seed: int, *, held_out: bool) -> list[Scene]:
    """Scenes with a red subject, on a ground that is neither red nor blue."""
    some = sample_scenes(10 * count, seed=seed, held_out=held_out, distinct=True)
    kinds = dict.fromkeys(replace(scene, colour="red") for scene in some if scene.background not in ("red", "blue"))
    return list(kinds)[:count]


def shares(images: Sequence[Image], scenes: Sequence[Scene]) -> dict[str, float]:
    """What was read back of images."""
    found = [recognise_scene(image).scene for image in images]
    both = [(one, scene) for one, scene in zip(found, scenes, strict=True) if one is not None]
    kept = sum((one.shape, one.position) == (scene.shape, scene.position) for one, scene in both)
    blue = sum(one.colour == "blue" for one, _ in both)
    return {name: round(n / len(scenes), 2) for name, n in (("blue", blue), ("readable", len(both)), ("kept", kept))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", default="flux2")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=12)
    given = parser.parse_args()
    lens, call = dl.DiTLens.toy(given.toy), {"num_inference_steps": 6}
    lens.pipe.set_progress_bar_config(disable=True)
    pairs = [(s.caption, replace(s, colour="blue").caption) for s in red_scenes(given.pairs, 0, held_out=False)]
    scenes = red_scenes(given.scenes, 1, held_out=True)
    prompts = [scene.caption for scene in scenes]
    edited = [replace(scene, colour="blue").caption for scene in scenes]
    print("the prompt says blue", shares(lens.run(edited, seed=5, **call).images, scenes))
    for sites in SITES:
        steering = dl.Steering.from_pairs(lens, pairs, sites, **call)
        for strength in STRENGTHS:
            for name, one in (("direction", steering), ("random", steering.randomised(1))):
                images = lens.run(prompts, one.op(strength), seed=5, **call).images
                print(sites, f"x{strength:g}", name, shares(images, scenes))


if __name__ == "__main__":
    main()
