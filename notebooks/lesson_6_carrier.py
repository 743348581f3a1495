# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Do the channels carry content, or detail?
#
# **Two groups of papers study the same channels. One says that they carry the content of the prompt, the other that
# they hardly depend on it and control detail. How can you decide?**
#
# You will learn
#
# - how to split a channel into its mean and its pattern, and how to test each alone;
# - how four lines of evidence are combined by rules that are fixed before looking at the results;
# - that "undecided" is a valid answer, and how to check that a test can give every answer.

# %%
import pandas as pd

import dit_lens as dl
from dit_lens import plots, studies
from dit_lens.toys.scenes import Scene, recognise_scene, sample_scenes

lens = dl.DiTLens.toy()
lens.pipe.set_progress_bar_config(disable=True)
lens.defaults["num_inference_steps"] = 4  # instead of 12: faster, and the images are hardly worse
circle = "a big red circle left on a checkered blue background"
massive = lens.massive_channels(circle, k=8, seed=0)

# %% [markdown]
# ## The two claims
#
# - **Carrier** ([arXiv 2605.13974](https://arxiv.org/abs/2605.13974)): the channels carry what the prompt asks for.
#   Then removing them removes the content, and moving them moves it.
# - **Detail** ([arXiv 2510.11538](https://arxiv.org/abs/2510.11538), [2607.02968](https://arxiv.org/abs/2607.02968)):
#   they are nearly the same for every prompt. Then removing them changes details, and the content stays.
#
# Both may refer to different parts of the same numbers. Over the tokens of an image, a channel has
#
# - a **mean**: one number for the whole image, which could be a constant;
# - a **residual**: the pattern around that mean, which could show something.

# %%
hidden = lens.run(circle, [dl.Read("blocks.5.img")], seed=0)["blocks.5.img"][-1, 0]  # [token, channel]
x = hidden[:, list(massive["blocks.5.img"])]
parts = pd.DataFrame({"mean": x.mean(0), "spread of the residual": x.std(0)}, index=massive["blocks.5.img"])
parts["share of energy in the mean"] = parts["mean"] ** 2 / x.square().mean(0).numpy()
parts.rename_axis("channel").round(2)

# %% [markdown]
# The channels were *chosen* by their mean, so their means are large; it does not follow that the residual is small.
# `TokenMean` keeps one part and removes the other.

# %%
edits = {
    "untouched": [],
    "mean kept": dl.TokenMean("blocks.*.img", channels=massive, keep="mean"),
    "residual kept": dl.TokenMean("blocks.*.img", channels=massive, keep="residual"),
    "zeroed": dl.Zero("blocks.*.img", channels=massive),
}
images = {name: lens.run(circle, edit, seed=0).images[0] for name, edit in edits.items()}
plots.strip(list(images.values()), list(images), title="One part of the massive channels removed, or both")

# %%
for name, image in images.items():
    print(f"{name:<14} {recognise_scene(image)}")

# %% [markdown]
# ## Four lines of evidence
#
# No single experiment decides. `studies.carrier_or_detail` runs four, on the whole channels and on each part:
#
# | evidence | question | carrier | detail |
# | --- | --- | --- | --- |
# | ablation | which share of the prompt's attributes is lost without it? | large | small |
# | transport | which share is gained where it is moved? | large | small |
# | decoding | can a linear decoder predict attributes of new prompts from it? | yes | no |
# | variance | how much of its variance depends on the prompt? | much | little |
#
# Each has controls of equal size, and the rules are fixed *before* the run:

# %%
from dit_lens.studies.parts.evidence import Thresholds

Thresholds()

# %% [markdown]
# A value of at least `carrier` is evidence for a carrier, if the difference to the strongest control also has an
# interval above 0. A value whose whole interval is at most `detail` is evidence for detail. Values in between are
# evidence for neither. An edit that changes the image by less than `change` grey levels is no evidence at all.

# %%
prompts = [scene.caption for scene in sample_scenes(4, seed=0, held_out=True)]
result = studies.carrier_or_detail(lens, prompts, k=8, seeds=[0], draws=1, num_inference_steps=3)
result.figure()

# %%
result

# %% [markdown]
# The rows "verdict" come last. A part is a carrier only if ablation *and* transport say so and the information is in
# it; it is detail only if both say detail. Before you believe a verdict, check three things.
#
# - **The column `control`.** A row in which other channels reach the same value says nothing about these channels.
# - **The size of the study.** Four prompts, one seed, one set of random channels: run it again with other prompts, or
#   with `num_inference_steps=4`, and see whether the verdict stays the same.
# - **What could not be tested.** With a single seed, all variance within a step depends on the prompt, in any channel,
#   so `variance` is missing: it needs two seeds. `decoding` needs prompts that share attributes, and is missing if
#   there are too few.
#
# ## Can the test give every answer?
#
# A test that always says "carrier" is useless. The tests of this library include models with known answers: one whose
# massive channels hold the content by construction, and one in which they hold only detail. The study must tell them
# apart, and does (`tests/studies/test_planted.py`).
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. The checks are folded, since they contain the
# answers.
#
# **Exercise 1.** The two parts add up. Compute mean and residual of `x` (`[token, channel]`) over tokens, and the share
# of its energy (mean square) that is in the mean. The two shares sum to 1, because the mean of the residual is 0.

# %% tags=["solution"]
# A number between 0 and 1, over all eight channels together.
in_mean = (x.mean(0).square().mean() / x.square().mean()).item()

# %% tags=["check"]
assert in_mean is not ..., "Exercise 1 is blank: square x.mean(0), average, and divide by the mean square of x."
_residual = ((x - x.mean(0)).square().mean() / x.square().mean()).item()
assert abs(in_mean + _residual - 1) < 1e-4, (
    f"Not yet: {in_mean:.3f} and the residual's {_residual:.3f} should sum to 1."
)
print(f"Exercise 1 is solved: {in_mean:.0%} of the energy is in the means.")

# %% [markdown]
# **Exercise 2.** Measure ablation by hand. For the four `prompts`, keep the *residual* only (no means), and count which
# share of all attributes is lost. `Scene.parse(prompt).agreement(recognise_scene(image).scene)` compares; untouched
# images of the toy are right in nearly all. Use `massive` for all prompts.

# %% tags=["solution"]
# A number between 0 (nothing lost) and 1.
edited = lens.run(prompts, dl.TokenMean("blocks.*.img", channels=massive, keep="residual"), seed=0)
agreed = [
    right
    for prompt, image in zip(prompts, edited.images, strict=True)
    for right in Scene.parse(prompt).agreement(recognise_scene(image).scene).values()
]
lost = 1 - sum(agreed) / len(agreed)

# %% tags=["check"]
assert lost is not ..., (
    "Exercise 2 is blank: run dl.TokenMean(..., keep='residual') on `prompts`, then count agreements."
)
_images = lens.run(prompts, dl.TokenMean("blocks.*.img", channels=massive, keep="residual"), seed=0).images
_right = [
    value
    for _prompt, _image in zip(prompts, _images, strict=True)
    for value in Scene.parse(_prompt).agreement(recognise_scene(_image).scene).values()
]
assert abs(lost - (1 - sum(_right) / len(_right))) < 1e-6, f"Not yet: {lost:.3f}. Four images of six attributes each?"
print(f"Exercise 2 is solved: {lost:.0%} of the attributes are lost without the means.")

# %% [markdown]
# **Exercise 3.** Apply the rule yourself. Moving the channels gains 0.35 of the source's attributes (interval 0.31 to
# 0.40). The strongest control gains 0.33, and the difference is 0.02 (interval -0.04 to 0.08). With the thresholds
# above, is this evidence for "carrier", "detail" or "neither"?

# %% tags=["solution"]
# A word.
evidence = "neither"

# %% tags=["check"]
assert evidence is not ..., "Exercise 3 is blank: write 'carrier', 'detail' or 'neither'."
assert evidence != "carrier", (
    "Not yet: it is above the threshold, but the interval of the difference to the control is not above 0."
)
assert evidence != "detail", "Not yet: for detail the whole interval must be below the lower threshold."
assert evidence == "neither", "Not yet: write 'carrier', 'detail' or 'neither'."
print("Exercise 3 is solved: to exceed a threshold is not enough, the controls must be exceeded as well.")

# %% [markdown]
# ## What we know, and what we do not
#
# *The verdict and its controls* are in the table above, for four prompts. In `docs/findings`, with 16 prompts and two
# seeds, the verdict for the toy is undecided: removing the channels removes the content, but moving them moves little
# of it. Channels that other computations need, without carrying content themselves, would have the same effect. If your
# small run had a clearer result, that is typical of small runs.
#
# We do not know how it is in large models, and a toy cannot tell. What it provides is a test whose errors are known.
#
# Next: [lesson 7](lesson_7_own_model.ipynb) takes all this to a model of your own.
