"""The checkpoint: one folder with all that a trained classifier is.

config.json  model.safetensors      weights, as transformers saves them
tokenizer.json                      the fast tokenizer
labels.json                         the categories, in the order of the logits
sample.jsonl                        some cleaned texts of each part, for calibrating and checking engines
metrics.json                        how good it is on the held-out part
training.json                       how it was made: settings, cleaning report, fingerprints of data and code
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import aisle
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import fingerprint
from aisle.train.sample import Sample, write_sample

FILES = ("config.json", "model.safetensors", "tokenizer.json", "labels.json")


def read_labels(folder: Path) -> list[str]:
    """Return the categories in the order of the logits.

    Raises:
        InputError: the folder is no checkpoint, or its labels are damaged.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is no checkpoint: it lacks {', '.join(missing)}; make one with: aisle train")
    try:
        labels = json.loads((folder / "labels.json").read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{folder}/labels.json is damaged: {error}") from None
    if not (isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels)):
        raise InputError(f"{folder}/labels.json must be a list of two or more strings")
    return labels


def load_model(folder: Path) -> Any:
    """Load the checkpoint's `BertForSequenceClassification`, ready to predict.

    Raises:
        InputError: the folder is no checkpoint, holds another architecture, or the labels don't fit the weights.
    """
    from transformers import BertForSequenceClassification

    labels = read_labels(folder)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{folder}/config.json is damaged: {error}") from None
    if config.get("model_type") != "bert":
        raise InputError(f"{folder} holds a {config.get('model_type')!r} model; only BERT can be served")
    try:
        model = BertForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # safetensors and transformers each raise their own
        raise InputError(f"{folder}: the weights cannot be loaded: {error}".splitlines()[0]) from None
    if model.config.num_labels != len(labels):
        raise InputError(f"{folder}: {len(labels)} labels for {model.config.num_labels} logits")
    return model.eval()


def write_checkpoint(
    folder: Path, model: Any, encoder: Encoder, sample: Sample, metrics: dict[str, Any], told: dict[str, Any]
) -> None:
    """Write all files of a checkpoint; `told` says in training.json how it was made."""
    import torch

    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    encoder.save(folder / "tokenizer.json")
    write_json(folder / "labels.json", [model.config.id2label[i] for i in range(model.config.num_labels)])
    write_sample(folder, sample)
    write_json(folder / "metrics.json", metrics)
    made_by = {
        "code_sha256": code_fingerprint(),
        "checkpoint_sha256": checkpoint_fingerprint(folder),
        "versions": {"aisle": aisle.__version__, "torch": torch.__version__},
    }
    write_json(folder / "training.json", {**told, **made_by})


def checkpoint_fingerprint(folder: Path) -> str:
    """Return a SHA-256 over what decides the answers: weights, configuration, tokenizer and labels."""
    return hashlib.sha256("".join(fingerprint(folder / name) for name in FILES).encode()).hexdigest()


def code_fingerprint() -> str:
    """Return a SHA-256 over the source that makes a checkpoint."""
    root = Path(__file__).parent.parent
    sources = sorted(path for part in ("preprocess", "train") for path in (root / part).rglob("*.py"))
    return hashlib.sha256("".join(fingerprint(path) for path in sources).encode()).hexdigest()
