"""What passes through a pipeline, by plain torch hooks; shares nothing with the library's families or plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from types import SimpleNamespace
from typing import Any

import torch

import dit_lens as dl
from tests.zoo import Entry, entries

REFERENCES_FIRST = ("klein-kv",)
TEXT_ONLY_AT_FIRST = ("qwen21",)  # a cache holds it afterwards
SEED = 3

# Stack -> where the image and the text tokens of a block's output are: an index into the output tuple (or None for a
# bare tensor), and for joint tensors a function (length, image tokens, padded image tokens) -> first image token.
OWN = {"img": (None, None)}
TXT = {"txt": (None, None)}
TEXT_IMAGE = {"txt": (0, None), "img": (1, None)}
IMAGE_TEXT = {"img": (0, None), "txt": (1, None)}
LAST = {"img": (None, "last"), "txt": (None, "before")}
FIRST = {"img": (None, "first"), "txt": (None, "after")}
RAGGED = {"img": (None, "ragged")}

DOUBLE_SINGLE = {"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}
DOUBLE_JOINT = {"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": LAST}
STACKS = {
    "FluxTransformer2DModel": DOUBLE_SINGLE,
    "BriaTransformer2DModel": DOUBLE_SINGLE,
    "OvisImageTransformer2DModel": DOUBLE_SINGLE,
    "LongCatImageTransformer2DModel": DOUBLE_SINGLE,
    "Flux2Transformer2DModel": DOUBLE_JOINT,
    "ChromaTransformer2DModel": DOUBLE_JOINT,
    "BriaFiboTransformer2DModel": DOUBLE_JOINT,
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": LAST},
    "QwenImageTransformer2DModel": {"transformer_blocks": TEXT_IMAGE},
    "SD3Transformer2DModel": {"transformer_blocks": TEXT_IMAGE},
    "CogView3PlusTransformer2DModel": {"transformer_blocks": IMAGE_TEXT},
    "CogView4Transformer2DModel": {"transformer_blocks": IMAGE_TEXT},
    "GlmImageTransformer2DModel": {"transformer_blocks": IMAGE_TEXT},
    "HiDreamImageTransformer2DModel": {"double_stream_blocks": IMAGE_TEXT, "single_stream_blocks": FIRST},
    "HunyuanImageTransformer2DModel": {
        "context_embedder.token_refiner.refiner_blocks": TXT,
        "transformer_blocks": IMAGE_TEXT,
        "single_transformer_blocks": IMAGE_TEXT,
    },
    "JoyImageEditTransformer3DModel": {"double_blocks": IMAGE_TEXT},
    "Lumina2Transformer2DModel": {"context_refiner": TXT, "noise_refiner": OWN, "layers": RAGGED},
    "ZImageTransformer2DModel": {"noise_refiner": OWN, "context_refiner": TXT, "layers": FIRST},
    "OmniGenTransformer2DModel": {"layers": LAST},
    "Krea2Transformer2DModel": {"transformer_blocks": LAST},
    "Ideogram4Transformer2DModel": {"layers": LAST},
    "ErnieImageTransformer2DModel": {"layers": FIRST},
    "QwenImage21Transformer2DModel": {"transformer_blocks": LAST},
    "BriaFibo2Transformer2DModel": {"noise_refiner": OWN, "layers": LAST},
    "DiTTransformer2DModel": {"transformer_blocks": OWN},
    "PixArtTransformer2DModel": {"transformer_blocks": OWN},
    "SanaTransformer2DModel": {"transformer_blocks": OWN},
    "HunyuanDiT2DModel": {"blocks": OWN},
    "LuminaNextDiT2DModel": {"layers": OWN},
    "PRXTransformer2DModel": {"blocks": OWN},
    "NucleusMoEImageTransformer2DModel": {"transformer_blocks": OWN},
    "CosmosTransformer3DModel": {"transformer_blocks": OWN},
    "Kandinsky5Transformer3DModel": {"text_transformer_blocks": TXT, "visual_transformer_blocks": OWN},
    "WanTransformer3DModel": {"blocks": OWN},
    "LTXVideoTransformer3DModel": {"transformer_blocks": OWN},
    "CogVideoXTransformer3DModel": {"transformer_blocks": IMAGE_TEXT},
    "HunyuanVideoTransformer3DModel": {
        "context_embedder.token_refiner.refiner_blocks": TXT,
        "transformer_blocks": IMAGE_TEXT,
        "single_transformer_blocks": IMAGE_TEXT,
    },
}
SEQUENCE_FIRST = ("ErnieImageTransformer2DModel",)
PADDED = {"ZImageTransformer2DModel": 32, "HiDreamImageTransformer2DModel": 36}
# Pooled embeddings of the text, or a class, are added to the time that modulates the final norm.
TEXT_IN_THE_FINAL_NORM = (
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "HunyuanVideoTransformer3DModel",
    "LuminaNextDiT2DModel",
    "Kandinsky5Transformer3DModel",
    "DiTTransformer2DModel",
)


def stop(tensor: torch.Tensor, hook: Any) -> None:
    raise RuntimeError("stop")


ENTRIES = {entry.name: entry for entry in entries()}


@cache
def zoo_of(name: str) -> Zoo:
    """A pipeline of the zoo by its name, made once."""
    return Zoo(ENTRIES[name])


class Zoo:
    """A tiny pipeline under a lens and, untouched by it, under plain hooks."""

    def __init__(self, entry: Entry):
        self.entry, self.rows, self.count = entry, entry.rows, prod(entry.grid)
        self.lens = dl.DiTLens(entry.build(), defaults={})
        self.pipe = entry.build()
        self.call = entry.call(entry.rows)
        self.branches = [branch for call in entry.branches for branch in call]
        self.blocks = [
            (block, streams)
            for path, streams in STACKS[entry.transformer].items()
            for block in self.pipe.transformer.get_submodule(path)
        ]
        self.sites_of_image = self.lens.sites("blocks.*.img")
        self._plain = None

    def run(self, ops: list, steps: int | None = None) -> dl.Run:
        call = dict(self.call)
        prompt, usual = call.pop("prompt", None), call.pop("num_inference_steps")
        return self.lens.run(prompt, ops, seed=SEED, num_inference_steps=steps or usual, **call)

    def drawn(self, run: dl.Run) -> torch.Tensor:
        return run.latents if run.latents is not None else pixels(run.images)

    def plain(self) -> SimpleNamespace:
        """The pipeline's own run: outputs: (call, block) -> output. drawn: latents or images."""
        if self._plain is None:
            self._plain = self.plain_of(self.call)
        return self._plain

    def plain_of(self, arguments: dict, edit: Callable | None = None) -> SimpleNamespace:
        """The same with other arguments, and with an edit: fn(call, block, output) -> output."""
        found = SimpleNamespace(outputs={}, drawn=None, texts=[])
        handles = [self.pipe.transformer.register_forward_pre_hook(lambda *_: found.texts.append(None))]

        def hook(index: int) -> Callable:
            def keep(module: Any, args: tuple, output: Any) -> Any:
                call = len(found.texts) - 1
                changed = output if edit is None else edit(call, index, output)
                parts = changed if isinstance(changed, tuple) else (changed,)
                found.outputs[call, index] = tuple(None if part is None else part.clone() for part in parts)
                return changed

            return keep

        for index, (block, _) in enumerate(self.blocks):
            handles.append(block.register_forward_hook(hook(index)))
        generators = [torch.Generator().manual_seed(SEED) for _ in range(self.rows)]
        try:
            output = self.pipe(**arguments, generator=generators)
        finally:
            for handle in handles:
                handle.remove()
        first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        found.drawn = first if isinstance(first, torch.Tensor) else pixels(first)
        return found

    def comparable(self, site: str) -> bool:
        _, index, stream, *_ = site.split(".")
        cached = stream == "txt" and self.entry.name in TEXT_ONLY_AT_FIRST
        return stream in self.blocks[int(index)][1] and not cached

    def place(self, step: int, branch: str) -> tuple[int, range]:
        """The call and the rows of a branch."""
        for i, call in enumerate(self.entry.branches):
            if branch in call:
                start = call.index(branch) * self.rows
                return step * len(self.entry.branches) + i, range(start, start + self.rows)
        raise KeyError(branch)

    def tokens(self, plain: SimpleNamespace, step: int, branch: str, site: str) -> torch.Tensor:
        _, index, stream, *_ = site.split(".")
        call, rows = self.place(step, branch)
        return self.select(plain.outputs[call, int(index)], int(index), stream, rows, branch)

    def select(self, output: tuple, index: int, stream: str, rows: range, branch: str) -> torch.Tensor:
        """A stream's tokens of some rows: a view of the output where there is one."""
        slot, where = self.blocks[index][1][stream]
        tensor = output[slot or 0]
        if self.entry.transformer in SEQUENCE_FIRST:
            tensor = tensor.transpose(0, 1)
        tensor = tensor[rows.start : rows.stop]
        padded = max(PADDED.get(self.entry.transformer, 0), self.count)
        length = tensor.shape[1]
        if where is None:
            if stream == "txt":
                return tensor
            return tensor[:, -self.count :] if self.entry.name in REFERENCES_FIRST else tensor[:, : self.count]
        if where == "ragged":
            lengths = self.text_lengths(branch)
            return torch.stack([row[n : n + self.count] for row, n in zip(tensor, lengths, strict=True)])
        spans = {
            "last": (length - self.count, length),
            "before": (0, min(self.entry.text_tokens or 0, length - self.count)),
            "first": (0, self.count),
            "after": (padded, length),
        }
        return tensor[:, slice(*spans[where])]

    def text_lengths(self, branch: str) -> list[int]:
        mask = self.call["prompt_attention_mask" if branch == "cond" else "negative_prompt_attention_mask"]
        return [int(row.sum()) for row in mask]

    def zeroing(self, site: str, *, step: int, branch: str, row: int, tokens: list, channels: list) -> Callable:
        """An edit that zeroes elements of one row, and nothing else."""
        _, block, stream, *_ = site.split(".")
        wanted, rows = self.place(step, branch)

        def edit(call: int, index: int, output: Any) -> Any:
            if (call, index) != (wanted, int(block)):
                return output
            where = self.blocks[index][1][stream][1]
            copies = output if isinstance(output, tuple) else (output,)
            copies = tuple(None if part is None else part.clone() for part in copies)
            if where == "ragged":
                first = self.text_lengths(branch)[row]
                for token in tokens:
                    copies[0][rows[row], first + token, channels] = 0
            else:
                chosen = self.select(copies, index, stream, rows, branch)
                for token in tokens:
                    chosen[row, token, channels] = 0
            return copies if isinstance(output, tuple) else copies[0]

        return edit


def with_another_prompt(call: dict) -> dict:
    """The same call with other positive embeddings, words or classes."""
    changed = dict(call)
    if "class_labels" in call:
        return {**call, "class_labels": [label + 5 for label in call["class_labels"]]}
    if "prompt" in call:
        return {**call, "prompt": [text.replace("a", "o") for text in call["prompt"]]}
    for name, value in call.items():
        if name.startswith("prompt_embeds") and "mask" not in name:
            changed[name] = [one + 1 for one in value] if isinstance(value, list) else value + 1
    return changed


def pixels(images: Any) -> torch.Tensor:
    """PIL images as one tensor."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))
