"""Convert a fine-tuned classifier of transformers, from a folder or the Hugging Face hub, into a checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess import MAX_TOKENS
from aisle.preprocess.windows import Windows
from aisle.train.core import decisions, sample
from aisle.train.core.checkpoint import FILES, load_classifier
from aisle.train.core.families import SUPPORTED, check_family, token_limit

AISLE_FILES = ("labels.json", sample.FILE, "training.json")  # any of these marks a checkpoint of `aisle train`
HUB_TIMEOUT_SECONDS = 10
VOCABULARIES = ("vocab.txt", "merges.txt", "*.model")  # of WordPiece, byte-level BPE and SentencePiece
CONVERT_COMMAND = (
    'python -c "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T; '
    "M.from_pretrained('{0}', use_safetensors=False).save_pretrained('{1}'); "
    "T.from_pretrained('{0}').save_pretrained('{1}')\""
)


@contextmanager
def checkpoint_of(source: Path, max_tokens: int | None = None, windows: int = 1) -> Iterator[Path]:
    """Yield the source itself if `aisle train` made it, else a temporary checkpoint converted from it.

    Args:
        source: a folder, or the name of a model on the hub.
        max_tokens: tokens of a text, or of each of its windows; by default 128, or the model's own limit if it is less.
        windows: the most windows of a text; only for a model that is converted.

    Raises:
        InputError: the source is neither, or cannot be served; the message says what to change.
    """
    if any((source / name).is_file() for name in AISLE_FILES):
        if windows > 1:
            raise InputError(f"{source} was trained without --windows {windows}; give the option to aisle train")
        yield source
        return
    folder = source if source.is_dir() else _from_hub(source)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{source} is not a checkpoint: it lacks {', '.join(FILES)}; make one with aisle train, or give a "
            "fine-tuned classifier, such as a BertForSequenceClassification"
        )
    with tempfile.TemporaryDirectory(prefix="aisle-checkpoint-") as made:
        _convert(folder, str(source), Path(made), max_tokens, windows)
        yield Path(made)


def _from_hub(source: Path) -> Path:
    """Download a model from the hub and return its local folder.

    Raises:
        InputError: the model does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name = str(source)
    if source.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"{source}: no such folder")
    try:
        files = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=files, etag_timeout=HUB_TIMEOUT_SECONDS))
    except Exception as error:  # the hub's client, HTTP and the file system each raise their own exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: no such folder, and the model cannot be downloaded from the hub ({reason}); give a local "
            "folder, or set HF_HUB_OFFLINE=1 to use an earlier download"
        ) from None


def _convert(folder: Path, name: str, to: Path, max_tokens: int | None, windows: int) -> None:
    """Convert a Hugging Face classifier into the files of a checkpoint.

    Raises:
        InputError: the classifier cannot be served.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{name}: config.json is damaged: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{name}: config.json is damaged: it holds no JSON object")
    labels = _labels(config, name)
    _check_weights(folder, name)
    tokenizer = _tokenizer(folder, name)
    model = load_classifier(folder, name)
    limit = max_tokens or min(MAX_TOKENS, token_limit(model.config))
    Windows(windows, limit).put_into(model.config)
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    model.save_pretrained(to)
    tokenizer.save(str(to / "tokenizer.json"))
    write_json(to / "labels.json", labels)
    if (folder / decisions.FILE).is_file():
        shutil.copyfile(folder / decisions.FILE, to / decisions.FILE)
    read = (
        f"texts are truncated to {limit} tokens (--max-tokens)"
        if windows == 1
        else f"{windows} windows of {limit} tokens"
    )
    say(f"{name}: {len(labels)} categories, such as {labels[0]!r}; {read}")


def _labels(config: dict[str, Any], name: str) -> list[str]:
    """Return the categories of a Hugging Face configuration, in the order of the logits.

    Raises:
        InputError: the model is not a classifier of a supported family, with two or more categories and one per text.
    """
    kind = check_family(config.get("model_type"), name)
    if config.get("architectures") != [SUPPORTED[kind]]:
        raise InputError(
            f"{name} is a {' '.join(config.get('architectures') or [kind])}, not a {SUPPORTED[kind]}: it has no "
            "categories yet; fine-tune it first: aisle train --model"
        )
    if config.get("problem_type") == "multi_label_classification":
        raise InputError(
            f"{name} gives a text several categories at once (multi_label_classification); use a model that gives one"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{name} has {config['position_embedding_type']} positions; only absolute ones can be served")
    names = config.get("id2label") or {}
    if not names:  # transformers leaves it out if there are two categories without names
        raise InputError(f'{name}: config.json has no id2label; name its categories there, as {{"0": "a", "1": "b"}}')
    labels = [names.get(str(number)) for number in range(len(names))]
    if not all(isinstance(label, str) and label for label in labels) or len({*labels}) < max(2, len(labels)):
        raise InputError(f"{name}: id2label in config.json must name two or more different categories, numbered from 0")
    return [str(label) for label in labels]


def _check_weights(folder: Path, name: str) -> None:
    """Make sure that the weights are safetensors: the older format is a pickle, and loading a pickle can run code.

    Raises:
        InputError: they are not; the message gives the command that converts them.
    """
    if any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    # From the hub only safetensors are downloaded, so there missing weights are taken to be .bin.
    if not Path(name).is_dir() or any(folder.glob("pytorch_model*.bin")):
        to = f"{Path(name).name}-safetensors"
        raise InputError(
            f"{name} has no model.safetensors, and weights in the older format (.bin) can run code when they are "
            f"loaded; if you trust them, convert them and build {to}: {CONVERT_COMMAND.format(name, to)}"
        )
    raise InputError(f"{name} has no weights: model.safetensors is missing")


def _tokenizer(folder: Path, name: str) -> Tokenizer:
    """Return the fast tokenizer of a folder, from tokenizer.json or from a vocabulary and its settings.

    Raises:
        InputError: the folder holds neither.
    """
    from transformers import AutoTokenizer

    tokenizer_json = folder / "tokenizer.json"
    vocabularies = [file for pattern in VOCABULARIES for file in folder.glob(pattern)]
    if not tokenizer_json.is_file() and not vocabularies:
        raise InputError(f"{name} has no tokenizer: put the model's own tokenizer.json or {VOCABULARIES[0]} there")
    try:
        if not vocabularies and not (folder / "tokenizer_config.json").is_file():
            return Tokenizer.from_file(str(tokenizer_json))  # without settings, transformers would make another
        settings = {"local_files_only": True, "trust_remote_code": False}
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, **settings).backend_tokenizer
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{name}: the tokenizer cannot be loaded: {error}".splitlines()[0]) from None
