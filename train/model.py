"""The classifier to be trained: a small BERT from scratch, or any pretrained one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification

from aisle.errors import InputError
from aisle.preprocess.encode import SPECIAL
from aisle.train.checkpoint import read_labels
from aisle.train.embed import embed
from aisle.train.settings import Settings

VOCABULARY = 12000
# How often a piece must occur: rarer ones, as whole model numbers, are learnt by heart and say nothing of new products.
RAREST = 10  # times, or in small tables once for every so many texts:
TEXTS = 2000
HEAD = 64  # width of an attention head, as in every BERT of Devlin et al.


def from_scratch(texts: Sequence[str], labels: Sequence[str], settings: Settings) -> tuple[Any, Tokenizer]:
    """Return a new classifier and its tokenizer, as `new_bert` does."""
    return new_bert(BertForSequenceClassification, texts, settings, **label_names(labels))


def new_bert(architecture: Any, texts: Sequence[str], settings: Settings, **more: Any) -> tuple[Any, Tokenizer]:
    """Return a BERT with random weights but for its word embeddings, and a WordPiece tokenizer learnt from the texts.

    Raises:
        InputError: the hidden size cannot be divided into attention heads.
    """
    tokenizer = train_tokenizer(texts, settings.max_tokens)
    model = architecture(small_bert(tokenizer, settings, **more))
    embed(model, tokenizer, texts)
    return model, tokenizer


def small_bert(tokenizer: Tokenizer, settings: Settings, **more: Any) -> BertConfig:
    """Return the configuration of a BERT in its usual proportions (Turc et al. 2019).

    Raises:
        InputError: the hidden size cannot be divided into attention heads.
    """
    heads, rest = divmod(settings.hidden_size, HEAD)
    if rest or not heads:
        raise InputError(f"a hidden size of {settings.hidden_size} cannot be divided; give a multiple of {HEAD}")
    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=settings.max_tokens,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        **more,
    )


def train_tokenizer(texts: Sequence[str], max_tokens: int) -> Tokenizer:
    """Learn a WordPiece vocabulary of the frequent words, Chinese and other, and of every character.

    BERT-base-Chinese reads single characters and learns their words from billions of texts. Some ten thousand texts
    cannot teach that: frequent words are pieces of their own here, in fewer tokens. A piece is the same at the start of
    a word and within it, as Chinese has no spaces to tell the two apart.
    """
    tokenizer = _wordpiece({})
    # The trainer breaks ties by token number and numbers characters in the order of a randomly seeded hash map.
    # Given them as special tokens, in order, it numbers them so; the vocabulary is then the same in every run.
    characters = sorted({c for text in texts for c in tokenizer.normalizer.normalize_str(text) if not c.isspace()})
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY,
        min_frequency=min(RAREST, 1 + len(texts) // TEXTS),
        special_tokens=[*SPECIAL, *characters],
        continuing_subword_prefix="",
        show_progress=False,
    )
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
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=False)
    # WordPiece takes quadratic time in the length of a word, and Chinese has no spaces: cut it at 16 characters.
    chinese = pre_tokenizers.Split(Regex(r"\p{Han}{1,16}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), chinese])
    return tokenizer


def from_pretrained(name: str, labels: Sequence[str], max_tokens: int, dropout: float) -> tuple[Any, Tokenizer]:
    """Load a BERT and its fast tokenizer with a classifier on top; the errors are those of `load_bert`.

    The classifier is new; of a checkpoint, it keeps the rows of the categories that it knows.
    """
    model, tokenizer = load_bert(BertForSequenceClassification, name, max_tokens, dropout, **label_names(labels))
    if (Path(name) / "labels.json").is_file():
        _keep_known(model, Path(name), labels)
    return model, tokenizer


def _keep_known(model: Any, checkpoint: Path, labels: Sequence[str]) -> None:
    """Give the classifier what the checkpoint's has for the categories of the same name."""
    before = {label: i for i, label in enumerate(read_labels(checkpoint))}
    known = [i for i, label in enumerate(labels) if label in before]
    weights = load_file(checkpoint / "model.safetensors")
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = weights[f"classifier.{name}"][[before[labels[i]] for i in known]]
            getattr(model.classifier, name)[known] = rows.to(model.dtype)


def load_bert(architecture: Any, name: str, max_tokens: int, dropout: float, **more: Any) -> tuple[Any, Tokenizer]:
    """Load a BERT and its fast tokenizer from a local folder or the Hugging Face hub.

    Raises:
        InputError: it cannot be loaded, is no BERT, has no fast tokenizer, or reads fewer than `max_tokens` tokens.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type != "bert":
            raise InputError(f"{name} is a {config.model_type!r} model; give a BERT")
        if config.max_position_embeddings < max_tokens:
            raise InputError(f"{name} reads {config.max_position_embeddings} tokens at most; lower --max-tokens")
        own = Path(name) / "tokenizer.json"
        if own.is_file() and not own.with_name("tokenizer_config.json").is_file():
            tokenizer = Tokenizer.from_file(str(own))  # a checkpoint's; transformers would make up another
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
        model = architecture.from_pretrained(
            name,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            ignore_mismatched_sizes=True,  # a classifier for other labels is replaced
            use_safetensors=True,  # the other form is a pickle, which runs what is in it
            **more,
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


def label_names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
