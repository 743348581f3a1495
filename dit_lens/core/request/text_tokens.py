"""The text stream's tokens: as strings, and where the words of a prompt are among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.request.call import Call, default_argument
from dit_lens.errors import OpError, PromptError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families import Family


@dataclass(frozen=True)
class TextTokens:
    """The text tokens of a pipeline's calls.

    pipe: the pipeline.
    family: of its transformer.
    defaults: arguments of every call.
    """

    pipe: DiffusionPipeline
    family: Family
    defaults: Mapping[str, Any]

    def to_strings(self, prompt: str) -> list[str]:
        """The tokens of a prompt in order; padding shows as the tokenizer's own mark."""
        return self.tokenizer.convert_ids_to_tokens(self._tokenize(prompt)["input_ids"])

    def count(self, call: Call) -> int | None:
        """How many there are in a call; None if only the run can tell."""
        if not self.family.prompts.plain:
            return None
        embeds = call.arguments.get("prompt_embeds")
        if embeds is not None:
            return int(embeds.shape[1])
        return call.arguments.get(self.family.prompts.length) or default_argument(self.pipe, self.family.prompts.length)

    def find(self, call: Call, row: int, word: str) -> list[int]:
        """The tokens of every occurrence of a word in the prompt of a row."""
        if call.prompts is None:
            raise OpError(
                f"tokens={word!r} needs a prompt to find the word in; this run has prompt_embeds. Use token indices."
            )
        prompt = call.prompts[row // call.images_per_prompt]
        spans = [found.span() for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
        offsets = self._tokenize(prompt, self.count(call))["offset_mapping"]
        found = [
            i for i, (start, stop) in enumerate(offsets) if any(start < end and begin < stop for begin, end in spans)
        ]
        if not found:
            raise OpError(f"the word {word!r} is not in {prompt!r}. lens.to_str_tokens(prompt) lists its tokens.")
        return found

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text stream; raises PromptError if words cannot be found in that stream."""
        if not any("txt" in stack.outputs for stack in self.family.stacks):
            raise PromptError(f"{self.family.name} has no text stream: its text enters by cross-attention.")
        if not self.family.prompts.plain:
            raise PromptError(
                f"the text stream of {self.family.name} holds more than the prompt's own tokens (a template or a "
                "second encoder's), so words of a prompt cannot be found in it. Use token indices."
            )
        tokenizer = getattr(self.pipe, self.family.prompts.tokenizer, None)
        if tokenizer is None:
            raise PromptError(
                f"this pipeline was loaded without {self.family.prompts.tokenizer}, so words of a prompt cannot be "
                "found. Use token indices."
            )
        return tokenizer

    def _tokenize(self, prompt: str, length: int | None = None) -> Any:
        length = (
            length
            or self.defaults.get(self.family.prompts.length)
            or default_argument(self.pipe, self.family.prompts.length)
        )
        return self.tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
        )
