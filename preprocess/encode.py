"""Encoding: cleaned texts to token ids, with the checkpoint's own tokenizer.json."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from aisle.errors import InputError

MAX_TOKENS = 128  # of one text, [CLS] and [SEP] included, unless tokenizer.json sets its own truncation

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MULTILINGUAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]  # the same, of SentencePiece
MASK = SPECIAL[-1]  # how augmentation writes a masked word, whatever tokenizer will read it


class Encoded(NamedTuple):
    input_ids: npt.NDArray[np.int32]  # [texts, longest], zero beyond each text's end
    lengths: npt.NDArray[np.int32]  # [texts, 1]
    truncated: int  # texts that were cut at the limit


class Encoder:
    """Turns cleaned texts into token ids; the fast tokenizer encodes a whole batch in one call."""

    def __init__(self, tokenizer_json: Path, max_tokens: int | None = None) -> None:
        """Load a fast tokenizer, with another limit than its own where `max_tokens` is given.

        Raises:
            InputError: the file is missing or is no tokenizer.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{tokenizer_json} is no fast tokenizer: {error}") from None
        self._tokenizer.no_padding()
        if max_tokens or self._tokenizer.truncation is None:
            self._tokenizer.enable_truncation(max_tokens or MAX_TOKENS)
        truncation: Any = self._tokenizer.truncation
        self.max_tokens: int = truncation["max_length"]
        self.vocabulary: int = self._tokenizer.get_vocab_size()

    def save(self, path: Path) -> None:
        """Write the tokenizer with its limit as tokenizer.json."""
        self._tokenizer.save(str(path))

    def entries(self) -> list[str]:
        """Return the vocabulary."""
        return list(self._tokenizer.get_vocab())

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, [CLS] first, at most `max_tokens` of them."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def varied_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that were varied for training: `MASK` is the tokenizer's own mask token.

        Raises:
            InputError: a word is masked, and the tokenizer has no mask token.
        """
        if any(MASK in text for text in texts):
            own = special_tokens(self._tokenizer)["mask"]
            texts = [text.replace(MASK, own) for text in texts]
        return self.tokens(texts)

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Return the token ids, where in the text each token starts and ends, and whether tokens were cut off.

        [CLS] and [SEP] stand for no characters, so they end where they start.
        """
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.offsets, bool(encoding.overflowing)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(texts)
        tokens = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))[:, None]
        input_ids = np.zeros((len(tokens), lengths.max()), np.int32)
        inside = np.arange(input_ids.shape[1]) < lengths
        input_ids[inside] = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, lengths.sum())
        full = (encoding for encoding, ids in zip(encodings, tokens, strict=True) if len(ids) == self.max_tokens)
        return Encoded(input_ids, lengths, sum(bool(encoding.overflowing) for encoding in full))


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return a tokenizer's special tokens by their roles: as BERT writes them, or as the multilingual BERTs do.

    Raises:
        InputError: one is missing.
    """
    found: dict[str, str] = {}
    for token, other in zip(SPECIAL, MULTILINGUAL, strict=True):
        role = token[1:-1].lower()
        known = [each for each in (token, other) if tokenizer.token_to_id(each) is not None]
        if not known:
            raise InputError(f"the tokenizer has no {token}; give a BERT that was pretrained on masked words")
        found[role] = known[0]
    return found
