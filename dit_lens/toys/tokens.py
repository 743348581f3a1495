"""Tokenizers that know every word as one token: the grammar's, and those of a pipeline's own templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def tokenizer(
    marks: Mapping[str, str], words: Sequence[str], length: int, *, template: str = "$A", **options: Any
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; ids follow the order of ``marks`` and then of ``words``.

    marks: special tokens by their role (``pad_token``, ``unk_token`` ...); a role of any other name is a mark that
    templates write out. template: what is put around a text. options: passed to ``PreTrainedTokenizerFast``.
    """
    vocabulary = {word: i for i, word in enumerate([*marks.values(), *words])}
    known = Tokenizer(models.WordLevel(vocabulary, unk_token=marks["unk_token"]))
    known.normalizer = normalizers.Lowercase()
    line_ends = r"\n|" if "\n" in vocabulary else ""
    known.pre_tokenizer = pre_tokenizers.Split(Regex(line_ends + r"\w+|[^\w\s]+"), behavior="removed", invert=True)
    known.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(mark, vocabulary[mark]) for mark in marks.values() if mark in template]
    )
    known.add_special_tokens(list(marks.values()))
    roles = {role: mark for role, mark in marks.items() if role.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_object=known, model_max_length=length, **roles, **options)
