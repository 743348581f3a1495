# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. A carrier, or a knob for detail?
#
# **Two groups of papers look at the same channels. One says they carry the prompt, the other that they hardly depend on
# it and tune detail. How would you decide?**
#
# You will learn
#
# - how to split a channel into its mean and its pattern, and to test each alone;
# - how four lines of evidence are weighed by rules that are fixed before looking;
# - that "undecided" is an answer, and how to tell an instrument that can say no from one that cannot.

# %%
import pandas as pd

import dit_lens as dl
from dit_lens import plots, studies
from dit_lens.toys.scenes import Scene, describe, sample_scenes

lens = dl.DiTLens.toy()
lens.pipe.set_progress_bar_config(disable=True)
lens.defaults["num_inference_steps"] = 4  # a third of the usual: quick, and images are hardly worse
circle = "a big red circle left on a checkered blue background"
massive = lens.massive_channels(circle, k=8, seed=0)

# %% [markdown]
# ## The two claims
#
# - **Carrier** ([arXiv 2605.13974](https://arxiv.org/abs/2605.13974)): the channels carry what the prompt asks for.
#   Then removing them loses it, and moving them brings it along.
# - **Detail** ([arXiv 2510.11538](https://arxiv.org/abs/2510.11538), [2607.02968](https://arxiv.org/abs/2607.02968)):
#   they are nearly the same for every prompt. Then removing them spoils the finish, and what is drawn stays.
#
# Both may look at the same numbers and mean different parts of them. Over the tokens of an image, a channel has
#
# - a **mean**: one number for the whole image, which could be a mere constant;
# - a **residual**: the pattern around that mean, which could draw something.

# %%
hidden = lens.run(circle, [dl.Read("blocks.5.img")], seed=0)["blocks.5.img"][-1, 0]  # [token, channel]
x = hidden[:, list(massive["blocks.5.img"])]
parts = pd.DataFrame({"mean": x.mean(0), "spread of the residual": x.std(0)}, index=massive["blocks.5.img"])
parts["share of energy in the mean"] = parts["mean"] ** 2 / x.square().mean(0).numpy()
parts.rename_axis("channel").round(2)

# %% [markdown]
# The channels were *chosen* by their mean, so means are large; that the residual is small does not follow. `TokenMean`
# keeps one part and removes the other.

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
    print(f"{name:<14} {describe(image)}")

# %% [markdown]
# ## Four lines of evidence
#
# No single experiment decides. `studies.carrier_or_detail` runs four, on the whole channels and on either part:
#
# | evidence | asks | a carrier | a knob for detail |
# | --- | --- | --- | --- |
# | ablation | which share of the prompt's attributes is lost without it? | many | few |
# | transport | which share is gained where it is moved? | many | few |
# | decoding | can a linear reader tell attributes of new prompts from it? | yes | no |
# | variance | how much of it depends on the prompt? | much | little |
#
# Each has controls of equal size, and the rules are written down *before* the run:

# %%
from dit_lens.studies.parts.evidence import Thresholds

Thresholds()

# %% [markdown]
# From `carrier` on an edit speaks for a carrier, if it also exceeds the strongest control by an interval above 0. Up to
# `detail` (with the end of its interval) it speaks for detail. What lies between speaks for neither. An edit that
# changes the image by less than `change` grey levels is no evidence of anything.

# %%
prompts = [scene.caption for scene in sample_scenes(4, seed=0, held_out=True)]
result = studies.carrier_or_detail(lens, prompts, k=8, seeds=[0], draws=1, num_inference_steps=3)
result.figure()

# %%
result

# %% [markdown]
# The rows "verdict" come last. A part is a carrier only if ablation *and* transport say so and the information is
# there; it is a knob for detail only if both say detail. Before you believe a verdict, look at three things.
#
# - **The column `control`.** A line in which other channels reach as much says nothing of these.
# - **The size of the study.** Four prompts, one seed, one draw of random channels: run it again with other prompts, or
#   with `num_inference_steps=4`, and see whether the verdict stays.
# - **What could not be asked.** With a single seed, all that varies within a step is the prompt's in any channel,
#   so `variance` is missing: it takes two seeds to ask. `decoding` needs prompts that share attributes, and is missing
#   where there are too few.
#
# ## Can the instrument say no?
#
# A test that always says "carrier" is worth nothing. The library's own tests plant both answers: a model whose massive
# channels are made to hold the prompt, and one where they hold detail alone. The study has to tell them apart, and does
# (`tests/studies/test_planted.py`).
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. It is folded, since it knows the answer.
#
# **Exercise 1.** The two parts add up. Compute mean and residual of `x` (`[token, channel]`) over tokens, and give the
# share of its energy (mean square) that is in the mean. The two shares sum to 1, because the residual averages to 0.

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
# share of all attributes is lost. `Scene.parse(prompt).agreement(describe(image).scene)` compares; untouched images
# of the toy are right in nearly all. Use `massive` for all prompts.

# %% tags=["solution"]
# A number between 0 (nothing lost) and 1.
edited = lens.run(prompts, dl.TokenMean("blocks.*.img", channels=massive, keep="residual"), seed=0)
agreed = [
    right
    for prompt, image in zip(prompts, edited.images, strict=True)
    for right in Scene.parse(prompt).agreement(describe(image).scene).values()
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
    for value in Scene.parse(_prompt).agreement(describe(_image).scene).values()
]
assert abs(lost - (1 - sum(_right) / len(_right))) < 1e-6, f"Not yet: {lost:.3f}. Four images of six attributes each?"
print(f"Exercise 2 is solved: {lost:.0%} of the attributes are lost without the means.")

# %% [markdown]
# **Exercise 3.** Apply the rule yourself. Moving the channels gains 0.35 of the source's attributes (interval 0.31 to
# 0.40). The strongest control gains 0.33, and the excess over it is 0.02 (interval -0.04 to 0.08). With the thresholds
# above, does this line say "carrier", "detail" or "neither"?

# %% tags=["solution"]
# A word.
says = "neither"

# %% tags=["check"]
assert says is not ..., "Exercise 3 is blank: write 'carrier', 'detail' or 'neither'."
assert says != "carrier", (
    "Not yet: it is above the threshold, but it does not exceed the control by an interval above 0."
)
assert says != "detail", "Not yet: for detail the whole interval has to lie below the lower threshold."
assert says == "neither", "Not yet: write 'carrier', 'detail' or 'neither'."
print("Exercise 3 is solved: beating a threshold is not enough, the controls have to be beaten as well.")

# %% [markdown]
# ## What we know, and what we do not
#
# *The verdict with its controls* is in the table above, for four prompts. In `docs/findings`, over 16 prompts and two
# seeds, the rules call the toy undecided: removing the channels loses the scene, moving them brings little of it.
# Something that everything else merely needs would look like that, too. If your small run said more, that is what small
# runs do.
#
# We do not know how it is in large models, and one toy cannot tell. What it gives is an instrument whose errors are
# known.
#
# Next: [lesson 7](lesson_7_own_model.ipynb) takes all this to a model of your own.
