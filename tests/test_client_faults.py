"""Errors of callers and of their surroundings: each ends soon, with a clear message."""

from __future__ import annotations

import asyncio
import http.server
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from aisle.client import (
    TLS,
    AsyncClassifier,
    Classifier,
    ClassifierError,
    Failure,
    InvalidText,
    Unavailable,
    connection,
)
from aisle.client.bulk import classify_file
from aisle.client.protocol import BULK_RETRIES
from aisle.client.status import LONGEST_WAIT, retry_after
from aisle.deploy.server.triton import free_ports
from aisle.errors import InputError

from .fake import Fake, fake_server, silent_socket

BOTH = pytest.mark.parametrize("kind", ["blocking", "asyncio"])


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as each:
        yield each


def call(kind: str, url: str, ask: Callable[[Any], Any], **options: Any) -> Any:
    """Call a new client of either kind, and close it."""
    if kind == "blocking":
        with Classifier(url, **options) as classifier:
            return ask(classifier)

    async def main() -> Any:
        async with AsyncClassifier(url, **options) as client:
            asked = ask(client)
            return await asked if isinstance(asked, Awaitable) else [answer async for answer in asked]

    return asyncio.run(main())


def classify(texts: Any, top_k: Any = 1) -> Callable[[Any], Any]:
    return lambda client: client.classify(texts, top_k)


def stream(texts: Any) -> Callable[[Any], Any]:
    return lambda client: list(client.stream(texts)) if isinstance(client, Classifier) else client.stream(texts)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waiting times between retries, without waiting."""
    asked: list[float] = []
    true = connection.Connection._seconds_to_wait

    def noted(*arguments: Any) -> float:
        asked.append(true(*arguments))
        return 0.0

    monkeypatch.setattr(connection.Connection, "_seconds_to_wait", noted)
    return asked


class Frame:
    """Like pandas' DataFrame: iterating gives the names of the columns."""

    columns = ("text",)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@BOTH
@pytest.mark.parametrize("texts", ["红富士苹果", b"usb", {"text": "苹果"}, {"苹果"}, None, 5, Frame()])
def test_what_is_not_a_list_is_a_type_error(fake: Fake, kind: str, texts: Any) -> None:
    for ask in (classify, stream):
        with pytest.raises(TypeError, match="texts must be a list of texts"):
            call(kind, fake.url, ask(texts))


@BOTH
def test_one_rule_for_values(fake: Fake, kind: str) -> None:
    answers = call(kind, fake.url, classify(["苹果", "苹果".encode(), 12, 12.0]))
    assert [answer.category for answer in answers] == ["6", "6", "2", "2"]
    for value, complaint in [(None, "missing"), (math.nan, "missing"), (True, "true or false"), (["苹果"], "a list")]:
        with pytest.raises(InvalidText, match=f"row 1: text is {complaint}"):
            call(kind, fake.url, classify(["苹果", value]))
    answers = call(kind, fake.url, stream(["苹果", None, math.nan, {"title": ["a"]}, "x" * 40_000, 7]))
    assert [isinstance(answer, Failure) for answer in answers] == [False, True, True, True, True, False]


@BOTH
def test_decisions_are_asked_for_with_true_or_false(fake: Fake, kind: str) -> None:
    with pytest.raises(TypeError, match="decisions must be True or False; got 'no'"):
        call(kind, fake.url, lambda classifier: classifier.classify(["苹果"], decisions="no"))


@BOTH
@pytest.mark.parametrize("bad", ["", None, "\ud800"])
@pytest.mark.parametrize(("count", "row"), [(65, 64), (200, 64), (200, 130), (200, 199)])
def test_errors_name_the_row_of_the_callers_list(fake: Fake, kind: str, bad: Any, count: int, row: int) -> None:
    texts: list[Any] = ["苹果"] * count
    texts[row] = bad
    with pytest.raises(InvalidText, match=f"^row {row}: text is ") as refused:
        call(kind, fake.url, classify(texts))
    assert refused.value.row == row


@BOTH
@pytest.mark.parametrize("top_k", [True, "3", 2.5, 2**31, -(2**40)])
def test_top_k_is_a_number(fake: Fake, kind: str, top_k: Any) -> None:
    with pytest.raises(InvalidText, match="top_k must be"):
        call(kind, fake.url, classify(["苹果"], top_k))


# ---- forks and event loops

FORK = """
import gc, os, signal, sys
from aisle.client import Classifier, TrafficLog
from pathlib import Path
log = TrafficLog(Path(sys.argv[2]))
classifier = Classifier(sys.argv[1], log=log)  # as a module that gunicorn loads before it forks
used = sys.argv[3]
if used != "unused":
    classifier.classify(["a"] * 130)
if used == "locked":
    log._lock.acquire()  # as by a thread of the parent in the middle of a line
def work(number):
    signal.alarm(60)
    assert len(classifier.classify(["a"] * (60 + number))) == 60 + number
    assert len(list(classifier.stream(["a"] * 500))) == 500
children = []
for number in range(8):
    pid = os.fork()
    if not pid:
        work(number)
        del classifier
        gc.collect()
        log.close()
        sys.exit(0)
    children.append(pid)
states = [os.waitpid(pid, 0)[1] for pid in children]
if used == "locked":
    log._lock.release()
assert len(classifier.classify(["a"] * 130)) == 130
classifier.close()
sys.exit(any(states))
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("used", ["unused", "used", "locked"])
def test_a_client_made_before_a_fork(fake: Fake, used: str, tmp_path: Any) -> None:
    done = run(FORK, fake.url, str(tmp_path / "log.jsonl"), used)
    assert done.returncode == 0, done.stderr


POOL = """
import multiprocessing, sys
from aisle.client import Classifier
classifier = Classifier(sys.argv[1])
classifier.classify(["a"])
def work(count):
    return len(classifier.classify(["a"] * count))
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(work, [1, 64, 65, 200]).get(60) == [1, 64, 65, 200]
"""


def test_multiprocessing(fake: Fake) -> None:
    done = run(POOL, fake.url)
    assert done.returncode == 0, done.stderr


ASYNC_FORK = """
import asyncio, os, signal, sys
from aisle.client import AsyncClassifier, ClassifierError
classifier = AsyncClassifier(sys.argv[1])
async def work():
    return len(await classifier.classify(["a"] * 130))
loop = asyncio.new_event_loop()
if sys.argv[2] == "used":
    assert loop.run_until_complete(work()) == 130
pid = os.fork()
if not pid:
    signal.alarm(60)
    try:
        assert (loop.run_until_complete if sys.argv[3] == "same" else asyncio.run)(work()) == 130
        os._exit(0)
    except ClassifierError as error:
        print(error)
        sys.exit(3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("loop", ["same", "new"])
def test_an_asyncio_client_and_a_fork(fake: Fake, loop: str) -> None:
    done = run(ASYNC_FORK, fake.url, "unused", loop)
    assert done.returncode == 0, done.stderr
    done = run(ASYNC_FORK, fake.url, "used", loop)  # gRPC itself would hang
    assert done.returncode == 3, done.stderr
    assert "used before this process was forked" in done.stdout


def test_one_asyncio_client_in_many_loops(fake: Fake) -> None:
    client = AsyncClassifier(fake.url)  # without a running loop

    async def main() -> int:
        lists = await asyncio.gather(*(client.classify(["a"] * 70) for _ in range(40)))  # more than its limit
        return sum(map(len, lists))

    counted: list[int] = []
    assert [asyncio.run(main()) for _ in range(3)] == [2800] * 3
    threads = [threading.Thread(target=lambda: counted.append(asyncio.run(main()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counted == [2800] * 3


@BOTH
def test_a_closed_client_raises(fake: Fake, kind: str) -> None:
    if kind == "blocking":
        with Classifier(fake.url) as classifier:
            classifier.classify(["a"])
        with pytest.raises(RuntimeError, match="closed"):
            classifier.classify(["a"])
        return

    async def main() -> None:
        async with AsyncClassifier(fake.url) as client:
            await client.classify(["a"])
        with pytest.raises(RuntimeError, match="closed"):
            await client.classify(["a"])

    asyncio.run(main())


def test_closing_a_client_ends_waiting_streams(fake: Fake) -> None:
    """A stream that waits for a server does not block the program that closes it."""
    waiting = threading.Event()

    def away(method: str, context: Any) -> None:
        if method == "ModelInfer":
            context.set_trailing_metadata((("retry-after", "300"),))
            waiting.set()
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "over the limit")

    fake.behave = away
    classifier = Classifier(fake.url)
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            list(classifier.stream(["a"]))
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert waiting.wait(60)
    classifier.close()
    thread.join(60)
    assert ended.is_set()


# ---- time limits


@BOTH
@pytest.mark.parametrize("method", ["ModelConfig", "ModelInfer"])
def test_every_call_has_a_timeout(fake: Fake, kind: str, method: str) -> None:
    over = threading.Event()
    fake.behave = lambda called, context: (called == method and over.wait(60) and None) or None
    try:
        with pytest.raises(ClassifierError, match=rf"no answer from {fake.url} within 0\.2 s") as late:
            call(kind, fake.url, classify(["苹果"]), timeout=0.2, retries=0)
    finally:
        over.set()
    assert late.value.status == "DEADLINE_EXCEEDED"
    assert fake.calls.count(method) == 1


@BOTH
def test_a_server_that_never_answers(kind: str, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_socket() as url:
        with pytest.raises(ClassifierError, match="is `aisle serve` running there") as late:
            call(kind, url, classify(["苹果"]), timeout=0.2)
        assert late.value.status == "DEADLINE_EXCEEDED"
        assert not waits
        monkeypatch.setattr(connection, "PATIENCE", 0.3)
        with pytest.raises(ClassifierError, match="is `aisle serve` running there"):
            call(kind, url, stream(["苹果"]), timeout=0.2)
        assert 1 <= len(waits) < BULK_RETRIES


@BOTH
def test_a_stream_retries_from_its_first_call(fake: Fake, kind: str, waits: list[float]) -> None:
    left = [grpc.StatusCode.UNAVAILABLE] * 6

    def behave(method: str, context: Any) -> None:
        if left:
            context.abort(left.pop(), "starting")

    fake.behave = behave
    assert len(call(kind, fake.url, stream(["苹果"]), retries=1)) == 1
    assert len(waits) == 6
    left += [grpc.StatusCode.UNAVAILABLE] * 6
    with pytest.raises(Unavailable, match="starting"):
        call(kind, fake.url, classify(["苹果"]), retries=1)


@pytest.mark.parametrize("timeout", [math.nan, math.inf, 0, -1, None, "10", True])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InputError, match="timeout must be a number of seconds above 0"):
        Classifier(timeout=timeout)


# ---- limits of a gateway


@BOTH
def test_a_stream_obeys_retry_after(fake: Fake, kind: str, waits: list[float]) -> None:
    left = [(("retry-after", "7"),), (("grpc-retry-pushback-ms", "2500"),), ()]

    def behave(method: str, context: Any) -> None:
        if method == "ModelInfer" and left:
            context.set_trailing_metadata(left.pop(0))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "local_rate_limited")

    fake.behave = behave
    assert len(call(kind, fake.url, stream(["苹果"]))) == 1
    assert len(waits) == 3
    assert 7 <= waits[0] < 8
    assert 2.5 <= waits[1] < 3.5
    assert 0 <= waits[2] < 1
    left += [(("retry-after", "7"),)]
    with pytest.raises(ClassifierError, match="RESOURCE_EXHAUSTED: local_rate_limited; try again in 7 s"):
        call(kind, fake.url, classify(["苹果"]))


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("", 0), ("12", 12), ("soon", 0), ("-5", 0), ("999999", LONGEST_WAIT), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after(told: str, seconds: float) -> None:
    class Told:
        def initial_metadata(self) -> Any:
            return ()

        def trailing_metadata(self) -> Any:
            return (("retry-after", told),)

    assert retry_after(Told()) == seconds


@BOTH
def test_a_message_that_is_too_large_is_not_retried(fake: Fake, kind: str, waits: list[float]) -> None:
    def behave(method: str, context: Any) -> None:
        if method == "ModelInfer":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)")

    fake.behave = behave
    with pytest.raises(ClassifierError, match="larger than max"):
        call(kind, fake.url, stream(["苹果"]))
    assert not waits


# ---- addresses


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://host:8001", "has no http://; give HOST:PORT, such as host:8001"),
        ("https://host:8001", "as host:8001 .*TLS"),
        ("grpc://host:8001", "has no grpc://"),
        ("localhost", "port is missing.* localhost:8001"),
        ("ipv4:127.0.0.1", "port is missing"),
        ("dns:///localhost", "port is missing"),
        ("[::1]", "port is missing"),
        ("::1:8001", "in brackets"),
        ("localhost:99999", "from 1 to 65535"),
        ("localhost:grpc", "from 1 to 65535"),
        ("localhost:0", "from 1 to 65535"),
        ("", "is empty"),
        (":8001", "is not an address"),
        ("local host:8001", "is not an address"),
        ("host:8001/v2", "is not an address|from 1 to 65535"),
    ],
)
def test_an_address_is_host_and_port(url: str, complaint: str) -> None:
    for kind in (Classifier, AsyncClassifier):
        with pytest.raises(InputError, match=complaint):
            kind(url)


@BOTH
def test_all_forms_of_addresses(fake: Fake, kind: str) -> None:
    port = fake.url.rpartition(":")[2]
    for url in (f"127.0.0.1:{port}", f"dns:///127.0.0.1:{port}", f"ipv4:127.0.0.1:{port},127.0.0.1:{port}"):
        assert len(call(kind, url, classify(["苹果"]))) == 1


@BOTH
def test_the_metrics_port(kind: str, waits: list[float]) -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as metrics:
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
        for ask in (classify, stream):
            with pytest.raises(
                Unavailable, match=r"does not speak gRPC; `aisle serve` has gRPC on port 8001 \(8002 is"
            ):
                call(kind, f"127.0.0.1:{metrics.server_port}", ask(["苹果"]))
        metrics.shutdown()
    assert not waits


@BOTH
def test_a_port_that_closes_the_connection(kind: str, waits: list[float]) -> None:
    """Like Triton's metrics port, and a server with TLS."""
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    pair = own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    endpoint = grpc.server(futures.ThreadPoolExecutor(1))
    port = endpoint.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    endpoint.start()
    try:
        with pytest.raises(Unavailable, match=r"closes the connection: .*8002 is for metrics.* TLS"):
            call(kind, f"127.0.0.1:{port}", classify(["苹果"]), retries=1)
    finally:
        endpoint.stop(None)
    assert len(waits) == 1


@BOTH
def test_a_server_without_tls(fake: Fake, kind: str, waits: list[float]) -> None:
    with pytest.raises(Unavailable, match="does not speak TLS"):
        call(kind, fake.url, classify(["苹果"]), tls=TLS())
    assert not waits


@BOTH
def test_no_proxy_is_used_for_this_host(fake: Fake, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")  # nothing listens there
    port = fake.url.rpartition(":")[2]
    for url in (fake.url, f"localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        assert len(call(kind, url, classify(["苹果"]))) == 1
    with pytest.raises(
        Unavailable, match=r"[Tt]he proxy 127\.0\.0\.1:9 \(http_proxy.*no_proxy=aisle\.example"
    ) as failed:
        call(kind, "aisle.example:8001", classify(["苹果"]), retries=0)
    assert "secret" not in str(failed.value)


# ---- no server there


@BOTH
def test_waiting_for_a_server_is_logged(
    kind: str, waits: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BULK_RETRIES", 5)
    url = f"127.0.0.1:{free_ports(1)[0]}"
    with caplog.at_level(logging.WARNING, "aisle.client"), pytest.raises(Unavailable) as failed:
        call(kind, url, stream(["苹果"]))
    assert len(waits) == 5
    assert f"no server answers at {url} (Connection refused); is `aisle serve` running?" in str(failed.value)
    [said] = caplog.records  # at once, and only once
    assert "Waiting for a server" in said.getMessage()


@BOTH
def test_a_call_only_raises_its_error(kind: str, waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable, match="is `aisle serve` running"):
        call(kind, f"127.0.0.1:{free_ports(1)[0]}", classify(["苹果"]), retries=2)
    assert len(waits) == 2
    assert not caplog.records


# ---- versions


@BOTH
@pytest.mark.parametrize("said", ["is not found", "is not at ready state"])
def test_a_version_that_is_not_loaded(fake: Fake, kind: str, said: str, waits: list[float]) -> None:
    def behave(method: str, context: Any) -> None:
        status = grpc.StatusCode.NOT_FOUND if said == "is not found" else grpc.StatusCode.UNAVAILABLE
        context.abort(status, f"Request for unknown model: 'product_classifier' version 9 {said}")

    fake.behave = behave
    for ask in (classify, stream):
        with pytest.raises(InputError, match="version 9 is not loaded"):
            call(kind, fake.url, ask(["苹果"]), model_version=9)
    assert not waits


@pytest.mark.parametrize("version", ["x", "-1", 0, "1.5", True])
def test_a_version_is_a_number(version: Any) -> None:
    with pytest.raises(InputError, match="model_version must be a whole number"):
        Classifier(model_version=version)


def test_forked_children_count_only_their_own_texts(tmp_path: Any) -> None:
    """Each process of a log counts the words of its own texts."""
    from aisle.client import Prediction, TrafficLog

    log = TrafficLog(tmp_path / "log.jsonl")
    log.record(["usb cable"] * 150, [Prediction(("a",), (0.5,))] * 150)
    pid = os.fork()
    if not pid:
        log.close()
        os._exit(0)
    os.waitpid(pid, 0)
    log.close()
    assert (tmp_path / "log.jsonl").read_text().count('"words"') == 1


def test_a_file_asks_once_for_the_models_configuration(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    with fake_server() as fake, Classifier(fake.url) as classifier:
        classify_file(classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "text", 1)
        assert fake.calls.count("ModelConfig") == 1
