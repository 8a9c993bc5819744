"""Vocabulary: which words and characters texts are made of, told by counts from which no text can be read."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable

BUCKETS = 2**16

# As tokenizers of BERT cut texts: a Chinese character stands alone, other letters make words. Numbers are left out:
# they are what is personal in a text, and no vocabulary has them all.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORDS = re.compile(rf"[{_HAN}]|(?:(?![{_HAN}])[^\W\d_])+")


def words(text: str) -> list[str]:
    """Return the words of a cleaned text in lower case without accents, as BERT's normalizer leaves them."""
    text = text.lower()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return _WORDS.findall(text)


def bucket(word: str) -> int:
    """Return the bucket of a word: one of `BUCKETS`, each of which stands for many words."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS


def count(texts: Iterable[str]) -> Counter[int]:
    """Count the words of cleaned texts by their buckets."""
    return Counter(bucket(word) for text in texts for word in words(text))
