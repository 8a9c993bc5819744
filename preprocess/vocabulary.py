"""Word counts by hash bucket. They show how the words of traffic change, and no text can be rebuilt from them."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable

from aisle.preprocess.han import HAN

BUCKETS = 2**16
MANY_UNKNOWN = 0.25  # share of unknown tokens in a text; from this share on, its answer is doubtful

# Words as BERT's tokenizers see them: each Chinese character, and each run of other letters. Numbers are not counted:
# they can be personal, and no vocabulary has all of them.
_WORDS = re.compile(rf"[{HAN}]|(?:(?![{HAN}])[^\W\d_])+")


def words(text: str) -> list[str]:
    """Return the words of a cleaned text in lower case without accents, as BERT's normalizer leaves them."""
    text = text.lower()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return _WORDS.findall(text)


def bucket(word: str) -> int:
    """Return the bucket of a word, a number below `BUCKETS`. Many words share a bucket."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS


def count(texts: Iterable[str]) -> Counter[int]:
    """Count the words of cleaned texts by their buckets."""
    return Counter(bucket(word) for text in texts for word in words(text))
