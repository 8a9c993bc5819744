"""The encoder families that can be trained and served, by the `model_type` of transformers."""

from __future__ import annotations

import re
from typing import Any

from aisle.errors import InputError

# XLM-RoBERTa is also the architecture of multilingual E5, ModernBERT that of mmBERT, DeBERTa-v2 that of DeBERTa-v3.
SUPPORTED = {
    "albert": "AlbertForSequenceClassification",
    "bert": "BertForSequenceClassification",
    "camembert": "CamembertForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "ernie": "ErnieForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
}
NAMES = ", ".join(SUPPORTED)
# Parameters by their names in transformers: those of a layer, and those below all layers. ALBERT's layers are one.
LAYER = re.compile(r"\.layers?\.(\d+)\.")
EMBEDDINGS = re.compile(r"embedding|\.encoder\.LayerNorm\.")
OFFSET = ("camembert", "mpnet", "roberta", "xlm-roberta")  # their first position is not 0


def check_family(model_type: Any, name: Any) -> str:
    """Return the family of a model.

    Raises:
        InputError: it is not supported; the message names those that are.
    """
    if model_type not in SUPPORTED:
        raise InputError(f"{name} is a {model_type!r} model; only these can be trained and served: {NAMES}")
    return str(model_type)


def first_position(config: Any) -> int:
    """Return the position id of a text's first token: in RoBERTa and its kin, 1 after that of padding."""
    if config.model_type not in OFFSET:
        return 0
    return 2 if config.model_type == "mpnet" else int(config.pad_token_id) + 1


def token_limit(config: Any) -> int:
    """Return how many tokens a model can read."""
    return int(config.max_position_embeddings) - first_position(config)


def dropout_settings(model_type: str, rate: float) -> dict[str, float]:
    """Return the settings of the configuration that give hidden states and attention this dropout rate."""
    match model_type:
        case "distilbert":
            return {"dropout": rate, "attention_dropout": rate}
        case "modernbert":
            return {"embedding_dropout": rate, "mlp_dropout": rate, "attention_dropout": rate}
        case _:
            return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def classifier_pooling(config: Any) -> str:
    """Return what the classifier reads of the last hidden states: those of the "first" token, or the "mean" of all."""
    return "mean" if getattr(config, "classifier_pooling", "") == "mean" else "first"


def embedding_pooling(config: Any) -> str:
    """Return what the embedding of a text is: what the classifier reads, or what `embedding_pooling` says.

    Raises:
        InputError: config.json says something else than "first" or "mean".
    """
    pooling = str(getattr(config, "embedding_pooling", classifier_pooling(config)))
    if pooling not in ("first", "mean"):
        raise InputError(f"config.json: embedding_pooling is {pooling!r}; it must be 'first' or 'mean'")
    return pooling


def output_layer(model: Any) -> Any:
    """Return the linear layer that computes the logits."""
    return getattr(model.classifier, "out_proj", model.classifier)
