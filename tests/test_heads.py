"""Further heads on one encoder: columns of the table, training, both engine layouts, the gate, the server, refusals."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from aisle.build.build import build
from aisle.build.gate import GATES, GateError, HeldOut, accuracy, predict
from aisle.build.graph import PackedEncoder
from aisle.build.varlen import VarlenEncoder, copy_weights, shape_of
from aisle.client import AsyncClassifier, Attribute, Classifier, Failure, InvalidText, Prediction
from aisle.deploy.server.rollout import _warn_of_lost_attributes
from aisle.errors import InputError
from aisle.preprocess.clean import LabelledTexts, content_key, prepare
from aisle.preprocess.labels import Labelling
from aisle.preprocess.pack import pack
from aisle.train.core.calibration import fit_temperature
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.families import output_layer
from aisle.train.core.head_data import HeadData, read_heads
from aisle.train.core.head_rows import HeadRows, add_rows, cut_rows, kept_rows, new_rows
from aisle.train.core.heads import Head, load_heads, spans
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import is_held_out
from aisle.train.fit.heads import WEIGHT, loss_of_all, targets_of
from aisle.train.fit.loss import Loss
from aisle.train.fit.train import train

from .conftest import Server, aisle, held_server
from .families import FLAT, MODELS, random_model
from .front import NDJSON, front
from .test_families import flat

KINDS = {
    "水果": ("苹果", "香蕉", "葡萄", "西瓜", "樱桃"),
    "电子": ("耳机", "充电器", "键盘", "鼠标", "音箱"),
    "日化": ("洗发水", "牙膏", "香皂", "面霜", "护手霜"),
}
BRANDS = {"佳沃": ("佳沃", "鲜锋", "果园"), "bosch": ("bosch", "serie", "siemens"), "dove": ("dove", "lux", "rexona")}
COLOURS = {"红色": ("红色", "酒红", "朱红"), "white": ("white", "ivory", "snow")}
HEADS = ["brand", "颜色"]


def rows_of(count: int) -> list[dict[str, str]]:
    """Return products; their words tell the category, the brand and the colour. Some have no brand or no colour."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        kind, brand, colour = rng.choice([*KINDS]), rng.choice([*BRANDS]), rng.choice([*COLOURS])
        words = [*rng.sample(KINDS[kind], 2), *rng.sample(BRANDS[brand], 2), *rng.sample(COLOURS[colour], 2)]
        rng.shuffle(words)
        rows.append(
            {
                "text": " ".join(words),
                "category": kind,
                "brand": brand if rng.random() < 0.7 else "",
                "颜色": colour if rng.random() < 0.9 else "",
            }
        )
    return rows


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("heads") / "table.csv", rows_of(900))


@pytest.fixture(scope="module")
def ckpt(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "checkpoint"
    settings = TrainingSettings(epochs=4, layers=2, hidden_size=128, learning_rate=1e-3, batch_size=16)
    train(table, "text", "category", folder, settings, also=HEADS)
    return folder


@pytest.fixture(scope="module")
def heads_repository(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "repository"
    build(ckpt, folder, "openvino", "fp32")
    return folder


@pytest.fixture(scope="module")
def heads_server(heads_repository: Path, ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "folder"
    with held_server(heads_repository, ckpt, folder, cache_mb=4) as each:
        yield each


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Held-out texts, and one twice."""
    unseen = [row["text"] for row in rows_of(900) if is_held_out(row["text"])][:30]
    return [*dict.fromkeys(unseen), unseen[0]]


@pytest.fixture(scope="module")
def expected(ckpt: Path, texts: list[str]) -> list[dict[str, Attribute]]:
    """The attributes that the checkpoint gives each text."""
    return attributes_of(ckpt, texts)


def attributes_of(folder: Path, texts: Sequence[str]) -> list[dict[str, Attribute]]:
    checkpoint = Checkpoint(folder)
    logits = logits_of(checkpoint.whole_model, checkpoint.tokenizer.tokens([prepare(text) for text in texts]), "")
    found: list[dict[str, Attribute]] = [{} for _ in texts]
    for head, place in zip(checkpoint.heads, spans(len(checkpoint.labels), checkpoint.heads), strict=True):
        probabilities = torch.from_numpy(logits[:, place]).softmax(dim=1)
        for own, row in zip(found, probabilities, strict=True):
            own[head.name] = Attribute(head.labels[int(row.argmax())], float(row.max()))
    return found


def assert_same(found: Sequence[Prediction | Failure], expected: Sequence[dict[str, Attribute]]) -> None:
    for prediction, wanted in zip(found, expected, strict=True):
        assert isinstance(prediction, Prediction)
        assert prediction.attributes is not None
        assert list(prediction.attributes) == HEADS
        for name, (value, confidence) in prediction.attributes.items():
            assert value == wanted[name].value
            assert confidence == pytest.approx(wanted[name].confidence, abs=1e-4)


# The table and the loss


def labelled(rows: Sequence[tuple[str, str]]) -> LabelledTexts:
    return LabelledTexts([text for text, _ in rows], ["x"] * len(rows))


def test_empty_values_and_conflicts_teach_nothing_and_rare_values_are_left_out(tmp_path: Path) -> None:
    rows = [(f"product {i}", "a" if i % 2 else "b") for i in range(60)]
    rows += [("no brand", ""), ("two brands", "a"), ("two  brands", "b"), ("rare one", "c"), ("no category", "a")]
    path = write_table(tmp_path / "t.csv", [{"text": text, "brand": brand} for text, brand in rows])
    known = labelled(rows[:-1])
    (data,) = read_heads(path, "text", ["brand"], known, Labelling(min_rows=2))
    assert data.head == Head("brand", ("a", "b"))
    assert data.numbers(["product 1", "Product 2!", "no brand", "two brands", "rare one", "no category"]) == [
        *(0, 1, -1, -1, -1, -1)
    ]
    with pytest.raises(InputError, match=r"^--also brand: value 'c' has only one row .*--min-rows 2"):
        read_heads(path, "text", ["brand"], known, Labelling())


def test_the_loss_is_the_weighted_sum_of_the_cross_entropies_of_texts_with_a_value() -> None:
    heads = [
        HeadData(Head("a", ("x", "y")), {content_key("one"): "y", content_key("two"): "x"}),
        HeadData(Head("b", ("p", "q", "r")), {content_key("two"): "r"}),
    ]
    settings = TrainingSettings()
    targets = torch.from_numpy(targets_of(heads, np.array([0, 3, 2]), ["one", "two", "three"]))
    assert targets.tolist() == [[0, 1, -1], [3, 0, 2], [2, -1, -1]]
    category = Loss(["k"] * 4, targets[:, 0], settings, torch.device("cpu"))
    loss = loss_of_all(category, heads, 4, targets, settings)
    logits = torch.randn(3, 9, requires_grad=True)
    parts = (logits[:, :4], logits[:, 4:6], logits[:, 6:])
    wanted = [
        weight * F.cross_entropy(part, numbers, reduction="none", ignore_index=-1)
        for weight, part, numbers in zip((1, WEIGHT, WEIGHT), parts, targets.T, strict=True)
    ]
    assert torch.allclose(loss(logits, targets), torch.stack(wanted).sum(dim=0))
    (gradient,) = torch.autograd.grad(loss(logits, targets).sum(), logits)
    assert gradient[2, 4:].abs().max() == gradient[0, 6:].abs().max() == 0
    assert loss.divergence(logits, logits).abs() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_both_layouts_compute_the_heads_of_every_family(name: str) -> None:
    model = random_model(name)
    tokens = [[7, 5, 6, 9], [8, 9, 6], [*range(20, 60)]]  # no special token, which some families count apart
    before = logits_of(model, tokens, "")
    rows = HeadRows((Head("a", ("x", "y")), Head("b", ("p", "q", "r"))), *random_rows(model, 5))
    expected = logits_of(add_rows(model, rows), tokens, "")
    assert expected.shape == (3, 12)
    assert np.allclose(expected[:, :7], before, atol=1e-5)
    ids, lengths = np.concatenate(tokens), np.array([len(each) for each in tokens])
    with torch.inference_mode():
        packed = PackedEncoder(model).eval()(*map(torch.from_numpy, pack(ids, lengths, 64)))
    assert np.abs(packed.numpy() - expected).max() < 1e-4
    if name in FLAT:
        module = copy_weights(VarlenEncoder(shape_of(model), 128, torch.float32), model)
        assert np.abs(flat(module, ids, lengths).numpy() - expected).max() < 1e-4
    cut = cut_rows(model, rows.heads)
    assert torch.equal(cut.weight, rows.weight)
    assert np.allclose(logits_of(model, tokens, ""), before, atol=1e-5)


def random_rows(model: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, model.config.hidden_size), torch.randn(count)


def test_known_values_keep_their_rows() -> None:
    model = random_model("bert")
    old = HeadRows((Head("a", ("x", "y")),), *random_rows(model, 2))
    new = kept_rows(new_rows(model, (Head("b", ("x", "y")), Head("a", ("n", "y", "z")))), old)
    assert torch.equal(new.weight[3], old.weight[1])
    assert new.bias[3] == old.bias[1]
    assert new.bias[[0, 1, 2, 4]].abs().max() == 0


# The checkpoint


def test_heads_are_learnt_beside_the_category(ckpt: Path, table: Path) -> None:
    metrics = json.loads((ckpt / "metrics.json").read_text("utf-8"))
    assert metrics["accuracy"] > 0.9
    assert set(metrics["attributes"]) == set(HEADS)
    held_out = {row["text"]: row for row in rows_of(900) if is_held_out(row["text"])}
    for found in metrics["attributes"].values():
        assert found["accuracy"] > 0.9
        assert {"macro_f1", "per_class"} <= found.keys()
        assert 0 < found["rows"] < len(held_out)
    training = json.loads((ckpt / "training.json").read_text("utf-8"))
    assert training["data"]["also"] == HEADS
    assert set(training["attribute_temperatures"]) == set(HEADS)
    assert {"accuracy", "brand accuracy", "颜色 accuracy"} <= training["epochs"][0].keys()


def test_each_head_is_calibrated(ckpt: Path, table: Path) -> None:
    checkpoint = Checkpoint(ckpt)
    rows = checkpoint.sample.validation.texts
    known = LabelledTexts([row["text"] for row in rows_of(900)], [""] * 900)
    data = read_heads(table, "text", HEADS, known, Labelling())
    logits = logits_of(checkpoint.whole_model, checkpoint.tokenizer.tokens(rows), "")
    for each, place in zip(data, spans(3, checkpoint.heads), strict=True):
        numbers = np.array(each.numbers(rows))
        assert fit_temperature(logits[numbers >= 0, place], numbers[numbers >= 0]) == pytest.approx(1, abs=0.02)


def test_transformers_reads_a_plain_classifier(ckpt: Path, texts: list[str]) -> None:
    checkpoint = Checkpoint(ckpt)
    model, found = AutoModelForSequenceClassification.from_pretrained(ckpt, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert output_layer(model).out_features == len(checkpoint.labels) == 3
    tokens = checkpoint.tokenizer.tokens(texts)
    plain = logits_of(model.eval(), tokens, "")
    assert np.array_equal(plain, logits_of(checkpoint.model, tokens, ""))
    assert np.allclose(plain, logits_of(checkpoint.whole_model, tokens, "")[:, :3], atol=1e-5)


def test_a_checkpoint_without_heads_is_as_before(checkpoint: Path, heads_repository: Path, ckpt: Path) -> None:
    opened = Checkpoint(checkpoint)
    assert opened.heads == ()
    assert opened.head_rows is None
    assert opened.whole_model is opened.model
    assert not list(checkpoint.glob("heads.*"))
    assert "also" not in opened.training["data"]
    assert "attribute_temperatures" not in opened.training
    assert "attributes" not in json.loads((checkpoint / "metrics.json").read_text("utf-8"))
    assert "accuracy" not in opened.training["epochs"][0]  # the score is the accuracy
    assert opened.fingerprint != Checkpoint(ckpt).fingerprint
    assert load_heads(heads_repository / "encoder" / "1") == Checkpoint(ckpt).heads


def test_the_fingerprint_covers_the_heads(ckpt: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(ckpt, tmp_path / "copy")
    labels = json.loads((copy / "heads.json").read_text("utf-8"))
    labels["brand"][0] = "other"
    (copy / "heads.json").write_text(json.dumps(labels), "utf-8")
    assert Checkpoint(copy).fingerprint != Checkpoint(ckpt).fingerprint


@pytest.mark.parametrize("damage", ["", "[]", '{"brand": ["a"]}', '{"brand": 3}', '{"brand": ["a", "b"]}', "gone"])
def test_damaged_heads_are_refused(damage: str, ckpt: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(ckpt, tmp_path / "copy")
    if damage == "gone":
        (copy / "heads.safetensors").unlink()
    else:
        (copy / "heads.json").write_text(damage, "utf-8")
    done = aisle("build", copy, "--repository", tmp_path / "models")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "heads." in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--also missing", "no column 'missing'; it has: text, category, brand, 颜色, one, single; give the right one"),
        ("--also one", "--also one: only the value 'same' is left after cleaning; an attribute needs at least two"),
        ("--also single", "--also single: value 'rare' has only one row after cleaning; add rows, or give --min-rows"),
        ("--also category", "--also category: this is the column of the category"),
        ("--also text", "--also text: this column is in the text"),
        ("--also brand --text-column text --text-column brand", "--also brand: this column is in the text"),
        ("--also brand --also brand", "--also: brand is given twice"),
        ("--also decision", "--also decision: the server or aisle classify has an output of this name"),
        ("--also embedding", "has an output of this name"),
        ("--also confidence_2", "has an output of this name"),
        ("--also brand --also brand_confidence", "this is the name of a confidence, that of 'brand'"),
        ("--also SPACE", "a name has 1 to 64 characters"),
        ("--also EMPTY", "a name has 1 to 64 characters"),
        ("--also brand --multi-label", "--also is for one category per text; leave out --also or --multi-label"),
    ],
)
def test_what_cannot_be_an_attribute_is_refused(options: str, message: str, tmp_path: Path) -> None:
    rows = [{**row, "one": "same", "single": "rare" if not i else "often"} for i, row in enumerate(rows_of(80))]
    path = write_table(tmp_path / "t.csv", rows)
    words = [{"SPACE": "brand ", "EMPTY": ""}.get(word, word) for word in options.split()]
    done = aisle("train", path, "-o", tmp_path / "out", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


# The gate


def test_the_gate_measures_each_head() -> None:
    heads = (Head("brand", ("a", "b")), Head("colour", ("x", "y")))
    expected = np.tile(np.array([[1, 0, 1, 0, 1, 0]], np.float32), (4, 1))
    held_out = HeldOut([[1]] * 4, ["k"] * 4, ["k", "l"], expected, heads=heads)
    good = accuracy(expected, held_out)
    assert good["attributes"] == {"brand": 1.0, "colour": 1.0}
    assert GATES["fp32"].passes(good)
    other = expected.copy()
    other[0, 2:4] = 0, 1
    row = accuracy(other, held_out)
    assert row["attributes"] == {"brand": 0.75, "colour": 1.0}
    assert (row["agreement"], row["f1_loss"]) == (1.0, 0.0)
    assert not GATES["fp32"].passes(row)
    assert GATES["fp32"].failed_attributes(row) == {"brand": 0.75}
    other[1, 5] = np.nan
    assert accuracy(other, held_out)["not_finite"] == 1


def test_an_engine_whose_head_differs_is_refused_by_name(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*arguments: Any) -> Any:
        logits = predict(*arguments)
        logits[:, 3:6] = -logits[:, 3:6]
        return logits

    monkeypatch.setattr("aisle.build.build.predict", spoilt)
    with pytest.raises(GateError, match=r"does not agree with .*: it gives the same brand to \d"):
        build(ckpt, tmp_path / "models", "cuda", "fp16")
    assert not list((tmp_path / "models").glob("*/1"))


@pytest.mark.long
def test_quantized_and_flat_engines_agree(ckpt: Path, tmp_path: Path) -> None:
    for target, precision in (("openvino", "int8"), ("cuda", "fp16")):
        result = build(ckpt, tmp_path / "models", target, precision)
        assert all(share >= GATES[precision].agreement for share in result["attributes"].values())
    assert json.loads((tmp_path / "models/encoder/2/engine.json").read_text())["labels"] == 3 + 3 + 2
    assert build(ckpt, tmp_path / "models", "cuda", "fp16")["reused"]


# The server


def test_served_attributes_are_the_checkpoints(
    heads_server: Server, texts: list[str], expected: list[dict[str, Attribute]]
) -> None:
    with Classifier(heads_server.url, timeout=60) as classifier:
        assert classifier.models().attributes == tuple(HEADS)
        for _ in range(2):  # the second time, the categories are in the cache
            assert_same(classifier.classify(texts, attributes=True), expected)
            assert_same(list(classifier.stream(texts, 2, attributes=True)), expected)
        plain = classifier.classify(texts)
        assert [each.attributes for each in plain] == [None] * len(texts)
        asked = classifier.classify(texts, attributes=True)
        assert [each.category for each in asked] == [each.category for each in plain]
        assert {each.decision for each in asked} == {None}
        both = classifier.classify(texts, 3, decisions=True, attributes=True)
        assert_same(both, expected)
        alone = classifier.classify(texts, 3, decisions=True)
        assert [(each.decision, each.prediction_set) for each in both] == [
            (each.decision, each.prediction_set) for each in alone
        ]
        assert hash(both[0]) is not None


def test_the_asyncio_client_gives_attributes(
    heads_server: Server, texts: list[str], expected: list[dict[str, Attribute]]
) -> None:
    async def ask() -> list[Prediction | Failure]:
        async with AsyncClassifier(heads_server.url, timeout=60) as classifier:
            streamed = [each async for each in classifier.stream([*texts, " "], attributes=True)]
            assert streamed[:-1] == await classifier.classify(texts, attributes=True)
            assert isinstance(streamed[-1], Failure)
            return streamed[:-1]

    assert_same(asyncio.run(ask()), expected)


def test_each_output_can_be_requested_alone(heads_server: Server, texts: list[str]) -> None:
    text = InferInput("text", [3, 1], "BYTES")
    text.set_data_from_numpy(np.array([[each.encode()] for each in texts[:3]], np.object_))
    names = ("attribute", "attribute_value", "attribute_confidence", "category", "confidence", "unknown")
    with InferenceServerClient(heads_server.url) as triton:
        for asked in (*((name,) for name in names), ("energy", "attribute_value"), names):
            outputs = [InferRequestedOutput(name) for name in asked]
            answer = triton.infer("product_attributes", [text], outputs=outputs)
            assert {output.name for output in answer.get_response().outputs} == set(asked)
        answer = triton.infer("product_attributes", [text])
        assert answer.as_numpy("attribute").tolist() == [[name.encode() for name in HEADS]] * 3
        assert answer.as_numpy("attribute_confidence").shape == answer.as_numpy("attribute_value").shape == (3, 2)


@pytest.mark.long
def test_a_version_without_decisions_gives_attributes(ckpt: Path, texts: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(ckpt, tmp_path / "copy")
    (copy / "decisions.json").unlink()
    build(copy, tmp_path / "models", "openvino", "fp32")
    with (
        held_server(tmp_path / "models", copy, tmp_path / "server") as server,
        Classifier(server.url, timeout=60) as classifier,
    ):
        assert_same(classifier.classify(texts, attributes=True), attributes_of(copy, texts))
        with pytest.raises(InvalidText, match=r"^this version has no decisions; ask for its attributes alone"):
            classifier.classify(texts, decisions=True, attributes=True)


def test_a_model_without_heads_refuses_in_one_line(classifier: Classifier, server: Server, tmp_path: Path) -> None:
    complaint = "this version has no attributes; train them with aisle train --also COLUMN"
    assert classifier.models().attributes == ()
    with pytest.raises(InvalidText, match=rf"^{complaint}"):
        classifier.classify(["苹果"], attributes=True)
    with pytest.raises(InvalidText, match=f"^{complaint}"):
        list(classifier.stream(["苹果", "usb"], attributes=True))
    with pytest.raises(TypeError, match="attributes must be True or False"):
        classifier.classify(["苹果"], attributes="no")  # type: ignore[arg-type]
    (tmp_path / "t.csv").write_text("text\n苹果\n", "utf-8")
    for words in (["苹果"], [tmp_path / "t.csv", "-o", tmp_path / "out.csv"]):
        done = aisle("classify", *words, "--also", "--url", server.url)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert complaint in done.stderr
    assert not (tmp_path / "out.csv").exists()
    with front(server.url, tmp_path) as running:
        answer = running.post("/v1/classify", {"texts": ["苹果"], "attributes": True})
        assert answer.status == 422
        assert complaint in answer.body["error"]
        assert running.post("/v1/classify/stream?attributes=true", '"苹果"'.encode(), NDJSON).status == 422
        assert running.post("/v1/classify/stream?attributes=maybe", '"苹果"'.encode(), NDJSON).status == 422
        assert "attributes" not in running.post("/v1/classify", {"texts": ["苹果"]}).body["predictions"][0]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_gets_a_column_for_each_attribute(
    ending: str, heads_server: Server, texts: list[str], expected: list[dict[str, Attribute]], tmp_path: Path
) -> None:
    source = write_table(tmp_path / "in.csv", [{"text": text, "brand": "mine"} for text in [*texts, " "]])
    out = tmp_path / f"out.{ending}"
    done = aisle("classify", source, "-o", out, "--also", "--url", heads_server.url)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]]
    if ending == "csv":
        rows = list(csv.DictReader(out.read_text("utf-8").splitlines()))
    else:
        rows = parquet.read_table(out).to_pylist()
    assert {row["source_brand"] for row in rows} == {"mine"}
    for row, wanted in zip(rows, expected, strict=False):
        for name in HEADS:
            assert row[name] == wanted[name].value
            assert float(row[f"{name}_confidence"]) == pytest.approx(wanted[name].confidence, abs=1e-4)
    assert rows[-1]["error"]
    assert not rows[-1]["brand"]
    done = aisle("classify", source, "-o", out, "--url", heads_server.url)
    header = (
        out.read_text("utf-8").splitlines()[0] if ending == "csv" else " ".join(parquet.read_table(out).schema.names)
    )
    assert "颜色" not in header


def test_the_command_and_rest_show_attributes(
    heads_server: Server, texts: list[str], expected: list[dict[str, Attribute]], tmp_path: Path
) -> None:
    done = aisle("classify", texts[0], "--also", "--url", heads_server.url)
    assert all(name in done.stdout and expected[0][name].value in done.stdout for name in HEADS)
    done = aisle("classify", texts[0], "--also", "--url", heads_server.url, "--json")
    (row,) = json.loads(done.stdout)["predictions"]
    assert row["attributes"]["brand"]["value"] == expected[0]["brand"].value
    with front(heads_server.url, tmp_path) as running:
        (answer,) = running.post("/v1/classify", {"texts": texts[:1], "attributes": True}).body["predictions"]
        assert "decision" not in answer
        assert answer["attributes"] == row["attributes"]
        lines = "\n".join(json.dumps(text) for text in texts).encode()
        query = "/v1/classify/stream?attributes=true&decisions=true"
        streamed = [json.loads(line) for line in running.post(query, lines, NDJSON).data.splitlines()]
        assert [each["attributes"]["颜色"]["value"] for each in streamed] == [each["颜色"].value for each in expected]
        assert "decision" in streamed[0]


def test_checkpoint_and_server_are_measured_alike(
    ckpt: Path, heads_server: Server, table: Path, tmp_path: Path
) -> None:
    local = aisle("evaluate", ckpt, table, "--held-out", "--report", tmp_path / "page.html", "--json")
    served = aisle("evaluate", "--url", heads_server.url, table, "--held-out", "--json")
    assert (local.returncode, served.returncode) == (0, 0), local.stderr + served.stderr
    first, second = (json.loads(done.stdout)["attributes"] for done in (local, served))
    metrics = json.loads((ckpt / "metrics.json").read_text("utf-8"))["attributes"]
    for name in HEADS:
        assert first[name]["rows"] >= metrics[name]["rows"]
        for figure in ("accuracy", "macro_f1", "rows"):
            assert second[name][figure] == pytest.approx(first[name][figure])
    assert "Attributes: the further heads" in (tmp_path / "page.html").read_text("utf-8")
    assert "brand: accuracy" in aisle("evaluate", ckpt, table, "--held-out").stdout
    rows = [{"text": row["text"], "category": row["category"], "颜色": ""} for row in rows_of(50)]
    done = aisle("evaluate", ckpt, write_table(tmp_path / "t.csv", rows), "--json")
    assert json.loads(done.stdout)["attributes"] == {"颜色": None}
    assert "the attribute brand is not measured" in done.stderr


# Other commands


def test_changed_checkpoints_keep_their_heads(ckpt: Path, table: Path, texts: list[str], tmp_path: Path) -> None:
    commands: list[list[Any]] = [
        ["prune", ckpt, table, "-o", tmp_path / "pruned"],
        ["category", "rename", ckpt, "水果", "生鲜", "-o", tmp_path / "renamed"],
    ]
    for words in commands:
        done = aisle(*words)
        assert done.returncode == 0, done.stderr
        for found, wanted in zip(attributes_of(words[-1], texts), attributes_of(ckpt, texts), strict=True):
            assert {name: each.value for name, each in found.items()} == {
                name: each.value for name, each in wanted.items()
            }


@pytest.mark.long
def test_an_added_category_does_not_touch_the_heads(ckpt: Path, texts: list[str], tmp_path: Path) -> None:
    examples = tmp_path / "new.csv"
    examples.write_text("text\n" + "".join(f"猫粮 鸡肉 {i} 大袋 成猫\n" for i in range(8)), "utf-8")
    done = aisle("category", "add", ckpt, "宠物", "--examples", examples, "-o", tmp_path / "added")
    assert done.returncode == 0, done.stderr
    assert_equal(attributes_of(tmp_path / "added", texts), attributes_of(ckpt, texts))
    result = build(tmp_path / "added", tmp_path / "models", "openvino", "fp32")
    assert result["attributes"] == {"brand": 1.0, "颜色": 1.0}


def assert_equal(found: list[dict[str, Attribute]], expected: list[dict[str, Attribute]]) -> None:
    for own, wanted in zip(found, expected, strict=True):
        for name, (value, confidence) in own.items():
            assert value == wanted[name].value
            assert confidence == pytest.approx(wanted[name].confidence, abs=1e-5)


def test_retrain_trains_the_heads_too(ckpt: Path, table: Path, tmp_path: Path) -> None:
    corrections = tmp_path / "corrections.csv"
    corrections.write_text(f"text,correct_category\n{rows_of(1)[0]['text']},水果\n全新 商品,电子\n", "utf-8")
    words = ["retrain", ckpt, table, "--corrections", corrections, "-o", tmp_path / "new", "--epochs", 1]
    done = aisle(*words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["attributes"]) == set(result["held_out_attributes"]) == set(HEADS)
    before = json.loads((ckpt / "metrics.json").read_text("utf-8"))["attributes"]
    for name, compared in result["held_out_attributes"].items():
        assert compared["old"] == pytest.approx(before[name]["accuracy"])
        assert compared["new"] == pytest.approx(result["attributes"][name]["accuracy"])
        assert compared["rows"] == result["attributes"][name]["rows"]
    new = Checkpoint(tmp_path / "new")
    assert new.heads == Checkpoint(ckpt).heads
    assert new.training["data"]["also"] == HEADS
    rows = [{"text": row["text"], "category": row["category"], "brand": row["brand"]} for row in rows_of(200)]
    words[2], words[6] = write_table(tmp_path / "less.csv", rows), tmp_path / "other"
    done = aisle(*words)
    assert done.returncode == 2
    assert "no column '颜色'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "other").exists()


def test_distil_refuses_heads_by_name(ckpt: Path, table: Path, tmp_path: Path) -> None:
    done = aisle("distil", ckpt, table, "-o", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has further heads (brand, 颜色), which aisle distil would drop" in done.stderr
    assert not (tmp_path / "out").exists()


def test_training_without_the_heads_of_its_model_says_so(ckpt: Path, tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.csv", rows_of(60))
    options = ["--epochs", 1, "--max-tokens", 32]
    done = aisle("train", rows, "--model", ckpt, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "are left out; give --also brand --also 颜色 to train them" in done.stderr
    assert not (tmp_path / "out" / "heads.json").exists()


def test_all_ways_to_train_take_heads(table: Path, tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.csv", [{**row, "product": str(i // 3)} for i, row in enumerate(rows_of(150))])
    options = "--also brand --epochs 1 --layers 1 --hidden-size 64 --max-tokens 32"
    for more in ("--mixup 0.2 --focal 1", "--contrastive product", "--folds 2 --class-weight 0.5"):
        done = aisle("train", rows, "-o", tmp_path / more[2:7], *options.split(), *more.split(), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["attributes"]["brand"]["rows"] > 0


def test_a_rollout_warns_of_lost_attributes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, heads in enumerate(('{"brand": ["a", "b"], "size": ["s", "m"]}', '{"brand": ["a", "b"]}', ""), start=1):
        folder = tmp_path / "encoder" / str(number)
        folder.mkdir(parents=True)
        if heads:
            (folder / "heads.json").write_text(heads)
    _warn_of_lost_attributes(tmp_path, 1, 2)
    assert "version 2 has no attribute size, unlike version 1; see" in capsys.readouterr().err
    _warn_of_lost_attributes(tmp_path, 2, 3)
    assert "version 3 has no attribute brand, unlike version 2, and will refuse" in capsys.readouterr().err
    _warn_of_lost_attributes(tmp_path, 3, 1)
    assert capsys.readouterr().err == ""
