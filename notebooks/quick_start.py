# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look inside a Diffusion Transformer
#
# A Diffusion Transformer (DiT) draws by removing noise step by step. At every step the image's tokens pass through a
# stack of blocks; between two blocks they are vectors of a few dozen to a few thousand **channels**. `dit_lens` gives
# those vectors names and lets you read, zero or swap them while the model draws.
#
# The toy used here is a real FLUX, only small: it was trained on drawn scenes and runs on a CPU.

# %%
import dit_lens as dl
from dit_lens import plots, studies

lens = dl.DiTLens.toy()
lens

# %% [markdown]
# The lens says what it found: the family, the blocks, the streams. Names are the same for every model:
# `blocks.{i}.{stream}`. A pattern can be looked at before anything runs.

# %%
lens.sites("blocks[1:3].{img,txt}")

# %%
prompt = "a big red circle left on a checkered blue background"
run = lens.run(prompt, [dl.Read("blocks.*.img", reduce="|mean|")], seed=0)
run

# %% [markdown]
# `reduce="|mean|"` averaged over the image's tokens where the tensor is; what came back is `[step, row, channel]`.
# The channels with the largest values are the *massive* ones.

# %%
massive = lens.massive_channels(prompt, k=8, seed=0)
plots.block_channel_map(massive.scores, massive)

# %% [markdown]
# Does the image need them? Zero them, and for fairness as many others.

# %%
with lens.trace(prompt, seed=0) as t:
    t.zero("blocks.*.img", channels=massive)
with lens.trace(prompt, seed=0) as control:
    control.zero("blocks.*.img", channels=massive.random(seed=0))
plots.strip([run.images[0], t.images[0], control.images[0]], ["untouched", "massive zeroed", "random zeroed"])

# %% [markdown]
# The receipt says exactly what was touched.

# %%
t.receipt.table

# %% [markdown]
# Two prompts can share a batch, and the channels of one can move into the other while both are drawn.

# %%
other = "a big yellow triangle right on a plain green background"
with lens.trace([other, prompt], seed=0) as t:
    t.swap("blocks.*.img", source="row:0", rows=1, channels=massive, strength=0.7, branch="cond")
plots.strip(t.images, ["source", "target with the source's channels"])

# %% [markdown]
# Where in the network does the image come about? Any block's tokens can be read out as if the block were the last:
# rows are steps, columns are blocks.

# %%
lens.read_x0(prompt, seed=0).figure()

# %% [markdown]
# One image proves little. A study runs all arms on the same prompts and seeds and gives intervals:
# `studies.disruption`, `studies.organisation`, `studies.transfer`.

# %%
result = studies.disruption(lens, [prompt, other], k=8, draws=1, num_inference_steps=4)
result.figure()

# %% [markdown]
# The lessons take this apart, one question at a time, with exercises: begin with [lesson 1](lesson_1_names.ipynb).
