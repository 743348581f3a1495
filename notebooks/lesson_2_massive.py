# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Finding massive channels
#
# **Do a few channels have much larger values than the others, and is this a result of training?**
#
# You will learn
#
# - how *massive activations* are defined, and that the definition is a choice;
# - how to find them, and how to read the plots that show them;
# - three controls for a claim that you found some: an untrained model, other prompts, other definitions.

# %%
import dit_lens as dl
from dit_lens import plots, studies
from dit_lens.toys.scenes import sample_scenes

lens = dl.DiTLens.toy()
lens.pipe.set_progress_bar_config(disable=True)
lens.defaults["num_inference_steps"] = 4  # instead of 12: faster, and the images are hardly worse
circle = "a big red circle left on a checkered blue background"

# %% [markdown]
# ## One number per channel
#
# A block's output is `[token, channel]`: 256 × 128 numbers for each image and step. How large is a channel? The paper
# that these lessons are about ([arXiv 2605.13974](https://arxiv.org/abs/2605.13974)) averages over the image tokens,
# then takes the absolute value. `reduce="|mean|"` computes that during the run, on the device of the tensor, so that
# only 128 numbers per block have to be kept.

# %%
run = lens.run(circle, [dl.Read("blocks.*.img", reduce="|mean|")], seed=0)
scores = {site: run[site].mean((0, 1)) for site in lens.sites("blocks.*.img")}  # over steps and rows
run["blocks.5.img"].shape, scores["blocks.5.img"].shape

# %% [markdown]
# `massive_channels` does the same and keeps the `k` channels with the largest score at every site. You choose `k`, and
# it should always be stated with the width: 8 of the toy's 128 channels are 6 %, 12 of the 3,072 of FLUX.1 are 0.4 %.

# %%
massive = lens.massive_channels(circle, k=8, seed=0)
massive

# %%
plots.channel_spectrum(massive.scores["blocks.5.img"], massive["blocks.5.img"], site="blocks.5.img")

# %% [markdown]
# All blocks at once. A column that is bright in all rows is a channel that is large in all blocks: the residual stream
# passes it from block to block.

# %%
plots.block_channel_map(massive.scores, massive)

# %% [markdown]
# The energy of a channel is the mean of its square over tokens. If all channels were equal, 8 of 128 would have 6 % of
# the energy.

# %%
massive.table.head(8)

# %% [markdown]
# Where in the image are they large? The explorer shows the channels of every block with the highest scores and, for
# comparison, those with the lowest scores and random ones: switch between these groups.

# %%
dl.explore(lens.run(circle, [dl.Read("blocks.*.img")], seed=0))

# %% [markdown]
# ## Control 1: an untrained model
#
# Every list of numbers has a top 8. So do the same with the network as it was *before* training: same architecture,
# same prompt, same noise, random weights.

# %%
untrained = dl.DiTLens.toy(untrained=True)
untrained.pipe.set_progress_bar_config(disable=True)
untrained.defaults["num_inference_steps"] = 4
largest = untrained.massive_channels(circle, k=8, seed=0)
plots.channel_spectrum(largest.scores["blocks.5.img"], largest["blocks.5.img"], site="blocks.5.img, untrained")

# %% [markdown]
# Note the range of the vertical axis: the figure marks eight channels here too, as it would in any list of numbers. Two
# numbers that do not depend on scale are the share of the energy in the top 8, and the top score divided by the median
# score.

# %%
import pandas as pd


def concentration(channels):
    ratios = {site: dl.channels.top_median_ratio(score) for site, score in channels.scores.items()}
    return pd.DataFrame({"energy share": channels.energy_share(), "top/median": ratios})


pd.concat({"trained": concentration(massive), "untrained": concentration(largest)}, axis=1).round(2)

# %% [markdown]
# ## Control 2: other prompts, other noise
#
# Are they *the same* channels everywhere, or does every image have its own? The Jaccard overlap of two sets is the
# share of their union that both have: 1 for equal sets, and about 0.03 for two random sets of 8 out of 128. The study
# compares over prompts, seeds, steps and blocks, and gives the overlap of random sets with each result.

# %%
prompts = [scene.caption for scene in sample_scenes(4, seed=0, held_out=True)]  # combinations held out of training
stability = studies.stability(lens, prompts, k=8, seeds=[0, 1])
stability.figure()

# %%
overlaps = stability.summary.set_index("over").loc[["prompts", "seeds", "steps", "sites"], ["jaccard", "chance"]]
overlaps.groupby(level=0).mean().sort_values("jaccard").round(2)

# %% [markdown]
# So there are two answers. Between two images of the same prompt the set hardly changes. Between prompts it changes
# clearly, though far less than random sets would. "The massive channels of this model" is therefore an average: for a
# single image, use the set of that image.

# %% [markdown]
# ## Control 3: other definitions
#
# "Large" can be defined in other ways: by the mean of the absolute value, the root mean square, or the largest value of
# any token. A channel that is +3 on the subject and -3 on the background has a mean near 0 but large values. The last
# column compares each set with the one we have used so far.

# %%
names = [*dl.channels.SCORES, dl.channels.MEDIAN]
reads = [dl.Read("blocks.5.img", reduce=name, name=name) for name in names]
run = lens.run(circle, reads, seed=0)
dl.channels.definitions({name: run[name]["blocks.5.img"].mean((0, 1)) for name in names}, k=8).round(2)

# %% [markdown]
# The table shows two things. The sets differ: which channels are massive depends on the definition, and those with the
# largest |mean| need not have the most energy. And rules that were made for language models find nothing (the rows with
# k = 0): in language models, a few channels are a thousand times as large as the median.
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. The checks are folded, since they contain the
# answers.
#
# **Exercise 1.** Find the massive channels by hand. `hidden` holds block 5 at all steps; compute the score, average
# over steps, and take the 8 largest with `torch.topk`.

# %%
hidden = lens.run(circle, [dl.Read("blocks.5.img")], seed=0)["blocks.5.img"]  # [step, row, token, channel]

# %% tags=["solution"]
# Channel numbers, the largest score first.
found = hidden.mean(2).abs().mean((0, 1)).topk(8).indices.tolist()

# %% tags=["check"]
assert found is not ..., (
    "Exercise 1 is blank: average `hidden` over tokens, take the absolute value, average over steps."
)
assert list(found) == list(massive["blocks.5.img"]), (
    f"Not yet: {list(found)} is not {list(massive['blocks.5.img'])}. First the mean, then the absolute value."
)
print("Exercise 1 is solved.")

# %% [markdown]
# **Exercise 2.** What share of the energy of block 5 do your channels have? The energy of a channel is the square of
# `hidden`, summed over steps, rows and tokens.

# %% tags=["solution"]
# A number between 0 and 1.
energy = hidden.square().sum((0, 1, 2))
share = (energy[list(massive["blocks.5.img"])].sum() / energy.sum()).item()

# %% tags=["check"]
assert share is not ..., (
    "Exercise 2 is blank: divide the energy of the channels in massive['blocks.5.img'] by that of all."
)
_expected = massive.energy_share()["blocks.5.img"]
assert abs(share - _expected) < 1e-3, f"Not yet: {share:.3f}, but massive.energy_share() is {_expected:.3f}."
print(f"Exercise 2 is solved: {share:.0%} of the energy is in {8 / 128:.0%} of the channels.")

# %% [markdown]
# **Exercise 3.** By how much do the sets of two prompts overlap? Find the massive channels of `triangle` (`k=8`,
# `seed=0`), and average their Jaccard overlap with `massive` over sites. A ChannelSet has the method `jaccard`.

# %%
triangle = "a big yellow triangle right on a plain green background"

# %% tags=["solution"]
# A number between 0 and 1.
overlaps = lens.massive_channels(triangle, k=8, seed=0).jaccard(massive)
overlap = sum(overlaps.values()) / len(overlaps)

# %% tags=["check"]
assert overlap is not ..., "Exercise 3 is blank: call lens.massive_channels for the triangle, then .jaccard(massive)."
assert 0 <= overlap < 1, "Not yet: with an overlap of 1 you have compared the set with itself."
_other = lens.massive_channels(triangle, k=8, seed=0).jaccard(massive)
assert abs(overlap - sum(_other.values()) / len(_other)) < 1e-6, f"Not yet: {overlap:.3f} is not the mean over sites."
print(f"Exercise 3 is solved: the overlap is {overlap:.2f}.")

# %% [markdown]
# ## What we know, and what we do not
#
# *Results of the controls.* The trained toy concentrates its energy in a few channels, and the untrained model does
# not: they are a result of training. Which channels they are hardly depends on the seed, clearly on the prompt, and at
# least as much on the definition. The next lessons use the paper's definition and the set of each image.
#
# We do not know what they are *for*. Large does not mean important: a large channel could be a constant that the next
# normalisation removes. And this is one toy, trained once. `docs/findings` has the same numbers for more prompts.
#
# Next: [lesson 3](lesson_3_breaking.ipynb) removes them and looks at the image.
