"""The model to train: a small BERT from scratch, or a pretrained encoder of any supported family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from aisle.errors import InputError
from aisle.preprocess.encode import SPECIAL, read_special_tokens_as_text
from aisle.train.core.checkpoint import Checkpoint, check_complete, check_finite, check_names, check_pieces
from aisle.train.core.families import EMBEDDINGS, LAYER, check_family, dropout_settings, output_layer, token_limit
from aisle.train.core.hub import is_local
from aisle.train.core.settings import TrainingSettings
from aisle.train.fit.embed import embed
from aisle.train.fit.unknown import cutting

VOCABULARY = 12000
# Minimum frequency of a piece. Rarer ones, such as whole model numbers, are memorized and do not generalize.
RAREST = 10  # in small tables 1 + texts / TEXTS
RAREST_OF_GROUPS = 2  # such numbers tell products apart
TEXTS = 2000
HEAD = 64  # width of an attention head, as in every BERT of Devlin et al.


def new_classifier(texts: Sequence[str], labels: Sequence[str], settings: TrainingSettings) -> tuple[Any, Tokenizer]:
    """Return the classifier that a training starts from, and its tokenizer.

    Raises:
        InputError: as `new_bert` or `from_pretrained`.
    """
    if settings.from_scratch:
        return from_scratch(texts, labels, settings)
    return from_pretrained(settings.model, labels, settings.max_tokens, settings.dropout)


def from_scratch(texts: Sequence[str], labels: Sequence[str], settings: TrainingSettings) -> tuple[Any, Tokenizer]:
    """Return a new classifier and its tokenizer, as `new_bert` does."""
    return new_bert(BertForSequenceClassification, texts, settings, **label_names(labels))


def new_bert(architecture: Any, texts: Sequence[str], settings: TrainingSettings, **more: Any) -> tuple[Any, Tokenizer]:
    """Return a BERT with counted word embeddings and otherwise random weights, and a WordPiece tokenizer of the texts.

    Raises:
        InputError: the hidden size cannot be divided into attention heads.
    """
    rarest = RAREST_OF_GROUPS if settings.contrastive else RAREST
    tokenizer = train_tokenizer(texts, settings.max_tokens, rarest)
    model = architecture(small_bert(tokenizer, settings, **more))
    embed(model, tokenizer, texts)
    return model, tokenizer


def small_bert(tokenizer: Tokenizer, settings: TrainingSettings, **more: Any) -> BertConfig:
    """Return the configuration of a BERT in its usual proportions (Turc et al. 2019).

    Raises:
        InputError: the hidden size cannot be divided into attention heads.
    """
    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads(settings.hidden_size),
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=settings.max_tokens,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        **more,
    )


def heads(size: int) -> int:
    """Return how many attention heads a hidden size has.

    Raises:
        InputError: it cannot be divided into heads.
    """
    count, rest = divmod(size, HEAD)
    if rest or not count:
        raise InputError(f"a hidden size of {size} cannot be divided; give a multiple of {HEAD}")
    return count


def train_tokenizer(texts: Sequence[str], max_tokens: int, rarest: int = RAREST) -> Tokenizer:
    """Learn a WordPiece vocabulary of frequent words, Chinese and other, and of every character.

    BERT-base-Chinese reads single characters and learns words from billions of texts. Ten thousand texts are too few
    for that, so frequent words are pieces here, which also gives fewer tokens. A piece is the same at the start of a
    word and within it, because Chinese has no spaces. Each character that is in no text becomes one [UNK].

    Args:
        rarest: minimum frequency of a piece; in small tables it is lower.
    """
    tokenizer = _wordpiece({})
    # The trainer breaks ties by token id, and gives characters ids in the order of a randomly seeded hash map.
    # Passed as special tokens they get ids in their order, so the vocabulary is the same in every run.
    characters = sorted({c for text in texts for c in tokenizer.normalizer.normalize_str(text) if not c.isspace()})
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY,
        min_frequency=min(rarest, 1 + len(texts) // TEXTS),
        special_tokens=[*SPECIAL, *characters],
        continuing_subword_prefix="",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()

    tokenizer = _wordpiece(vocabulary)  # a new one, in which only SPECIAL are special tokens
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer.enable_truncation(max_tokens)
    read_special_tokens_as_text(tokenizer)
    return tokenizer


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=False)
    tokenizer.pre_tokenizer = cutting(vocabulary)
    return tokenizer


def from_pretrained(name: str, labels: Sequence[str], max_tokens: int, dropout: float) -> tuple[Any, Tokenizer]:
    """Load an encoder and its fast tokenizer, with a new classifier on top; raises as `load_model`.

    From a checkpoint, the classifier keeps the rows of the categories that both have.
    """
    model, tokenizer = load_model(AutoModelForSequenceClassification, name, max_tokens, dropout, **label_names(labels))
    if (Path(name) / "labels.json").is_file():
        _keep_known(model, Path(name), labels)
    return model, tokenizer


def _keep_known(model: Any, checkpoint: Path, labels: Sequence[str]) -> None:
    """Copy the checkpoint's classifier rows for the categories of the same name."""
    names = Checkpoint(checkpoint).labels
    check_names(checkpoint, json.loads((checkpoint / "config.json").read_text("utf-8")), names)
    before = {label: i for i, label in enumerate(names)}
    known = [i for i, label in enumerate(labels) if label in before]
    weights = load_file(checkpoint / "model.safetensors")
    last = output_layer(model)
    prefix = next(name for name, module in model.named_modules() if module is last)
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = weights[f"{prefix}.{name}"][[before[labels[i]] for i in known]]
            getattr(last, name)[known] = rows.to(model.dtype)


def load_model(architecture: Any, name: str, max_tokens: int, dropout: float, **more: Any) -> tuple[Any, Tokenizer]:
    """Load an encoder and its fast tokenizer from a local folder or the Hugging Face hub.

    Weights of any type are converted to fp32.

    Raises:
        InputError: it cannot be loaded, is of another family, has no fast tokenizer, or reads fewer than `max_tokens`
            tokens; or its tokenizer and weights do not fit together.
    """
    config = check_model(name, max_tokens)
    local = is_local(name)
    try:
        tokenizer = _load_tokenizer(name, local)
        model, found = architecture.from_pretrained(
            name,
            output_loading_info=True,
            **dropout_settings(config.model_type, dropout),
            ignore_mismatched_sizes=True,  # a classifier for other labels is replaced
            use_safetensors=True,  # never a pickle, which can run code
            dtype=torch.float32,
            local_files_only=local,
            **more,
        )
        encoder = [key for key in found["missing_keys"] if LAYER.search(key) or EMBEDDINGS.search(key)]
        check_complete(name, model, encoder)  # the classifier may be missing
        check_pieces(name, tokenizer, model)
        check_finite(name, model)
    except InputError:
        raise
    except AttributeError:
        raise InputError(f"{name} has no fast tokenizer (tokenizer.json)") from None
    except Exception as error:  # hub, file and safetensors errors
        raise InputError(f"cannot load {name}: {str(error).splitlines()[0]}") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    read_special_tokens_as_text(tokenizer)
    return model, tokenizer


def _load_tokenizer(name: str, local: bool) -> Any:
    file = Path(name) / "tokenizer.json"
    if file.is_file() and not file.with_name("tokenizer_config.json").is_file():
        return Tokenizer.from_file(str(file))  # a checkpoint of Aisle; transformers would construct another tokenizer
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local).backend_tokenizer


def check_model(name: str, max_tokens: int) -> Any:
    """Check by its configuration that a model is of a supported family and reads `max_tokens` tokens.

    Returns the configuration.

    Raises:
        InputError: it is not, or it cannot be found.
    """
    local = is_local(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # hub and file errors
        raise InputError(f"cannot load {name}: {str(error).splitlines()[0]}") from None
    check_family(config.model_type, name)
    if token_limit(config) < max_tokens:
        raise InputError(f"{name} reads {token_limit(config)} tokens at most; lower --max-tokens")
    return config


def check_settings(settings: TrainingSettings) -> None:
    """Check the settings before a table is read.

    Raises:
        InputError: an augmentation, the model or a size is invalid.
    """
    if settings.augment:
        from aisle.preprocess.augment import Augmenter

        Augmenter(settings.augment, settings.seed, settings.augment_rate)
    if settings.folds == 1:
        raise InputError("--folds 1: cross-validation takes two folds or more; 0 turns it off")
    if settings.contrastive and settings.mixup:
        raise InputError("--mixup mixes texts, and --contrastive compares them; leave one out")
    if settings.from_scratch:
        heads(settings.hidden_size)
    else:
        check_model(settings.model, settings.max_tokens)


def label_names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
