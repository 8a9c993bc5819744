"""One small checkpoint, one repository, one Triton for the whole session."""

from __future__ import annotations

import contextvars
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from aisle.build.build import build
from aisle.build.repository import MANIFEST, TEMPLATE
from aisle.cli import run
from aisle.client import Classifier
from aisle.deploy.server import served_repository
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.loadtest import processes
from aisle.preprocess.tables.table import fingerprint
from aisle.train.core.settings import DecisionTargets
from aisle.train.fit.train import TrainingSettings, train
from aisle.train.synthetic.catalogue import write_sample

from .clock import VirtualClock

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# Where each step of a test's server waits while a test holds it.
STEPS = {"encoder": "outputs = self.engine", "tokenizer": "texts: list[str] = []"}


@dataclass(frozen=True)
class Server:
    """A running Triton whose steps a test can hold, so that requests gather before them on any machine."""

    url: str
    metrics: str
    labels: int
    log: Path
    gates: Path

    @contextmanager
    def held(self, step: str = "encoder") -> Iterator[None]:
        """Have a step compute nothing within the context: the encoder before its engine, the tokenizer at a request."""
        gate = self.gates / step
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    def wait_for_requests(self, step: str, number: int) -> None:
        """Wait until so many requests wait in Triton for a step."""
        name = f'nv_inference_pending_request_count{{model="{step}",version="1"}}'
        wait_for(lambda: series(self.metrics)[name] >= number)

    def wait_for_texts(self, number: float) -> None:
        """Wait until `number` texts in all have gone through the tokenizer and reached the encoder."""
        waiting = 'nv_inference_pending_request_count{model="encoder",version="1"}'

        def arrived() -> bool:
            return self.tokenized() >= number and series(self.metrics)[waiting] == 0

        wait_for(arrived)

    def tokenized(self) -> float:
        return series(self.metrics)['nv_inference_count{model="tokenizer",version="1"}']

    def figures(self) -> dict[str, float]:
        """Return the metrics' series and their values, once all that was counted so far is reported."""
        wait_for(lambda: len(reports(self.metrics)) >= len(STEPS))  # a process that has just started has not reported
        before = reports(self.metrics)
        wait_for(lambda: all(count >= before.get(name, 0) + 2 for name, count in reports(self.metrics).items()))
        return series(self.metrics)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order the tests so that each worker begins with its share of the long ones.

    Each worker gets a run of neighbours of this list, and later takes from the end of another's. Short tests at the
    end let the workers end together. The last worker gets the tests that need the checkpoint: so it trains it while
    the others are busy, and none waits.
    """
    ordered = sorted(items, key=_needs_checkpoint)
    long = [item for item in ordered if item.get_closest_marker("long")]
    short = [item for item in ordered if not item.get_closest_marker("long")]
    anywhere = [item for item in long if workers == 1 or not _needs_checkpoint(item)]
    others = max(1, workers - 1)
    shares = [anywhere[i::others] for i in range(others)]
    if workers > 1:
        shares.append([item for item in long if _needs_checkpoint(item)])
    result: list[pytest.Item] = []
    for i, share in enumerate(shares):
        size = (len(items) - len(result)) // (len(shares) - i)  # as xdist divides the list
        more = max(0, size - len(share))
        result += [*share, *short[:more]]
        short = short[more:]
    return result + short


def _needs_checkpoint(item: pytest.Item) -> bool:
    return "checkpoint" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic titles, with all their faults."""
    path = tmp_path_factory.mktemp("data") / "sample.csv"
    write_sample(path, 4000, seed=1)
    return path


@pytest.fixture(scope="session")
def checkpoint(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once, even with several test workers: the first one trains, and the others copy."""
    folder = tmp_path_factory.mktemp("train") / "checkpoint"
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoint-of-all"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            # Half of the default layers take half of the time, in each export and retraining, too.
            settings = TrainingSettings(epochs=4, layers=2, learning_rate=1e-3)
            train(sample, "text", "category", shared, settings, targets=DecisionTargets(0.95))
    shutil.copytree(shared, folder)
    return folder


@pytest.fixture(scope="session")
def repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "model_repository"
    build(checkpoint, folder, "openvino", "fp32")
    return folder


@contextmanager
def held_server(repository: Path, checkpoint: Path, folder: Path, **options: Any) -> Iterator[Server]:
    """Run a Triton of a repository, whose steps can be held; its log and its gates are in `folder`."""
    from aisle.train.core.checkpoint import Checkpoint

    grpc, metrics = free_ports(2)
    labels, gates = len(Checkpoint(checkpoint).labels), folder / "gates"
    gates.mkdir(parents=True)
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        with pytest.MonkeyPatch.context() as patch:  # no longer than this server's folder is made
            patch.setattr(served_repository, "TEMPLATE", with_gates(folder / "template", gates))
            settings = ServerOptions(repository, grpc_port=grpc, metrics_port=metrics, **options)
            stack.enter_context(running(settings, log))
        yield Server(f"localhost:{grpc}", f"localhost:{metrics}", labels, folder / "log", gates)


def with_gates(template: Path, gates: Path) -> Path:
    """Copy the steps' code, with one line more each: where a file stands in the way, it waits."""
    shutil.copytree(TEMPLATE, template, ignore=shutil.ignore_patterns("[0-9]*"))
    for step, line in STEPS.items():
        code, gate = template / step / "model.py", f"open_gate({str(gates / step)!r})"
        text, count = re.subn(rf"(?m)^( +)({re.escape(line)})", rf"\1{gate}\n\1\2", code.read_text("utf-8"))
        assert count == 1
        code.write_text(text + OPEN_GATE, "utf-8")
    return template


OPEN_GATE = """

def open_gate(path):
    import os, time
    while os.path.exists(path):
        time.sleep(0.005)
"""


@pytest.fixture(scope="session")
def server(repository: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with held_server(repository, checkpoint, tmp_path_factory.mktemp("server")) as each:
        yield each


@pytest.fixture(scope="session")
def short(repository: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose encoder has two queues of two requests."""
    folder = tmp_path_factory.mktemp("short")
    copy = folder / "repository"
    shutil.copytree(repository, copy, symlinks=True)
    text = (TEMPLATE / "encoder" / "config.pbtxt").read_text("utf-8")
    text, count = re.subn(r'(max_queue_size" value { string_value: )"\d+"', r'\1"2"', text)
    assert count == 1
    configuration = copy / "encoder" / "configs" / "short.pbtxt"
    configuration.parent.mkdir(exist_ok=True)
    configuration.write_text(text, "utf-8")
    with held_server(copy, checkpoint, folder, model_config_name="short") as each:
        yield each


@pytest.fixture(scope="session")
def classifier(server: Server) -> Iterator[Classifier]:
    with Classifier(server.url, timeout=60) as each:
        yield each


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """The load generator's clock and that of the event loops, which passes only where all tasks wait."""
    from aisle.loadtest import generator

    made = VirtualClock()
    made.take_over(monkeypatch, generator)
    return made


def aisle(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would.

    It runs in this process, which has PyTorch and the like imported already. One that needs an environment of its own,
    with `env` added, runs in a process of its own.
    """
    words = [str(each) for each in arguments]
    if env is not None:
        command = [sys.executable, "-m", "aisle", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        unittest.mock.patch.dict(os.environ),
        same_signals(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = contextvars.copy_context().run(run, words)
        told = [(stream.seek(0), stream.read())[1] for stream in (out, err)]
    return subprocess.CompletedProcess(words, code, *told)


@contextmanager
def same_signals() -> Iterator[None]:
    """Leave the handlers of signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seal(repository: Path, version: int, name: str) -> None:
    """Write the present digest of a file into its version's manifest."""
    manifest = repository / "product_classifier" / str(version) / MANIFEST
    content = json.loads(manifest.read_text("utf-8"))
    model, _, file = name.partition("/")
    content["files"][name] = fingerprint(repository / model / str(version) / file)
    manifest.write_text(json.dumps(content), "utf-8")


def unseal(repository: Path, version: int, name: str) -> None:
    """Take a file out of its version's manifest."""
    manifest = repository / "product_classifier" / str(version) / MANIFEST
    content = json.loads(manifest.read_text("utf-8"))
    del content["files"][name]
    manifest.write_text(json.dumps(content), "utf-8")


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait until a condition holds, and return its value; fail after far more time than any machine needs."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)
    return value


def assert_linear(function: Callable[[str], object], unit: str, prefix: str = "") -> None:
    """Check that a function's cost grows with a text's length, not its square.

    16 times the text must take far less than 256 times the CPU time of this thread, which no other program can take.
    """

    def seconds(size: int) -> float:
        text = prefix + unit * (size // len(unit))
        start = time.thread_time()
        function(text)
        return time.thread_time() - start

    small = min(seconds(2048) for _ in range(5))
    assert min(seconds(32768) for _ in range(3)) < 120 * small + 0.05


WORDS = ("苹果", "手机壳", "猫粮", "usb", "cable", "奶粉", "洗发水", "耳机")


def long_text(number: int) -> str:
    """Return a text longer than the token limit. Two million numbers give different tokens: none is cached twice."""
    return " ".join(WORDS[number // 8**place % 8] for place in range(7)) + " 红富士苹果" * 130


def below(root: int, argument: str) -> set[int]:
    """Return the processes below this one with such an argument."""
    found = set()
    for pid in processes.tree(root) - {root}:
        try:
            if argument in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(pid)
        except OSError:
            continue  # it ended meanwhile
    return found


def series(address: str) -> dict[str, float]:
    """Return the series of a server's metrics at HOST:PORT, and their values."""
    lines = urllib.request.urlopen(f"http://{address}/metrics", timeout=30).read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[:1] != "#"}


def reports(address: str) -> dict[str, float]:
    """Return how often each process of a server's steps has reported its figures."""
    return {name: count for name, count in series(address).items() if name.startswith("aisle_reports_total")}


def total(address: str, name: str) -> float:
    """Return the sum of a metric's series at HOST:PORT."""
    return sum(value for key, value in series(address).items() if key.partition("{")[0] == name)


def rename_labels(checkpoint: Path, labels: Sequence[str]) -> None:
    """Rename the labels of a checkpoint, in both files that hold them; its decisions are for the old ones."""
    (checkpoint / "decisions.json").unlink(missing_ok=True)
    (checkpoint / "labels.json").write_text(json.dumps(list(labels), ensure_ascii=False), "utf-8")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["id2label"] = dict(enumerate(labels))
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
