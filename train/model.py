"""The classifier to be trained: a small BERT from scratch, or any pretrained one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification

from aisle.errors import InputError

SCRATCH = "scratch"
VOCABULARY = 8000
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
    """Learn a WordPiece vocabulary: single Chinese characters, pieces of other words, as BERT-base-Chinese has."""
    tokenizer = _wordpiece({})
    # The trainer breaks ties by token number and numbers characters in the order of a randomly seeded hash map.
    # Given them as special tokens, in order, it numbers them so; the vocabulary is then the same in every run.
    pieces = sorted({piece for text in texts for piece in _characters(tokenizer, text)})
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *pieces], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()

    tokenizer = _wordpiece(vocabulary)  # anew: only SPECIAL are special
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _characters(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Yield the characters of a text as WordPiece writes them: those within a word begin with ##."""
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
        yield word[0]
        yield from ("##" + character for character in word[1:])


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
