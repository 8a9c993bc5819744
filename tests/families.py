"""Small models of every encoder family, with random weights."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

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


def random_model(name: str, labels: int = 7, **settings: Any) -> Any:
    """Return a classifier with random weights. Biases and norms are not 0 and 1, which would hide a mix-up."""
    torch.manual_seed(0)
    kind, own = MODELS[name]
    size = {} if "id2label" in settings else {"num_labels": labels}
    config = AutoConfig.for_model(kind, **{**own, **settings, **size}, initializer_range=0.2)
    model = AutoModelForSequenceClassification.from_config(config).eval().float()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


SHOP = [
    "红富士苹果新鲜水果脆甜",
    "蓝牙耳机无线降噪运动",
    "成猫猫粮鸡肉味大袋",
    "organic green tea bags",
    "usb cable 2m fast charge",
]


def shop_texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return titles and their categories, which the words tell."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = SHOP[number % len(SHOP)]
        rows.append(
            ("".join(rng.sample(words, len(words))) + f" {rng.randrange(99)}", f"category {number % len(SHOP)}")
        )
    return rows


def tokenizer_of(name: str, texts: Sequence[str]) -> Tokenizer:
    """Return a tokenizer of the kind that the family uses, trained on texts."""
    kind, _ = MODELS[name]
    trainer: Any
    more: dict[str, Any] = {}
    if kind in ("roberta", "modernbert"):
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        more = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif kind in ("xlm-roberta", "camembert", "albert", "deberta-v2"):
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        more = {"unk_token": "[UNK]" if kind in ("albert", "deberta-v2") else "<unk>"}
    else:
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    offset = kind in ("roberta", "xlm-roberta", "camembert", "mpnet")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if offset else ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    special = [*special, "[UNK]"] if kind == "mpnet" else special
    tokenizer.train_from_iterator(texts, trainer(vocab_size=400, special_tokens=special, show_progress=False, **more))
    start, end = (special[0], special[2]) if offset else ("[CLS]", "[SEP]")
    ends = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
    return tokenizer


def write_model(name: str, folder: Path, texts: Sequence[str], labels: Sequence[str], **settings: Any) -> Any:
    """Write a classifier with random weights, as transformers does, and return it."""
    numbers = {label: i for i, label in enumerate(labels)}
    model = random_model(name, len(labels), id2label=dict(enumerate(labels)), label2id=numbers, **settings)
    model.save_pretrained(folder)
    tokenizer = tokenizer_of(name, texts)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return model
