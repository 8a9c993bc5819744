"""The service parts of `aisle bench gpu`: files and single calls through Triton, and peers on the same texts."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aisle.deploy.server.triton import free_ports
from aisle.errors import ServerError
from aisle.loadtest.bench.gpu.engines import Bench, Row
from aisle.loadtest.bench.gpu.measure import device
from aisle.loadtest.generator import checked, closed, percentile
from aisle.loadtest.processes import cpu_of_steps, tree

START_SECONDS = 90.0
CLIENT_START_SECONDS = 3.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    metrics: str  # the address of its metrics
    pid: int


def served(precision: str) -> Callable[[Bench], Iterator[Row]]:
    """Return the part that serves a built version through Triton and sends it files and single texts."""

    def part(bench: Bench) -> Iterator[Row]:
        start = time.perf_counter()
        with _server(bench, precision) as server:
            yield {
                "system": "Triton, start until ready",
                "precision": precision,
                "seconds": time.perf_counter() - start,
            }
            yield _load(bench, server, precision, "calls", processes=1, callers=1)
            for processes in [1] if bench.dry else [4, 8]:
                yield _load(bench, server, precision, "files", processes=processes, callers=1)
            for callers in [4] if bench.dry else [64, 256]:
                yield _load(bench, server, precision, "calls", processes=1 if bench.dry else 8, callers=callers)

    return part


@contextmanager
def _server(bench: Bench, precision: str) -> Iterator[Server]:
    """Run `aisle serve` on the built version; its log stays in the work folder."""
    grpc, metrics = free_ports(2)
    name = ["--model-config-name", "gpu"] if device().type == "cuda" else []
    command = [bench.settings["server_python"], "-m", "aisle", "serve", "--cache-mb", "0", *name]
    command += ["--repository", str(bench.repository("random", precision).resolve())]
    command += ["--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    log = bench.work / f"serve-{precision}.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        address = f"http://127.0.0.1:{metrics}/metrics"
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the server did not start: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
        yield Server(f"127.0.0.1:{grpc}", address, server.pid)
    finally:
        _end(server)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants: a remaining process would keep the port and the GPU."""
    started = tree(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _load(bench: Bench, server: Server, precision: str, kind: str, processes: int, callers: int) -> Row:
    """Send from several processes at once; return their combined figures, and what the server's steps did."""
    seconds = 1.0 if bench.dry else 5.0
    begin = time.time() + CLIENT_START_SECONDS
    settings = {
        "url": server.url,
        "texts": str(bench.work / "texts.json"),
        "kind": kind,
        "callers": max(1, callers // processes),
        "seconds": seconds,
        "begin": begin,
    }
    clients = []
    for number in range(processes):
        own = json.dumps({**settings, "first": number * (50 if bench.dry else 2000)})
        command = [bench.settings["server_python"], "-m", "aisle.loadtest.bench.gpu.client", own]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    seen = _watch(server, begin + 0.1 * seconds, 0.8 * seconds)
    found, errors = [], []
    for client in clients:
        out, error = client.communicate(timeout=CLIENT_START_SECONDS + seconds + 60)
        if client.returncode:
            errors.append(error.strip().splitlines()[-1] if error.strip() else "no message")
        else:
            found.append(json.loads(out))
    latencies = [latency for each in found for latency in each["latencies"]]
    concurrency = "one caller" if callers == 1 else f"{callers} at once"
    row: Row = {
        "system": f"Triton, files from {processes} processes" if kind == "files" else f"Triton, calls, {concurrency}",
        "precision": precision,
        "texts_per_second": sum(each["texts_per_second"] for each in found),
        "failures": sum(each["failures"] for each in found) + len(errors),
        **seen,
    }
    if latencies:
        row |= {"p50_ms": 1e3 * percentile(latencies, 50), "p99_ms": 1e3 * percentile(latencies, 99)}
    return {**row, "error": errors[0]} if errors else row


def _watch(server: Server, begin: float, seconds: float) -> Row:
    """Wait for the time `begin`; return the cores that each step uses in the next `seconds`, and texts per batch."""
    time.sleep(max(0.0, begin - time.time()))
    before, start = cpu_of_steps(server.pid), time.perf_counter()
    texts, batches = _engine_work(server)
    time.sleep(seconds)
    after, passed = cpu_of_steps(server.pid), time.perf_counter() - start
    more_texts, more_batches = _engine_work(server)
    cores = {name: (used - before.get(name, 0.0)) / passed for name, used in sorted(after.items())}
    return {
        "cores": ", ".join(f"{name} {used:.1f}" for name, used in cores.items()),
        "batch": round((more_texts - texts) / max(1.0, more_batches - batches), 1),
    }


def _engine_work(server: Server) -> tuple[float, float]:
    """Return how many texts and batches the engine has computed."""
    with urllib.request.urlopen(server.metrics, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    sums = {"nv_inference_count": 0.0, "aisle_engine_batches_total": 0.0}
    for line in lines:
        name = line.partition("{")[0]
        if name in sums and (name.startswith("aisle") or 'model="encoder"' in line):
            sums[name] += float(line.rpartition(" ")[2])
    return sums["nv_inference_count"], sums["aisle_engine_batches_total"]


def sentence_transformers(bench: Bench) -> Iterator[Row]:
    """Measure sentence-transformers on the same texts, tokenizing included. It returns embeddings, not categories."""
    if not importlib.util.find_spec("sentence_transformers"):
        yield {"system": "sentence-transformers", "error": "not installed"}
        return
    from sentence_transformers import SentenceTransformer

    # A folder without modules.json is loaded as a plain transformer, whose token embeddings are averaged.
    model = SentenceTransformer(str(_transformers_layout(bench)), device=str(device()))
    model.max_seq_length = 128
    if device().type == "cuda":
        model.half()
    texts = bench.texts()[: 64 if bench.dry else 8192]
    model.encode(texts[:64], batch_size=64)
    for size in bench.sizes[:2]:
        start = time.perf_counter()
        model.encode(texts, batch_size=size)
        seconds = time.perf_counter() - start
        yield {
            "system": "sentence-transformers, sorted by length, from text",
            "precision": "fp16",
            "batch": size,
            "texts_per_second": len(texts) / seconds,
        }


def dynamic_batching(bench: Bench) -> Iterator[Row]:
    """Measure transformers behind HTTP with dynamic batching, like most self-written services."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "aisle.loadtest.bench.gpu.peer", str(_transformers_layout(bench)), str(port)]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/ready"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ServerError("the peer did not start")
            time.sleep(0.2)
        for callers in [4] if bench.dry else [1, 64, 256]:
            yield asyncio.run(_over_http(bench, port, callers))
    finally:
        _end(server)


async def _over_http(bench: Bench, port: int, callers: int) -> Row:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), raise_for_status=True) as session:

        async def call(text: str) -> None:
            async with session.post(f"http://127.0.0.1:{port}/classify", json={"text": text}) as response:
                await response.json()

        load = checked(await closed(call, itertools.cycle(bench.texts()), callers, 0.5 if bench.dry else 5.0))
    return {
        "system": f"transformers + aiohttp, dynamic batching, {callers} at once",
        "precision": "fp16",
        "texts_per_second": load.texts_per_second,
        "p50_ms": 1e3 * percentile(load.latencies, 50),
        "p99_ms": 1e3 * percentile(load.latencies, 99),
    }


def _transformers_layout(bench: Bench) -> Path:
    """Write the checkpoint as a folder that transformers can load, with its tokenizer."""
    folder = bench.work / "transformers"
    if not folder.exists():
        from transformers import PreTrainedTokenizerFast

        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to((bench.checkpoint / name).resolve())
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        file = str(bench.checkpoint / "tokenizer.json")
        PreTrainedTokenizerFast(tokenizer_file=file, model_max_length=128, **names).save_pretrained(folder)
    return folder
