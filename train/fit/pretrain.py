"""Pretrain a BERT on unlabelled texts by masked language modelling (Devlin et al. 2019)."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from aisle.console import say, track
from aisle.errors import InputError
from aisle.files import put_in_place, write_json
from aisle.preprocess.clean import content_key, prepare
from aisle.preprocess.encode import special_tokens
from aisle.preprocess.tables.table import column, fingerprint, read_rows
from aisle.preprocess.values import TextError
from aisle.train.core.predict import pad
from aisle.train.core.processes import processes
from aisle.train.core.resume import STATE, check_replaceable, identity, working_folder
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import is_held_out, is_validation
from aisle.train.fit.loop import Hooks, Scalars, fit, like_lengths
from aisle.train.fit.model import check_model, check_settings, load_model, new_bert

MASKED = 0.15  # of the words


def pretrain(
    data: Sequence[Path],
    text_column: str,
    out: Path,
    settings: TrainingSettings,
    *,
    save_every: int | None = None,
    log_dir: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a masked language model on the texts of some tables; `aisle train --model OUT` fine-tunes it.

    Texts that `aisle train` would hold out are not used, so its scores remain those of unseen texts. A model other than
    "scratch" is trained further, with its own vocabulary. Resumes after a kill, and runs under torchrun, as `train`
    does.

    Returns pretraining.json: the loss and the accuracy on the masked words of the validation texts.

    Raises:
        InputError: a table cannot be read, too few texts are left, or the model cannot be loaded or has no mask token.
    """
    start = time.perf_counter()
    check_replaceable(out, "pretraining.json", overwrite)
    check_settings(settings)
    if not settings.from_scratch and (kind := check_model(settings.model, settings.max_tokens).model_type) != "bert":
        raise InputError(f"{settings.model} is a {kind!r} model; only a BERT can be pretrained further")
    texts, validation = read_texts(data, text_column)
    made_from = [{"file": path.name, "sha256": fingerprint(path), "column": text_column} for path in data]
    with processes() as world, working_folder(out, identity(settings, made_from, world), is_main=world.is_main) as work:
        say(f"{len(texts)} texts, {len(validation)} to validate")
        torch.manual_seed(settings.seed)
        if settings.from_scratch:
            model, tokenizer = new_bert(MaskedBert, texts, settings)
        else:
            model, tokenizer = load_model(MaskedBert, settings.model, settings.max_tokens, settings.dropout)
        task = MaskedWords(tokenizer, texts, validation, settings, world.device)
        history = fit(model, task, settings, world, Hooks(work / STATE, save_every, log_dir))
        result = {
            "settings": asdict(settings),
            "data": made_from,
            "texts": {"train": len(texts), "validation": len(validation)},
            "epochs": history,
            "seconds": round(time.perf_counter() - start, 1),
        }
        if world.is_main:
            _write_model(model, tokenizer, work / "model")
            write_json(work / "model" / "pretraining.json", result)
            put_in_place(work / "model", out)
    return result


def _write_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model and its tokenizer as a Hugging Face folder."""
    model.config.architectures = ["BertForMaskedLM"]
    BertForMaskedLM.save_pretrained(model, folder)
    special = {f"{role}_token": token for role, token in special_tokens(tokenizer).items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def read_texts(data: Sequence[Path], text_column: str) -> tuple[list[str], list[str]]:
    """Return the cleaned training texts and validation texts, without duplicates and held-out texts.

    Raises:
        InputError: a table cannot be read, or too few texts are left.
    """
    texts: list[str] = []
    validation: list[str] = []
    for text in unlabelled(data, text_column):
        (validation if is_validation(text) else texts).append(text)
    if not texts or not validation:
        raise InputError(f"{len(texts) + len(validation)} texts are too few to learn from; add texts")
    return texts, validation


def unlabelled(data: Sequence[Path], text_column: str) -> Iterator[str]:
    """Yield the cleaned texts of some tables, without duplicates and held-out texts.

    Raises:
        InputError: a table cannot be read.
    """
    seen: set[bytes] = set()
    for path in data:
        for (raw,) in track(column(read_rows(path), [text_column], path), f"reading {path.name}"):
            try:
                text = prepare(raw)
            except TextError:
                continue
            key = content_key(text)
            if key in seen or is_held_out(text):
                continue
            seen.add(key)
            yield text


class MaskedBert(BertForMaskedLM):  # type: ignore[misc]
    """A BERT with logits [masked tokens, vocabulary] of masked tokens only; all tokens would cost six times more."""

    def forward(self, input_ids: Any, attention_mask: Any, masked: Any) -> Any:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.cls(hidden[masked])


class MaskedWords:
    """The task of predicting masked words; each epoch masks different words."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        validation: Sequence[str],
        settings: TrainingSettings,
        device: torch.device,
    ) -> None:
        self.tokens, self.words = _words(tokenizer, texts)
        self.validation = _words(tokenizer, validation)
        self.mask = tokenizer.get_vocab()[special_tokens(tokenizer)["mask"]]
        self.vocabulary = tokenizer.get_vocab_size()
        self.settings = settings
        self.device = device

    def epoch(self, number: int) -> list[list[int]]:
        shuffler = random.Random(f"{self.settings.seed} {number}")
        return list(like_lengths(self.tokens, self.settings.batch_size, shuffler))

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        logits, wanted = self._guess(model, [self.tokens[i] for i in rows], [self.words[i] for i in rows])
        return F.cross_entropy(logits.float(), wanted, reduction="sum") / max(1, len(wanted)) * len(rows)

    def validate(self, model: Any) -> Scalars | None:
        torch.manual_seed(self.settings.seed)  # the same words in every epoch
        tokens, words = self.validation
        loss, right, total = 0.0, 0, 0
        with torch.inference_mode():
            for start in track(range(0, len(tokens), 64), "validating"):
                logits, wanted = self._guess(model, tokens[start : start + 64], words[start : start + 64])
                loss += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
                right += int((logits.argmax(dim=1) == wanted).sum())
                total += len(wanted)
        return {"score": -loss / max(1, total), "loss": loss / max(1, total), "accuracy": right / max(1, total)}

    def _guess(
        self, model: Any, tokens: Sequence[Sequence[int]], words: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [masked tokens, vocabulary] and the original ids [masked tokens]."""
        input_ids, attention_mask = pad(tokens)
        number, _ = pad(words)
        draws = torch.rand(len(tokens), int(number.max()) + 1)
        draws[:, 0] = 1.0  # [CLS], [SEP] and padding stay
        masked = draws.gather(1, number) < MASKED
        # Of the masked tokens, 80 % are hidden, 10 % replaced at random, 10 % kept.
        draw = torch.rand(input_ids.shape)
        noisy = torch.where(masked & (draw < 0.8), self.mask, input_ids)
        noisy = torch.where(masked & (draw >= 0.9), torch.randint(self.vocabulary, input_ids.shape), noisy)
        logits = model(noisy.to(self.device), attention_mask.to(self.device), masked.to(self.device))
        return logits, input_ids[masked].to(self.device)


def _words(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of each text, and for each token the number of its word from 1; 0 for special tokens.

    The pieces of a Latin word are masked together, so that none reveals the others. A Chinese piece is its own word.
    """
    encodings = tokenizer.encode_batch(list(texts))
    return [each.ids for each in encodings], [list(_numbered(each.word_ids, each.tokens)) for each in encodings]


def _numbered(word_ids: Iterable[int | None], tokens: Iterable[str]) -> Iterator[int]:
    count, last = 0, None
    for word, token in zip(word_ids, tokens, strict=True):
        count += word is not None and not (word == last and token.isascii())
        last = word
        yield 0 if word is None else count
