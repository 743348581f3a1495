# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Ablation with fair controls
#
# **If a few massive channels are set to zero, the image breaks. Is that because these channels matter, or because so
# much was removed?**
#
# You will learn
#
# - how to edit activations while the model draws, and how to see what an edit changed;
# - which other explanations the effect of an ablation can have, and the control for each;
# - how to replace one impressive image by a measurement with a confidence interval.

# %%
import dit_lens as dl
from dit_lens import plots, studies
from dit_lens.metrics import rmse
from dit_lens.toys.scenes import recognise_scene, sample_scenes

lens = dl.DiTLens.toy()
lens.pipe.set_progress_bar_config(disable=True)
lens.defaults["num_inference_steps"] = 4  # instead of 12: faster, and the images are hardly worse
circle = "a big red circle left on a checkered blue background"
untouched = lens.run(circle, seed=0).images[0]
massive = lens.massive_channels(circle, k=8, seed=0)

# %% [markdown]
# ## The experiment of the paper
#
# Set the eight channels with the highest scores to zero, in every block and at every step. For comparison, do the same
# with the eight lowest scores, and with eight random channels. The random control replaces every channel by the same
# other one in all blocks: massive sets repeat from block to block, and random channels drawn separately for each block
# would touch many more channels of the residual stream.

# %%
arms = {"top": massive, "bottom": massive.bottom(), "random": massive.random(seed=0)}
runs = {name: lens.run(circle, dl.Zero("blocks.*.img", channels=channels), seed=0) for name, channels in arms.items()}
images = {"untouched": untouched, **{name: run.images[0] for name, run in runs.items()}}
plots.strip(list(images.values()), list(images), title="Eight channels zeroed in every block")

# %% [markdown]
# What exactly was changed? Every run has a receipt: where, how many elements, and their norm before and after.

# %%
runs["top"].receipt.table[["op", "site", "channels", "elements", "before", "after"]].head(4)

# %% [markdown]
# After the first block less is left to remove: values that were removed from the residual stream do not come back, and
# each later block only adds its own part.
#
# Looking at images is not a measurement. Two numbers are: the distance of an image from the untouched one (root mean
# square difference in grey levels, 0 to 255), and what can still be recognised in it. Toy images come from a small
# grammar of scenes, and `recognise_scene` finds the scene that fits an image best; an image that no scene fits is
# unreadable.

# %%
for name, image in images.items():
    print(f"{name:<10} {rmse(image, untouched):5.1f}   {recognise_scene(image)}")

# %% [markdown]
# So far this agrees with the paper's claim. But there are objections.
#
# ## Objection 1: you removed more
#
# The top channels are those with the largest values, so zeroing them removes more than zeroing others does.

# %%
for name, channels in arms.items():
    shares = channels.energy_share().values()
    print(f"{name:<10} has {sum(shares) / len(shares):.1%} of the energy, averaged over blocks")

# %% [markdown]
# A fair control removes as much. `energy_matched` searches for eight *other* channels that together have as much
# energy, and reports if there are none.

# %%
matched = massive.energy_matched(seed=0)
matched.matched, matched.note

# %% [markdown]
# That is a real limit: no other eight channels have so much energy. So match in the other direction: *weaken* the top
# channels only so far that tokens move as much as they do when the energy-matched channels are zeroed. This arm is
# called **attenuated**. If it does more damage than energy-matched, the channels matter beyond their size. Another arm,
# **random-direction**, moves every token as far as zeroing the top channels would, in one random direction.
#
# ## Objection 2: the next normalisation is the reason
#
# Every block begins with a normalisation, which divides a token by its length. If the largest channels are removed, all
# others become larger after it. Perhaps that breaks the image, and not the missing values. Three arms separate these
# explanations. **rescaled** removes nothing, and scales the other channels up as the normalisation would.
# **norm-frozen** zeroes the top channels, and normalisations divide by what they would have divided by before.
# **norm-kept** overwrites the top channels with a fixed pattern of the same statistics, so that the normalisation is
# unchanged.
#
# ## The study
#
# `studies.disruption` runs all these arms with the same prompts and noise. The set of each image comes from its own
# untouched run. `no-op` is an edit without channels: it must not change anything, otherwise no other result is valid.
# Intervals (95 %) are of new prompts and new seeds. Two steps without guidance are enough for the toy, and save time.

# %%
prompts = [scene.caption for scene in sample_scenes(4, seed=0, held_out=True)]
result = studies.disruption(lens, prompts, k=8, draws=1, num_inference_steps=2, true_cfg_scale=1.0)
result.figure()

# %%
summary = result.summary.set_index("arm")
summary[["rmse", "rmse_low", "rmse_high", "fidelity", "energy_share"]].round(2)

# %% [markdown]
# `fidelity` is the share of the prompt's six attributes (size, colour, shape, position, texture, background) that can
# be recognised in the image. Now a rule, fixed before looking at the results: one arm does more damage than another if
# its whole interval is above that of the other.


# %%
def damage(arm, than):
    if summary.rmse_low[arm] > summary.rmse_high[than]:
        return "more"
    return "less" if summary.rmse_high[arm] < summary.rmse_low[than] else "undecided"


for arm, than in [
    ("top", "bottom"),
    ("top", "random"),
    ("top", "energy-matched"),
    ("attenuated", "energy-matched"),
    ("top", "random-direction"),
    ("top", "rescaled"),
]:
    print(f"damage of {arm}, compared with {than}: {damage(arm, than)}")

# %% [markdown]
# Read it line by line. The first two are the paper's claim. The third is a weak test, since energy-matched removes less
# than top does; the fourth is the fair one. The fifth asks whether *any* change of that size breaks the image as well.
# The last asks whether the normalisation is the reason.
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. The checks are folded, since they contain the
# answers.
#
# **Exercise 1.** Every edit takes `steps=`: an index, a list, or a pair of floats for a part of the run. Zero the
# massive channels in the first half of the steps only, and in the second half only. When is the content of the image
# determined?

# %% tags=["solution"]
# Two images (PIL), with seed=0 and all 4 steps.
early = lens.run(circle, dl.Zero("blocks.*.img", channels=massive, steps=(0.0, 0.5)), seed=0).images[0]
late = lens.run(circle, dl.Zero("blocks.*.img", channels=massive, steps=(0.5, 1.0)), seed=0).images[0]

# %% tags=["check"]
assert early is not ..., "Exercise 1 is blank: run dl.Zero with steps=(0.0, 0.5), and keep the image as `early`."
assert late is not ..., "Exercise 1 is incomplete: run dl.Zero with steps=(0.5, 1.0), and keep the image as `late`."
for _image, _part in ((early, (0.0, 0.5)), (late, (0.5, 1.0))):
    _expected = lens.run(circle, dl.Zero("blocks.*.img", channels=massive, steps=_part), seed=0).images[0]
    assert rmse(_image, _expected) < 0.5, f"Not yet: this is not the image with steps={_part}."
print(f"Exercise 1 is solved: {rmse(early, untouched):.0f} grey levels early, {rmse(late, untouched):.0f} late.")

# %% [markdown]
# **Exercise 2.** Make an attenuated arm yourself: `dl.Scale` multiplies channels by `factor`. Zeroing channels moves a
# token by their length, the square root of their energy; scaling them by f moves it by (1 - f) times their length. The
# top channels have a share `large` of the energy. Which factor moves tokens as far as zeroing channels with a share
# `small` does? (At one block: a `Scale` at every block would multiply what the block before had scaled.)

# %%
large = massive.energy_share()["blocks.5.img"]
small = matched.energy_share()["blocks.5.img"]

# %% tags=["solution"]
# The factor for block 5: a number between 0 and 1.
factor = 1 - (small / large) ** 0.5

# %% tags=["check"]
assert factor is not ..., "Exercise 2 is blank: solve (1 - f) · √large = √small for f."
assert abs((1 - factor) * large**0.5 - small**0.5) < 1e-4, (
    f"Not yet: with a factor of {factor:.3f} tokens move by {(1 - factor) * large**0.5:.3f}, not by {small**0.5:.3f}."
)
print(f"Exercise 2 is solved: keep {factor:.0%} of each value.")

# %% [markdown]
# **Exercise 3.** Another control: does the level of the massive channels matter, or their *pattern* over the image?
# `dl.TokenMean` with `keep="mean"` gives every token the mean of the channel, which keeps the level and removes the
# pattern. Apply it to `massive` in all blocks.

# %% tags=["solution"]
# An image (PIL), with seed=0.
flat = lens.run(circle, dl.TokenMean("blocks.*.img", channels=massive, keep="mean"), seed=0).images[0]

# %% tags=["check"]
assert flat is not ..., "Exercise 3 is blank: run dl.TokenMean('blocks.*.img', channels=massive, keep='mean')."
_expected = lens.run(circle, dl.TokenMean("blocks.*.img", channels=massive, keep="mean"), seed=0).images[0]
assert rmse(flat, _expected) < 0.5, "Not yet: this is another image. All blocks, all steps, keep='mean', seed=0?"
print(f"Exercise 3 is solved: without the pattern the image is recognised as: {recognise_scene(flat)}.")

# %% [markdown]
# ## What we know, and what we do not
#
# *The results of the controls* are in the lines above, from this run of the study: four prompts, one seed. With more
# prompts and seeds, in `docs/findings`, the toy needs its massive channels, and the next normalisation is not the
# reason; whether they matter *more than their size explains* is less clear, and a random change of that size does much
# of the damage.
#
# We do not know why. A broken image shows that something was needed. It does not show *what for*: a car does not drive
# without its battery, but the battery does not know the way.
#
# Next: [lesson 4](lesson_4_clusters.ipynb) looks at where in the image the channels are large.
