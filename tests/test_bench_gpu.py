"""`aisle bench gpu --dry-run` runs all its code on a CPU, so that mistakes are found before it runs on a GPU."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.build.cuda_device import gpu_problem
from aisle.build.cuda_runtime import ON_CPU
from aisle.loadtest.bench.fixtures import config_of
from aisle.loadtest.bench.gpu.bench import LIMITS, GpuBenchSettings, bench_gpu, with_shares
from aisle.loadtest.bench.gpu.engines import Bench
from aisle.loadtest.bench.gpu.measure import batches_of, operations
from aisle.loadtest.bench.gpu.part import MEASURES
from tests.conftest import aisle


@pytest.mark.long
def test_a_dry_run_runs_every_part(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run in this process, because starting a process takes most of their time here."""
    monkeypatch.setenv(ON_CPU, "1")
    bench = Bench(asdict(GpuBenchSettings(str(tmp_path), checkpoint=str(checkpoint), dry_run=True)))
    assert set(MEASURES) == set(LIMITS)
    rows = {part: list(MEASURES[part](bench)) for part in LIMITS if part != "service-fp8"}  # as service-fp16
    trained = [row for row in rows["versions"] if row["system"] == "aisle build, trained weights"]
    assert [row["precision"] for row in trained] == ["fp16", "fp8", "bf16"]
    assert all(row["agreement"] > 0.97 for row in trained)
    served = [row for row in rows["service-fp16"] if "texts_per_second" in row]
    assert len(served) == 3
    assert all(row["texts_per_second"] > 0 and row["failures"] == 0 for row in served)
    for part in ("flat-fp16", "flat-fp8", "flat-bf16", "padded", "padded-compiled", "packed"):
        assert all(row["texts_per_second"] > 0 for row in rows[part] if "teraflops" in row)
        assert any("teraflops" in row for row in rows[part])


@pytest.mark.long
def test_parts_write_their_rows_a_page_and_its_json(tmp_path: Path) -> None:
    page = tmp_path / "report" / "gpu.html"
    result = bench_gpu(GpuBenchSettings(str(tmp_path / "work"), dry_run=True), ["peaks", "padded"], 5, page)
    assert {row["part"] for row in result["rows"]} == {"fixtures", "peaks", "padded"}
    assert not [row for row in result["rows"] if "error" in row]
    assert all(row["share"] > 0 for row in result["rows"] if "teraflops" in row)
    assert json.loads(page.with_suffix(".json").read_text())["rows"] == result["rows"]
    assert page.with_suffix(".jsonl").read_text().count("\n") == len(result["rows"]) + 1
    assert "Hugging Face, SDPA, padded" in page.read_text()


@pytest.mark.long
def test_a_part_that_fails_loses_nothing(tmp_path: Path) -> None:
    page = tmp_path / "gpu.html"
    settings = GpuBenchSettings(str(tmp_path / "work"), data=str(tmp_path / "missing.csv"), dry_run=True)
    rows = bench_gpu(settings, ["peaks"], 5, page)["rows"]
    assert [row["system"] for row in rows] == ["FAILED", *["dense product"] * 3]
    assert "missing.csv" in rows[0]["error"]


def test_a_part_without_time_left_is_reported(tmp_path: Path) -> None:
    rows = bench_gpu(GpuBenchSettings(str(tmp_path / "work"), dry_run=True), ["peaks"], 0.01, tmp_path / "gpu.html")[
        "rows"
    ]
    assert [row["error"] for row in rows] == ["no time was left"] * 2


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    done = aisle("bench", "gpu", "--dry-run", "--parts", "peaks,speed", "--report", tmp_path / "gpu.html")
    assert done.returncode == 2
    assert "no part 'speed'" in done.stderr
    done = aisle("bench", "gpu", "engines")
    assert done.returncode == 2
    assert "runs alone" in done.stderr


@pytest.mark.long
def test_target_cuda_needs_neither_onnxruntime_nor_openvino() -> None:
    """They may be missing on a GPU machine."""
    code = "import sys; sys.modules.update(onnxruntime=None, openvino=None); import aisle.loadtest.bench.gpu.engines"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not gpu_problem(), reason="refusal by a machine without a GPU")
def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    done = aisle("bench", "gpu", "--work", tmp_path / "work", "--report", tmp_path / "gpu.html")
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_operations_count_all_layers_and_no_padding() -> None:
    config = config_of("base", 10)
    # 2 × 12 layers × 50 tokens × 12 × 768² weights of a layer, and attention of 50 × 50 in each.
    assert operations(config, np.array([50])) == 2 * 12 * 50 * 12 * 768**2 + 12 * 4 * 768 * 50**2


def test_batches_hold_whole_texts() -> None:
    batches = batches_of([2, 3, 1], [1, 1, 2, 2, 2, 3], 2)
    assert [(tokens.tolist(), lengths.tolist()) for tokens, lengths in batches] == [([1, 1, 2, 2, 2], [2, 3])]


def test_shares_are_of_the_measured_fp16_peak() -> None:
    rows: list[dict[str, Any]] = [
        {"precision": "fp16", "peak": 700.0},
        {"precision": "fp8", "peak": 1400.0},
        {"teraflops": 350.0},
    ]
    assert with_shares(rows)[2]["share"] == 0.5
    assert "share" not in with_shares(rows[1:])[1]
