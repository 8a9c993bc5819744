"""NDJSON through the REST front: one line in, one line out, in order, in constant memory, and no longer than needed."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from starlette.requests import ClientDisconnect

from aisle.client import Classifier, Failure
from aisle.client.protocol import IN_FLIGHT
from aisle.deploy.rest import ndjson
from aisle.deploy.rest.app import create_app
from aisle.deploy.rest.front import STREAMS, Upstream
from aisle.deploy.rest.ndjson import FLUSH, LONGEST, Lines

from .conftest import Server, long_text, wait_for
from .fake import Fake, fake_server
from .front import NDJSON, RunningFront, front
from .test_rest import STREAM, TEXTS

BATCH = 64


@pytest.fixture(scope="module")
def rest(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    with front(server.url, tmp_path_factory.mktemp("rest")) as running:
        yield running


def lines_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_a_file_of_20_000_lines(rest: RunningFront, classifier: Classifier) -> None:
    """Sent in parts of odd sizes, while the answers are read; every hundredth line is bad."""
    texts = [None if i % 100 == 99 else f"{TEXTS[i % 4]} {i % 500}" for i in range(20_000)]
    data = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in texts).encode()

    async def parts() -> AsyncIterator[bytes]:
        sizes, at = itertools.cycle([1, 700, 65_536, 3]), 0
        while at < len(data):
            size = next(sizes)
            yield data[at : at + size]
            at += size

    async def run() -> bytes:
        async with aiohttp.ClientSession() as session:
            url = f"{rest.url}{STREAM}?top_k=2"
            async with session.post(url, data=parts(), headers=NDJSON) as answer:
                assert (answer.status, answer.content_type) == (200, NDJSON["Content-Type"])
                return await answer.read()

    for line, expected in zip(lines_of(asyncio.run(run())), classifier.stream(texts, 2), strict=True):
        if isinstance(expected, Failure):
            assert line == {"error": expected.message, "error_type": "Validation"}
        else:
            assert line["categories"] == [*expected.categories]
            assert line["confidences"] == pytest.approx(expected.confidences, abs=1e-5)  # batches round differently
            assert line["version"] == expected.version


def test_a_bad_line_has_an_error_and_spoils_nothing(rest: RunningFront) -> None:
    lines = {
        b'"apple"': "",
        b'{"id": 7, "text": "apple"}': "",
        b" 42 \r": "",
        b'{"id": 7}': "text is missing",
        b"null": "text is missing",
        b'["apple"]': "text is a list",
        b"true": "text is true or false",
        b'""': "empty once cleaned",
        b"": "the line is empty",
        b"apple": "not JSON",
        b'"apple" "pear"': "more than one value",
        b'{"text": "a", "text": "b"}': "occurs twice",
        b"[" * 5000: "nested too deeply",
        b'"\xff"': "not UTF-8",
        b'"\\ud800"': "lone surrogates",
        b'"%s"' % (b"a" * 40_000): "over the limit of 32768",
        b'"%s"' % (b"a" * LONGEST): f"over {LONGEST} bytes",
        b'"%s"' % (b"a" * 3_000_000): f"over {LONGEST} bytes",
        b'"pear"': "",
    }
    answer = rest.post(STREAM, b"\n".join(lines), NDJSON)
    for found, (line, complaint) in zip(lines_of(answer.data), lines.items(), strict=True):
        assert complaint in found["error"] if complaint else found["categories"], line[:50]


def test_the_end_of_the_last_line_is_optional(rest: RunningFront) -> None:
    counts = {b"": 0, b"\n": 1, b'"a"': 1, b'"a"\n': 1, b'"a"\n\n': 2, b'\n"a"': 2}
    assert {body: len(lines_of(rest.post(STREAM, body, NDJSON).data)) for body in counts} == counts


@pytest.mark.parametrize(
    "query",
    [f"top_k={each}" for each in ("x", "1.0", "", "0", "9999", "99999999999", "1&top_k=2")]
    + [f"decisions={each}" for each in ("", "yes", "1", "true&decisions=false")],
)
def test_the_query_is_checked_before_the_first_line(rest: RunningFront, query: str) -> None:
    answer = rest.post(f"{STREAM}?{query}", b'"a"\n', NDJSON)
    assert (answer.status, answer.body["error_type"]) == (422, "Validation")


def test_only_ndjson_is_read(rest: RunningFront) -> None:
    assert rest.post(STREAM, b'"a"\n', {"Content-Type": "text/plain"}).status == 415
    assert rest.post(STREAM, b'"a"\n', {**NDJSON, "Content-Encoding": "gzip"}).status == 415


def test_a_server_that_fails_midway_leaves_the_answer_incomplete(tmp_path: Path) -> None:
    """The caller sees an error, and cannot take what it has for everything."""
    with fake_server() as fake, front(fake.url, tmp_path) as rest:
        fake.behave = fail_after(fake, 3)
        with pytest.raises(http.client.IncompleteRead) as caught:
            rest.post(STREAM, b'"apple"\n' * 6400, NDJSON)
        *answers, last = lines_of(caught.value.partial)
        assert all("categories" in each for each in answers)
        assert last == {"error": "the server failed", "error_type": "Backend", "status": 502}
        assert wait_for(rest.logged)[-1]["why"] == "INTERNAL: broken"


def fail_after(fake: Fake, calls: int) -> Callable[[str, Any], None]:
    def behave(method: str, context: Any) -> None:
        if fake.calls.count("ModelInfer") > calls and method == "ModelInfer":
            context.abort(grpc.StatusCode.INTERNAL, "broken")

    return behave


class Caller:
    """A caller of the application in this process. It sends lines while `sends`, and reads answers while `reads`."""

    def __init__(self, url: str) -> None:
        self.sent, self.limit, self.stalls_at = 0, 10**9, -1
        self.complete = False
        self.answers: list[bytes] = []
        self.reads, self.leaves = asyncio.Event(), asyncio.Event()
        self._app = create_app(Upstream(url, 60))

    async def call(self) -> None:
        scope = {"type": "http", "method": "POST", "path": STREAM, "query_string": b"", "http_version": "1.1"}
        await self._app({**scope, "headers": [(b"content-type", b"application/x-ndjson")]}, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.leaves.is_set():
            return {"type": "http.disconnect"}
        if self.sent in (self.limit, self.stalls_at):
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        self.sent += 1
        text = json.dumps(long_text(100_000 + self.sent)).encode() + b"\n"
        return {"type": "http.request", "body": text, "more_body": self.sent < self.limit}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.answers += message["body"].splitlines()
            self.complete = not message["more_body"]
            await self.reads.wait()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_caller_that_reads_nothing_is_not_read_from() -> None:
    async def run() -> int:
        with fake_server() as fake:
            caller = Caller(fake.url)
            task = asyncio.create_task(caller.call())
            await until(lambda: caller.answers)
            await asyncio.sleep(0.5)
            sent = caller.sent
            caller.leaves.set()
            caller.reads.set()
            with pytest.raises(ClientDisconnect):
                await task
            return sent

    assert BATCH <= asyncio.run(run()) <= (IN_FLIGHT + 1) * BATCH + FLUSH


def test_a_caller_that_leaves_before_its_answers_ends_the_work(server: Server, classifier: Classifier) -> None:
    """The requests under way are cancelled, although the server does not answer them."""
    classifier.probe()  # from now on in the server's cache, which answers while the engine is held

    async def run() -> None:
        caller = Caller(server.url)
        caller.reads.set()
        caller.limit = 3 * BATCH
        with server.held():
            task = asyncio.create_task(caller.call())
            await until(lambda: caller.sent == caller.limit)
            caller.leaves.set()
            with pytest.raises(ClientDisconnect):
                await asyncio.wait_for(task, 60)
            assert not caller.answers

    asyncio.run(run())


def test_a_caller_that_leaves_while_it_sends_ends_the_work(server: Server) -> None:
    async def run() -> None:
        caller = Caller(server.url)
        caller.reads.set()
        task = asyncio.create_task(caller.call())
        await until(lambda: caller.answers)
        before = len(caller.answers)
        caller.leaves.set()
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(task, 60)
        assert len(caller.answers) <= before + (IN_FLIGHT + 1) * BATCH

    asyncio.run(run())


def test_a_caller_that_sends_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has arrived is not answered as if it were everything."""
    monkeypatch.setattr(ndjson, "SECONDS", 0.2)

    async def run() -> Caller:
        with fake_server() as fake:
            caller = Caller(fake.url)
            caller.reads.set()
            caller.stalls_at = 10
            await asyncio.wait_for(caller.call(), 60)
            return caller

    caller = asyncio.run(run())
    assert (caller.sent, caller.answers, caller.complete) == (10, [], False)


def test_streams_over_the_limit_are_refused(rest: RunningFront) -> None:
    async def run() -> list[int]:
        go = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b'"apple"\n'
            await go.wait()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one() -> int:
                async with session.post(rest.url + STREAM, data=body(), headers=NDJSON) as answer:
                    if answer.status == 200:
                        assert len(lines_of(await answer.read())) == 1
                    return answer.status

            tasks = [asyncio.create_task(one()) for _ in range(STREAMS + 1)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # the refused one
            go.set()
            return await asyncio.gather(*tasks)

    statuses = asyncio.run(run())
    assert sorted(statuses) == [200] * STREAMS + [429]


def test_long_lines_are_not_kept() -> None:
    """However many parts a line comes in."""
    parts = [b'"' + b"a" * 1000] + [b"a" * 1000] * 1000 + [b'"\n"x"']

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def run() -> tuple[list[Any], Lines]:
        lines = Lines(receive)
        return [each async for each in lines], lines

    values, lines = asyncio.run(run())
    assert values == [None, "x"]
    assert [*lines.faults] == [0]
