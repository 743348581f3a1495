"""The text in the text stream of a call: which token is of which word, and which are padding, ends and templates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dit_lens.errors import OpError, PromptError

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")  # no spaces
CLASSES = ("prompt", "template", "eos", "pad")  # what a token may be


@dataclass(frozen=True)
class Text:
    """One text as a tokenizer was given it.

    whole: the text, with the template around a prompt.
    prompt: where the prompt is in it.
    """

    whole: str
    prompt: range

    @property
    def words(self) -> str:
        """The prompt."""
        return self.whole[self.prompt.start : self.prompt.stop]


@dataclass(frozen=True)
class Origin:
    """What one tokenizer says of a token.

    piece: the token as the tokenizer writes it.
    kind: one of CLASSES.
    text: the number of its text.
    start, stop: its characters in that; the same where it stands for none.
    """

    piece: str
    kind: str
    text: int
    start: int
    stop: int


Tokens = Sequence[Sequence[Origin]]  # of a row: for each token its origins, none where the pipeline filled up


@dataclass(frozen=True)
class StreamText:
    """The text in the text stream of a call.

    rows: (branch, row) -> its tokens. Two encoders side by side share tokens, which then have two origins.
    texts: those the tokenizers were given.
    count: how many tokens the stream has; None where only the run can tell.
    before, after: those of them that the model puts in front and behind, which are of no text.
    data: (branch, row) -> for each token whether it takes part in attention; empty where only the run can tell.
    contradiction: where masks are not those of the text that the rows hold; None where none was found.
    unknown: why words cannot be found in it; None where they can.
    """

    rows: Mapping[tuple[str, int], Tokens] = field(default_factory=dict)
    texts: Sequence[Text] = ()
    count: int | None = None
    before: int = 0
    after: int = 0
    data: Mapping[tuple[str, int], Sequence[bool]] = field(default_factory=dict)
    contradiction: str | None = None
    unknown: str | None = None

    def strings(self) -> list[str]:
        """The tokens of the first prompt as their tokenizer writes them."""
        self._check("its tokens have no text")
        tokens = self.rows["cond", 0]
        return [""] * self.before + ["+".join(dict.fromkeys(origin.piece for origin in token)) for token in tokens]

    def find(self, branch: str, row: int, asked: str | Sequence[str]) -> list[int]:
        """The tokens of a class, or of every occurrence of some words in the prompt of a row; empty if there are none.

        branch, row: of the stream.
        asked: the name of a class, a word, or several words.

        Raises OpError for a word of which nothing but a part is left, and PromptError where the stream has no text.
        """
        self._check(f"tokens={asked!r} has no text to be looked up in")
        if not any(self.rows[branch, row]):  # no text: embeddings, or zeros in place of a negative prompt
            return []
        if isinstance(asked, str) and asked in CLASSES:
            return [self.before + i for i, token in enumerate(self.rows[branch, row]) if _is(token, asked)]
        words = [asked] if isinstance(asked, str) else asked
        return sorted({token for word in words for token in self._find_word(branch, row, word)})

    def find_each(self, branch: str, row: int, asked: str | Sequence[str]) -> list[list[int]]:
        """The tokens of a class or word, or those of each of several words."""
        return [
            self.find(branch, row, one) for one in ([asked] if isinstance(asked, str) else [[one] for one in asked])
        ]

    def encoders(self, branch: str, row: int, token: int) -> list[int]:
        """Which of the texts of a row a token is of, counted among them: several encoders have one each."""
        tokens = self.rows[branch, row]
        texts = sorted({origin.text for some in tokens for origin in some})
        return sorted({texts.index(origin.text) for origin in tokens[token - self.before]})

    def length(self, branch: str, row: int) -> int:
        """How many tokens the stream has in a row."""
        return self.before + len(self.rows[branch, row]) + self.after

    def is_data(self, branch: str, row: int, tokens: Sequence[int]) -> list[bool] | None:
        """Whether tokens of a row take part in attention; None where only the run can tell."""
        data = self.data.get((branch, row))
        return None if data is None else [token < len(data) and data[token] for token in tokens]

    def pads_in_front(self) -> bool:
        """Whether rows are filled up before their text, so that tokens count from the end."""
        return any(
            bool(tokens) and _is(tokens[0], "pad") and not _is(tokens[-1], "pad") for tokens in self.rows.values()
        )

    def move(self, branch: str, row: int, tokens: Sequence[int], to: Tokens) -> list[int]:
        """Where tokens of a row are when it is filled up otherwise; padding that is left out there is left out.

        branch, row: of the stream.
        tokens: of that row.
        to: the same row in another batch.
        """
        places = [{}, {}]  # whether it is padding -> its number among those -> where it is
        for i, token in enumerate(to):
            same = places[_is(token, "pad")]
            same[len(same)] = i
        own, seen = self.rows[branch, row], [0, 0]
        found: dict[int, int | None] = {i: i for i in range(-self.before, 0)}
        found |= {len(own) + i: len(to) + i for i in range(self.after)}
        for i, token in enumerate(own):
            padding = _is(token, "pad")
            found[i] = places[padding].get(seen[padding])
            seen[padding] += 1
        moved = (found.get(token - self.before) for token in tokens)
        return [self.before + i for i in moved if i is not None]

    def prompts(self, branch: str, row: int) -> list[str]:
        """The prompts whose tokens a row holds."""
        numbers = {origin.text for token in self.rows[branch, row] for origin in token}
        return list(dict.fromkeys(self.texts[number].words for number in sorted(numbers)))

    def classes(self) -> list[str]:
        """The classes of which there are tokens."""
        return [name for name in CLASSES if any(_is(token, name) for tokens in self.rows.values() for token in tokens)]

    def _check(self, what: str) -> None:
        if self.unknown is not None:
            raise PromptError(f"{what}: {self.unknown}. Use token indices.")

    def _find_word(self, branch: str, row: int, word: str) -> Iterator[int]:
        """Whole occurrences only; OpError where there are others only."""
        tokens = self.rows[branch, row]
        cut = None
        whole: set[int] = set()
        for number in {origin.text for token in tokens for origin in token}:
            text = self.texts[number]
            for start, stop in find_word(text, word):
                of_word = {
                    i: range(origin.start, origin.stop)
                    for i, token in enumerate(tokens)
                    for origin in token
                    if origin.text == number and origin.start < stop and start < origin.stop
                }
                covered = {at for span in of_word.values() for at in span}
                if all(at in covered for at in range(start, stop) if not text.whole[at].isspace()):
                    whole |= set(of_word)
                else:
                    cut = text
        if cut is not None and not whole:
            raise OpError(
                f"the word {word!r} of {cut.words!r} was truncated: the text stream has {len(tokens)} tokens, and the "
                "word, or a part of it, comes after them. Use a shorter prompt, or a larger max_sequence_length= where "
                "the pipeline has one."
            )
        return (self.before + i for i in sorted(whole))


def match_tokens(
    here: tuple[StreamText, str, int], there: tuple[StreamText, str, int], asked: str | Sequence[str]
) -> dict[int, int] | None:
    """Each token of a class, or of words, in one row -> the one of the same place in another; None where they differ.

    here, there: a text, and the branch and row of it.
    asked: as in :meth:`StreamText.find`.
    """
    found: dict[int, int] = {}
    (mine, branch, row), (other, branch_there, row_there) = here, there
    words = zip(mine.find_each(branch, row, asked), other.find_each(branch_there, row_there, asked), strict=True)
    for some, same in words:
        if len(some) != len(same):
            return None
        for one, two in zip(some, same, strict=True):
            encoders = mine.encoders(branch, row, one), other.encoders(branch_there, row_there, two)
            if (all(encoders) and encoders[0] != encoders[1]) or found.setdefault(one, two) != two:
                return None
    return found


def find_word(text: Text, word: str) -> list[tuple[int, int]]:
    """Where a word stands in the prompt of a text, in any case: (start, stop) of each occurrence.

    Accented letters are the same in both of their forms. Scripts without spaces have no ends of words to look for.
    """
    clusters = _split_clusters(text.words)
    plain = "".join(letters for _, letters in clusters)
    starts = [start for start, letters in clusters for _ in letters]
    ends = [*(start for start, _ in clusters[1:]), len(text.words)] if clusters else []
    stops = [end for (_, letters), end in zip(clusters, ends, strict=True) for _ in letters]
    pattern, found, at = re.compile(re.escape(unicodedata.normalize("NFC", word)), re.IGNORECASE), [], 0
    while (match := pattern.search(plain, at)) is not None and match[0]:
        start, stop = match.span()
        whole = not (_is_one_word(plain, start) or _is_one_word(plain, stop))
        at = stop if whole else start + 1
        if whole:
            found.append((text.prompt.start + starts[start], text.prompt.start + stops[stop - 1]))
    return found


def _split_clusters(text: str) -> list[tuple[int, str]]:
    """Where each letter of a text begins, and the letter with its accents in one form."""
    found: list[tuple[int, str]] = []
    for at, character in enumerate(text):
        start, letters = found[-1] if found else (0, "")
        joined = unicodedata.normalize("NFC", letters + character)
        if found and len(joined) <= len(letters):
            found[-1] = (start, joined)
        else:
            found.append((at, unicodedata.normalize("NFC", character)))
    return found


def _is_one_word(text: str, at: int) -> bool:
    """Whether the characters before and after a place belong to one word."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M"):  # an accent, or the vowel of the letter before
        return True
    letters = all(one == "_" or one.isalnum() or unicodedata.category(one).startswith("M") for one in (before, after))
    return letters and not any(unicodedata.name(one, "").startswith(UNSPACED) for one in (before, after))


def _is(token: Sequence[Origin], kind: str) -> bool:
    """Whether a token is of a class: padding where it is nothing else, the others where one of its origins is."""
    kinds = {origin.kind for origin in token} - {"pad"}
    return not kinds if kind == "pad" else kind in kinds
