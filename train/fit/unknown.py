"""Unknown characters: tokenizers from scratch read each as one [UNK], and training shows [UNK] to the model."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from tokenizers import Regex, Tokenizer, pre_tokenizers

from aisle.preprocess.encode import MASK

# WordPiece takes quadratic time in the length of a word, and reads a word of over 100 characters as [UNK]. So long
# words are split after HAN characters of Chinese, which has no spaces, or OTHERS characters of other scripts.
HAN, OTHERS = 16, 64
SHARE = 0.8  # of the texts get unknown characters
REPLACED = 0.25  # of these texts, the share whose rarest character is replaced; in the others, characters are inserted
INSERTED = 3  # characters in a text, mostly within words, so that the model learns the smaller pieces around them
STRANGE = range(0x20000, 0x2A6E0)  # characters that almost no text has: ideographs of extension B


def cutting(vocabulary: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer for a vocabulary: it isolates each character that is not in the vocabulary.

    WordPiece turns a whole word into [UNK] if one character is missing. Here only that character becomes [UNK]. A
    vocabulary without single characters isolates none.
    """
    alphabet = "".join(_ranges(piece for piece in vocabulary if len(piece) == 1))
    known, unknown = (f"&&[{alphabet}]", f"[^{alphabet}]|") if alphabet else ("", "")
    words = rf"{unknown}[\p{{Han}}{known}]{{1,{HAN}}}|[\P{{Han}}{known}]{{1,{OTHERS}}}"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), split])


def _ranges(characters: Iterable[str]) -> Iterator[str]:
    """Yield the ranges of adjacent characters, in the syntax of a regular expression."""
    codes = set(map(ord, characters))
    starts = sorted(code for code in codes if code - 1 not in codes)
    ends = sorted(code for code in codes if code + 1 not in codes)
    for start, end in zip(starts, ends, strict=True):
        yield rf"\x{{{start:x}}}-\x{{{end:x}}}"


def isolates(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer isolates unknown characters, as those with the pre-tokenizer of `cutting` do."""
    parsed = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    patterns = [each.get("pattern", {}).get("Regex", "") for each in parsed.get("pretokenizers", [])]
    return any(pattern.startswith(r"[^\x{") for pattern in patterns)


class Unknowns:
    """Puts an unknown character into some training texts, so that the model learns [UNK]."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> None:
        """Count the characters of the training texts."""
        self._counts = Counter(chain.from_iterable(texts))
        known = tokenizer.get_vocab()
        self._unk = known["[UNK]"]
        self._unknown = next(c for c in map(chr, STRANGE) if c not in known)
        self._seed = seed

    def put(self, texts: Sequence[str], tokens: Sequence[Sequence[int]], epoch: int) -> dict[int, str]:
        """Return the texts that change in an epoch, by number.

        The unknown character replaces a text's rarest character, or is inserted. Masked texts are not changed, and
        neither are texts that already have unknown characters: in a new category, these may decide.
        """
        rng = random.Random(f"unknown {self._seed} {epoch}")
        chosen = [
            i
            for i, text in enumerate(texts)
            if rng.random() < SHARE and MASK not in text and self._unk not in tokens[i]
        ]
        return {i: self._put(texts[i], rng) for i in chosen}

    def _put(self, text: str, rng: random.Random) -> str:
        if rng.random() < REPLACED:
            rarest = min(text, key=lambda character: (self._counts[character], character))
            return text.replace(rarest, self._unknown, 1)
        for _ in range(INSERTED):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + self._unknown + text[place:]
        return text
