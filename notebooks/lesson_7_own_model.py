# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Your own model, and runs that travel
#
# **All of it worked on a toy. What changes with a FLUX of twelve billion parameters, on a GPU that is too small for
# it?**
#
# You will learn
#
# - how to put a lens on any diffusers pipeline, with a LoRA, quantised or offloaded;
# - how to ask what fits into memory before loading, and what a read would keep before running;
# - how to look into a model that is on a server, and how to write an experiment down as data, so that another machine
#   can repeat it.
#
# No GPU is needed here: a small FLUX is saved to a folder, and then treated as a stranger. What needs a GPU is shown as
# text.

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
toy.pipe.save_pretrained(folder)
sorted(path.name for path in folder.iterdir())

# %% [markdown]
# ## Will it fit?
#
# `recommend` reads configurations and the headers of weight files, loads nothing, and lists the ways to load the
# pipeline into so many gigabytes, the fastest first. `exact` tells those that keep the activations of the bf16 weights
# from those that do not. For the hub's FLUX.1-dev it is `dl.recommend("black-forest-labs/FLUX.1-dev", gb=24)`.

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
# The lens recognises the transformer by its class and compares its structure with what it expects. Look at the line
# `checks`: nothing is guessed.

# %%
lens = dl.DiTLens.from_pretrained(folder)
lens.pipe.set_progress_bar_config(disable=True)
lens

# %% [markdown]
# The folder holds weights, and not the habits of the toy: its size, steps and guidance were the lens's `defaults`.
# Without them this FLUX would draw images of a size it never saw. Give your own, so that every call of an experiment
# agrees.

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
# ## Prompts first, then the encoders may go
#
# The text encoders of FLUX.1 weigh two fifths of what its transformer does, and are needed for a moment. `encode` turns
# prompts into embeddings; with `release=True` the encoders are given up.

# %%
before = lens.run(circle, seed=0)
texts = lens.encode(circle, release=True)
after = lens.run(**texts, seed=0)
print("same image, bit for bit:", before.images[0].tobytes() == after.images[0].tobytes())
print("text encoder:", lens.pipe.text_encoder)

# %% [markdown]
# Words of a prompt can no longer be found in such a run (`tokens="circle"`); token numbers still work.
#
# ## What a read costs
#
# Reads are kept in the computer's memory. `lens.cost` counts their bytes beforehand, and a run that would not fit is
# refused. All of FLUX.1 at 1024 × 1024, 57 blocks and 28 steps, would be about 40 GB; the averages of all its channels
# are about 20 MB. Here is the same comparison for the small one.

# %%
lens.cost(**texts, ops=[dl.Read("blocks.*.img")], seed=0)

# %%
cheap = [dl.Read("blocks.*.img", reduce="|mean|", name="spectrum"), dl.Read("blocks.5.img", channels=[12, 74])]
lens.cost(**texts, ops=cheap, seed=0)

# %% [markdown]
# `batch_size=` splits a run into batches; where a GPU runs out of memory, a batch is halved and begun again.
#
# ## A LoRA
#
# Load, unload or fuse one whenever you like: the lens looks again before each run. A LoRA changes activations, so find
# the massive channels anew. Below, for want of a real one, a random LoRA on some of the attention.

# %%
plain = lens.massive_channels(None, k=8, **texts, seed=0)
try:
    from peft import LoraConfig
except ImportError:
    print("LoRA needs another package: pip install peft")
else:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k"], init_lora_weights=False)
    lens.pipe.transformer.add_adapter(config)
    tuned = lens.massive_channels(None, k=8, **texts, seed=0)
    print({site: round(overlap, 2) for site, overlap in plain.jaccard(tuned).items()})
    lens.pipe.transformer.delete_adapters("default")

# %% [markdown]
# The same question is due after quantisation. `plain.jaccard(...)` answers it for int8 or NF4 weights as well.
#
# ## Runs that travel
#
# Where the model is on an nnsight server, `dl.DiTLens.remote(name, host="http://...")` makes a lens without its
# weights: plans are made and checked here and carried out there, and a run comes back as if it had been made here
# (`docs/how-to/remote.md`). No server is at hand in this lesson, but everything up to the request is:

# %%
there = dl.DiTLens.remote(dl.toys.path("flux"), host="http://127.0.0.1:9")
there.cost("a big red circle left on a plain blue background", [dl.Read("blocks.*.img", reduce="|mean|")])

# %% [markdown]
# The same experiment is portable as data. Ops go to JSON and back.

# %%
massive = toy.massive_channels(circle, k=8, seed=0)
ops = [dl.Zero("blocks.*.img", channels=massive, steps=(0.5, 1.0)), dl.Read("blocks.*.img", reduce="|mean|")]
as_text = json.dumps([dl.ops.to_json(op) for op in ops])
print(as_text[:200], "...")

# %% [markdown]
# A run is saved as safetensors, JSON and PNG, with all it takes to repeat it. It loads without a model: look at it on a
# laptop, after it was made on a server.

# %%
run = toy.run(circle, ops, seed=0)
run.save(home / "run")
loaded = dl.Run.load(home / "run")
loaded

# %% [markdown]
# `rerun` repeats it on a lens and names everything that differs: images, versions, device, model. Images are equal
# bit for bit on the same machine, not across machines; `docs/guarantees.md` says what to expect.

# %%
loaded.rerun(toy)

# %% [markdown]
# What cannot travel as data is a Python function (`dl.Apply`), and a run says so when it is repeated.
#
# ## Exercises
#
# Fill in the cells with `...` and run them, then the check below each. It is folded, since it knows the answer.
#
# **Exercise 1.** You want the spectrum of every block at every step, and have 100 kB. Write the read.

# %% tags=["solution"]
# A dl.Read of all blocks and steps that keeps less than 100 kB.
small = dl.Read("blocks.*.img", reduce="|mean|")

# %% tags=["check"]
assert small is not ..., "Exercise 1 is blank: a dl.Read('blocks.*.img', ...) that is reduced over tokens."
_cost = toy.cost(circle, small, seed=0)
assert _cost.bytes < 100_000, f"Not yet: it would keep {_cost.bytes / 1000:.0f} kB. What does reduce= do?"
_found = toy.run(circle, small, seed=0)
assert _found["blocks.7.img"].shape == (12, 1, 128), "Not yet: every block, every step and all 128 channels are wanted."
print(f"Exercise 1 is solved: {_cost.bytes / 1000:.0f} kB.")

# %% [markdown]
# **Exercise 2.** Bring `as_text` back to ops, as another machine would, and draw with them.

# %% tags=["solution"]
# A run of `circle` with seed=0.
again = toy.run(circle, [dl.ops.from_json(data) for data in json.loads(as_text)], seed=0)

# %% tags=["check"]
assert again is not ..., "Exercise 2 is blank: json.loads gives a list; dl.ops.from_json makes an op of each item."
assert rmse(again.images[0], run.images[0]) == 0, "Not yet: the image differs from that of `run`."
print("Exercise 2 is solved: the same image, from a line of text.")

# %% [markdown]
# **Exercise 3.** A reader repeats your saved run with other weights: those of the untrained twin. Let `rerun` say what
# differs. A surprise awaits: which difference is *not* among those it names?

# %%
twin = dl.DiTLens.toy(untrained=True)

# %% tags=["solution"]
# What Run.rerun returns.
comparison = loaded.rerun(twin)

# %% tags=["check"]
assert comparison is not ..., "Exercise 3 is blank: call loaded.rerun with the lens of the twin."
assert hasattr(comparison, "table"), "Not yet: keep what rerun returns, a comparison."
assert not comparison.identical, "Not yet: the images are the same, so that was the trained toy."
print(f"Exercise 3 is solved. {comparison}")
print("A run writes down where its weights came from, not the weights: the twin is built on the same folder.")

# %% [markdown]
# ## What we know, and what we do not
#
# We know that the lens treats a stranger as it treats the toy, that embeddings give the same image as prompts, and
# that a run can be repeated from its folder. All of it was checked here, on a CPU.
#
# We do not know, from this notebook, anything about a large model. What holds in a toy need not hold there: begin with
# lesson 2 on your model, take `k` with its share of the width, keep every control, and measure the subject's mask with
# a segmenter of your own (`masks=`). `docs/models.md` lists what is supported, and for an unknown transformer the error
# says how to describe it.
