from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import aclosing, contextmanager
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
    Prediction,
    Unavailable,
)
from aisle.client.bulk import classify_file
from aisle.client.protocol import IN_FLIGHT
from aisle.deploy.server.triton import free_ports
from aisle.errors import InputError
from aisle.preprocess.tables.table import read_rows
from aisle.preprocess.tables.writing import write_rows

from .conftest import Server, aisle

TITLES = [f"{kind} {i}号" for i in range(150) for kind in ("红富士苹果", "手机壳 防摔", "猫粮 成猫")]


class Flaky:
    """A gRPC proxy that answers some calls with an error and forwards the others to the real server."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.failures: list[grpc.StatusCode] = []
        self.delay = 0.0
        self.calls = 0

    def handle(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        forward = self.channel.unary_unary(details.method)

        def unary(request: bytes, context: grpc.ServicerContext) -> Any:
            if details.method.endswith("ModelInfer"):
                self.calls += 1
                time.sleep(self.delay)
                if self.failures:
                    context.abort(self.failures.pop(), "made to fail")
            return forward(request)

        return grpc.unary_unary_rpc_method_handler(unary)


@contextmanager
def proxied(target: str, credentials: grpc.ServerCredentials | None = None) -> Iterator[tuple[str, Flaky]]:
    proxy = Flaky(target)
    endpoint = grpc.server(futures.ThreadPoolExecutor(8))
    handler = type("Handler", (grpc.GenericRpcHandler,), {"service": lambda self, details: proxy.handle(details)})
    endpoint.add_generic_rpc_handlers((handler(),))
    address = "localhost:0"
    port = endpoint.add_secure_port(address, credentials) if credentials else endpoint.add_insecure_port(address)
    endpoint.start()
    yield f"localhost:{port}", proxy
    endpoint.stop(None)
    proxy.channel.close()


@pytest.fixture
def flaky(server: Server) -> Iterator[tuple[str, Flaky]]:
    with proxied(server.url) as pair:
        yield pair


def test_mutual_tls(server: Server, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own, client = authority.issue_cert("localhost"), authority.issue_cert("client.example")
    client.private_key_pem.write_to_path(tmp_path / "key.pem")
    client.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    pair = own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    known = TLS(tmp_path / "ca.pem", tmp_path / "key.pem", tmp_path / "chain.pem")
    with proxied(server.url, credentials) as (url, _):
        with Classifier(url, tls=known) as classifier:
            assert classifier.classify(["好"])
        for stranger in (None, TLS(tmp_path / "ca.pem")):  # without TLS, and without a client certificate
            with Classifier(url, tls=stranger, retries=0) as classifier, pytest.raises(Unavailable):
                classifier.classify(["好"])
    with pytest.raises(InputError, match="no such file"):
        Classifier(url, tls=TLS(tmp_path / "none.pem"))


def test_long_lists_come_back_in_order(classifier: Classifier) -> None:
    together = classifier.classify(TITLES, top_k=2)
    assert len(together) == len(TITLES) > classifier.max_batch == 64
    for i in (0, 63, 64, 200, 449):
        alone = classifier.classify([TITLES[i]], top_k=2)[0]
        assert alone.categories == together[i].categories
        assert alone.confidences == pytest.approx(together[i].confidences, abs=1e-4)
    assert classifier.classify([]) == []


def test_the_asyncio_client(server: Server, classifier: Classifier) -> None:
    async def main() -> None:
        async with AsyncClassifier(server.url, timeout=60) as client:
            answers, one = await asyncio.gather(client.classify(TITLES), client.classify([TITLES[7]]))
            assert [a.category for a in answers] == [a.category for a in classifier.classify(TITLES)]
            assert one[0].category == answers[7].category
            with pytest.raises(InvalidText, match="empty"):
                await client.classify(["好"] * 100 + [""])
            with pytest.raises(InvalidText, match="lone surrogates"):
                await client.classify(["\ud800"])

    asyncio.run(main())


def test_in_a_stream_only_bad_texts_fail(classifier: Classifier) -> None:
    texts: list[Any] = [*TITLES[:100], "", None, b"\xff", "\ud800", *TITLES[100:130]]
    answers = list(classifier.stream(texts))
    assert [i for i, answer in enumerate(answers) if isinstance(answer, Failure)] == [100, 101, 102, 103]
    assert [answer.message for answer in answers if isinstance(answer, Failure)] == [
        "text is empty once cleaned; send at least one visible character",
        "text is missing; send a string",
        "text is not valid UTF-8; encode it as UTF-8",
        "text is not valid Unicode: it holds lone surrogates; remove them",
    ]
    good = [answer.category for answer in answers if not isinstance(answer, Failure)]
    assert good == [answer.category for answer in classifier.classify(TITLES[:130])]


def test_the_asyncio_stream(server: Server, classifier: Classifier) -> None:
    texts: list[Any] = [*TITLES[:100], "", None, b"\xff", "\ud800", *TITLES[100:130]]
    expected = list(classifier.stream(texts, top_k=2))

    async def arriving() -> AsyncIterator[Any]:
        for text in texts:
            yield text

    async def main() -> None:
        async with AsyncClassifier(server.url, timeout=60) as client:
            for each in (texts, iter(texts), arriving()):
                answers = [answer async for answer in client.stream(each, top_k=2)]
                assert [a if isinstance(a, Failure) else a.categories for a in answers] == [
                    a if isinstance(a, Failure) else a.categories for a in expected
                ]
            assert [answer async for answer in client.stream([])] == []

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_stream_reads_only_as_many_texts_as_it_can_hold(server: Server, kind: str) -> None:
    """If the caller stops reading answers, no more texts are read; the texts may be endless."""
    drawn = 0

    def endless() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"苹果 {drawn % 50}斤装"

    if kind == "blocking":
        with Classifier(server.url, timeout=60) as classifier:
            stream = classifier.stream(endless())
            assert all(isinstance(next(stream), Prediction) for _ in range(100))
            stream.close()  # type: ignore[attr-defined]
    else:

        async def main() -> None:
            async with (
                AsyncClassifier(server.url, timeout=60) as client,
                aclosing(client.stream(endless())) as stream,
            ):
                for _ in range(100):
                    assert isinstance(await anext(stream), Prediction)

        asyncio.run(main())
    assert 100 <= drawn <= (IN_FLIGHT + 2) * 64


def test_one_channel_serves_many_calls_at_once(server: Server, classifier: Classifier) -> None:
    """Each of a thousand calls made at once gets its own answer, and ten thousand texts theirs in order."""
    titles = [f"{title} {i}" for i in range(20) for title in TITLES[:50]]
    expected = [answer.category for answer in classifier.classify(titles)]

    async def main() -> None:
        async with AsyncClassifier(server.url, timeout=120) as client:
            answers = await asyncio.gather(*(client.classify([title]) for title in titles))
            assert [answer.category for [answer] in answers] == expected
            many = await client.classify(titles * 10)
            assert [answer.category for answer in many] == expected * 10

    asyncio.run(main())


def test_only_unavailable_is_retried(flaky: tuple[str, Flaky]) -> None:
    url, proxy = flaky
    with Classifier(url) as classifier:
        proxy.failures = [grpc.StatusCode.UNAVAILABLE] * 2
        assert classifier.classify(["好"])
        assert proxy.calls == 3
        for status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED):
            proxy.failures, proxy.calls = [status], 0
            with pytest.raises(ClassifierError, match=f"{status.name}: made to fail"):
                classifier.classify(["好"])
            assert proxy.calls == 1
    with Classifier(url, retries=1) as classifier:
        proxy.failures, proxy.calls = [grpc.StatusCode.UNAVAILABLE] * 9, 0
        with pytest.raises(Unavailable):
            classifier.classify(["好"])
        assert proxy.calls == 2


def test_asyncio_retries_too(flaky: tuple[str, Flaky]) -> None:
    url, proxy = flaky
    proxy.failures = [grpc.StatusCode.UNAVAILABLE] * 2

    async def main() -> None:
        async with AsyncClassifier(url) as client:
            assert await client.classify(["好"])

    asyncio.run(main())
    assert proxy.calls == 3


def test_timeout(flaky: tuple[str, Flaky]) -> None:
    url, proxy = flaky
    proxy.delay = 1.0
    with Classifier(url, timeout=0.2) as classifier, pytest.raises(ClassifierError) as caught:
        classifier.classify(["好"])
    assert caught.value.status == "DEADLINE_EXCEEDED"


def test_no_server() -> None:
    url = f"localhost:{free_ports(1)[0]}"
    with Classifier(url, retries=1) as classifier, pytest.raises(Unavailable):
        classifier.classify(["好"])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "csv.gz"])
def test_files_of_every_kind(classifier: Classifier, tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    rows = [{"id": str(i), "text": text, "category": "the shop's own"} for i, text in enumerate(TITLES[:100])]
    rows[40]["text"] = " "
    rows[41]["text"] = "𠮷𠮷 𠮷𠮷"  # no training text contains such a character
    write_rows(source, lambda: iter(rows), ["id", "text", "category"])
    result = classify_file(classifier, source, out, "text", top_k=2)
    assert (result["rows"], result["errors"], result["resumed_from"]) == (100, 1, 0)
    answers = list(read_rows(out))
    assert [(row["id"], row["text"]) for row in answers] == [(row["id"], row["text"]) for row in rows]
    expected = classifier.classify([row["text"] for row in rows if row["text"].strip()], top_k=2)
    for row, prediction in zip((r for r in answers if not r["error"]), expected, strict=True):
        assert (row["category"], row["category_2"]) == prediction.categories
        assert float(row["confidence"]) == pytest.approx(prediction.confidence, abs=1e-4)
        assert row["source_category"] == "the shop's own"
    assert "empty once cleaned" in answers[40]["error"]
    assert not answers[40]["category"]
    assert answers[41]["warning"] == "the model does not know 100% of this text"
    assert [bool(row["warning"]) for row in answers if not row["error"]] == [each.unknown >= 0.25 for each in expected]
    assert result["warnings"] == sum(bool(row["warning"]) for row in answers)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, out.name])


@pytest.mark.long
def test_a_killed_job_resumes(server: Server, classifier: Classifier, tmp_path: Path) -> None:
    """After kill -9 and a truncated line, every row is in the output once and in order."""
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    write_rows(source, lambda: ({"text": f"苹果 {i}"} for i in range(20_000)), ["text"])
    command = [sys.executable, "-m", "aisle", "classify", str(source), "-o", str(out), "--url", server.url, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (partial.exists() and partial.stat().st_size > 50_000):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with partial.open("ab") as file:
        file.write(b'{"text": "torn')
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert 0 < result["resumed_from"] < 20_000
    assert [row["text"] for row in read_rows(out)] == [f"苹果 {i}" for i in range(20_000)]
    assert not partial.exists()


def test_the_partial_file_of_another_job_is_not_continued(classifier: Classifier, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "苹果"}\n')
    (tmp_path / "out.jsonl.partial").write_text('{"source": "other.jsonl"}\n')
    with pytest.raises(InputError, match="belongs to another job"):
        classify_file(classifier, source, out, "text", top_k=1)


def test_a_refused_job_writes_nothing(classifier: Classifier, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "苹果"}\n')
    for column, out, top_k, complaint in [
        ("title", "out.jsonl", 1, "no column 'title'"),
        ("text", "out.doc", 1, "unknown file format"),
        ("text", "out.jsonl", 10_000, "top_k must be"),
    ]:
        with pytest.raises(InputError, match=complaint):
            classify_file(classifier, source, tmp_path / out, column, top_k)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_in_which_no_row_has_an_answer_is_no_success(server: Server, tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('id,text\n1," "\n2,""\n', "utf-8")
    done = aisle("classify", source, "-o", out, "--url", server.url, "--json")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == f"aisle: no row of {source} has an answer; the column error of {out} says why"
    )
    assert json.loads(done.stdout)["errors"] == 2
    assert all(row["error"] for row in read_rows(out))


def test_an_empty_file(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\n")
    assert classify_file(classifier, tmp_path / "in.csv", tmp_path / "out.csv", "text", top_k=1)["rows"] == 0
    assert (tmp_path / "out.csv").read_text().strip() == "text,category,confidence,decision,decided,warning,error"


def test_a_table_goes_from_standard_input_to_standard_output(server: Server) -> None:
    command = [sys.executable, "-m", "aisle", "classify", "-", "-o", "-", "--url", server.url]
    table = "text,id\n红富士苹果 5斤装,1\n,2\nusb c cable,3\n"
    done = subprocess.run(command, input=table, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["category"]) for row in rows] == [True, False, True]
    assert rows[1]["error"]
