"""Every encoder family is computed without padding as transformers computes it with padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForTokenClassification

from aisle.build.families import FAMILIES, family_of
from aisle.build.graph import PackedEncoder, WithEmbeddings
from aisle.build.varlen import VarlenEncoder, copy_weights, shape_of
from aisle.errors import InputError
from aisle.preprocess.pack import pack
from aisle.train.core.added import set_added
from aisle.train.core.checkpoint import load_classifier
from aisle.train.core.families import SUPPORTED
from aisle.train.core.predict import embeddings_of
from tests.families import FLAT, MODELS, random_model

Ints = npt.NDArray[np.int64]


def texts_of(longest: int, seed: int = 0) -> tuple[Ints, Ints]:
    """Return token ids end to end, none of them padding, and the lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, 9)
    lengths[0], lengths[1] = longest, 1
    return rng.integers(3, 500, lengths.sum()), lengths


def padded_logits(model: Any, tokens: Ints, lengths: Ints) -> torch.Tensor:
    """Return the logits of transformers, one text at a time: then not even its own padding is involved."""
    texts = np.split(tokens, np.cumsum(lengths)[:-1])
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.from_numpy(text)[None]).logits for text in texts])


def test_all_supported_families_are_compiled() -> None:
    assert FAMILIES.keys() == SUPPORTED.keys() == {kind for kind, _ in MODELS.values()}


@pytest.mark.parametrize("longest", [20, 128, 512])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_are_exact(name: str, longest: int) -> None:
    model = random_model(name)
    tokens, lengths = texts_of(longest)
    with torch.inference_mode():
        actual = PackedEncoder(model).eval()(*map(torch.from_numpy, pack(tokens, lengths, longest)))
    expected = padded_logits(model, tokens, lengths)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_added_categories_are_exact(name: str, tmp_path: Path) -> None:
    """They read the hidden states before the last layer; they are saved with the weights, and loaded again."""
    model = random_model(name)
    plain = padded_logits(model, *texts_of(20))
    weight = torch.zeros(model.config.num_labels, model.config.hidden_size)
    weight[-1] = torch.randn(model.config.hidden_size)
    set_added(model, weight)
    model.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path, name).eval()
    tokens, lengths = texts_of(20)
    expected = padded_logits(loaded, tokens, lengths)
    assert (expected - plain)[:, :-1].abs().max() < 1e-5
    assert (expected - plain)[:, -1].abs().min() > 1e-3
    with torch.inference_mode():
        packed = PackedEncoder(loaded).eval()(*map(torch.from_numpy, pack(tokens, lengths, 64)))
    assert (packed - expected).abs().max() < 1e-4
    if name in FLAT:
        module = copy_weights(VarlenEncoder(shape_of(loaded), 128, torch.float32), loaded)
        assert (flat(module, tokens, lengths) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", FLAT)
def test_flat_tokens_are_exact(name: str) -> None:
    model = random_model(name)
    tokens, lengths = texts_of(128)
    module = copy_weights(VarlenEncoder(shape_of(model), 128, torch.float32), model)
    assert (flat(module, tokens, lengths) - padded_logits(model, tokens, lengths)).abs().max() < 1e-4


def flat(module: VarlenEncoder, tokens: Ints, lengths: Ints) -> torch.Tensor:
    """Return what a module gives for texts end to end."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    with torch.inference_mode():
        outputs: torch.Tensor = module(*map(torch.from_numpy, (tokens.astype(np.int32), positions, offsets)))
    return outputs


@pytest.mark.parametrize("pooling", ["", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_exact(name: str, pooling: str) -> None:
    model = random_model(name)
    if pooling:
        model.config.embedding_pooling = pooling
    tokens, lengths = texts_of(20)
    texts = np.split(tokens, np.cumsum(lengths)[:-1])
    packed = map(torch.from_numpy, pack(tokens, lengths, 20))
    with torch.inference_mode():
        actual = WithEmbeddings(PackedEncoder(model).eval())(*packed)
    expected = np.concatenate([embeddings_of(model, [text.tolist()], "embedding") for text in texts])
    logits, vectors = actual[:, : model.config.num_labels], F.normalize(actual[:, model.config.num_labels :], dim=1)
    assert (vectors - torch.from_numpy(expected)).abs().max() < 1e-4
    assert (logits - padded_logits(model, tokens, lengths)).abs().max() < 1e-4
    if name in FLAT:
        module = copy_weights(VarlenEncoder(replace(shape_of(model), embeds=True), 128, torch.float32), model)
        assert (flat(module, tokens, lengths) - actual).abs().max() < 1e-4


def test_an_unknown_kind_of_embedding_is_refused() -> None:
    model = random_model("bert")
    model.config.embedding_pooling = "max"
    with pytest.raises(InputError, match="embedding_pooling is 'max'; it must be 'first' or 'mean'"):
        PackedEncoder(model)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FLAT])
def test_flash_attention_has_no_relative_positions(name: str) -> None:
    with pytest.raises(InputError, match="relative positions; use --target"):
        shape_of(random_model(name))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deberta-v3", {"conv_kernel_size": 3, "conv_act": "gelu"}, "convolution"),
        ("deberta-v3", {"pos_att_type": ["c2p"]}, "both kinds"),
        ("albert", {"inner_group_num": 2}, "inner_group_num"),
        ("bert", {"hidden_act": "mish"}, "activation 'mish'"),
        ("bert", {"is_decoder": True}, "cannot compile a BertForSequenceClassification"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        family_of(random_model(name, **settings))


def test_other_heads_and_families_are_refused() -> None:
    config = AutoConfig.for_model("bert", **MODELS["bert"][1])
    with pytest.raises(InputError, match="cannot compile a BertForTokenClassification"):
        family_of(BertForTokenClassification(config))
    other = AutoConfig.for_model("squeezebert", **MODELS["bert"][1], embedding_size=64)
    with pytest.raises(InputError, match=r"SqueezeBertForSequenceClassification; give .*ModernBertForSequence"):
        family_of(AutoModelForSequenceClassification.from_config(other))
