"""Fixtures of the bench: real texts, and a BERT with random weights, which runs as fast as a trained one."""

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
from aisle.preprocess.clean import LabelledTexts, prepare
from aisle.preprocess.encode import SPECIAL, TextTokenizer
from aisle.preprocess.tables.table import read_labelled
from aisle.preprocess.values import TextError
from aisle.train.core.predict import pad
from aisle.train.core.sample import Sample, write_sample
from aisle.train.fit.model import label_names
from aisle.train.synthetic.catalogue import generate

VOCABULARY = 21128  # of BERT-base-Chinese
TOKENIZER_TEXTS = 20_000  # the tokenizer is trained on this many texts
SAMPLE = {"train": 32, "validation": 32, "held_out": 64}  # texts; random weights need no more for calibration
COMPONENTS = 1  # principal components that the classifier reads; with more, INT8 changes near ties
GAIN = 1.0  # of each layer: with BERT's own initialization, texts would differ by less than an engine's rounding
SIZES = {  # hidden size, layers; as in BERT, heads have size 64, and the intermediate size is 4 × the hidden size
    "tiny": (64, 2),
    "4x256": (256, 4),
    "6x512": (512, 6),
    "base": (768, 12),
    "large": (1024, 24),
}


def read_texts(data: Path | None, text_column: str, most: int, seed: int = 0) -> list[str]:
    """Return up to `most` cleaned texts in random order, from a table or, without one, from the SYNTHETIC catalogue.

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
    """Return the configuration of a BERT. Other values are the defaults of BERT-base."""
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
    """Make a checkpoint with random weights, or reuse one with the same recipe.

    A random classifier would give every text the same category. This one reads the direction in which the texts' pooled
    outputs differ most, so that an engine can be compared with PyTorch. It predicts only a few of the categories. The
    agreement of an INT8 engine must be measured on a trained model.
    """
    recipe = {
        "size": size,
        "labels": labels,
        "texts": len(texts),
        "first": texts[0],
        "random weights": [GAIN, COMPONENTS],
    }
    try:
        if json.loads((folder / "training.json").read_text("utf-8")) == recipe:
            return folder
    except (OSError, ValueError):
        pass
    say(f"making a checkpoint with random weights: {size}, {labels} categories")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", texts)
    model = random_bert(size, labels)
    chosen = random.Random(0).choices(texts, k=sum(SAMPLE.values()))
    predicted = spread_out(model, TextTokenizer(folder / "tokenizer.json").tokens(chosen))
    model.save_pretrained(folder)
    names = [model.config.id2label[number] for number in range(labels)]
    write_json(folder / "labels.json", names)
    # The labels are the model's own predictions, so a loss in the gate is a disagreement.
    write_sample(folder, _sample(chosen, [names[number] for number in predicted]))
    write_json(folder / "training.json", recipe)
    return folder


def _sample(texts: Sequence[str], labels: Sequence[str]) -> Sample:
    """Cut texts and their labels into parts of the sizes in `SAMPLE`."""
    parts, start = [], 0
    for count in SAMPLE.values():
        end = start + count
        parts.append(LabelledTexts([*texts[start:end]], [*labels[start:end]]))
        start = end
    return Sample(*parts)


def spread_out(model: Any, tokens: Sequence[Sequence[int]]) -> list[int]:
    """Set the classifier to random combinations of the first principal components of the texts' pooled outputs.

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
    first = components.Vh[:COMPONENTS]  # [components, hidden]
    spread = components.S[0] / len(pooled) ** 0.5
    mixes = torch.randn(classifier.out_features, len(first), generator=torch.Generator().manual_seed(0))
    classifier.weight.data = 4 * torch.nn.functional.normalize(mixes) @ first / spread
    classifier.bias.data = -classifier.weight.data @ mean
    best: list[int] = torch.nn.functional.linear(pooled, classifier.weight, classifier.bias).argmax(1).tolist()
    return best


def write_tokenizer(path: Path, texts: Sequence[str], max_tokens: int = 128) -> None:
    """Train and write a WordPiece tokenizer like that of BERT-base-Chinese: each Chinese character is a token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts[:TOKENIZER_TEXTS], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(max_tokens)
    tokenizer.save(str(path))
