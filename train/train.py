"""Train: labelled texts to a checkpoint. Reads top to bottom: data, model, loop, evaluation, files."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import aisle
from aisle.console import say, track
from aisle.errors import InputError
from aisle.preprocess.clean import clean_rows
from aisle.preprocess.encode import MAX_TOKENS, Encoder
from aisle.preprocess.table import fingerprint, read_labelled
from aisle.train.checkpoint import checkpoint_fingerprint, code_fingerprint, write_json
from aisle.train.data import split
from aisle.train.evaluate import logits_of, pad
from aisle.train.metrics import score
from aisle.train.model import SCRATCH, from_pretrained, from_scratch

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Settings:
    """What one training run is told."""

    model: str = SCRATCH  # or a Hugging Face BERT: a local folder or a hub name
    epochs: int = 2
    batch_size: int = 64
    learning_rate: float | None = None  # by default 5e-4 from scratch, 3e-5 from a pretrained model
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    dropout: float = 0.1
    max_tokens: int = MAX_TOKENS
    seed: int = 0


def train(data: Path, text_column: str, label_column: str, out: Path, settings: Settings) -> dict[str, Any]:
    """Train a classifier on a table and write the checkpoint folder `out`.

    Returns metrics.json: the scores on the held-out fifth, and the seconds it took.

    Raises:
        InputError: the table cannot be learnt from, or the model cannot be loaded.
    """
    start = time.perf_counter()
    if out.exists() and not (out / "training.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no checkpoint; choose another folder")
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)

    # Data: clean, split by content.
    table, cleaning = clean_rows(read_labelled(data, text_column, label_column))
    say(f"{cleaning.rows_in} rows, {cleaning.rows_kept} kept; dropped: {cleaning.dropped or 'none'}")
    parts = split(table)
    number = {label: i for i, label in enumerate(parts.labels)}
    targets = torch.tensor([number[label] for label in parts.train.labels])

    # Model and tokenizer; the tokenizer's file goes through the serving code's own loader.
    if settings.model == SCRATCH:
        model, tokenizer = from_scratch(parts.train.texts, parts.labels, settings.max_tokens, settings.dropout)
    else:
        model, tokenizer = from_pretrained(settings.model, parts.labels, settings.max_tokens, settings.dropout)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=_made(out.parent)))
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
        encoder = Encoder(folder / "tokenizer.json")

        fit(model, encoder.tokens(parts.train.texts), targets, settings)

        # Evaluate on the held-out part, then write the rest of the folder and put it in its place.
        logits = logits_of(model.eval(), encoder.tokens(parts.held_out.texts), "evaluating")
        metrics = score(parts.held_out.labels, [parts.labels[i] for i in logits.argmax(axis=1)])
        metrics["rows"] = {"train": len(parts.train.texts), "held_out": len(parts.held_out.texts)}
        metrics["seconds"] = round(time.perf_counter() - start, 1)
        model.save_pretrained(folder)
        write_json(folder / "labels.json", parts.labels)
        write_json(folder / "metrics.json", metrics)
        write_json(
            folder / "training.json",
            {
                "settings": asdict(settings),
                "data": {"file": data.name, "sha256": fingerprint(data), "cleaning": asdict(cleaning)},
                "code_sha256": code_fingerprint(),
                "checkpoint_sha256": checkpoint_fingerprint(folder),
                "versions": {"aisle": aisle.__version__, "torch": torch.__version__},
            },
        )
        _replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return metrics


def fit(model: Any, tokens: Tokens, targets: torch.Tensor, settings: Settings) -> None:
    """Minimize the cross-entropy with AdamW: linear warm-up, then linear decay to zero."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    # Without bf16 instructions a CPU would only emulate it, more slowly than fp32.
    bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    rate = settings.learning_rate or (5e-4 if settings.model == SCRATCH else 3e-5)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]  # biases and LayerNorm are not decayed
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=rate,
    )
    steps = settings.epochs * math.ceil(len(tokens) / settings.batch_size)
    warmup = max(1, int(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    shuffler = random.Random(settings.seed)
    for epoch in range(settings.epochs):
        total = 0.0
        batches = list(like_lengths(tokens, settings.batch_size, shuffler))
        for batch in track(batches, f"epoch {epoch + 1}/{settings.epochs}"):
            input_ids, attention_mask = pad([tokens[i] for i in batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
            loss = F.cross_entropy(output.logits.float(), targets[batch].to(device))
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        say(f"epoch {epoch + 1}: mean loss {total / len(batches):.4f}")


def like_lengths(tokens: Tokens, size: int, shuffler: random.Random) -> Iterator[list[int]]:
    """Yield shuffled batches whose texts are of like length, so that little of a batch is padding."""
    order = list(range(len(tokens)))
    shuffler.shuffle(order)
    batches = []
    for start in range(0, len(order), 50 * size):
        pool = sorted(order[start : start + 50 * size], key=lambda i: len(tokens[i]))
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffler.shuffle(batches)
    yield from batches


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def _replace(folder: Path, out: Path) -> None:
    """Move `folder` to `out`; an older checkpoint there goes first."""
    folder.chmod(0o755)
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
