"""Dictionaries of features: sparse autoencoders and transcoders that other libraries have trained.

>>> import torch
>>> from dit_lens import DiTLens, Feature, ReadFeatures
>>> from dit_lens.dictionaries import Dictionary
>>> channels = Dictionary(torch.eye(128), torch.zeros(128), torch.eye(128), torch.zeros(128))  # one for each channel
>>> prompt = "a big red circle left on a plain blue background"
>>> ops = [ReadFeatures("blocks.3.img", channels, [5, 7]), Feature("blocks.3.img", channels, 5, scale=0)]
>>> run = DiTLens.toy().run(prompt, ops, seed=0, num_inference_steps=2)
>>> run["blocks.3.img"].grid().shape  # [step, row, h, w, feature]
torch.Size([2, 1, 16, 16, 2])
"""

from dit_lens.core.request.dictionaries.dictionary import Dictionary
from dit_lens.core.request.dictionaries.formats import load

__all__ = ["Dictionary", "load"]
