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
# stack of blocks; between two blocks they are vectors of a hundred to a few thousand **channels**. `dit_lens` gives
# those vectors names and lets you read, zero or swap them while the model draws.
#
# The toy used here is a real but small FLUX: it was trained on drawn scenes and runs on a CPU.

# %%
import dit_lens as dl
from dit_lens import plots, studies

lens = dl.DiTLens.toy()
lens.defaults["num_inference_steps"] = 4  # instead of 12: faster, and the images are hardly worse
lens

# %% [markdown]
# The lens shows what it found: the family, the blocks, the streams. Names are the same for every model:
# `blocks.{i}.{stream}`. `lens.sites` lists what a pattern selects, before anything runs.

# %%
lens.sites("blocks[1:3].{img,txt}")

# %%
prompt = "a big red circle left on a checkered blue background"
run = lens.run(prompt, [dl.Read("blocks.*.img", reduce="|mean|")], seed=0)
run

# %% [markdown]
# `reduce="|mean|"` averages over the image's tokens during the run; the result is `[step, row, channel]`.
# The channels with the largest values are the *massive* ones.

# %%
massive = lens.massive_channels(prompt, k=8, seed=0)
plots.block_channel_map(massive.scores, massive)

# %% [markdown]
# Does the image need them? Zero them and, as a control, as many others.

# %%
with lens.trace(prompt, seed=0) as t:
    t.zero("blocks.*.img", channels=massive)
with lens.trace(prompt, seed=0) as control:
    control.zero("blocks.*.img", channels=massive.random(seed=0))
plots.strip([run.images[0], t.images[0], control.images[0]], ["untouched", "massive zeroed", "random zeroed"])

# %% [markdown]
# The receipt lists exactly what was changed.

# %%
t.receipt.table

# %% [markdown]
# Two prompts can be drawn in one batch, and channels of one can be swapped into the other at every step.

# %%
other = "a big yellow triangle right on a plain green background"
with lens.trace([other, prompt], seed=0) as t:
    t.swap("blocks.*.img", source="row:0", rows=1, channels=massive, strength=0.7, branch="cond")
plots.strip(t.images, ["source", "target with the source's channels"])

# %% [markdown]
# Where in the network is the image formed? The final layers can be applied to the output of any block, as if it were
# the last: rows are steps, columns are blocks.

# %%
lens.read_x0(prompt, seed=0).figure()

# %% [markdown]
# One image proves little. A study runs all arms with the same prompts and seeds and gives confidence intervals:
# `studies.disruption`, `studies.organisation`, `studies.transfer`.

# %%
result = studies.disruption(lens, [prompt, other], k=8, draws=1, num_inference_steps=2)
result.figure()

# %% [markdown]
# The lessons explain this, one question at a time, with exercises: begin with [lesson 1](lesson_1_names.ipynb).
