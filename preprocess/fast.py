"""A faster tokenizer than Hugging Face's, for vocabularies for which it gives exactly the same token ids.

The package nanotoken (the extra `fast`) tokenizes WordPiece ten times as fast. `aisle build` checks whether it agrees,
on the version's own texts and on random ones, and writes the result beside tokenizer.json. A server uses nanotoken only
if it agrees.
Tokenizers that Aisle trains split words in a way that nanotoken does not support. `Cutter` inserts spaces at the same
places instead.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import string
import sys
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, pre_tokenizers

from aisle.extras import install
from aisle.preprocess.clean import prepare
from aisle.preprocess.values import TextError

DECISION = "fast.json"  # the result of the check, beside tokenizer.json
FUZZED = 2000  # random texts of the check
LONGEST_WORD = 64  # characters; Hugging Face reads a word of over 100 as [UNK]
HAN_ALONE = r"\p{Han}{1,16}"  # the pattern of older tokenizers, which do not isolate unknown characters
ISOLATING = re.compile(r"\[\^.*\]\|\[\\p\{Han\}.*\]\{1,(\d+)\}\|\[\\P\{Han\}.*\]\{1,(\d+)\}", re.S)
STRANGE = "\U0002a000𝔸éİßﬀ́̈‍\u0600🙂👨‍👩‍👧กาힸ￾\u0378[MASK][UNK] [CLS][SEP]##%"
# What a character is to the cutter: an end of words, Chinese, part of another word, unknown, or one it cannot read.
BREAK, HAN, WORD, UNKNOWN, ODD, UNSEEN = range(6)
BREAKS = f" \n{string.punctuation}。、"
NEWLINE = ord("\n")
FEW = 4  # texts of a batch that are looked at one by one first


class Ragged(NamedTuple):
    """Token ids of several texts, one after the other."""

    ids: npt.NDArray[np.uint32]  # [tokens]
    lengths: npt.NDArray[np.int32]  # [texts]

    def rows(self) -> list[npt.NDArray[np.uint32]]:
        """Return the token ids of each text."""
        ends = [0, *self.lengths.cumsum().tolist()]
        return [self.ids[start:stop] for start, stop in itertools.pairwise(ends)]


class Cutter:
    """Inserts spaces where a tokenizer trained by Aisle splits words, for one that splits at spaces and punctuation.

    The pieces of such a vocabulary are the same at the start of a word and within it, so only the ends of words matter.
    A whole batch is read at once, as an array of code points, because a loop over characters would be slower than the
    tokenizer itself.
    """

    def __init__(self, tokenizer: Tokenizer, han: int, *, isolates: bool) -> None:
        """Read the alphabet.

        Args:
            han: the largest number of Chinese characters in a word.
            isolates: whether each unknown character is a separate word.

        Raises:
            ValueError: a piece mixes Chinese and other characters.
        """
        pieces = set(tokenizer.get_vocab(with_added_tokens=False))
        self._alphabet = {piece for piece in pieces if len(piece) == 1}
        spots = pre_tokenizers.Split(Regex(r"\p{Han}"), "removed")
        self._han = {each for each in self._alphabet if not spots.pre_tokenize_str(each)}
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        if any(self._han & set(piece) and not set(piece) <= self._han for piece in pieces - special):
            raise ValueError("a piece mixes Chinese and other characters")
        self._normalizer = tokenizer.normalizer
        self._words = pre_tokenizers.BertPreTokenizer()
        self._longest_han = han
        self._isolates = isolates
        self._kinds = np.full(sys.maxunicode + 1, UNSEEN, np.uint8)  # of each code point
        self._kinds[[ord(each) for each in BREAKS]] = BREAK
        self._plain = set(BREAKS) - {"\n"}  # the characters met so far that are left alone
        wide = f"[{re.escape(''.join(sorted(self._han)))}]{{{han + 1}}}|" if self._han else ""
        self._cut_or_long = re.compile(rf"{wide}[^{re.escape(BREAKS)}]{{{LONGEST_WORD + 1}}}")

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """Return cleaned texts with these spaces; None for a text that only the tokenizer itself can read."""
        if len(texts) <= FEW and all(map(self._needs_nothing, texts)):
            return list(texts)
        joined = "\n".join([*texts, ""])
        if joined.count("\n") != len(texts):  # a text has a line end, which cleaned texts do not have
            return [None if "\n" in text else self([text])[0] for text in texts]
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = self._kinds_of(codes)
        cuts = self._cuts(kinds)
        pieces = [joined[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(joined)])]
        found: list[str | None] = [*" ".join(pieces).split("\n")[:-1]]
        unread = [*np.flatnonzero(kinds == ODD).tolist(), *_long_words(kinds, cuts)]
        if unread:
            for number in np.searchsorted(np.flatnonzero(codes == NEWLINE), unread).tolist():
                found[number] = None
        return found

    def _needs_nothing(self, text: str) -> bool:
        """Tell of one text, in a few microseconds, that it stays as it is; False if that is not certain."""
        return self._plain.issuperset(text) and (len(text) <= self._longest_han or not self._cut_or_long.search(text))

    def _kinds_of(self, codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
        """Return the kind of each code point; those met for the first time are looked at one by one."""
        kinds: npt.NDArray[np.uint8] = self._kinds[codes]
        unseen = kinds == UNSEEN
        if unseen.any():
            for code in np.unique(codes[unseen]).tolist():
                self._kinds[code] = kind = self._kind(chr(code))
                if kind in (HAN, WORD):
                    self._plain.add(chr(code))
            kinds = self._kinds[codes]
        return kinds

    def _cuts(self, kinds: npt.NDArray[np.uint8]) -> list[int]:
        """Return the places before which a space belongs, in order: around unknown characters, within long Chinese."""
        unknown: list[int] = np.flatnonzero(kinds == UNKNOWN).tolist()
        cuts = [place for each in unknown for place in (each, each + 1)]
        others = np.flatnonzero(kinds != HAN)  # a run of Chinese lies between two of them, or at an end
        runs = np.diff(others, prepend=-1, append=len(kinds))
        for i in np.flatnonzero(runs > self._longest_han + 1).tolist():
            start = int(others[i - 1]) + 1 if i else 0
            cuts += range(start + self._longest_han, start + int(runs[i]) - 1, self._longest_han)
        return sorted(cuts)

    def _kind(self, character: str) -> int:
        """Return the kind of a character after normalization: a known one, UNKNOWN, or ODD (not one character)."""
        normal = self._normalizer.normalize_str(f"a{character}a")[1:-1]
        if len(normal) != 1 or normal.isspace() or unicodedata.combining(character) or unicodedata.combining(normal):
            return ODD
        if normal != character and (normal in self._han or not normal.isascii()):
            return ODD
        if normal in self._han:
            return HAN
        punctuation = len(self._words.pre_tokenize_str(f"a{normal}a")) == 3
        if punctuation or normal in self._alphabet:
            return WORD
        return UNKNOWN if self._isolates else ODD


def _long_words(kinds: npt.NDArray[np.uint8], cuts: Sequence[int]) -> list[int]:
    """Return where words that are too long begin, given the places before which words are cut; the last ends a word."""
    breaks = np.flatnonzero(kinds == BREAK)
    starts = np.sort(np.concatenate([[0], breaks + 1, np.array(cuts, breaks.dtype)]))
    ends = starts[1:]
    lengths = ends - starts[:-1] - (kinds[ends - 1] == BREAK)
    found: list[int] = starts[:-1][lengths > LONGEST_WORD].tolist()
    return found


class FastTokenizer:
    """nanotoken, for one tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read a tokenizer.

        Raises:
            ImportError: nanotoken is not installed.
            ValueError: it does not support such a tokenizer.
        """
        from nanotoken import WordPieceTokenizer

        spec = json.loads(tokenizer.to_str())
        self._cutter = _cutter(tokenizer, spec)
        if self._cutter:
            spec["pre_tokenizer"] = {"type": "BertPreTokenizer"}
        spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]  # they are text
        self._core: Any = WordPieceTokenizer.from_json(json.dumps(spec))

    def __call__(self, texts: Sequence[str], most: int) -> tuple[Ragged, list[int]]:
        """Return the token ids of cleaned texts, at most `most` of each, and the numbers of texts that it cannot read.

        Such a text has the token ids of an empty one.
        """
        cut = self._cutter(texts) if self._cutter else list(texts)
        unread = [i for i, text in enumerate(cut) if text is None]
        ids, offsets = self._core.encode_batch([text or "" for text in cut], max_length=most, parallel=False)
        return Ragged(ids, np.diff(offsets).astype(np.int32)), unread


def _cutter(tokenizer: Tokenizer, spec: dict[str, Any]) -> Cutter | None:
    """Return the cutter for a tokenizer that Aisle trained; None for other tokenizers."""
    cuts = (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
    if [each["type"] for each in cuts] != ["BertPreTokenizer", "Split"]:
        return None
    if spec["model"].get("continuing_subword_prefix") != "" or cuts[1]["behavior"] != "Isolated" or cuts[1]["invert"]:
        raise ValueError("pieces differ at the start of a word and within it")
    pattern = cuts[1]["pattern"].get("Regex", "")
    if pattern == HAN_ALONE:
        return Cutter(tokenizer, 16, isolates=False)
    found = ISOLATING.fullmatch(pattern)
    if found is None or int(found[2]) != LONGEST_WORD:
        raise ValueError(f"words are split in an unknown way: {pattern[:40]}")
    return Cutter(tokenizer, int(found[1]), isolates=True)


def installed() -> str:
    """Return the installed faster tokenizer with its version, as "nanotoken 0.1.0"; empty if there is none."""
    try:
        return f"nanotoken {version('nanotoken')}"
    except ImportError:
        return ""


def load(tokenizer: Tokenizer, folder: Path) -> FastTokenizer | None:
    """Return the faster tokenizer if the installed one is the one that passed the version's check; else None."""
    try:
        decision = json.loads((folder / DECISION).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not decision["exact"] or decision["tokenizer"] != installed():
        return None
    return FastTokenizer(tokenizer)


def decide(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    """Compare the faster tokenizer with a tokenizer on cleaned texts and on random variations of them.

    Returns its name and version, the number of texts, whether it is `exact`, and if not, the `reason`.
    """
    found: dict[str, Any] = {"tokenizer": installed(), "texts": 0, "exact": False, "reason": ""}
    if not found["tokenizer"]:
        return {**found, "reason": f"not installed: {install('fast')}"}
    try:
        fast = FastTokenizer(tokenizer)
    except ValueError as error:
        return {**found, "reason": str(error)}
    tried = [*texts, *fuzz(texts, FUZZED)]
    found["texts"] = len(tried)
    for start in range(0, len(tried), 1000):
        some = tried[start : start + 1000]
        expected = tokenizer.encode_batch_fast(some)
        tokens, unread = fast(some, max_tokens)
        for i, (text, ids, right) in enumerate(zip(some, tokens.rows(), expected, strict=True)):
            if ids.tolist() != right.ids and i not in unread:
                return {**found, "reason": f"its token ids differ for {text[:80]!r}"}
    return {**found, "exact": True}


def fuzz(texts: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Return cleaned texts with unusual characters, special tokens and long words inserted at random."""
    rng = random.Random(seed)
    made: list[str] = []
    while len(made) < count:
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + _strange(rng, texts) + text[place:]
        try:
            made.append(prepare(text))
        except TextError:
            continue
    return made


def _strange(rng: random.Random, texts: Sequence[str]) -> str:
    match rng.randrange(6):
        case 0:
            return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        case 1:
            return rng.choice(STRANGE) * rng.randint(1, 3)
        case 2:
            return rng.choice(["[MASK]", "[UNK]", "[SEP]", "##", "[PAD]"])
        case 3:
            return "".join(rng.choice(rng.choice(texts)) for _ in range(rng.randint(1, 130)))
        case 4:
            return rng.choice("aß中Ж1") * rng.randint(15, 140)
        case _:
            return rng.choice(texts)[: rng.randint(1, 40)]
