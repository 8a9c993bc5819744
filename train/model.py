"""The classifier to be trained: a small BERT from scratch, or any pretrained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification

from aisle.errors import InputError

SCRATCH = "scratch"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def from_scratch(texts: Sequence[str], labels: Sequence[str], max_tokens: int, dropout: float) -> tuple[Any, Tokenizer]:
    """Return a 4 × 256 BERT with random weights, and a WordPiece tokenizer learnt from the texts."""
    tokenizer = train_tokenizer(texts, max_tokens)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=max_tokens,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **_label_names(labels),
    )
    return BertForSequenceClassification(config), tokenizer


def train_tokenizer(texts: Sequence[str], max_tokens: int) -> Tokenizer:
    """Learn a WordPiece vocabulary of 8,000: single Chinese characters, pieces of other words, as BERT-base-Chinese."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=8000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def from_pretrained(name: str, labels: Sequence[str], max_tokens: int, dropout: float) -> tuple[Any, Tokenizer]:
    """Load a BERT and its fast tokenizer from a local folder or the Hugging Face hub, with a new classifier on top.

    Raises:
        InputError: it cannot be loaded, is no BERT, has no fast tokenizer, or reads fewer than `max_tokens` tokens.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "bert":
            raise InputError(f"{name} is a {config.model_type!r} model; give a BERT")
        if config.max_position_embeddings < max_tokens:
            raise InputError(f"{name} reads {config.max_position_embeddings} tokens at most; lower --max-tokens")
        tokenizer = AutoTokenizer.from_pretrained(name).backend_tokenizer
        model = BertForSequenceClassification.from_pretrained(
            name,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            ignore_mismatched_sizes=True,  # a classifier for other labels is replaced
            **_label_names(labels),
        )
    except InputError:
        raise
    except AttributeError:
        raise InputError(f"{name} has no fast tokenizer (tokenizer.json)") from None
    except Exception as error:  # hub, file and safetensors errors
        raise InputError(f"cannot load {name}: {str(error).splitlines()[0]}") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return model, tokenizer


def _label_names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
