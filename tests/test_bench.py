"""The bench: its layouts are exact, its arithmetic is right, its rows are complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aisle.build.graph import PackedEncoder
from aisle.errors import InputError, ServerError
from aisle.loadtest.bench import comparison, engines, interleave, scaling, services, systems
from aisle.loadtest.bench.bench import BenchSettings, bench
from aisle.loadtest.bench.fixtures import config_of, read_texts, write_tokenizer
from aisle.loadtest.bench.layouts import FlatEncoder, flat, padded
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.pack import pack
from tests.conftest import aisle
from tests.test_graph import random_bert


@pytest.mark.parametrize("texts", [1, 2, 33])
def test_all_layouts_of_the_encoder_agree(texts: int) -> None:
    model = random_bert(texts)
    rng = np.random.default_rng(texts)
    lengths = rng.integers(1, 65, texts)
    lengths[0] = 64  # as long as a row
    tokens = rng.integers(0, 500, lengths.sum())
    with torch.inference_mode():
        expected = PackedEncoder(model)(*map(torch.from_numpy, pack(tokens, lengths, 64)))
        for graph, laid in (
            (FlatEncoder(model, torch.float32), flat((tokens, lengths), 64)),
            (PackedEncoder(model), padded((tokens, lengths))),
            (PackedEncoder(model), padded((tokens, lengths), 128)),
        ):
            assert (graph(*map(torch.from_numpy, laid)) - expected).abs().max() < 1e-4


def test_the_ceiling_counts_the_products_that_the_graph_has() -> None:
    model, lengths = random_bert(0), np.array([5, 60, 1])
    counted = 0

    def count(layer: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * inputs[0].numel() // layer.in_features * layer.weight.numel()

    graph = PackedEncoder(model)
    for name, layer in graph.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers." in name:
            layer.register_forward_hook(count)
    packed = pack(np.ones(66, np.int64), lengths, 66)  # one full row: no padding
    with torch.inference_mode():
        graph(*map(torch.from_numpy, packed))
    assert engines.operations(model.config, lengths) == counted


def test_the_ceiling_is_timed_at_the_encoders_sizes() -> None:
    config = config_of("tiny", 2)
    asked: list[tuple[int, int, int]] = []

    def product(inner: int, columns: int) -> engines.Product:
        def seconds(rows: int) -> float:
            asked.append((rows, inner, columns))
            return rows * inner * columns * 1e-9

        return seconds

    slower = lambda rows: 1.0  # noqa: E731
    products = {shape: [slower, product(*shape)] for shape in engines.int8_products(config)}
    lengths = np.array([7, 9])
    expected = engines.operations(config, lengths) / 2 * 1e-9
    assert engines.bare_seconds(config, products, [lengths]) == pytest.approx(expected)
    assert {rows for rows, _, _ in asked} == {16, 2}


@pytest.mark.long
def test_bench_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "report" / "bench.html"
    done = aisle("bench", "engines", "--quick", "--report", page, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = result["engines"]["rows"]
    systems = {row["system"] for row in rows}
    assert {(row["system"], row["batch"]) for row in rows} == {(s, b) for s in systems for b in engines.BATCHES}
    assert {engines.PYTORCH, engines.SERVED, "packed rows, bf16", "flat windowed, int8"} <= systems
    assert all(row["texts_per_second"] > 0 for row in rows)
    assert next(row["ratio"] for row in rows if row["system"] == engines.PYTORCH and row["batch"] == 16) == 1
    assert result["engines"]["share_of_ceiling"] > 0
    assert json.loads(page.with_suffix(".json").read_text())["engines"] == result["engines"]
    text = page.read_text()
    assert "QUICK RUN" in text
    assert "<svg" in text


def test_unknown_parts_and_systems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="engines, services, scaling"):
        bench(("nothing",), BenchSettings(), tmp_path / "bench.html")
    with pytest.raises(InputError, match="onnxruntime"):
        bench(("services",), BenchSettings(systems=("nothing",)), tmp_path / "bench.html")


SERVER = """
import http.server, json, os, sys
labels, pid = json.load(open(sys.argv[1] + "/labels.json")), os.getpid()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(pid)
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        self.answer({"category": labels[len(text) % len(labels)]})
    def log_message(self, *_):
        pass
assert json.loads(sys.argv[3]) == {"batch": 1}
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.mark.long
def test_services_have_one_row_per_system_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, repository: Path
) -> None:
    """Aisle, its engine and a peer, each for a moment; the peer is installed, started, paused and ended."""
    folder = tmp_path / "here" / "peers" / "other"
    folder.mkdir(parents=True)
    (folder / "requirements.txt").write_text("")
    (folder / "server.py").write_text(SERVER)
    other = systems.Peer("other", "other", "/classify", ({"batch": 1},))
    monkeypatch.setattr(systems, "HERE", tmp_path / "here")
    monkeypatch.setattr(services, "PEERS", (other,))
    monkeypatch.setattr(services, "SYSTEMS", ("engine", "aisle", "other"))
    monkeypatch.setattr(services, "built", lambda *_: repository)
    texts = read_texts(None, "text", 300)
    plan = services.BenchPlan(("engine", "aisle", "other"), (1, 4), 0.5, 1, tune=True)
    found = services.measure(checkpoint, texts, plan, tmp_path / "work" / "bench", True)

    rows = {(row["system"], row["load"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    for system in (comparison.ENGINE, systems.OURS, "other"):
        assert {(system, "1 at once"), (system, "4 at once")} <= rows.keys()
    rates = {row["rate"] for row in found["rows"] if row["system"] == systems.OURS and row["kind"] == "open"}
    assert len(rates) == len(interleave.RATES)
    offered = {row["rate"] for row in found["rows"] if row["system"] == "other" and row["kind"] == "open"}
    assert offered
    assert offered <= rates
    for row in found["rows"]:
        assert {"texts_per_second", "p50_ms", "p99_ms", "ratio", "calls", "failures"} <= row.keys()
        assert row["failures"] == 0
        if row["p50_ms"] is not None:
            assert 0 < row["p50_ms"] <= row["p99_ms"]
        if row["system"] == systems.OURS:
            answered = row["texts_per_second"] > 0  # on a busy machine, a slice may have no answers
            assert row["ratio"]["median"] == 1 if answered else row["ratio"] is None
    assert found["agreement"][systems.OURS] == 1
    assert found["agreement"]["other"] < 1
    assert found["settings"] == {"other": {"batch": 1}}
    assert found["tuning"]["other"][0]["texts_per_second"] > 0
    assert found["times_as_fast"]["other"]["median"] == found["best"][systems.OURS] / found["best"]["other"]
    assert not found["times_as_fast"]["other"]["conclusive"]  # one round
    assert {"files"} == {row["kind"] for row in found["rows"] if "texts each" in row["load"]}
    assert found["share_of_engine_files"]["median"] > 0
    assert any("No conclusion" in line for line in comparison.summary(found))


def test_a_peer_that_does_not_start_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with (
        pytest.raises(ServerError, match="broken did not start"),
        systems.running("broken", command, "http://127.0.0.1:1", tmp_path / "broken.log"),
    ):
        pass
    assert "no such thing" in (tmp_path / "broken.log").read_text()


def test_every_peer_is_pinned() -> None:
    for peer in systems.PEERS:
        lines = (systems.HERE / "peers" / peer.folder / "requirements.txt").read_text().split()
        assert lines
        assert all("==" in line for line in lines)
        assert "torch==2.13.0" in lines
        assert not any(line.startswith(("nvidia-", "triton==")) for line in lines)  # no CUDA build


def test_texts_of_a_length(tmp_path: Path) -> None:
    texts = read_texts(None, "text", 300)
    write_tokenizer(tmp_path / "tokenizer.json", texts)
    encoder = TextTokenizer(tmp_path / "tokenizer.json")
    for tokens in scaling.TOKENS:
        made = list(scaling.texts_of_length(texts, encoder, tokens, 4))
        assert [len(ids) for ids in encoder.tokens(made)] == [tokens] * 4


def test_sizing() -> None:
    found = scaling.sizing(100, 2)
    assert found["texts_per_second_and_core"] == 50
    # 10⁹ / 86,400 s = 11,574 a second, twice that at the peak, 70 a machine
    assert found["machines"] == 331
    assert found["cores"] == 662
