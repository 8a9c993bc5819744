"""Prune: drop the vocabulary pieces that a checkpoint's texts do not use. Their predictions stay the same."""

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
from aisle.files import put_in_place
from aisle.preprocess.encode import TextTokenizer, read_special_tokens_as_text
from aisle.preprocess.tables.table import fingerprint
from aisle.train.core.checkpoint import Checkpoint, write_checkpoint
from aisle.train.core.families import first_position
from aisle.train.core.metrics import score
from aisle.train.core.predict import logits_of
from aisle.train.core.resume import check_replaceable, working_folder
from aisle.train.fit.decide import fit_on_texts
from aisle.train.fit.pretrain import unlabelled
from aisle.train.fit.unknown import cutting, isolates

BATCH = 1024  # texts


def prune(
    checkpoint: Path, data: Sequence[Path], text_column: str, out: Path, least: int, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the checkpoint to `out`, with the pieces that occur `least` times in some tables, and their characters.

    Texts that `aisle train` holds out are not counted, so the pruned checkpoint is measured on unseen texts.

    Returns the sizes before and after, and the agreement of both models on the checkpoint's held-out sample.

    Raises:
        InputError: a table or the checkpoint cannot be read, or its tokenizer is of another kind than WordPiece,
            Unigram and BPE.
    """
    check_replaceable(out, "training.json", overwrite)
    source = Checkpoint(checkpoint)
    source.check_one_category("aisle prune")
    labels, model, sample, tokenizer = source.labels, source.model, source.sample, source.tokenizer
    texts = sample.held_out.texts
    before = logits_of(model, tokenizer.tokens(texts), "before")
    pieces = _pieces(tokenizer, sample.validation.texts)
    config: dict[str, Any] = {
        "checkpoint": source.fingerprint,
        "data": [{"file": path.name, "sha256": fingerprint(path), "column": text_column} for path in data],
        "least": least,
    }
    with working_folder(out, config) as work:
        pruned, sizes = prune_vocabulary(model, tokenizer, list(unlabelled(data, text_column)), work, least)
        after = logits_of(model, pruned.tokens(texts), "after")
        metrics = {
            **score(sample.held_out.labels, [labels[i] for i in after.argmax(axis=1)]),
            "rows": {"held_out": len(texts)},
            "agreement": float((before.argmax(axis=1) == after.argmax(axis=1)).mean()),
        }
        history = {**source.training, "pruning": {**config, **sizes}}
        decisions = source.decisions
        if decisions and pieces != _pieces(pruned, sample.validation.texts):  # then their logits have changed too
            decisions = fit_on_texts(
                model, pruned, labels, sample.validation, decisions.targets, alone=source.prototypes
            )
        write_checkpoint(
            *(work / "checkpoint", model, pruned, sample, metrics, history, decisions),
            examples=source.examples,
            heads=source.head_rows,
        )
        weights = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, work / "checkpoint")]
        put_in_place(work / "checkpoint", out)
    return {**sizes, "bytes": dict(zip(("before", "after"), weights, strict=True)), **metrics}


def _pieces(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[str | None]]:
    """Return the pieces of each text as strings, which pruning does not renumber."""
    return [[tokenizer.tokenizer.id_to_token(number) for number in ids] for ids in tokenizer.tokens(texts)]


def prune_vocabulary(
    model: Any, tokenizer: TextTokenizer, texts: Sequence[str], folder: Path, least: int = 1
) -> tuple[TextTokenizer, dict[str, Any]]:
    """Drop pieces from a model, in place, and from its tokenizer, which is written to `folder`.

    If `least` is 1, each text keeps its pieces and so its logits: WordPiece takes the longest piece that fits, Unigram
    the most likely ones, BPE merges pieces in a fixed order, and all of these pieces are kept.

    Returns the new tokenizer, and how many pieces there were and are.

    Raises:
        InputError: the tokenizer is of another kind.
    """
    file = folder / "tokenizer.json"
    tokenizer.save(file)
    backend = Tokenizer.from_file(str(file))
    keep = needed(backend, texts, least)
    if first := first_position(model.config):  # positions are counted from the number of the padding token
        keep = sorted({*range(first), *keep})
    shrink(backend, keep).save(str(file))

    padding = model.config.pad_token_id
    old = model.get_input_embeddings().weight.detach()
    padding = keep.index(padding) if padding in keep else None
    model.set_input_embeddings(torch.nn.Embedding(len(keep), old.shape[1], padding, _weight=old[keep].clone()))
    model.config.vocab_size, model.config.pad_token_id = len(keep), padding
    return TextTokenizer(file, windows=tokenizer.windows), {"vocabulary": {"before": len(old), "after": len(keep)}}


def needed(tokenizer: Tokenizer, texts: Sequence[str], least: int) -> list[int]:
    """Return the ids of the pieces to keep, in order: special tokens and the pieces of the whole, untruncated texts.

    Each character of the texts is kept, at the start of a word and within it. So a word with a dropped piece is split
    into smaller pieces and does not become [UNK].

    Raises:
        InputError: the tokenizer is neither WordPiece nor Unigram (SentencePiece's) nor BPE.
    """
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    special = {token["content"] for token in spec["added_tokens"]}
    if model["type"] == "WordPiece":
        mark = model["continuing_subword_prefix"]
        special.add(model["unk_token"])
    elif model["type"] == "Unigram":
        mark = "▁"  # marks the space before a word
        # The least likely piece sets the score of unknown characters.
        special |= {model["vocab"][model["unk_id"] or 0][0], min(model["vocab"], key=lambda piece: piece[1])[0], mark}
    elif model["type"] == "BPE":
        mark = "▁"
        special |= {piece for piece in model["vocab"] if len(piece) == 1}  # the bytes or characters that are merged
    else:
        raise InputError(f"a {model['type']} vocabulary cannot be pruned; only WordPiece, Unigram and BPE can")
    counts, characters = _count_pieces(tokenizer, texts)
    keep = {
        piece
        for piece, number in tokenizer.get_vocab().items()
        if piece in special or counts[number] >= least or piece in characters or piece.removeprefix(mark) in characters
    }
    if model["type"] == "BPE":
        keep = _with_parts(keep, _merges(model))
    return sorted(number for piece, number in tokenizer.get_vocab().items() if piece in keep)


def _merges(model: dict[str, Any]) -> list[list[str]]:
    """Return the pairs of pieces that BPE merges, in order."""
    return [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]


def _with_parts(pieces: set[str], merges: Sequence[Sequence[str]]) -> set[str]:
    """Return the pieces, and those that they are merged from."""
    parts: dict[str, set[str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, set()).update((left, right))
    found, waiting = set(pieces), list(pieces)
    while waiting:
        more = parts.get(waiting.pop(), set()) - found
        found |= more
        waiting += more
    return found


def _count_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Counter[int], set[str]]:
    """Return how often each piece occurs in the whole texts, and the characters of the texts."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    read_special_tokens_as_text(whole)
    counts: Counter[int] = Counter()
    characters: set[str] = set()
    for start in track(range(0, len(texts), BATCH), "counting pieces"):
        batch = list(texts[start : start + BATCH])
        for encoding in whole.encode_batch_fast(batch):
            counts.update(encoding.ids)
        for text in batch:
            characters.update(whole.normalizer.normalize_str(text) if whole.normalizer else text)
    return counts, characters


def shrink(tokenizer: Tokenizer, keep: Sequence[int]) -> Tokenizer:
    """Return the tokenizer with the pieces `keep` only, numbered from 0 in their order."""
    new = {old: number for number, old in enumerate(keep)}
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    if model["type"] == "Unigram":  # a list indexed by id
        model["vocab"] = [model["vocab"][number] for number in keep if number < len(model["vocab"])]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new[number] for piece, number in model["vocab"].items() if number in new}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in _merges(model) if {*pair, "".join(pair)} <= model["vocab"].keys()]
    for token in spec["added_tokens"]:
        token["id"] = new[token["id"]]
    processor = spec["post_processor"] or {}
    for token in processor.get("special_tokens", {}).values():  # TemplateProcessing
        token["ids"] = [new[number] for number in token["ids"]]
    for end in processor.keys() & {"cls", "sep"}:  # BertProcessing
        processor[end][1] = new[processor[end][1]]
    shrunk = Tokenizer.from_str(json.dumps(spec))
    if isolates(tokenizer):  # dropped characters are unknown now
        shrunk.pre_tokenizer = cutting(shrunk.get_vocab())
    return shrunk
