"""Word-level tokenizers for the grammar of scenes and for the templates of the pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def make_tokenizer(
    special_tokens: Mapping[str, str], words: Sequence[str], length: int, *, template: str = "$A", **options: Any
) -> PreTrainedTokenizerFast:
    """Makes a word-level tokenizer. Token ids follow the order of the special tokens, then that of the words.

    special_tokens: role (``pad_token``, ``unk_token`` ...) -> special token. A role without "_token" at its end is for
      a token that only chat templates use.
    words: all other tokens.
    length: largest number of tokens of a text.
    template: special tokens around a text ``$A``.
    options: passed to ``PreTrainedTokenizerFast``.
    """
    vocabulary = {word: i for i, word in enumerate([*special_tokens.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special_tokens["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    # A token is a word or a run of punctuation; a line break is one if the vocabulary has it.
    line_break = r"\n|" if "\n" in vocabulary else ""
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(line_break + r"\w+|[^\w\s]+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(token, vocabulary[token]) for token in special_tokens.values() if token in template],
    )
    tokenizer.add_special_tokens(list(special_tokens.values()))
    roles = {role: token for role, token in special_tokens.items() if role.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **roles, **options)
