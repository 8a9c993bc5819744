"""The packed graph computes what Hugging Face's padded BERT computes."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from aisle.build.graph import PackedEncoder
from aisle.preprocess.pack import pack
from aisle.train.core.predict import pad


def random_bert(seed: int, **settings: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 500,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "num_labels": 7,
        **settings,
    }
    model = BertForSequenceClassification(BertConfig(**config, initializer_range=0.2)).eval()
    for parameter in model.parameters():  # biases and LayerNorms start at 0 and 1, which would hide a mix-up
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("texts", [1, 2, 7, 64])
@pytest.mark.parametrize("settings", [{}, {"num_attention_heads": 2, "num_hidden_layers": 1}, {"type_vocab_size": 1}])
@pytest.mark.parametrize("limit", [64, 128, 512])
def test_packed_is_exact(texts: int, settings: dict[str, int], limit: int) -> None:
    model = random_bert(texts, **settings)
    rng = np.random.default_rng(texts)
    lengths = rng.integers(1, limit + 1, texts)
    lengths[0] = [1, limit][texts % 2]
    tokens = rng.integers(0, 500, lengths.sum())
    input_ids, attention_mask = pad([text.tolist() for text in np.split(tokens, np.cumsum(lengths)[:-1])])
    with torch.inference_mode():
        expected = model(input_ids=input_ids, attention_mask=attention_mask).logits
        actual = PackedEncoder(model)(*map(torch.from_numpy, pack(tokens, lengths, limit)))
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_with_16_bits_sums_stay_in_fp32(dtype: torch.dtype, error: float) -> None:
    model = random_bert(0)
    lengths = np.array([5, 60, 128, 1])
    packed = pack(np.random.default_rng(0).integers(0, 500, lengths.sum()), lengths, 128)
    with torch.inference_mode():
        expected = PackedEncoder(model)(*map(torch.from_numpy, packed))
        actual = PackedEncoder(model, dtype)(*map(torch.from_numpy, packed))
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).abs().max() < error * expected.abs().max()
