"""Unsuitable model folders are refused, or converted, before training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from aisle.errors import InputError
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import logits_of
from aisle.train.fit.model import from_pretrained, train_tokenizer


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A language model of 200 pieces, without a tokenizer."""
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_without_a_tokenizer_is_refused(bert: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer: put the model's tokenizer\.json or vocab\.txt there"):
        from_pretrained(str(bert), ["a", "b"], 16, 0.1)


def test_a_tokenizer_of_another_model_is_refused(bert: Path) -> None:
    texts = [f"商品{chr(0x4E00 + i)}" for i in range(300)]
    train_tokenizer(texts, 16).save(str(bert / "tokenizer.json"))
    with pytest.raises(InputError, match="they belong to different models"):
        from_pretrained(str(bert), ["a", "b"], 16, 0.1)
    train_tokenizer(texts[:50], 16).save(str(bert / "tokenizer.json"))
    from_pretrained(str(bert), ["a", "b"], 16, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_16_bits_are_converted(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    half = tmp_path / "half"
    shutil.copytree(checkpoint, half)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    tokens = Checkpoint(half).tokenizer.tokens(["红富士苹果", "蓝牙耳机"])
    model = Checkpoint(half).model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert abs(logits_of(model, tokens, "") - logits_of(Checkpoint(checkpoint).model, tokens, "")).max() < 0.2
    further, _ = from_pretrained(str(half), list(model.config.id2label.values()), 16, 0.1)
    assert {tensor.dtype for tensor in further.parameters()} == {torch.float32}


def test_labels_that_differ_from_the_configuration_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    labels = json.loads((other / "labels.json").read_text("utf-8"))
    (other / "labels.json").write_text(json.dumps([labels[1], labels[0], *labels[2:]]), "utf-8")
    for load in (lambda: Checkpoint(other).model, lambda: from_pretrained(str(other), labels, 16, 0.1)):
        with pytest.raises(InputError, match="logit 0 is"):
            load()
    config = json.loads((other / "config.json").read_text("utf-8"))
    unnamed = {str(i): f"LABEL_{i}" for i in range(len(labels))}  # default names of transformers
    (other / "config.json").write_text(json.dumps({**config, "id2label": unnamed, "label2id": {}}), "utf-8")
    assert Checkpoint(other).model.config.num_labels == len(labels)
