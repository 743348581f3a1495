"""A judge that asks a vision-language model whether an image shows its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.analysis.metrics.pretrained import load_pretrained
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
SPELLINGS = ("{}", " {}")
VQA = "llava-hf/llava-1.5-7b-hf"  # one of the models of VQAScore


class Vqa:
    """A vision-language model as a judge: called with an image and a prompt.

    ``vqa(image, prompt)`` returns {"fidelity": P(yes) / (P(yes) + P(no)), "vqascore": P(yes)}: the chances that the
    model begins its answer so.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor
        self.yes, self.no = (_find_tokens(processor.tokenizer, word) for word in ("yes", "no"))
        if not self.yes or not self.no:
            raise OpError("the tokenizer of this model has no token for 'yes' or for 'no', so it cannot be asked.")
        self.__qualname__ = f"Vqa({model.name_or_path})"  # the judge's name in the settings of a study

    def __call__(self, image: Image, prompt: str) -> dict[str, float]:
        chances = self._answer(image, QUESTION.format(prompt)).softmax(-1)
        yes, no = (float(chances[tokens].sum()) for tokens in (self.yes, self.no))
        return {"fidelity": yes / (yes + no) if yes + no else float("nan"), "vqascore": yes}

    @torch.no_grad()
    def _answer(self, image: Image, question: str) -> Tensor:
        """The logits of the first token of the answer."""
        words = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
        inputs = self.processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        # Pixels come in float32, whatever the precision of the model.
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        return self.model(**inputs).logits[0, -1].float()


@checked
def vqa_judge(model: str | Path | Any = VQA, processor: Any = None) -> Vqa:
    """Loads a vision-language model for ``judge=`` of a study: does an image show its prompt?

        vqa = dl.metrics.vqa_judge("llava-hf/llava-1.5-7b-hf")
        dl.studies.carrier_or_detail(lens, prompts, judge=vqa)

    model: a folder or repository with an image-text-to-text model of transformers, with a chat template; or a loaded
        one.
    processor: the processor of a loaded model.
    Raises StoreError if the model cannot be loaded, and OpError for one without a processor or chat template.
    Source: VQAScore, Lin et al. 2024 (arXiv 2404.01291); the fidelity is of yes against no.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if isinstance(model, str | Path):
        what = "an image-text-to-text model with its processor"
        model, processor = load_pretrained(model, what, AutoModelForImageTextToText, AutoProcessor)
    if processor is None:
        raise OpError("A loaded model needs its processor: vqa_judge(model, AutoProcessor.from_pretrained(...)).")
    if not getattr(processor, "chat_template", None):
        raise OpError("this model has no chat template, so how it is asked is not known. Choose one with a template.")
    return Vqa(model, processor)


def _find_tokens(tokenizer: Any, word: str) -> list[int]:
    """The tokens that spell a word, with a large letter or a small one, with a space before it or without."""
    found = set()
    for spelling in SPELLINGS:
        for written in (word, word.capitalize()):
            tokens = tokenizer.encode(spelling.format(written), add_special_tokens=False)
            found |= set(tokens) - {tokenizer.unk_token_id} if len(tokens) == 1 else set()
    return sorted(found)
