"""The services that are held against each other: how each is installed, started, called, and kept out of the way."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from aisle.client.aio import AsyncClassifier
from aisle.console import say
from aisle.deploy.triton import free_ports
from aisle.errors import InputError, ServerError
from aisle.loadtest.load import Call
from aisle.preprocess.encode import special_tokens
from aisle.preprocess.table import fingerprint

HERE = Path(__file__).parent
OURS = "Aisle"
START_SECONDS = 300.0
STOP_SECONDS = 20.0
TIMEOUT = 120.0  # seconds that a call may take: what is overloaded is slow, not gone
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Peer:
    """Another way to serve the same checkpoint, in an environment of its own under loadtest/peers/."""

    name: str
    folder: str
    route: str
    # What it may be run with: the first was the fastest where this was written, `--tune` finds out here.
    settings: tuple[dict[str, Any], ...]

    def request(self, text: str) -> dict[str, Any]:
        return {"model": "model", "input": [text]} if self.folder == "infinity" else {"text": text}

    def category(self, answer: Any) -> str:
        if self.folder == "infinity":
            return str(max(answer["data"][0], key=lambda each: each["score"])["label"])
        return str(answer["category"])


def _torch(**more: Any) -> dict[str, Any]:
    return {"dtype": "bfloat16", "batch": 1, "workers": 1, "threads": CORES, "compile": False, **more}


PEERS = (
    Peer(
        "LitServe, transformers",
        "litserve",
        "/predict",
        (
            _torch(batch=8),
            _torch(),
            _torch(batch=32),
            _torch(workers=CORES, threads=1),
            _torch(dtype="float32"),
        ),
    ),
    Peer(
        "infinity-emb",
        "infinity",
        "/classify",
        tuple(
            {"dtype": dtype, "batch": batch, "threads": CORES}
            for dtype, batch in (("bfloat16", 8), ("bfloat16", 32), ("float32", 8), ("int8", 8))
        ),
    ),
    Peer(
        "FastAPI, transformers",
        "fastapi",
        "/classify",
        (
            _torch(),
            _torch(batch=8),
            _torch(workers=CORES, threads=1),
            _torch(compile=True),
            _torch(dtype="float32"),
        ),
    ),
    Peer(
        "FastAPI, ONNX Runtime INT8",
        "onnxruntime",
        "/classify",
        (
            {"batch": 1, "workers": 1, "threads": CORES},
            {"batch": 8, "workers": 1, "threads": CORES},
            {"batch": 1, "workers": CORES, "threads": 1},
        ),
    ),
)


@dataclass
class Service:
    """A service that runs; only one at a time is awake."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    peer: Peer | None = None  # Aisle itself without one
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run; then stop all its processes where they are, so that it takes no time from the others."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Call]:
        """Give a function that sends one text and returns its category: over gRPC to Aisle, HTTP/1.1 to the peers.

        Aisle's takes lists as well, and returns the first category.
        """
        if self.peer is None:
            async with AsyncClassifier(f"127.0.0.1:{self.port}", timeout=TIMEOUT) as classifier:

                async def classify(what: str | list[str]) -> str:
                    return (await classifier.classify([what] if isinstance(what, str) else what))[0].category

                yield classify
            return
        peer, url = self.peer, f"http://127.0.0.1:{self.port}{self.peer.route}"
        connector = aiohttp.TCPConnector(limit=0)  # as many connections as there are calls, kept alive
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT), raise_for_status=True
        ) as session:

            async def post(text: str) -> str:
                async with session.post(url, json=peer.request(text)) as response:
                    return peer.category(await response.json())

            yield post


@contextmanager
def aisle(repository: Path, log: Path) -> Iterator[Service]:
    """Serve a repository with Triton, without its response cache: the same text would else be computed but once.

    Raises:
        ServerError: it did not start; the log says why.
    """
    grpc, http, metrics = free_ports(3)
    command = [sys.executable, "-m", "aisle", "serve", "--repository", str(repository), "--cache-mb", "0"]
    for option, port in (("--grpc-port", grpc), ("--http-port", http), ("--metrics-port", metrics)):
        command += [option, str(port)]
    with _running(OURS, command, f"http://127.0.0.1:{http}/v2/health/ready", log) as process:
        yield Service(OURS, process, grpc)


@contextmanager
def peer(which: Peer, settings: dict[str, Any], checkpoint: Path, work: Path, log: Path) -> Iterator[Service]:
    """Serve a checkpoint in transformers' layout by a peer.

    Raises:
        ServerError: it did not start; the log says why.
    """
    (port,) = free_ports(1)
    python = install(which, work)
    command = [str(python), str(HERE / "peers" / which.folder / "server.py"), str(checkpoint.resolve()), str(port)]
    command.append(json.dumps(settings))
    with _running(which.name, command, f"http://127.0.0.1:{port}/health", log) as process:
        yield Service(which.name, process, port, which, settings)


def install(which: Peer, work: Path) -> Path:
    """Return the interpreter of a peer's own environment, which is made where it is missing or outdated.

    Raises:
        InputError: its packages cannot be installed.
    """
    requirements = HERE / "peers" / which.folder / "requirements.txt"
    home = (work / which.folder).resolve()
    python, stamp = home / "bin" / "python", home / "requirements.sha256"
    wanted = fingerprint(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"installing {which.name} into {home}; it is hundreds of megabytes")
    shutil.rmtree(home, ignore_errors=True)
    commands = [
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"cannot install {requirements}: {done.stderr.strip().splitlines()[-1]}")
    stamp.write_text(wanted)
    return python


def transformers_layout(checkpoint: Path, folder: Path) -> Path:
    """Lay a checkpoint out as transformers reads it: links to its files, and what names its tokenizer and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "tokenizer.json", "labels.json"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to((checkpoint / name).resolve())
    labels = json.loads((checkpoint / "labels.json").read_text("utf-8"))
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps({**config, **names}, ensure_ascii=False), "utf-8")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": (tokenizer.truncation or {}).get("max_length", 128),
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in special_tokens(tokenizer).items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told), "utf-8")
    return folder


@contextmanager
def _running(name: str, command: list[str], health: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own, wait until it is healthy, end the whole group on leaving."""
    say(f"starting {name}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, preexec_fn=_end_with_parent
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{name} did not start; {log} says why")
            time.sleep(0.2)
        yield process
    finally:
        _end(process)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group."""
    try:
        os.killpg(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    except ProcessLookupError:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of it
    process.wait()


def _end_with_parent() -> None:
    """Have the kernel end the service should this process be killed (Linux prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
