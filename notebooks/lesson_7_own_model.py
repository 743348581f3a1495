# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Your own model, on your own hardware
#
# **All of this was done with a toy. What changes with a FLUX of twelve billion parameters, on a GPU that is too small
# for it?**
#
# You will learn
#
# - how to use a lens with any diffusers pipeline, with a LoRA, quantised or offloaded;
# - how to find out what fits into memory before loading, and how much a read takes before running;
# - how to look into a model on a server, and how to save an experiment as data, so that another machine can repeat it.
#
# No GPU is needed here: a small FLUX is saved to a folder, and then loaded like any other model. What needs a GPU is
# shown as text.

# %%
import json
import tempfile
from pathlib import Path

import dit_lens as dl
from dit_lens.metrics import rmse

circle = "a big red circle left on a checkered blue background"
home = Path(tempfile.mkdtemp())
folder = home / "my-flux"
toy = dl.DiTLens.toy()
toy.pipe.set_progress_bar_config(disable=True)
toy.defaults["num_inference_steps"] = 4  # instead of 12: faster, and the images are hardly worse
toy.pipe.save_pretrained(folder)
sorted(path.name for path in folder.iterdir())

# %% [markdown]
# ## Will it fit?
#
# `recommend` reads configurations and the headers of weight files, loads nothing, and lists the ways to load the
# pipeline into a given number of gigabytes, the fastest first. `exact` says whether the activations are those of the
# bf16 weights. For FLUX.1-dev on the Hub, call `dl.recommend("black-forest-labs/FLUX.1-dev", gb=24)`.

# %%
dl.recommend(folder, gb=24)

# %% [markdown]
# ## Loading
#
# `from_pretrained` passes everything to diffusers. Or set the pipeline up yourself, and wrap it:
#
# ```python
# pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
# pipe.load_lora_weights("lora.safetensors")
# pipe.enable_model_cpu_offload()
# lens = dl.DiTLens(pipe)
# ```
#
# The lens identifies the transformer by its class and compares its structure with the expected one. The line `checks`
# shows what was compared.

# %%
lens = dl.DiTLens.from_pretrained(folder)
lens.pipe.set_progress_bar_config(disable=True)
lens

# %% [markdown]
# The folder has the weights, but not the default arguments of the toy: its image size, steps and guidance were the
# lens's `defaults`. Without them this FLUX would draw images of a size that it was not trained for. Set your own
# defaults, so that all calls of an experiment agree.

# %%
lens.defaults = dict(toy.defaults)
lens.defaults

# %% [markdown]
# Does everything work, with this model, on this machine? The doctor draws two steps with and without a lens, compares,
# and looks for massive channels. On the command line it is `dit-lens doctor my-flux`.

# %%
from dit_lens.commands.doctor import examine

examine(lens)

# %% [markdown]
# ## Encode prompts first, then release the text encoders
#
# The text encoders of FLUX.1 take two fifths of the memory of its transformer, and are needed only once. `encode`
# converts prompts to embeddings; with `release=True` the encoders are removed from memory.

# %%
before = lens.run(circle, seed=0)
texts = lens.encode(circle, release=True)
after = lens.run(**texts, seed=0)
print("same image, bit for bit:", before.images[0].tobytes() == after.images[0].tobytes())
print("text encoder:", lens.pipe.text_encoder)

# %% [markdown]
# In such a run, words of a prompt cannot be found (`tokens="circle"`); token indices still work.
#
# ## How much memory a read takes
#
# Reads are kept in the computer's memory. `lens.cost` computes their size beforehand, and a run that would not fit
# raises an error. All hidden states of FLUX.1 at 1024 × 1024, 57 blocks and 28 steps, would take about 40 GB; the means
# of all its channels take about 20 MB. Here is the same comparison for the small one.

# %%
lens.cost(**texts, ops=[dl.Read("blocks.*.img")], seed=0)

# %%
cheap = [dl.Read("blocks.*.img", reduce="|mean|", name="spectrum"), dl.Read("blocks.5.img", channels=[12, 74])]
lens.cost(**texts, ops=cheap, seed=0)

# %% [markdown]
# `batch_size=` splits a run into batches; if a GPU runs out of memory, the batch is halved and started again.
#
# ## A LoRA
#
# You may load, unload or fuse one at any time: the lens checks the model before each run. A LoRA changes activations,
# so find the massive channels again. The example uses a random LoRA on a part of the attention.

# %%
original = lens.massive_channels(None, k=8, **texts, seed=0)
try:
    from peft import LoraConfig
except ImportError:
    print("LoRA needs another package: pip install peft")
else:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k"], init_lora_weights=False)
    lens.pipe.transformer.add_adapter(config)
    tuned = lens.massive_channels(None, k=8, **texts, seed=0)
    print({site: round(overlap, 2) for site, overlap in original.jaccard(tuned).items()})
    lens.pipe.transformer.delete_adapters("default")

# %% [markdown]
# Check the same after quantisation: `original.jaccard(...)` works for int8 or NF4 weights as well.
#
# ## Runs on other machines
#
# If the model is on an nnsight server, `dl.DiTLens.remote(name, host="http://...")` makes a lens without its weights:
# runs are planned and checked here and executed there, and a run is returned as if it had been made here
# (`docs/how-to/remote.md`). This lesson has no server, but everything before the request works without one:

# %%
remote = dl.DiTLens.remote(dl.toys.path("flux"), host="http://127.0.0.1:9")
remote.cost("a big red circle left on a plain blue background", [dl.Read("blocks.*.img", reduce="|mean|")])

# %% [markdown]
# An experiment can also be saved as data. Ops can be converted to JSON and back.

# %%
massive = toy.massive_channels(circle, k=8, seed=0)
ops = [dl.Zero("blocks.*.img", channels=massive, steps=(0.5, 1.0)), dl.Read("blocks.*.img", reduce="|mean|")]
as_text = json.dumps([dl.ops.to_json(op) for op in ops])
print(as_text[:200], "...")

# %% [markdown]
# A run is saved as safetensors, JSON and PNG, with everything that is needed to repeat it. It can be loaded without a
# model: for example on a laptop, after it was made on a server.

# %%
run = toy.run(circle, ops, seed=0)
run.save(home / "run")
loaded = dl.Run.load(home / "run")
loaded

# %% [markdown]
# `rerun` repeats it on a lens and lists everything that differs: images, versions, device, model. Images are equal bit
# for bit on the same machine, but not on different machines; `docs/guarantees.md` says what to expect.

# %%
loaded.rerun(toy)

# %% [markdown]
# A Python function (`dl.Apply`) cannot be saved as data; a run that has one raises an error when it is repeated.
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. The checks are folded, since they contain the
# answers.
#
# **Exercise 1.** You need the |mean| of all channels of every block at every step, in less than 100 kB. Write the read.

# %% tags=["solution"]
# A dl.Read of all blocks and steps that takes less than 100 kB.
small = dl.Read("blocks.*.img", reduce="|mean|")

# %% tags=["check"]
assert small is not ..., "Exercise 1 is blank: a dl.Read('blocks.*.img', ...) that is reduced over tokens."
_cost = toy.cost(circle, small, seed=0)
assert _cost.bytes < 100_000, f"Not yet: it would take {_cost.bytes / 1000:.0f} kB. What does reduce= do?"
_found = toy.run(circle, small, seed=0)
assert _found["blocks.7.img"].shape == (4, 1, 128), "Not yet: every block, every step and all 128 channels are needed."
print(f"Exercise 1 is solved: {_cost.bytes / 1000:.0f} kB.")

# %% [markdown]
# **Exercise 2.** Convert `as_text` back to ops, as another machine would, and run them.

# %% tags=["solution"]
# A run of `circle` with seed=0.
again = toy.run(circle, [dl.ops.from_json(data) for data in json.loads(as_text)], seed=0)

# %% tags=["check"]
assert again is not ..., "Exercise 2 is blank: json.loads gives a list; dl.ops.from_json makes an op of each item."
assert rmse(again.images[0], run.images[0]) == 0, "Not yet: the image differs from that of `run`."
print("Exercise 2 is solved: the same image, from a line of text.")

# %% [markdown]
# **Exercise 3.** Repeat the saved run with other weights: those of the untrained toy. What does `rerun` list as
# different? Which difference is *not* in its list?

# %%
untrained = dl.DiTLens.toy(untrained=True)

# %% tags=["solution"]
# What Run.rerun returns.
comparison = loaded.rerun(untrained)

# %% tags=["check"]
assert comparison is not ..., "Exercise 3 is blank: call loaded.rerun with the lens of the untrained toy."
assert hasattr(comparison, "table"), "Not yet: keep what rerun returns, a comparison."
assert not comparison.identical, "Not yet: the images are the same, so that was the trained toy."
print(f"Exercise 3 is solved. {comparison}")
print("A run records where its weights came from, not the weights: the untrained toy uses the same folder.")

# %% [markdown]
# ## What we know, and what we do not
#
# We know that the lens works with another model as with the toy, that embeddings give the same image as prompts, and
# that a run can be repeated from its folder. All of this was checked here, on a CPU.
#
# From this notebook we do not know anything about a large model. What holds in a toy need not hold there: begin with
# lesson 2 on your model, choose `k` relative to the width, keep every control, and pass the subject's masks from a
# segmentation model (`masks=`). `docs/models.md` lists what is supported, and for an unknown transformer the error says
# how to describe it.
#
# Next: [lesson 8](lesson_8_features.ipynb) looks for other axes than channels.
