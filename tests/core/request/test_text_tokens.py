"""Words in prompts of other scripts and forms, and tokens as their tokenizer writes them."""

from __future__ import annotations

import unicodedata

import pytest

from dit_lens import Read, Zero
from dit_lens.core.request.text_tokens import Text, find_word
from dit_lens.errors import OpError
from tests import texts

WORDS = [  # a prompt, a word, and its occurrences as they are written
    ("一只猫坐在桌子上", "猫", ["猫"]),
    ("一只cat坐", "cat", ["cat"]),
    ("桌子上的猫和猫", "猫", ["猫", "猫"]),
    ("ねこがいる", "ねこ", ["ねこ"]),
    ("concat cat_ Cat, cat", "cat", ["Cat", "cat"]),
    ("ba a a a", "a a a", ["a a a"]),
    ("a C++ book", "C++", ["C++"]),
    ("किताब", "क", []),
    ("cats", "cat", []),
]


@pytest.mark.parametrize(("prompt", "word", "expected"), WORDS)
@pytest.mark.parametrize("before", ["", "a template "])
def test_words_of_every_script(prompt, word, expected, before):
    text = Text(f"{before}{prompt} end", range(len(before), len(before) + len(prompt)))
    assert [text.whole[start:stop] for start, stop in find_word(text, word)] == expected


@pytest.mark.parametrize("of_prompt", ["NFC", "NFD"])
@pytest.mark.parametrize("of_word", ["NFC", "NFD"])
def test_accents_are_the_same_in_both_forms(of_prompt, of_word):
    prompt, word = unicodedata.normalize(of_prompt, "a naïve café, über"), unicodedata.normalize(of_word, "café")
    text = Text(prompt, range(len(prompt)))
    ((start, stop),) = find_word(text, word)
    assert unicodedata.normalize("NFC", prompt[start:stop]) == "café"
    assert prompt[stop] == ","
    assert not find_word(text, "cafe")  # another word


def test_a_word_of_a_script_without_spaces_is_read():
    subject = texts.SUBJECTS["qwen"]
    prompt = "一只猫坐"
    start = texts.TEMPLATE.index("{}") - 34 + prompt.index("猫")
    run = subject.lens.run(prompt, Read("blocks.1.txt", tokens="猫"), seed=0, **subject.call)
    assert run.reading("blocks.1.txt").tokens == (start,)


def test_of_several_words_each_must_be_somewhere():
    subject = texts.SUBJECTS["qwen"]
    for op in (Read, Zero):
        with pytest.raises(OpError, match=r"the word 'dog' of tokens=\['cat', 'dog'\] is in no prompt"):
            subject.lens.cost(["a cat", "a red cat"], op("blocks.1.txt", tokens=["cat", "dog"]), **subject.call)
    both = subject.lens.run(["a cat", "a dog"], Zero("blocks.1.txt", tokens=["cat", "dog"]), seed=0, **subject.call)
    assert [entry.rows for entry in both.receipt.entries] == [(0,), (1,)]


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_tokens_are_those_of_the_prompt_and_not_of_the_negative_one(name):
    subject = texts.SUBJECTS[name]
    found = subject.lens.to_str_tokens("a cat", negative_prompt="ugly", **subject.call)
    plain = "".join(token.split("+")[0] for token in found)
    assert "cat" in plain
    assert "ugly" not in plain
