# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Where in the image the channels are large
#
# **Do the massive channels show where the subject is, better than other channels, and better than chance?**
#
# You will learn
#
# - how clusters of a few channels become a mask of the image;
# - how a mask is scored, and why every score needs its chance level for comparison;
# - which errors a good-looking mask can hide: centred subjects, the better of two clusters, the best of eight blocks.

# %%
import numpy as np

import dit_lens as dl
from dit_lens import clusters, plots, studies
from dit_lens.toys.scenes import recognise_scene, sample_scenes

lens = dl.DiTLens.toy()
lens.pipe.set_progress_bar_config(disable=True)
lens.defaults["num_inference_steps"] = 4  # instead of 12: faster, and the images are hardly worse
circle = "a big red circle left on a checkered blue background"
massive = lens.massive_channels(circle, k=8, seed=0)
run = lens.run(circle, [dl.Read("blocks.*.img")], seed=0)
image = run.images[0]

# %% [markdown]
# ## One channel as a map
#
# A channel has one value per image token, so it is a map of 16 × 16. Below, the tokens are clustered by the eight
# massive channels of block 5, which this lesson will do step by step; *channel* shows each channel alone.

# %%
dl.explore(run, channels=massive, site="blocks.5.img", overlay="clusters")

# %% [markdown]
# ## Clusters
#
# Eight channels give each token eight numbers. K-means with two clusters groups similar tokens; it uses neither the
# image nor the prompt. Each channel is first scaled to the range from 0 to 1 over the tokens. The cluster with fewer
# tokens on the border of the image is taken as the foreground.

# %%
site = "blocks.5.img"
tokens = run[site][-1, 0]  # [token, channel] at the last step
found = clusters.segment(tokens[:, list(massive[site])], run.grid)
found

# %% [markdown]
# ## Compared with the truth
#
# For a toy the truth is known: `recognise_scene` fits a scene to the image and returns the exact mask of the subject.
# The score is the IoU (intersection over union): 1 if the masks are equal, 0 if they do not overlap.

# %%
truth = recognise_scene(image).mask
plots.cluster_overlay(image, found.mask, truth=truth, title="Clusters of eight massive channels, block 5")

# %% [markdown]
# ## What is a good IoU?
#
# A random mask also has an IoU above 0, and a large one has a higher IoU. `chance_iou` computes the exact chance level
# of a mask with the same number of pixels. Two other baselines are a disc in the centre, since subjects tend to be
# there, and other channels.

# %%
pixels = clusters.upsample(found.mask, truth.shape)
across, down = np.meshgrid(np.arange(64), np.arange(64))
nearest = np.argsort(np.hypot(across - 31.5, down - 31.5).ravel())[: pixels.sum()]  # pixels nearest to the centre
disc = np.zeros(truth.size, bool)
disc[nearest] = True

print(f"massive channels   {clusters.iou(pixels, truth):.2f}")
print(f"chance, same size  {clusters.chance_iou(truth, int(pixels.sum())):.2f}")
print(f"disc, same size    {clusters.iou(disc.reshape(truth.shape), truth):.2f}")

# %%
sets = {"massive": massive[site], "bottom": massive.bottom()[site], "all 128": range(128)}
sets |= {f"random {seed}": massive.random(seed=seed)[site] for seed in range(3)}
masks = {name: clusters.segment(tokens[:, list(channels)], run.grid).mask for name, channels in sets.items()}
plots.overlay_grid(image, masks, truth=truth, title="The same method with other channels, block 5")

# %% [markdown]
# Compare carefully. Random channels may find the subject as well; all channels together often do. A DiT processes the
# image, so the image can be seen in most of its activations. The question is not *whether* massive channels show the
# subject, but whether they show it *better*.
#
# ## Possible error: which of the two clusters?
#
# One of the two clusters is called the foreground. A rule decides, and sometimes it decides wrongly. The published
# reproduction takes the cluster with the larger sum of scaled channels (`polarity="heat"`), which fails where a channel
# is strongly *negative* on the subject; the rule of the border fails where the subject fills the border. If you take
# the cluster that fits better, you have used the truth; then the chance level must be that of the better cluster, too
# (`oracle=True`).

# %%
for name, mask in masks.items():
    pixels = clusters.upsample(mask, truth.shape)
    heat = clusters.segment(tokens[:, list(sets[name])], run.grid, polarity="heat").mask
    fits = {"border": pixels, "heat": clusters.upsample(heat, truth.shape), "the border's other cluster": ~pixels}
    print(f"{name:<9}", *(f"{rule} {clusters.iou(one, truth):.2f}  " for rule, one in fits.items()))

# %% [markdown]
# ## The study
#
# One image proves nothing. `studies.organisation` repeats this for every block, with all controls: other sets of
# channels; maps that do not use massive channels (attention to the subject's word, the norm of each token, the first
# principal component); and baselines that do not use the block (the disc, masks of the noisy latent and of `x0`). Its
# own rule needs no clusters: in front are the tokens that lie far from those on the border (`polarity="distance"`).
# That finds the subject better on every toy, for massive channels and for others. `"border"` and `"heat"` are the rules
# above.
#
# Here it is run twice, with two samples of four prompts. The table below shows why.

# %%
results = {}
for sample in (0, 1):
    prompts = [scene.caption for scene in sample_scenes(4, seed=sample, held_out=True)]
    results[sample] = studies.organisation(lens, prompts, k=8, draws=1, num_inference_steps=2)
results[0].figure()

# %% [markdown]
# One possible error is in the figure itself. It shows eight blocks, and the best of eight is good by chance alone. So
# average over *all* blocks, or choose one beforehand: `lens.mask_site()` is at two thirds of the depth. The study
# itself chooses a block on one half of the prompts and judges it on the other half.

# %%
print(results[0].notes[1])

# %%
import pandas as pd


def scores(summary):
    chosen = summary[summary.block == int(lens.mask_site().split(".")[1])].set_index("arm")[["iou", "low", "high"]]
    every = summary.groupby("arm")[["iou", "chance", "iou_other_prompts"]].mean()
    return every.join(chosen.rename(columns=lambda name: f"{name}, {lens.mask_site()}"))


pd.concat({f"prompts of sample {sample}": scores(result.summary) for sample, result in results.items()}).round(2)

# %% [markdown]
# The last possible error is the sample. Compare `top` with `random` and `all` in either half of the table. If their
# order differs between the halves, a study of one sample would have measured a property of its prompts, not of the
# channels.
#
# `iou_other_prompts` is the score of the same mask with the subjects of the *other* prompts. A mask that fits the
# subjects of all prompts does not depend on the prompt; the score with the mask's own subject should be clearly higher.
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. The checks are folded, since they contain the
# answers.
#
# **Exercise 1.** At which step does the layout appear? Cluster block 5 at *every* step with the channels
# `massive[site]`, and give the IoU with `truth` for each.

# %% tags=["solution"]
# A list of 4 numbers.
by_step = [
    clusters.iou(clusters.upsample(clusters.segment(x[0][:, list(massive[site])], run.grid).mask, truth.shape), truth)
    for x in run[site]
]

# %% tags=["check"]
assert by_step is not ..., "Exercise 1 is blank: loop over run[site], which is [step, row, token, channel]."
assert len(by_step) == 4, f"Not yet: {len(by_step)} numbers, and the run has 4 steps."
_last = clusters.iou(clusters.upsample(found.mask, truth.shape), truth)
assert abs(by_step[-1] - _last) < 1e-6, f"Not yet: the last step should give {_last:.3f}, as above."
print("Exercise 1 is solved:", ", ".join(f"{value:.2f}" for value in by_step))

# %% [markdown]
# **Exercise 2.** Here is a mask that covers the whole image. What is its IoU with `truth`, and what is the chance level
# of a mask of that size?

# %%
everything = np.ones_like(truth)

# %% tags=["solution"]
# A pair of numbers: the IoU, and its chance level.
score = (clusters.iou(everything, truth), clusters.chance_iou(truth, everything.size))

# %% tags=["check"]
assert score is not ..., (
    "Exercise 2 is blank: use clusters.iou and clusters.chance_iou, which takes a number of pixels."
)
assert abs(score[0] - truth.mean()) < 1e-6, "Not yet: the IoU with everything is the subject's share of the image."
assert abs(score[1] - score[0]) < 1e-6, "Not yet: there is only one mask of that size, so the chance level is equal."
print(f"Exercise 2 is solved: an IoU of {score[0]:.2f} that means nothing.")

# %% [markdown]
# **Exercise 3.** Does the mask show *this* subject? Draw `cross`, get its true mask with `recognise_scene`, and compute
# the IoU of the circle's mask `found.mask` with it.

# %%
cross = "a small white cross right on a striped green background"

# %% tags=["solution"]
# The IoU of the circle's mask with the cross's subject.
other_truth = recognise_scene(lens.run(cross, seed=0).images[0]).mask
with_other = clusters.iou(clusters.upsample(found.mask, other_truth.shape), other_truth)

# %% tags=["check"]
assert with_other is not ..., "Exercise 3 is blank: draw `cross` with seed=0, and take recognise_scene(image).mask."
_mask = recognise_scene(lens.run(cross, seed=0).images[0]).mask
_expected = clusters.iou(clusters.upsample(found.mask, _mask.shape), _mask)
assert abs(with_other - _expected) < 1e-6, f"Not yet: {with_other:.3f}. Which mask did you score, and with seed=0?"
print(f"Exercise 3 is solved: {with_other:.2f} with another subject, {_last:.2f} with its own.")

# %% [markdown]
# ## What we know, and what we do not
#
# *The results of the controls* are in the table above: compare `top` with `random`, `energy-matched` and `all`, and all
# of them with `chance` and `iou_other_prompts`, in both samples. Intervals of four prompts are wide, and it would be
# wrong to report only the sample with the preferred result. `docs/findings` says, of more prompts, whether the claim
# holds at a block that other prompts chose; the published measurement on a large model did not show it.
#
# We do not know whether the model *uses* these maps. If the subject can be found in some channels, it does not follow
# that later blocks use it.
#
# Next: [lesson 5](lesson_5_moving.ipynb) moves the channels into another image, which is a test of use.
