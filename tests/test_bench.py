"""The bench: its forms of the encoder are exact, its arithmetic is right, its rows are complete."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aisle.build.graph import PackedBert
from aisle.loadtest import engines
from aisle.loadtest.forms import FlatBert, flat, padded
from aisle.loadtest.material import config_of
from aisle.preprocess.pack import pack
from tests.conftest import aisle
from tests.test_graph import random_bert


@pytest.mark.parametrize("texts", [1, 2, 33])
def test_all_forms_of_the_encoder_agree(texts: int) -> None:
    model = random_bert(texts)
    rng = np.random.default_rng(texts)
    lengths = rng.integers(1, 65, texts)
    lengths[0] = 64  # as long as a row
    tokens = rng.integers(0, 500, lengths.sum())
    with torch.inference_mode():
        expected = PackedBert(model)(*map(torch.from_numpy, pack(tokens, lengths, 64)))
        for graph, laid in (
            (FlatBert(model, torch.float32), flat((tokens, lengths), 64)),
            (PackedBert(model), padded((tokens, lengths))),
            (PackedBert(model), padded((tokens, lengths), 128)),
        ):
            assert (graph(*map(torch.from_numpy, laid)) - expected).abs().max() < 1e-4


def test_the_ceiling_counts_the_products_that_the_graph_has() -> None:
    model, lengths = random_bert(0), np.array([5, 60, 1])
    counted = 0

    def count(layer: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * inputs[0].numel() // layer.in_features * layer.weight.numel()

    graph = PackedBert(model)
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
    assert engines.bare_seconds(config, products, lengths) == pytest.approx(expected)
    assert {rows for rows, _, _ in asked} == {16, 2}


def test_bench_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "report" / "bench.html"
    done = aisle("bench", "engines", "--quick", "--report", page, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = result["engines"]["rows"]
    systems = {row["system"] for row in rows}
    assert {(row["system"], row["batch"]) for row in rows} == {(s, b) for s in systems for b in engines.BATCHES}
    assert {engines.PYTORCH, engines.KEPT, "packed rows, bf16", "flat windowed, int8"} <= systems
    assert all(row["texts_per_second"] > 0 for row in rows)
    assert next(row["ratio"] for row in rows if row["system"] == engines.PYTORCH and row["batch"] == 16) == 1
    assert result["engines"]["share_of_ceiling"] > 0
    assert json.loads(page.with_suffix(".json").read_text())["engines"] == result["engines"]
    text = page.read_text()
    assert "QUICK RUN" in text
    assert "<svg" in text


def test_no_such_part() -> None:
    done = aisle("bench", "nothing")
    assert done.returncode == 2
    assert "engines" in done.stderr
