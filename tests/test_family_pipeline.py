"""Models of every family are trained, compressed, compiled and served like a BERT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer

from aisle.build.build import build
from aisle.build.engine import load_engine
from aisle.build.graph import PackedEncoder
from aisle.build.inputs import TextSource
from aisle.build.repository import check_version
from aisle.client import Classifier
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.pack import pack
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.families import output_layer
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import SCRATCH, StudentSpec, TrainingSettings
from aisle.train.fit.distil import distil, student_of
from aisle.train.fit.loop import parameter_groups
from aisle.train.fit.model import from_pretrained
from aisle.train.fit.prune import prune_vocabulary
from aisle.train.fit.train import train
from tests.families import MODELS, shop_texts, write_model

LABELS = ["apples", "headphones", "cat food", "tea", "cables"]
# One of each kind of graph: absolute positions, wider layers, biases of distances, disentangled, rotary.
GRAPHS = ["roberta", "albert", "mpnet", "deberta-v3", "modernbert"]
ONCE = [name for name in MODELS if name not in ("electra as wide", "albert as wide", "deberta-v2", "deberta narrow")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "shop.jsonl"
    rows = [{"text": text, "category": category} for text, category in shop_texts(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def texts_of(table: Path) -> list[str]:
    return [json.loads(line)["text"] for line in table.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ONCE)
def test_a_model_of_any_family_is_loaded_shrunk_and_pruned(name: str, table: Path, tmp_path: Path) -> None:
    texts = texts_of(table)
    write_model(name, tmp_path / "model", texts, ["other", *LABELS])
    model, backend = from_pretrained(str(tmp_path / "model"), LABELS, 64, 0.3)
    assert {each.p for each in model.modules() if isinstance(each, torch.nn.Dropout)} >= {0.3}
    assert output_layer(model).out_features == len(LABELS)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    expected = logits_of(model.eval(), tokenizer.tokens(texts), "")

    student, basis = student_of(model, StudentSpec(layers=2, hidden_size=64), 0.1)
    assert (student.config.num_hidden_layers, basis) == (2, None)
    groups = parameter_groups(student, TrainingSettings("name", learning_rate=1e-3, layer_decay=0.5))
    assert len({group["lr"] for group in groups}) == (2 if name == "albert" else 4)  # the head, the layers, the rest
    if name in ("albert", "electra"):
        with pytest.raises(InputError, match="size of their own"):
            student_of(model, StudentSpec(layers=2, hidden_size=32), 0.1)
    else:
        narrow, basis = student_of(model, StudentSpec(layers=2, hidden_size=32), 0.1)
        assert basis is not None
        assert logits_of(narrow.eval(), tokenizer.tokens(texts[:5]), "").shape == (5, len(LABELS))

    pruned, sizes = prune_vocabulary(model, tokenizer, texts[:100], tmp_path)
    assert sizes["vocabulary"]["after"] < sizes["vocabulary"]["before"]
    assert np.abs(logits_of(model, pruned.tokens(texts[:100]), "") - expected[:100]).max() < 1e-4
    assert np.abs(family_logits(model, pruned.tokens(texts[:100])) - expected[:100]).max() < 1e-4


def family_logits(model: Any, tokens: list[list[int]]) -> npt.NDArray[np.float32]:
    """Return the logits of the graph that is compiled."""
    packed = pack(np.concatenate(tokens), np.array(list(map(len, tokens))), 64)
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = PackedEncoder(model).eval()(*map(torch.from_numpy, packed)).numpy()
    return logits


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.long
def test_openvino_computes_each_kind_of_graph(name: str, table: Path, tmp_path: Path) -> None:
    texts = texts_of(table)
    write_model(name, tmp_path / "model", texts, LABELS)
    result = build(tmp_path / "model", tmp_path / "models", "openvino", "fp32", held_out=TextSource(table, "text"))
    assert result["agreement"] == 1.0
    assert result["largest_logit_error"] < 1e-3


@pytest.mark.long
def test_a_modernbert_is_trained_distilled_and_built_in_int8(table: Path, tmp_path: Path) -> None:
    write_model("modernbert", tmp_path / "model", texts_of(table), LABELS)
    settings = TrainingSettings(str(tmp_path / "model"), epochs=3, batch_size=16, max_tokens=64, learning_rate=1e-3)
    train(table, "text", "category", tmp_path / "trained", settings)
    like_teacher = replace(settings, model=SCRATCH)
    spec = StudentSpec(layers=2, hidden_size=64)
    metrics = distil([tmp_path / "trained"], table, "text", "category", tmp_path / "student", like_teacher, spec)
    assert metrics["accuracy"] > 0.9
    assert Checkpoint(tmp_path / "student").model.config.model_type == "modernbert"
    assert build(tmp_path / "student", tmp_path / "models", "openvino", "int8")["agreement"] >= 0.98


@pytest.mark.long
def test_a_long_text_is_read_to_the_models_own_limit(table: Path, tmp_path: Path) -> None:
    texts = texts_of(table)
    model = write_model("modernbert", tmp_path / "model", texts, LABELS, max_position_embeddings=2048)
    repository = tmp_path / "repository"
    build(
        *(tmp_path / "model", repository, "openvino", "fp32"),
        held_out=TextSource(table, "text"),
        max_tokens=2048,
    )
    long = " ".join(texts)[:4000]
    asked = [prepare(text) for text in ("红富士苹果", long, "usb cable", *texts[:30])]
    tokens = TextTokenizer(check_version(repository, 1)["tokenizer.json"]).tokens(asked)
    assert len(tokens[1]) > 1500
    with torch.inference_mode():
        expected = np.array([model(torch.tensor([ids])).logits[0].numpy() for ids in tokens])
    logits = load_engine(repository / "encoder" / "1")(np.concatenate(tokens), np.array(list(map(len, tokens))))
    assert np.abs(logits - expected).max() < 1e-3
    grpc, metrics = free_ports(2)
    options = ServerOptions(repository, grpc_port=grpc, metrics_port=metrics)
    with (tmp_path / "log").open("wb") as log, running(options, log), Classifier(f"localhost:{grpc}") as classifier:
        served = classifier.classify(asked)
    assert [each.category for each in served] == [LABELS[number] for number in expected.argmax(1)]
    confidence = torch.from_numpy(expected).softmax(1).max(1).values.numpy()
    assert np.allclose([each.confidence for each in served], confidence, atol=1e-3)


def test_special_tokens_in_a_title_are_text(table: Path, tmp_path: Path) -> None:
    for name in ("bert", "roberta", "deberta-v3"):
        write_model(name, tmp_path / name, texts_of(table), LABELS)
        tokenizer = TextTokenizer(tmp_path / name / "tokenizer.json")
        special = {number for number, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}
        ids = tokenizer.tokens(["usb [SEP] cable </s> [MASK] <mask> <pad> [CLS]"])[0]
        unknown = {tokenizer.tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")}
        assert not special.intersection(ids[1:-1]) - unknown, name
        assert special.issuperset([ids[0], ids[-1]])
        tokenizer.save(tmp_path / "again.json")
        again = TextTokenizer(tmp_path / "again.json")
        again.save(tmp_path / "thrice.json")
        assert again.tokens(texts_of(table)) == tokenizer.tokens(texts_of(table))
        assert (tmp_path / "thrice.json").read_bytes() == (tmp_path / "again.json").read_bytes()
        whole = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))  # as transformers reads other texts
        assert tokenizer.tokens(texts_of(table)) == [each.ids for each in whole.encode_batch(texts_of(table))]
