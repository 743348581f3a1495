"""How well masks of massive channels fit the subject, by the rule that says what is in front.

    python benchmarks/subject_masks.py [--toys flux flux2 qwen-image sana] [--scenes 40] [--k 12]
    PYTHONPATH=. python benchmarks/subject_masks.py --toys planted

Draws held-out scenes of trained toys, reads the subject back from each image, and prints mean IoUs: of
``lens.subject_mask`` in every polarity, of the better of both clusters of K-means, which takes the truth to know, and
of the true mask on the grid of tokens, which no mask of tokens exceeds. A second table is of ``studies.organisation``,
where each block is parted by itself: the mean over blocks for the top channels and the controls, and the share of the
top channels' masks that miss the subject (IoU below 0.1). "planted" are the models of the tests, whose truth is built
in: the massive channels of one hold the image, and those of the other a constant.
"""

import argparse

import numpy as np
import pandas as pd
import torch

import dit_lens as dl
from dit_lens.analysis.channels import top_channels
from dit_lens.analysis.subjects import distance_from_border, threshold
from dit_lens.studies.shared.arms import add_controls
from dit_lens.toys.scenes import recognise_scene, sample_scenes

RULES = ("distance", "border", "heat", "better cluster")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", nargs="+", default=["flux", "flux2", "qwen-image", "sana"])
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--k", type=int, default=12)
    options = parser.parse_args()
    found = [table for toy in options.toys for table in measure(toy, options.scenes, options.k)]
    for title, number in (("lens.subject_mask", 0), ("studies.organisation, mean over blocks", 1)):
        print(f"\n{title}")
        table = pd.concat([tables[number] for tables in found], ignore_index=True)
        print(table.to_string(index=False, float_format="{:.2f}".format))


def measure(toy, scenes, k):
    """Mean IoUs of one toy, or of both planted models: for each a table of one line, and one of a line an arm."""
    if toy == "planted":
        from tests import planted

        base = dl.DiTLens.toy()
        for kind in (planted.Carrier, planted.DetailOnly):
            lens = dl.DiTLens(planted.pipeline(base, kind), defaults=planted.CALL)
            yield summarise(kind.__name__, lens, planted.SCENES, 16, truths=planted.masks())
        return
    yield summarise(toy, dl.DiTLens.toy(toy), sample_scenes(scenes, seed=500, held_out=True, distinct=True), k)


def summarise(name, lens, scenes, k, truths=None):
    """Both tables of a model. truths: where the subjects are; by default they are read back from the images."""
    lens.pipe.set_progress_bar_config(disable=True)
    whole, blocks = [], []
    for seed, scene in enumerate(scenes):
        reads = [
            dl.Read("blocks.*.img", reduce="|mean|", name="score"),
            dl.Read("blocks.*.img", steps=-1, name="tokens"),
        ]
        run = lens.run(scene.caption, reads, seed=seed)
        truth = recognise_scene(run.images[0]).mask if truths is None else truths[seed]
        whole.append(fit_all(run, truth, k, lens.mask_site()))
        blocks += fit_blocks(run, truth, k, scene.caption, seed)
    table = pd.DataFrame(blocks)
    means = table.groupby("arm", sort=False)[list(RULES)].mean().reset_index()
    top = table.loc[table["arm"] == "top", list(RULES)]
    missed = pd.DataFrame([{"arm": "top, IoU < 0.1", **(top < 0.1).mean()}])
    means = pd.concat([means, missed], ignore_index=True)
    means.insert(0, "toy", name)
    return pd.DataFrame([{"toy": name, "images": len(whole), **pd.DataFrame(whole).mean()}]), means


def fit_all(run, truth, k, site):
    """IoU with the truth by rule: of the distance in all blocks together, of clusters at one site."""
    scores = {name: value.mean((0, 1)) for name, value in run["score"].items()}
    tokens = {
        name: value[-1, 0][:, torch.argsort(-scores[name])[:k]].float().numpy() for name, value in run["tokens"].items()
    }
    found = fit(np.concatenate(list(tokens.values()), 1), tokens[site], run.grid, truth)
    (limit,) = dl.clusters.ious(dl.clusters.to_grid(truth, run.grid)[None], truth[None])[0]
    return {**found, "true tokens": limit}


def fit_blocks(run, truth, k, prompt, seed):
    """IoU with the truth by rule, of the channels of every arm at every block: lines of a table."""
    scores = {name: value[-1, 0].float() for name, value in run["score"].items()}
    energy = {name: value[-1, 0].float().square().mean(0) for name, value in run["tokens"].items()}
    lines = []
    for arm in add_controls([top_channels(scores, energy, k, "|mean|")], 2, seed, [prompt]):
        for site, value in run["tokens"].items():
            x = value[-1, 0][:, list(arm.sets[0][site])].float().numpy()
            lines.append({"arm": arm.name, "site": site, **fit(x, x, run.grid, truth)})
    return lines


def fit(x, clustered, grid, truth):
    """IoU with the truth by rule. x: tokens for the distance; clustered: those for K-means."""
    distance = distance_from_border(x, grid)
    masks = {"distance": distance > threshold(distance)}
    masks |= {one: dl.clusters.segment(clustered, grid, polarity=one).mask for one in ("border", "heat")}
    masks |= {"better cluster": masks["heat"], "complement": ~masks["heat"]}
    found = dict(zip(masks, dl.clusters.ious(np.stack(list(masks.values())), truth[None])[:, 0], strict=True))
    better = max(found["heat"], found.pop("complement"))
    return {**found, "better cluster": better}


if __name__ == "__main__":
    main()
