"""The services to compare: how each is installed, started, called, paused and ended."""

from __future__ import annotations

import contextlib
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
from aisle.deploy.server.triton import free_ports
from aisle.errors import InputError, ServerError
from aisle.loadtest.generator import Call
from aisle.loadtest.processes import awake, resume
from aisle.preprocess.encode import special_tokens
from aisle.preprocess.tables.table import fingerprint
from aisle.processes import end_with_parent

HERE = Path(__file__).parent
OURS = "Aisle"
START_SECONDS = 300.0
STOP_SECONDS = 20.0
TIMEOUT = 120.0  # seconds per call: an overloaded service is slow, not down
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Peer:
    """Another way to serve the same checkpoint, in its own environment; see loadtest/bench/peers/."""

    name: str
    folder: str
    route: str
    # The first settings were the fastest on the author's machine; `--tune` finds the fastest on this one.
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
    """A running service. Only one at a time is awake."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    peer: Peer | None = None  # None: Aisle itself
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the service run, then pause all its processes, so that it uses no CPU time and no memory bandwidth.

        Raises:
            ServerError: a process cannot be paused.
        """
        with awake(self.process.pid):
            yield

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Call]:
        """Return a function that sends one text and returns its category, by gRPC to Aisle and HTTP/1.1 to the peers.

        The function for Aisle also accepts a list of texts, and returns the first category.
        """
        if self.peer is None:
            async with AsyncClassifier(f"127.0.0.1:{self.port}", timeout=TIMEOUT) as classifier:

                async def classify(texts: str | list[str]) -> str:
                    return (await classifier.classify([texts] if isinstance(texts, str) else texts))[0].category

                yield classify
            return
        peer, url = self.peer, f"http://127.0.0.1:{self.port}{self.peer.route}"
        connector = aiohttp.TCPConnector(limit=0)  # one connection for each concurrent call, kept alive
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT), raise_for_status=True
        ) as session:

            async def post(text: str) -> str:
                async with session.post(url, json=peer.request(text)) as response:
                    return peer.category(await response.json())

            yield post


@contextmanager
def aisle(repository: Path, log: Path) -> Iterator[Service]:
    """Serve a repository with Triton, without the response cache, which would compute each text only once.

    Raises:
        ServerError: it did not start; the log has the reason.
    """
    grpc, http, metrics = free_ports(3)
    command = [sys.executable, "-m", "aisle", "serve", "--repository", str(repository), "--cache-mb", "0"]
    for option, port in (("--grpc-port", grpc), ("--http-port", http), ("--metrics-port", metrics)):
        command += [option, str(port)]
    with running(OURS, command, f"http://127.0.0.1:{http}/v2/health/ready", log) as process:
        yield Service(OURS, process, grpc)


@contextmanager
def start_peer(peer: Peer, settings: dict[str, Any], checkpoint: Path, work: Path, log: Path) -> Iterator[Service]:
    """Serve a checkpoint, in the layout of transformers, with a peer.

    Raises:
        ServerError: it did not start; the log has the reason.
    """
    (port,) = free_ports(1)
    python = install(peer, work)
    command = [str(python), str(HERE / "peers" / peer.folder / "server.py"), str(checkpoint.resolve()), str(port)]
    command.append(json.dumps(settings))
    with running(peer.name, command, f"http://127.0.0.1:{port}/health", log) as process:
        yield Service(peer.name, process, port, peer, settings)


def install(peer: Peer, work: Path) -> Path:
    """Return the Python of a peer's own environment. It is created if it is missing or outdated.

    Raises:
        InputError: its packages cannot be installed.
    """
    requirements = HERE / "peers" / peer.folder / "requirements.txt"
    home = (work / peer.folder).resolve()
    python, stamp = home / "bin" / "python", home / "requirements.sha256"
    expected = fingerprint(requirements)
    if stamp.is_file() and stamp.read_text() == expected:
        return python
    say(f"installing {peer.name} into {home}; it needs hundreds of megabytes")
    shutil.rmtree(home, ignore_errors=True)
    commands = [
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"cannot install {requirements}: {done.stderr.strip().splitlines()[-1]}")
    stamp.write_text(expected)
    return python


def transformers_layout(checkpoint: Path, folder: Path) -> Path:
    """Write a folder that transformers can load: links to the checkpoint's files, and the configuration it needs."""
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
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": (tokenizer.truncation or {}).get("max_length", 128),
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in special_tokens(tokenizer).items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), "utf-8")
    return folder


@contextmanager
def running(name: str, command: list[str], health: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in its own group, wait until it is healthy, and end the whole group on exit."""
    say(f"starting {name}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{name} did not start; see {log}")
            time.sleep(0.2)
        yield process
    finally:
        _end(process)


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this host is reached without a proxy


def _healthy(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, which may be paused, and its whole group."""
    try:
        resume(process.pid)
        process.terminate()
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    except ProcessLookupError:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # processes that did not end
    process.wait()
