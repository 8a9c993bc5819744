"""Windows over texts that are longer than the token limit: token ids, training, both engine layouts, the server."""

from __future__ import annotations

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
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from aisle.build.build import build
from aisle.build.cuda_runner import CudaRunner
from aisle.build.engine import Engine, EngineSpec, load_engine
from aisle.build.inputs import TextSource
from aisle.build.varlen import VarlenEncoder, copy_weights, shape_of
from aisle.client import Classifier, Prediction
from aisle.errors import InputError
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.windows import Windows, averaged, into_windows, one_of_each, separate
from aisle.train.core.calibration import softmax
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.predict import embeddings_of, logits_of
from aisle.train.core.settings import StudentSpec, TrainingSettings
from aisle.train.fit.distil import distil
from aisle.train.fit.train import train

from .conftest import Server, aisle, held_server
from .families import random_model

WORDS = {"fruit": "apple cherry grape melon", "audio": "speaker headset cable jack", "soap": "shampoo lotion cream gel"}
FILLING = ["new", "best", "free", "shop", "gift", "sale", "fast", "good", "nice", "deal"]
TOKENS, WINDOWS = 16, 4
SMALL = TrainingSettings(
    epochs=4, layers=1, hidden_size=64, learning_rate=3e-3, batch_size=16, max_tokens=TOKENS, windows=WINDOWS
)


def rows_of(count: int) -> list[tuple[str, str]]:
    """Return texts of 10 to 50 words; the last four, in most texts behind the first window, tell the category."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        kind = rng.choice([*WORDS])
        told = rng.choices(WORDS[kind].split(), k=4)
        rows.append((" ".join([*rng.choices(FILLING, k=rng.randint(6, 46)), *told]), kind))
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "table.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows_of(500)])
    return path


@pytest.fixture(scope="module")
def ckpt(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows") / "checkpoint"
    train(table, "text", "category", folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def windows_repository(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows") / "repository"
    build(ckpt, folder, "openvino", "fp32")
    return folder


@pytest.fixture(scope="module")
def windows_server(windows_repository: Path, ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with held_server(windows_repository, ckpt, tmp_path_factory.mktemp("server") / "folder", cache_mb=4) as each:
        yield each


# Token ids


@pytest.mark.parametrize("content", [*range(1, 40), 100])
def test_windows_are_full_and_read_every_token(content: int) -> None:
    ids = [1, *range(10, 10 + content), 2]
    found = into_windows(ids, 12, (1, 1))
    if len(ids) <= 12:
        assert found == ids
        return
    parts, counts = separate([found], 12)
    assert counts.tolist() == [len(parts)] == [-(-content // 10)]
    assert all(len(part) == 12 and (part[0], part[-1]) == (1, 2) for part in parts)
    read = [token for part in parts for token in part[1:-1]]
    assert [*dict.fromkeys(read)] == ids[1:-1]
    assert read[: 10 * (len(parts) - 1)] == ids[1 : 1 + 10 * (len(parts) - 1)]  # only the last one overlaps


def test_values_are_averaged_over_the_windows_of_each_text() -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    assert averaged(values, np.array([1, 3, 2])).tolist() == [[0, 1], [4, 5], [9, 10]]
    assert averaged(values, np.ones(6, np.int64)) is values


def test_training_draws_one_window_of_a_long_text() -> None:
    texts = [[1, 2, 3], [*range(12)], [*range(20, 32)]]
    drawn = {tuple(one_of_each(texts, 4, [f"{seed} {row}" for row in range(3)])[1]) for seed in range(40)}
    assert drawn == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}
    assert one_of_each(texts, 4, "abc") == one_of_each(texts, 4, "abc")
    assert one_of_each(texts[:1], 4, "a") == texts[:1]


def test_a_text_over_all_windows_is_cut_and_counted(ckpt: Path) -> None:
    tokenizer = Checkpoint(ckpt).tokenizer
    content = WINDOWS * (TOKENS - 2)
    texts = ["good", "good " * (TOKENS - 2), "good " * (TOKENS - 1), "good " * content, "good " * (content + 1)]
    texts += ["sale " * 5000, "犬" * 3 + " good" * 20]
    found = tokenizer([text.strip() for text in texts])
    assert found.lengths[:, 0].tolist() == [3, 16, 32, 64, 64, 64, 32]
    assert found.truncated == 2
    for ids, row, length in zip(tokenizer.tokens(texts), found.input_ids, found.lengths[:, 0], strict=True):
        assert ids == row[:length].tolist()
    assert found.unknown[0] == 0 < found.unknown[-1]
    assert Checkpoint(ckpt).tokenizer.windows == WINDOWS


def test_the_files_say_the_limit_of_one_window(ckpt: Path, windows_repository: Path, tmp_path: Path) -> None:
    assert json.loads((ckpt / "config.json").read_text())["text_windows"] == {"count": WINDOWS, "tokens": TOKENS}
    version = windows_repository / "tokenizer" / "1"
    for folder in (ckpt, version):
        assert json.loads((folder / "tokenizer.json").read_text("utf-8"))["truncation"]["max_length"] == TOKENS
    texts = [text for text, _ in rows_of(50)]
    assert TextTokenizer.of_version(version).tokens(texts) == Checkpoint(ckpt).tokenizer.tokens(texts)
    copy = shutil.copytree(version, tmp_path / "1")
    (copy / "windows.json").write_text("{}")
    with pytest.raises(InputError, match=r"windows\.json is damaged"):
        TextTokenizer.of_version(copy)


# Training


def test_what_stands_behind_the_first_window_is_read(ckpt: Path) -> None:
    assert json.loads((ckpt / "metrics.json").read_text())["accuracy"] > 0.9
    checkpoint = Checkpoint(ckpt)
    known = checkpoint.sample.held_out
    beginnings = TextTokenizer(ckpt / "tokenizer.json").tokens(known.texts)
    best = logits_of(checkpoint.model, beginnings, "").argmax(axis=1)
    right = [checkpoint.labels[number] == label for number, label in zip(best, known.labels, strict=True)]
    assert np.mean(right) < 0.8


def test_one_window_leaves_no_trace_in_the_configuration(checkpoint: Path) -> None:
    assert "text_windows" not in json.loads((checkpoint / "config.json").read_text("utf-8"))


def test_a_student_reads_as_much_as_its_teacher(ckpt: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    settings = TrainingSettings(epochs=1, batch_size=16, layers=1, hidden_size=64)
    result = distil([ckpt], table, "text", "category", out, settings, StudentSpec(layers=1), extra=[])
    assert Checkpoint(out).windows == Windows(WINDOWS, TOKENS)
    assert Checkpoint(out).tokenizer.windows == WINDOWS
    assert result["teachers"]["accuracy"] == pytest.approx(json.loads((ckpt / "metrics.json").read_text())["accuracy"])


# Engines


def ragged(tokens: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    return np.concatenate([np.asarray(each) for each in tokens]), np.array([len(each) for each in tokens])


@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_an_engine_averages_what_pytorch_averages(layout: str, ckpt: Path, windows_repository: Path) -> None:
    """Also where a batch has more windows than one run of the engine takes."""
    checkpoint = Checkpoint(ckpt)
    texts = [text for text, _ in rows_of(200)]
    tokens = checkpoint.tokenizer.tokens(texts)
    expected = logits_of(checkpoint.model, tokens, "")
    vectors = embeddings_of(checkpoint.model, tokens, "")
    if layout == "packed":
        engine = load_engine(windows_repository / "encoder" / "1")
    else:
        module = copy_weights(VarlenEncoder(shape_of(checkpoint.model), TOKENS, torch.float32), checkpoint.model)
        spec = EngineSpec("cuda", "fp32", TOKENS, 3, "", windows=WINDOWS)
        engine = Engine(CudaRunner(module, TOKENS, torch.device("cpu")), spec)
    assert sum(map(len, tokens)) > engine.max_batch_tokens or layout == "flat"
    outputs = engine.outputs(*ragged(tokens))
    assert np.abs(outputs[:, :3] - expected).max() < 1e-4
    if layout == "packed":
        found = outputs[:, 3:] / np.linalg.norm(outputs[:, 3:], axis=1, keepdims=True)
        assert np.abs(found - vectors).max() < 1e-4


def test_logits_of_windows_are_those_of_the_single_windows() -> None:
    model = random_model("bert")
    texts = [[*range(5, 17)], [*range(100, 112), *range(200, 212), *range(300, 312)]]
    plain = logits_of(model, [texts[0], *(texts[1][start : start + 12] for start in (0, 12, 24))], "")
    Windows(3, 12).put_into(model.config)
    assert np.allclose(logits_of(model, texts, ""), [plain[0], plain[1:].mean(axis=0)], atol=1e-5)


# Serving


def test_the_server_reads_all_windows(windows_server: Server, ckpt: Path) -> None:
    checkpoint = Checkpoint(ckpt)
    texts = [text for text, _ in rows_of(64)]
    tokens = checkpoint.tokenizer.tokens(texts)
    probabilities = softmax(logits_of(checkpoint.model, tokens, ""))
    with Classifier(windows_server.url) as client:
        found = [*client.classify(texts), *client.classify(texts)]  # the second time from the cache
        vectors = client.embed(texts)
        one = client.classify([texts[0]])[0]
    for i, prediction in enumerate(found):
        assert isinstance(prediction, Prediction)
        row = probabilities[i % 64]
        assert prediction.category == checkpoint.labels[int(row.argmax())]
        assert prediction.confidence == pytest.approx(float(row.max()), abs=1e-4)
    assert isinstance(one, Prediction)
    assert one.category == found[0].category if isinstance(found[0], Prediction) else False
    assert np.abs(vectors - embeddings_of(checkpoint.model, tokens, "")).max() < 1e-4


@pytest.mark.parametrize("length", [TOKENS + 1, 2 * TOKENS - 1, (WINDOWS + 1) * TOKENS])
def test_the_encoder_refuses_what_is_not_full_windows(windows_server: Server, length: int) -> None:
    inputs = [InferInput("input_ids", [1, length], "INT32"), InferInput("lengths", [1, 1], "INT32")]
    inputs[0].set_data_from_numpy(np.full((1, length), 7, np.int32))
    inputs[1].set_data_from_numpy(np.array([[length]], np.int32))
    with (
        InferenceServerClient(windows_server.url) as client,
        pytest.raises(InferenceServerException, match="must come from the tokenizer"),
    ):
        client.infer("encoder", inputs)


# Commands


@pytest.mark.long
def test_another_classifier_is_built_with_windows(tmp_path: Path) -> None:
    folder, texts = foreign(tmp_path)
    repository = tmp_path / "repository"
    build(folder, repository, "openvino", "fp32", held_out=TextSource(texts, "text"), max_tokens=64, windows=3)
    engine = load_engine(repository / "encoder" / "1")
    assert (engine.spec.max_tokens, engine.spec.windows) == (64, 3)
    long = " ".join(FILLING * 30)
    tokens = TextTokenizer.of_version(repository / "tokenizer" / "1").tokens([long])
    assert len(tokens[0]) == 3 * 64


def foreign(tmp_path: Path) -> tuple[Path, Path]:
    """Return a classifier as transformers saves it, and a table of texts."""
    model = random_model("bert", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    model.save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLING]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    rng = random.Random(0)
    path = tmp_path / "texts.csv"
    rows = {" ".join(rng.choices(FILLING, k=rng.randint(3, 150))) for _ in range(300)}
    path.write_text("text\n" + "".join(f"{row}\n" for row in sorted(rows)))
    return tmp_path / "bert", path


def test_what_does_not_fit_windows_is_refused_in_one_line(ckpt: Path, tmp_path: Path) -> None:
    out = ["--repository", tmp_path / "repository"]
    done = aisle("build", ckpt, *out, "--windows", 2)
    assert (done.returncode, done.stderr) == (
        2,
        f"aisle: {ckpt} was trained without --windows 2; give the option to aisle train\n",
    )
    done = aisle("build", ckpt, *out, "--max-tokens", 64)
    assert done.returncode == 2
    assert f"{ckpt} has windows of {TOKENS} tokens; leave --max-tokens out" in done.stderr
    done = aisle("explain", "good " * 30, "--checkpoint", ckpt)
    assert done.returncode == 2
    assert f"has more than the {TOKENS} tokens of a window; explain it through a server alone: --url" in done.stderr
    assert aisle("explain", "good apple", "--checkpoint", ckpt).returncode == 0
