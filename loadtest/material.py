"""What is measured with: real texts, and a BERT with random weights, as fast as a trained one of its size."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification

from aisle.console import say, track
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.clean import Table, TextError, prepare
from aisle.preprocess.encode import SPECIAL, Encoder
from aisle.preprocess.table import read_labelled
from aisle.train.catalogue import generate
from aisle.train.evaluate import pad
from aisle.train.model import label_names
from aisle.train.sample import Sample, write_sample

VOCABULARY = 21128  # of BERT-base-Chinese
LEARNT_FROM = 20_000  # texts
SAMPLE = {"train": 32, "validation": 32, "held_out": 64}  # texts: random weights need no better calibration
DIRECTIONS = 1  # of the pooled outputs' variance that the classifier reads: with more, INT8 turns over near ties
GAIN = 1.0  # of each layer: texts then differ by more than an engine's rounding, which BERT's own 0.02 would not give
SIZES = {  # hidden size, layers; heads of 64 and four times the width between, as in BERT
    "tiny": (64, 2),
    "4x256": (256, 4),
    "6x512": (512, 6),
    "base": (768, 12),
    "large": (1024, 24),
}


def read_texts(data: Path | None, text_column: str, most: int, seed: int = 0) -> list[str]:
    """Return up to `most` cleaned texts in random order: of a table or, without one, of the SYNTHETIC catalogue.

    Raises:
        InputError: the table cannot be read, or none of its texts can be classified.
    """
    rows = (
        read_labelled(data, text_column, text_column)
        if data
        else ((row["text"], "") for row in generate(2 * most, seed))
    )
    texts = []
    for text, _ in rows:
        try:
            texts.append(prepare(text))
        except TextError:
            continue
    if not texts:
        raise InputError(f"{data}: no text that can be classified")
    return random.Random(seed).sample(texts, min(most, len(texts)))


def config_of(size: str, labels: int) -> BertConfig:
    """Return the configuration of a BERT: transformers' defaults are BERT-base."""
    hidden, layers = SIZES[size]
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        initializer_range=GAIN / hidden**0.5,
        **label_names([f"category {number}" for number in range(labels)]),
    )


def random_bert(size: str, labels: int) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(config_of(size, labels)).eval()


def random_checkpoint(folder: Path, texts: Sequence[str], size: str = "base", labels: int = 10) -> Path:
    """Make a checkpoint of random weights; one that was made in the same way is used again.

    A random classifier on top would answer every text alike. This one reads the direction in which the pooled outputs
    of the texts differ most, so that an engine can be held against PyTorch; few of the categories are ever answered.
    How well a trained model's INT8 agrees, only a trained model shows.
    """
    recipe = {
        "size": size,
        "labels": labels,
        "texts": len(texts),
        "first": texts[0],
        "random weights": [GAIN, DIRECTIONS],
    }
    try:
        if json.loads((folder / "training.json").read_text("utf-8")) == recipe:
            return folder
    except (OSError, ValueError):
        pass
    say(f"making a checkpoint of random weights: {size}, {labels} categories")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", texts)
    encoder = Encoder(folder / "tokenizer.json")
    model = random_bert(size, labels)
    chosen = random.Random(0).choices(texts, k=sum(SAMPLE.values()))
    tokens = encoder.tokens(chosen)
    best = spread_out(model, tokens)
    model.save_pretrained(folder)
    names = [model.config.id2label[number] for number in range(labels)]
    write_json(folder / "labels.json", names)
    # The categories are the model's own: what the gate then counts as a loss is disagreement.
    own = [names[number] for number in best]
    parts, start = [], 0
    for count in SAMPLE.values():
        parts.append(Table(chosen[start : start + count], own[start : start + count]))
        start += count
    write_sample(folder, Sample(*parts))
    write_json(folder / "training.json", recipe)
    return folder


def spread_out(model: Any, tokens: Sequence[Sequence[int]]) -> list[int]:
    """Set the classifier to random mixes of the first principal components of these texts' pooled outputs.

    Returns each text's category.
    """
    classifier, read = model.classifier, []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.inference_mode():
        for start in track(range(0, len(tokens), 16), "reading the texts"):
            input_ids, attention_mask = pad(tokens[start : start + 16])
            model(input_ids=input_ids, attention_mask=attention_mask)
    hook.remove()
    pooled = torch.cat(read)
    mean = pooled.mean(0)
    components = torch.linalg.svd(pooled - mean, full_matrices=False)
    first = components.Vh[:DIRECTIONS]  # [directions, hidden]
    spread = components.S[0] / len(pooled) ** 0.5
    mixes = torch.randn(classifier.out_features, len(first), generator=torch.Generator().manual_seed(0))
    classifier.weight.data = 4 * torch.nn.functional.normalize(mixes) @ first / spread
    classifier.bias.data = -classifier.weight.data @ mean
    best: list[int] = torch.nn.functional.linear(pooled, classifier.weight, classifier.bias).argmax(1).tolist()
    return best


def write_tokenizer(path: Path, texts: Sequence[str], max_tokens: int = 128) -> None:
    """Learn a WordPiece tokenizer as BERT-base-Chinese has it, each Chinese character a token, and write it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts[:LEARNT_FROM], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(max_tokens)
    tokenizer.save(str(path))
