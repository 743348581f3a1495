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
# - why "needed" and "movable" are two questions, and which four verdicts they give;
# - how an experiment can show that there is *no* effect, and how many prompts that takes.

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
# ## Two questions, four verdicts
#
# `studies.carrier_or_detail` asks two questions, of the whole channels and of each part.
#
# - **Needed?** Remove the channels: which share of the prompt's attributes is lost?
# - **Movable?** Move the channels from the image of another prompt: which share of *its* attributes arrives? All
#   channels together are the most that can be moved, so this is a share of what they bring, the *ceiling*.
#
# |  | movable | not movable |
# | --- | --- | --- |
# | **needed** | they carry the content | other computations need them; the content is elsewhere |
# | **not needed** | they carry a copy of it | they tune detail, or nothing |
#
# "Removed" means: replaced by their mean over all images of the study. What is the same for every prompt stays, since
# it says nothing about any of them. (`ablation="zero"` takes that too, and mostly destroys the image.)
#
# The rules are fixed *before* the run:

# %%
studies.Thresholds()

# %% [markdown]
# - **yes**: the share is more than `bound` larger than that of *every* control of equal size;
# - **no**: it is *not* more than `bound` larger than that of some control. That has to be shown, too: the whole
#   interval of the difference must lie below `bound`;
# - **undecided**: the interval holds `bound`. A small study mostly says this.
#
# Only `readable` images count, and there is no answer about moving where even all channels gain less than `ceiling`.
# Two steps without guidance are enough for the toy, and save time.

# %%
prompts = [scene.caption for scene in sample_scenes(3, seed=0, held_out=True)]
result = studies.carrier_or_detail(lens, prompts, k=8, draws=1, num_inference_steps=2, true_cfg_scale=1.0)
result.figure()

# %%
result

# %% [markdown]
# Three prompts decide nothing, and the figure says so: the intervals are wide. Before you believe any verdict, check
#
# - **The share of readable images**, in the figure beside each part. An image without any subject has lost all
#   attributes, but not because these channels held them: it is counted as *destroyed*, apart.
# - **The ceiling.** If moving everything gains little, moving eight channels can gain nothing. In FLUX, some of the
#   text reaches the image beside the image stream (it modulates the final norm), so that there are two: of everything,
#   and of all channels alone. Below the second no "no" is said.
# - **The control** named in each row. A row in which other channels reach the same value says nothing about these.
# - **The notes on power**: how large an effect this many prompts can find, and how many prompts a "no" takes.

# %%
# Prompts that differ by 0.4 from one another (standard deviation of the difference to a control):
studies.power(0.4, difference=0.1, prompts=16)

# %% [markdown]
# `needs` prompts tell an effect of 0 from one of 0.1; 16 prompts find differences from `decides` up.
#
# ## Can the test give every answer?
#
# A test that always says "carrier" is useless, and so is one that never decides. The tests of this library plant models
# in which channels carry a known share of the attributes, and count what the verdict says. The page *Carrier or detail*
# of the docs has the figure: with 64 prompts it is right nearly always, with 16 it finds large effects only.
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
# **Exercise 2.** Measure ablation by hand. For the three `prompts`, keep the *residual* only (no means), and count
# which share of all attributes is lost. `Scene.parse(prompt).agreement(recognise_scene(image).scene)` compares;
# untouched images of the toy are right in nearly all. Use `massive` for all prompts.

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
assert abs(lost - (1 - sum(_right) / len(_right))) < 1e-6, f"Not yet: {lost:.3f}. Three images of six attributes each?"
print(f"Exercise 2 is solved: {lost:.0%} of the attributes are lost without the means.")

# %% [markdown]
# **Exercise 3.** Apply the rule yourself. Moving the channels gains 0.55 of the ceiling. The best control gains 0.50:
# the difference is 0.05, and its interval -0.02 to 0.08 (with `bound=0.1`, corrected for the number of controls). Does
# the study answer "yes", "no" or "undecided"?

# %% tags=["solution"]
# A word.
answer = "no"

# %% tags=["check"]
assert answer is not ..., "Exercise 3 is blank: write 'yes', 'no' or 'undecided'."
assert answer != "yes", "Not yet: 0.55 is much, but another set of channels gains nearly as much."
assert answer != "undecided", "Not yet: where does the whole interval of the difference lie?"
assert answer == "no", "Not yet: write 'yes', 'no' or 'undecided'."
print("Exercise 3 is solved: the interval excludes a difference of 0.1, so these channels move no more than others.")

# %% [markdown]
# ## What we know, and what we do not
#
# *The verdict and its controls* are in the table above, for three prompts. What larger studies of the toys say is in
# `docs/findings`. Zeroing the channels of the FLUX toy destroys nearly every image, which says that something of their
# size has to be there, and nothing about what they say; replacing them by their mean leaves about half readable.
#
# We do not know how it is in large models, and a toy cannot tell. What it provides is a test whose errors are known.
#
# Next: [lesson 7](lesson_7_own_model.ipynb) takes all this to a model of your own.
