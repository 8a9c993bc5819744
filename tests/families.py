"""Small models of every encoder family, with random weights."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": 0,
}
ROTARY = {
    "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
DISTILBERT = {"vocab_size": 500, "dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 96}
DEBERTA: dict[str, Any] = {
    **SIZES,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 64,
    "pooler_hidden_act": "gelu",
}
MODERNBERT: dict[str, Any] = {
    **SIZES,
    "local_attention": 16,
    "rope_parameters": ROTARY,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "classifier_pooling": "mean",
}
# By a name for the test: the model type, and the settings of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", SIZES),
    "roberta": ("roberta", {**SIZES, "pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {**SIZES, "pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "camembert": ("camembert", {**SIZES, "pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "distilbert": ("distilbert", DISTILBERT),
    "electra": ("electra", {**SIZES, "embedding_size": 32}),
    "electra as wide": ("electra", {**SIZES, "embedding_size": 64}),
    "ernie": ("ernie", {**SIZES, "use_task_id": True}),
    "albert": ("albert", {**SIZES, "embedding_size": 32, "num_hidden_groups": 2}),
    "albert as wide": ("albert", {**SIZES, "embedding_size": 64}),
    "mpnet": ("mpnet", {**SIZES, "pad_token_id": 1, "max_position_embeddings": 514}),
    "deberta-v3": ("deberta-v2", {**DEBERTA, "position_buckets": 16}),
    "deberta-v2": (
        "deberta-v2",
        {**DEBERTA, "share_att_key": False, "position_biased_input": True, "type_vocab_size": 2, "norm_rel_ebd": ""},
    ),
    "deberta narrow": ("deberta-v2", {**DEBERTA, "embedding_size": 32, "position_buckets": 256}),
    "modernbert": ("modernbert", MODERNBERT),
    "modernbert, first token": (
        "modernbert",
        {**MODERNBERT, "classifier_pooling": "cls", "norm_bias": True, "attention_bias": True, "mlp_bias": True},
    ),
}
FLAT = [name for name in MODELS if not name.startswith(("mpnet", "deberta"))]  # those that FlashAttention can run


def random_model(name: str, seed: int = 0, labels: int = 7, **settings: Any) -> Any:
    """Return a classifier with random weights. Biases and norms are not 0 and 1, which would hide a mix-up."""
    torch.manual_seed(seed)
    kind, own = MODELS[name]
    config = AutoConfig.for_model(kind, **{**own, **settings}, num_labels=labels, initializer_range=0.2)
    model = AutoModelForSequenceClassification.from_config(config).eval().float()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model
