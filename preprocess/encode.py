"""Encoding: cleaned texts to token ids, with the checkpoint's own tokenizer.json."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from aisle.errors import InputError
from aisle.preprocess import MAX_TOKENS, fast
from aisle.preprocess.fast import Ragged
from aisle.preprocess.windows import into_windows, read_count

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MULTILINGUAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]  # the same tokens in SentencePiece
UNKNOWN = (SPECIAL[1], MULTILINGUAL[1])
# Of a text with more characters than LONG times the token limit, only the beginning is tokenized first: in most cases
# the rest is cut off anyway.
LONG = 8
ENDS = " 。,!?;"  # characters that end a word in every tokenizer that splits at spaces and punctuation
MASK = SPECIAL[-1]  # how augmentation writes a masked word, for every tokenizer


Cut: TypeAlias = npt.NDArray[np.bool_]  # [texts], whether a text was cut at the limit


class TokenizedTexts(NamedTuple):
    input_ids: npt.NDArray[np.int32]  # [texts, longest], zero after each text's end
    lengths: npt.NDArray[np.int32]  # [texts, 1], in tokens, of all windows together
    truncated: int  # texts that were cut at the limit
    unknown: npt.NDArray[np.float32]  # [texts, 1], the share of [UNK] among each text's tokens


class TextTokenizer:
    """Turns cleaned texts into token ids; the fast tokenizer encodes a whole batch in one call."""

    def __init__(self, tokenizer_json: Path, max_tokens: int | None = None, windows: int = 1) -> None:
        """Load a fast tokenizer.

        Args:
            max_tokens: replaces its own token limit.
            windows: the most windows of a text, each of at most `max_tokens` tokens.

        Raises:
            InputError: the file is missing or is not a tokenizer.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{tokenizer_json} is not a fast tokenizer: {error}") from None
        self._tokenizer.no_padding()
        read_special_tokens_as_text(self._tokenizer)
        if max_tokens or self._tokenizer.truncation is None:
            self._tokenizer.enable_truncation(max_tokens or MAX_TOKENS)
        truncation: Any = self._tokenizer.truncation
        self.max_tokens: int = truncation["max_length"]
        self.windows = windows
        self.vocabulary: int = self._tokenizer.get_vocab_size()
        self._unknown = next((i for i in map(self._tokenizer.token_to_id, UNKNOWN) if i is not None), -1)
        self._added: int = self._tokenizer.num_special_tokens_to_add(False)  # to each text: [CLS] and [SEP]
        first = self._tokenizer.encode("1").special_tokens_mask.index(0)
        self._around = (first, self._added - first)  # of these, how many are at the start and at the end
        self._limit = windows * (self.max_tokens - self._added) + self._added  # tokens of a text, before it is windowed
        self._tokenizer.enable_truncation(self._limit)
        self._fast = None if max_tokens else fast.load(self._tokenizer, tokenizer_json.parent)
        self._ends = ENDS if "BertPreTokenizer" in self._tokenizer.to_str() else " "

    @staticmethod
    def of_version(folder: Path) -> TextTokenizer:
        """Load the tokenizer of a version folder.

        Raises:
            InputError: a file is missing or damaged.
        """
        return TextTokenizer(folder / "tokenizer.json", windows=read_count(folder))

    def save(self, path: Path) -> None:
        """Write the tokenizer with its limit, `max_tokens`, as tokenizer.json."""
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.save(str(path))
        self._tokenizer.enable_truncation(self._limit)

    @property
    def tokenizer(self) -> Tokenizer:
        """The Hugging Face tokenizer, for training."""
        return self._tokenizer

    def entries(self) -> list[str]:
        """Return the vocabulary."""
        return list(self._tokenizer.get_vocab())

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, [CLS] and [SEP] included: at most `max_tokens`, or its windows."""
        return [self._in_windows(ids.tolist()) for ids in self._read(texts)[0].rows()]

    def _in_windows(self, ids: list[int]) -> list[int]:
        return into_windows(ids, self.max_tokens, self._around)

    def varied_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of augmented texts: `MASK` becomes the tokenizer's own mask token.

        Raises:
            InputError: a word is masked, but the tokenizer has no mask token.
        """
        found = self.tokens(texts)
        masked = [i for i, text in enumerate(texts) if MASK in text]
        if masked:
            own = special_tokens(self._tokenizer)["mask"]
            self._tokenizer.encode_special_tokens = False
            encodings = self._tokenizer.encode_batch_fast([texts[i].replace(MASK, own) for i in masked])
            read_special_tokens_as_text(self._tokenizer)
            for i, encoding in zip(masked, encodings, strict=True):
                found[i] = self._in_windows(encoding.ids)
        return found

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Return the token ids, where in the text each token starts and ends, and whether tokens were cut off.

        [CLS] and [SEP] stand for no characters, so they end where they start.
        """
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.offsets, bool(encoding.overflowing)

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        read, cut = self._read(texts)
        input_ids, inside = _padded(read)
        unknown = (inside & (input_ids == self._unknown)).sum(axis=1, dtype=np.float32)
        share = unknown / np.maximum(read.lengths - self._added, 1, dtype=np.float32)
        if input_ids.shape[1] > self.max_tokens:
            read = _ragged([self._in_windows(ids.tolist()) for ids in read.rows()])
            input_ids, _ = _padded(read)
        return TokenizedTexts(input_ids, read.lengths[:, None], int(cut.sum()), share[:, None])

    def decide_fast(self, texts: Sequence[str]) -> dict[str, Any]:
        """Check whether the faster tokenizer gives the same token ids; see `fast.decide`."""
        return fast.decide(self._tokenizer, texts, self._limit)

    def _read(self, texts: Sequence[str]) -> tuple[Ragged, Cut]:
        """Return the token ids of each text, and which texts were cut at the limit.

        A long text is tried in three steps: its first words, its first characters, and at last the whole text.
        """
        long = {i: self._beginning(text) for i, text in enumerate(texts) if len(text) > LONG * self._limit}
        if not long:
            return self._read_whole(texts)
        read, cut = self._read_whole([long.get(i, text) for i, text in enumerate(texts)])
        replaced: dict[int, Any] = {i: self._start(texts[i]) for i in long if not cut[i]}
        cut[[i for i, ids in replaced.items() if ids]] = True
        again = [i for i, ids in replaced.items() if not ids]
        if again:
            more, more_cut = self._read_whole([texts[i] for i in again])
            replaced.update(zip(again, more.rows(), strict=True))
            cut[again] = more_cut
        return _with_rows(read, replaced), cut

    def _beginning(self, text: str) -> str:
        """Return the first words of a long text, or an empty string if no word ends there.

        If these words fill the token limit, their tokens are those of the whole text: later words do not change the
        tokens of earlier ones.
        """
        most = LONG * self._limit
        return text[: 1 + max(text.rfind(end, 0, most) for end in self._ends)]

    def _start(self, text: str) -> list[int]:
        """Return the token ids of a long text from its first characters; an empty list if more must be read.

        The tokenizer may cut a run without spaces and punctuation into several words. All of these but the last are
        words of the whole text too.
        """
        encoding = self._tokenizer.encode(text[: LONG * self._limit])
        words = [word for part in (encoding, *encoding.overflowing) for word in part.word_ids if word is not None]
        kept = [word for word in encoding.word_ids if word is not None]
        ids: list[int] = encoding.ids
        return ids if encoding.overflowing and kept[-1] < max(words) else []

    def _read_whole(self, texts: Sequence[str]) -> tuple[Ragged, Cut]:
        if self._fast is None:
            return self._read_slowly(texts)
        (ids, lengths), unread = self._fast(texts, self._limit + 1)  # one more tells whether there are more
        cut = lengths > self._limit
        if cut.any():  # its last token, [SEP], stays
            surplus = (lengths.cumsum() - 2)[cut]
            ids, lengths = np.delete(ids, surplus), lengths - cut
        if not unread:
            return Ragged(ids, lengths), cut
        others, others_cut = self._read_slowly([texts[i] for i in unread])
        cut[unread] = others_cut
        return _with_rows(Ragged(ids, lengths), dict(zip(unread, others.rows(), strict=True))), cut

    def _read_slowly(self, texts: Sequence[str]) -> tuple[Ragged, Cut]:
        encodings = self._tokenizer.encode_batch_fast(texts)
        rows = [encoding.ids for encoding in encodings]
        full = [len(ids) == self._limit for ids in rows]
        cut = [at and bool(each.overflowing) for at, each in zip(full, encodings, strict=True)]
        return _ragged(rows), np.array(cut, bool)


def _ragged(rows: Sequence[Sequence[int]]) -> Ragged:
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    return Ragged(np.fromiter(itertools.chain.from_iterable(rows), np.uint32, lengths.sum()), lengths)


def _padded(read: Ragged) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return token ids as rows, [texts, longest], zero after each text's end, and which places are inside a text."""
    inside = np.arange(read.lengths.max()) < read.lengths[:, None]
    input_ids = np.zeros(inside.shape, np.int32)
    input_ids[inside] = read.ids
    return input_ids, inside


def _with_rows(read: Ragged, replaced: Mapping[int, Any]) -> Ragged:
    """Return token ids of which some texts' are replaced."""
    return _ragged([replaced.get(i, ids) for i, ids in enumerate(read.rows())]) if replaced else read


def read_special_tokens_as_text(tokenizer: Tokenizer) -> None:
    """Make a tokenizer read "[SEP]" in a text as these five characters. tokenizer.json cannot say this."""
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, models.Unigram):  # its vocabulary has the special tokens as ordinary pieces
        special = [each.content for each in tokenizer.get_added_tokens_decoder().values() if each.special]
        first = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in sorted(special))
        _split_first(tokenizer, pre_tokenizers.Split(Regex(first), "isolated"))


def _split_first(tokenizer: Tokenizer, split: pre_tokenizers.PreTokenizer) -> None:
    """Add a step to the beginning of the pre-tokenizer, unless it is there already."""
    own = tokenizer.pre_tokenizer
    if own is None:
        tokenizer.pre_tokenizer = split
    elif split.__getstate__() not in own.__getstate__():
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, own])


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return a tokenizer's special tokens by role, such as `mask`: those of BERT or of the multilingual BERTs.

    Raises:
        InputError: one is missing.
    """
    found: dict[str, str] = {}
    for token, other in zip(SPECIAL, MULTILINGUAL, strict=True):
        role = token[1:-1].lower()
        known = [each for each in (token, other) if tokenizer.token_to_id(each) is not None]
        if not known:
            raise InputError(f"the tokenizer has no {token}; use a BERT that was pretrained on masked words")
        found[role] = known[0]
    return found
