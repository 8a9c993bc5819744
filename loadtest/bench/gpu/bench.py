"""Run the parts of `aisle bench gpu`, each in its own process with its own time limit."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.report import Page  # a missing package is reported at the start

# The time limit of each part in seconds, in the order of running: first the inputs of all others, then by importance.
LIMITS = {
    "fixtures": 90,
    "peaks": 45,
    "flat-fp16": 100,
    "flat-fp8": 75,
    "versions": 150,
    "load-fp16": 75,
    "service-fp16": 120,
    "padded": 60,
    "load-fp8": 75,
    "service-fp8": 120,
    "train": 60,
    "dynamic-batching": 75,
    "sentence-transformers": 60,
    "packed": 75,
    "padded-compiled": 90,
    "flat-bf16": 60,
}
REQUIRED = ("fixtures",)  # every other part needs it
COLUMNS = {
    "part": "part",
    "system": "system",
    "precision": "precision",
    "batch": "texts per batch",
    "texts_per_second": "texts/s",
    "share": "share of fp16 peak",
    "texts_per_second_host": "texts/s, host included",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "agreement": "agreement",
    "seconds": "s",
    "memory_mib": "MiB",
    "cores": "cores",
    "error": "error",
}

SHOWN = {key: COLUMNS[key] for key in ("system", "precision", "batch", "texts_per_second", "share", "p50_ms", "error")}


@dataclass(frozen=True)
class GpuBenchSettings:
    """The settings of `aisle bench gpu`."""

    work: str
    data: str = ""  # a table of texts; "": the SYNTHETIC catalogue
    text_column: str = "text"
    checkpoint: str = ""  # a trained checkpoint: its versions must pass the gates
    server_python: str = sys.executable  # a Python with Triton and the client's packages
    dry_run: bool = False  # tiny shapes, on the CPU if there is no GPU


def bench_gpu(settings: GpuBenchSettings, parts: Sequence[str], minutes: float, page: Path) -> dict[str, Any]:
    """Measure parts in the order of `LIMITS`. Write each row at once, and at the end the page and its .json.

    A part that fails or exceeds its limit keeps its rows and its log, and gets a row with the error.

    Raises:
        InputError: a part does not exist, or there is no GPU and this is not a dry run.
    """
    for part in parts:
        if part not in LIMITS:
            raise InputError(f"bench gpu has no part {part!r}; choose from {', '.join(LIMITS)}")
    machine = _machine()
    if not settings.dry_run and "gpu" not in machine:
        raise InputError(f"{machine.get('problem')}; --dry-run runs all parts on a CPU")
    start = time.monotonic()
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = page.with_suffix(".jsonl")
    lines.write_text(json.dumps({"part": "machine", **machine}) + "\n")
    chosen = [part for part in LIMITS if part in (*REQUIRED, *(parts or LIMITS))]
    for part in chosen:
        left = minutes * 60 - (time.monotonic() - start)
        limit = min(LIMITS[part], left)
        failed = _run(part, settings, lines, limit) if limit > 5 else "no time was left"
        if failed:
            say(f"{part}: {failed}")
            with lines.open("a") as file:
                file.write(json.dumps({"part": part, "system": "FAILED", "error": failed}) + "\n")
    result = {
        "machine": machine,
        "settings": asdict(settings),
        "seconds": round(time.monotonic() - start, 1),
        "rows": with_shares([json.loads(line) for line in lines.read_text().splitlines()[1:]]),
        "report": str(page),
    }
    write_json(page.with_suffix(".json"), result)
    _page(result, page)
    return result


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row the share of the measured fp16 peak that its arithmetic reaches."""
    peak = next((row["peak"] for row in rows if "peak" in row and row["precision"] == "fp16"), None)
    if peak is None:
        return rows
    return [{**row, "share": row["teraflops"] / peak} if "teraflops" in row else row for row in rows]


def _run(part: str, settings: GpuBenchSettings, lines: Path, limit: float) -> str:
    """Run a part in its own session; return its error, or ""."""
    say(f"{part}: at most {limit:.0f} s")
    command = [sys.executable, "-m", "aisle.loadtest.bench.gpu.part", part, json.dumps(asdict(settings)), str(lines)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    if settings.dry_run:
        environment["AISLE_CUDA_ON_CPU"] = "1"
    log = Path(settings.work, f"{part}.log")
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"exceeded its limit of {limit:.0f} s; {_last(log)}"
        finally:
            _end_session(process)
    say(f"{part}: {time.monotonic() - start:.0f} s")
    return f"exit code {process.returncode}: {_last(log)}" if process.returncode else ""


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End all processes of a part. On SIGINT, the part first ends its servers, which run in other sessions."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:]


def _machine() -> dict[str, Any]:
    """Return the machine's properties. A child process reads them, so that this process never initializes CUDA."""
    script = (
        "import json, torch\n"
        "from aisle.build.cuda_device import gpu_problem\n"
        "from aisle.build.cuda_runtime import gpu_name\n"
        "found = {'torch': torch.__version__, 'cuda': torch.version.cuda, 'problem': gpu_problem()}\n"
        "if not found['problem']:\n"
        "    found['gpu'] = gpu_name()\n"
        "    found['memory_mib'] = torch.cuda.mem_get_info()[1] >> 20\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise InputError(f"PyTorch cannot be imported: {lines[-1] if lines else 'no message'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    cores = len(os.sched_getaffinity(0))
    return {**found, "driver": _driver(), "cores": cores, "python": platform.python_version()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _page(result: dict[str, Any], path: Path) -> None:
    machine = result["machine"]
    page = Page(
        "GPU bench",
        f"{machine.get('gpu', 'no GPU: the figures of a dry run are meaningless')}, "
        f"driver {machine['driver'] or 'none'}, PyTorch {machine['torch']}, "
        f"CUDA {machine['cuda']}, {machine['cores']} cores; {result['seconds']} s. "
        "A share is the model's arithmetic, without padding, divided by the dense fp16 peak measured in this run.",
    )
    page.table(list(COLUMNS.values()), [[row.get(key) for key in COLUMNS] for row in result["rows"]])
    page.write(path)
