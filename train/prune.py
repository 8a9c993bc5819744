"""Prune: leave out of a checkpoint's vocabulary what its texts do not use; they are read and answered as before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from aisle.console import track
from aisle.errors import InputError
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import fingerprint
from aisle.train.checkpoint import checkpoint_fingerprint, load_model, read_labels, write_checkpoint
from aisle.train.evaluate import logits_of
from aisle.train.metrics import score
from aisle.train.pretrain import unlabelled
from aisle.train.resume import check_replaceable, put_in_place, working_folder
from aisle.train.sample import read_sample

BATCH = 1024  # texts


def prune(checkpoint: Path, data: Sequence[Path], text_column: str, out: Path, least: int) -> dict[str, Any]:
    """Write the checkpoint to `out` with the pieces that the texts of some tables hold `least` times, and characters.

    Texts that `aisle train` holds out are not counted, so what the pruned checkpoint is measured on stays unseen.

    Returns the sizes before and after, and on the checkpoint's own held-out sample how often both agree.

    Raises:
        InputError: a table or the checkpoint cannot be read, or its tokenizer is neither WordPiece nor Unigram.
    """
    check_replaceable(out, "training.json")
    labels, model, sample = read_labels(checkpoint), load_model(checkpoint), read_sample(checkpoint)
    encoder = Encoder(checkpoint / "tokenizer.json")
    texts = sample.held_out.texts
    before = logits_of(model, encoder.tokens(texts), "before")
    told: dict[str, Any] = {
        "checkpoint": checkpoint_fingerprint(checkpoint),
        "data": [{"file": path.name, "sha256": fingerprint(path), "column": text_column} for path in data],
        "least": least,
    }
    with working_folder(out, told) as work:
        pruned, sizes = prune_vocabulary(model, encoder, list(unlabelled(data, text_column)), work, least)
        after = logits_of(model, pruned.tokens(texts), "after")
        metrics = {
            **score(sample.held_out.labels, [labels[i] for i in after.argmax(axis=1)]),
            "rows": {"held_out": len(texts)},
            "agreement": float((before.argmax(axis=1) == after.argmax(axis=1)).mean()),
        }
        training = checkpoint / "training.json"
        history = json.loads(training.read_text("utf-8")) if training.is_file() else {}
        history["pruning"] = {**told, **sizes}
        write_checkpoint(work / "checkpoint", model, pruned, sample, metrics, history)
        weights = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, work / "checkpoint")]
        put_in_place(work / "checkpoint", out)
    return {**sizes, "bytes": dict(zip(("before", "after"), weights, strict=True)), **metrics}


def prune_vocabulary(
    model: Any, encoder: Encoder, texts: Sequence[str], folder: Path, least: int = 1
) -> tuple[Encoder, dict[str, Any]]:
    """Drop pieces from a model, in place, and from its tokenizer, a file of which is left in `folder`.

    Where `least` is 1, each of the texts is encoded in the same pieces as before, and so gets the same logits:
    WordPiece takes the longest piece that fits, Unigram the likeliest ones, and those are still there.

    Returns the new encoder, and how many pieces there were and are.

    Raises:
        InputError: the tokenizer is neither WordPiece nor Unigram.
    """
    file = folder / "tokenizer.json"
    encoder.save(file)
    tokenizer = Tokenizer.from_file(str(file))
    keep = needed(tokenizer, texts, least)
    shrink(tokenizer, keep).save(str(file))

    embeddings, padding = model.bert.embeddings, model.config.pad_token_id
    old = embeddings.word_embeddings.weight.detach()
    padding = keep.index(padding) if padding in keep else None
    embeddings.word_embeddings = torch.nn.Embedding(len(keep), old.shape[1], padding, _weight=old[keep].clone())
    model.config.vocab_size, model.config.pad_token_id = len(keep), padding
    return Encoder(file), {"vocabulary": {"before": len(old), "after": len(keep)}}


def needed(tokenizer: Tokenizer, texts: Sequence[str], least: int) -> list[int]:
    """Return the ids of the pieces to keep, in their order: special tokens, and what the texts need, cut off or not.

    A character that occurs stays, at the start of a word and within it: with all its characters known, a word that
    holds a dropped piece is cut finer and is no [UNK].

    Raises:
        InputError: the tokenizer is neither WordPiece nor Unigram (SentencePiece's, of the multilingual BERTs).
    """
    told = json.loads(tokenizer.to_str())
    model = told["model"]
    special = {token["content"] for token in told["added_tokens"]}
    if model["type"] == "WordPiece":
        mark = model["continuing_subword_prefix"]
        special.add(model["unk_token"])
    elif model["type"] == "Unigram":
        mark = "▁"  # stands for the space before a word
        # How unlikely the unknown is follows from the least likely piece.
        special |= {model["vocab"][model["unk_id"] or 0][0], min(model["vocab"], key=lambda piece: piece[1])[0], mark}
    else:
        raise InputError(f"a {model['type']} vocabulary cannot be pruned; only WordPiece and Unigram can")
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    counts: Counter[int] = Counter()
    characters: set[str] = set()
    for start in track(range(0, len(texts), BATCH), "counting pieces"):
        batch = list(texts[start : start + BATCH])
        for encoding in whole.encode_batch_fast(batch):
            counts.update(encoding.ids)
        for text in batch:
            characters.update(whole.normalizer.normalize_str(text) if whole.normalizer else text)
    return sorted(
        number
        for piece, number in whole.get_vocab().items()
        if piece in special or counts[number] >= least or piece in characters or piece.removeprefix(mark) in characters
    )


def shrink(tokenizer: Tokenizer, keep: Sequence[int]) -> Tokenizer:
    """Return the tokenizer with the pieces `keep` only, numbered from 0 in their order."""
    new = {old: number for number, old in enumerate(keep)}
    told = json.loads(tokenizer.to_str())
    model = told["model"]
    if model["type"] == "Unigram":  # a list, where an id is a place
        model["vocab"] = [model["vocab"][number] for number in keep if number < len(model["vocab"])]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new[number] for piece, number in model["vocab"].items() if number in new}
    for token in told["added_tokens"]:
        token["id"] = new[token["id"]]
    processor = told["post_processor"] or {}
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new[number] for number in token["ids"]]
    for end in processor.keys() & {"cls", "sep"}:  # BertProcessing
        processor[end][1] = new[processor[end][1]]
    return Tokenizer.from_str(json.dumps(told))
