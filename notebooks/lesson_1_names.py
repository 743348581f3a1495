# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. What a Diffusion Transformer is, and how the lens names its tensors
#
# **A Diffusion Transformer turns noise into an image in a few steps. What does the network compute in between, and how
# can you read it?**
#
# You will learn
#
# - what happens between noise and image: steps, tokens, blocks, the residual stream;
# - how a name such as `blocks.3.img` identifies a tensor, in every model;
# - how to read tensors while a model draws, and how to check that they are the right ones.
#
# You need to know PyTorch, and nothing else. Everything runs on a CPU: the model is a *toy*, a FLUX with 8 blocks of
# 128 channels that was trained on drawn scenes.

# %%
import dit_lens as dl
from dit_lens import plots

lens = dl.DiTLens.toy()
lens.pipe.set_progress_bar_config(disable=True)  # the toy is fast
lens.defaults["num_inference_steps"] = 6  # instead of 12: faster, and the images are hardly worse
lens

# %% [markdown]
# `lens` is a diffusers pipeline (`lens.pipe`) with names for its tensors. It draws the same images as the pipeline.

# %%
circle = "a big red circle left on a checkered blue background"
run = lens.run(circle, seed=0)
plots.strip(run.images, [circle])

# %% [markdown]
# ## From noise to an image
#
# A diffusion model draws step by step. Its input is a noisy image, and it predicts a direction towards a clean image.
# A small step is taken in that direction, then it predicts again. The prediction at any step implies an estimate of the
# finished image, called `x0`. Below are the estimates at all steps; σ (sigma) is the share of noise that is
# still in the input, from 1 down to 0.

# %%
estimates = lens.read_x0(circle, "blocks.-1.img", steps=range(6), seed=0).images["x0"]
labels = [f"step {step}<br>σ {sigma:.2f}" for step, sigma in enumerate(run.sigmas)]
plots.strip([rows[0] for rows in estimates], labels, title="The model's estimate of the finished image")

# %% [markdown]
# The toy's scenes are so simple that its first estimate is already close; later steps add details. The first estimates
# of a large model are blurred.

# %% [markdown]
# ## Inside one step
#
# The network that predicts is a transformer:
#
# ```
# noisy image ─ 16 × 16 patches ─> 256 image tokens ┐
#                                                     ├─ block 0 ─ block 1 ─ ... ─ block 7 ─> direction
# prompt ─────────── text encoder ─>  16 text tokens  ┘
# ```
#
# A token is a vector of 128 **channels**. Each block adds something to every token: attention adds information from
# other tokens, an MLP processes each token separately. The sum is the **residual stream**. Look there first: all
# information that one block passes to later ones is in it.
#
# In this family the first three blocks (*double*) have separate weights for text and image, and the other five
# (*single*) use the same weights for both. The lens numbers all blocks consecutively.

# %% [markdown]
# ## Names
#
# `blocks.{i}.{stream}.{point}`: the block, the stream (`img` for the image's tokens, `txt` for the prompt's), and the
# point inside the block. Without a point it is the residual stream at the output of the block. A name may be a pattern,
# and `lens.sites` lists the sites that it selects, before anything runs.

# %%
lens.sites("blocks[1:3].{img,txt}")

# %%
lens.sites("blocks.1.img.{resid_pre,attn_out,resid_mid,mlp_out,resid_post}")

# %% [markdown]
# Not every block has every point. The lens then explains why, and never returns another tensor instead. In the single
# blocks of FLUX, attention and MLP run in parallel, so there is no point between them:

# %%
try:
    lens.sites("blocks.5.img.resid_mid")
except dl.errors.SiteError as problem:
    print(problem)

# %% [markdown]
# ## Reading
#
# You say before the run what to read, and find it in the run afterwards. A read is `[step, row, token, channel]`; a row
# is one image of the batch. `.grid()` arranges the image tokens as in the image.

# %%
run = lens.run(circle, [dl.Read("blocks.*.img")], seed=0)
hidden = run["blocks.5.img"]
hidden.shape, hidden.grid().shape

# %% [markdown]
# Reading all tokens of all blocks at all steps is fine for a toy. For a large model `Read` takes `channels=`, `steps=`
# and `reduce=`, and `lens.cost` tells beforehand how much memory a read would take.

# %%
lens.cost(circle, dl.Read("blocks.*.img"), seed=0)

# %% [markdown]
# Now explore. Move through steps and blocks, click on a channel, and point at the image. Colours show the value of one
# channel at every token.

# %%
dl.explore(run)

# %% [markdown]
# ## Is it the right tensor?
#
# Always check a tool. A block of the pipeline is an ordinary `nn.Module`, so a forward hook of PyTorch receives its
# output. With guidance the toy calls its transformer twice per step, once with the prompt and once without; a read is
# of the call with the prompt.

# %%
import torch

seen = []


def keep(_module, _inputs, outputs):
    seen.append(outputs[1])  # outputs are the text tokens and the image tokens


handle = lens.pipe.transformer.transformer_blocks[1].register_forward_hook(keep)
plain = lens.pipe(circle, generator=torch.Generator().manual_seed(0), **lens.defaults).images[0]
handle.remove()

with_prompt = torch.stack(seen[::2])
print("calls of the block:", len(seen))
print("same tensor, bit for bit:", torch.equal(with_prompt, run["blocks.1.img"]))
print("same image, bit for bit:", plain.tobytes() == run.images[0].tobytes())

# %% [markdown]
# ## The prompt's tokens
#
# Text passes through the same blocks. On the `txt` stream you can name a word instead of its position.

# %%
print(lens.to_str_tokens(circle))
lens.run(circle, [dl.Read("blocks.3.txt", tokens="circle")], seed=0)["blocks.3.txt"].shape

# %% [markdown]
# ## What does a block know?
#
# A common technique: take the output of some block and apply the final layers to it, as if that block were the last. In
# language models this is the *logit lens*. Rows are steps, columns are blocks, and the last column is the model's own
# estimate.

# %%
lens.read_x0(circle, seed=0).figure()

# %% [markdown]
# Be careful with conclusions. The final projection was trained for the output of the last block only. If an early block
# shows nothing, it may still have the information, in a form that this projection does not read.

# %% [markdown]
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. The checks are folded, since they contain the
# answers.
#
# **Exercise 1.** Write the pattern for the *text* tokens that leave the last two blocks. Negative numbers count from
# the end, also in `[a:b]`.

# %% tags=["solution"]
# A string for lens.sites.
pattern = "blocks[-2:].txt"

# %% tags=["check"]
assert pattern is not ..., (
    "Exercise 1 is blank: write a pattern of sites, such as 'blocks.0.img', in place of the dots."
)
assert lens.sites(pattern) == ["blocks.6.txt", "blocks.7.txt"], f"Not yet: {pattern!r} means {lens.sites(pattern)}."
print("Exercise 1 is solved.")

# %% [markdown]
# **Exercise 2.** Read what attention adds to the image tokens in block 1, at the last step only, from the same noise
# (`seed=0`).

# %% tags=["solution"]
# A tensor of shape [1, 1, 256, 128].
added = lens.run(circle, [dl.Read("blocks.1.img.attn_out", steps=-1)], seed=0)["blocks.1.img.attn_out"]

# %% tags=["check"]
assert added is not ..., (
    "Exercise 2 is blank: call lens.run with a dl.Read of attn_out, and take the read from the run."
)
assert added.shape == (1, 1, 256, 128), f"Not yet: the shape is {list(added.shape)}. Does the read say steps=-1?"
_expected = lens.run(circle, [dl.Read("blocks.1.img.attn_out")], seed=0)["blocks.1.img.attn_out"][-1:]
assert torch.equal(added, _expected), "Not yet: the shape is right, but the values differ. Is it block 1, and seed=0?"
print("Exercise 2 is solved.")

# %% [markdown]
# **Exercise 3.** "Each block adds something to every token": test it. Read `resid_pre`, `attn_out`, `mlp_out` and
# `resid_post` of block 1 in one run, and find the largest deviation from *before + attention + MLP = after*.

# %% tags=["solution"]
# One number: the largest absolute difference over all steps, tokens and channels.
parts = lens.run(circle, [dl.Read("blocks.1.img.{resid_pre,attn_out,mlp_out,resid_post}")], seed=0)
total = parts["blocks.1.img.resid_pre"] + parts["blocks.1.img.attn_out"] + parts["blocks.1.img.mlp_out"]
gap = (total - parts["blocks.1.img"]).abs().max().item()

# %% tags=["check"]
assert gap is not ..., (
    "Exercise 3 is blank: read the four points of block 1, add three of them, and compare with the fourth."
)
assert 0 <= gap < 1e-3, f"Not yet: the sum is off by {gap:.3g}, and only rounding should be left."
print(f"Exercise 3 is solved: the residual stream adds up to within {gap:.1g}.")

# %% [markdown]
# ## What we know, and what we do not
#
# We know that a read is exactly the tensor that PyTorch computes, that reading does not change the image, and that a
# block's output is a sum. All three were checked here; `docs/guarantees.md` lists what else is guaranteed.
#
# We do not know what any channel *means*. In the explorer, some channels seem to show the subject. That is a question,
# not an answer: among 128 channels, 8 blocks and 6 steps, some maps will look meaningful by chance.
#
# Next: [lesson 2](lesson_2_massive.ipynb) asks which channels to look at first.
