"""How well masks of massive channels fit the subject, by the rule that says what is in front.

    python benchmarks/subject_masks.py [--toys flux flux2 qwen-image sana] [--scenes 40] [--k 12]

Draws held-out scenes of trained toys, reads the subject back from each image, and prints mean IoUs: of
``lens.subject_mask`` in every polarity, of the better of both clusters of K-means, which takes the truth to know, and
of the true mask on the grid of tokens, which no mask of tokens exceeds.
"""

import argparse

import numpy as np
import pandas as pd
import torch

import dit_lens as dl
from dit_lens.analysis.subjects import distance_from_border, threshold
from dit_lens.toys.scenes import recognise_scene, sample_scenes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", nargs="+", default=["flux", "flux2", "qwen-image", "sana"])
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--k", type=int, default=12)
    options = parser.parse_args()
    table = pd.DataFrame([measure(toy, options.scenes, options.k) for toy in options.toys])
    print(table.to_string(index=False, float_format="{:.2f}".format))


def measure(toy, scenes, k):
    """Mean IoUs of one toy, a line of the table."""
    lens = dl.DiTLens.toy(toy)
    lens.pipe.set_progress_bar_config(disable=True)
    prompts = list(dict.fromkeys(scene.caption for scene in sample_scenes(4 * scenes, seed=500, held_out=True)))
    lines = []
    for seed, prompt in enumerate(prompts[:scenes]):
        reads = [
            dl.Read("blocks.*.img", reduce="|mean|", name="score"),
            dl.Read("blocks.*.img", steps=-1, name="tokens"),
        ]
        run = lens.run(prompt, reads, seed=seed)
        truth = recognise_scene(run.images[0]).mask
        lines.append(fits(run, truth, k, lens.mask_site()))
    fitted = pd.DataFrame(lines).mean()
    return {"toy": toy, "images": len(lines), **fitted}


def fits(run, truth, k, site):
    """IoU with the truth by rule."""
    scores = {name: value.mean((0, 1)) for name, value in run["score"].items()}
    tokens = {
        name: value[-1, 0][:, torch.argsort(-scores[name])[:k]].float().numpy() for name, value in run["tokens"].items()
    }
    distance = distance_from_border(np.concatenate(list(tokens.values()), 1), run.grid)
    clustered = {one: dl.clusters.segment(tokens[site], run.grid, polarity=one).mask for one in ("border", "heat")}
    masks = {
        "distance": distance > threshold(distance),
        **clustered,
        "better cluster": clustered["heat"],
        "complement": ~clustered["heat"],
        "true tokens": dl.clusters.to_grid(truth, run.grid),
    }
    found = dict(zip(masks, dl.clusters.ious(np.stack(list(masks.values())), truth[None])[:, 0], strict=True))
    found["better cluster"] = max(found["better cluster"], found.pop("complement"))
    return found


if __name__ == "__main__":
    main()
