"""The REST front: the same answers, limits, errors and tokens as gRPC; health, log, page and description."""

from __future__ import annotations

import asyncio
import base64
import gzip
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from openapi_spec_validator import validate

from aisle.client import AsyncClassifier, Classifier, Prediction
from aisle.deploy.rest import bodies
from aisle.deploy.rest.access import AccessLog
from aisle.deploy.rest.app import create_app
from aisle.deploy.rest.bodies import LIMIT
from aisle.deploy.rest.errors import Fault
from aisle.deploy.rest.front import Limit, Upstream
from aisle.deploy.rest.models import Answer, Decided
from aisle.errors import InputError

from .conftest import Server, aisle, long_text, wait_for
from .fake import fake_server
from .front import JSON, NDJSON, RunningFront, front
from .gateway import TOKENS, gateway

TEXTS = ["红富士苹果 5斤装", "手机壳 磨砂防摔", "usb c cable 2m", "<b>猫粮</b> 10kg"]
CANARY = "f00dcafe 红富士苹果"  # must not be in a log
CLASSIFY, STREAM = "/v1/classify", "/v1/classify/stream"


@pytest.fixture(scope="module")
def rest(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    with front(server.url, tmp_path_factory.mktemp("rest")) as running:
        yield running


# Answers


def as_json(predictions: list[Prediction], form: type[Answer]) -> Any:
    """Return predictions as REST answers them, without attributes, which must be asked for."""
    names = form.model_fields.keys() - {"attributes"}
    return json.loads(json.dumps([{name: getattr(each, name) for name in names} for each in predictions]))


def test_answers_are_those_of_grpc(rest: RunningFront, server: Server, classifier: Classifier) -> None:
    for texts, top_k in ((TEXTS, 3), (TEXTS * 16, 1), ([42, 1.0], 1), (TEXTS[:1], server.labels)):
        answer = rest.post(CLASSIFY, {"texts": texts, "top_k": top_k})
        assert answer.status == 200, answer.data
        expected = classifier.classify(texts, top_k)  # type: ignore[arg-type]
        assert answer.body == {"predictions": as_json(expected, Answer)}


def test_decisions_are_those_of_grpc(rest: RunningFront, classifier: Classifier) -> None:
    expected = classifier.classify(TEXTS, 2, decisions=True)
    answer = rest.post(CLASSIFY, {"texts": TEXTS, "top_k": 2, "decisions": True})
    assert answer.body == {"predictions": as_json(expected, Decided)}
    lines = "".join(json.dumps(text) + "\n" for text in TEXTS).encode()
    streamed = rest.post(f"{STREAM}?top_k=2&decisions=true", lines, NDJSON)
    assert [json.loads(line) for line in streamed.data.splitlines()] == answer.body["predictions"]


def test_no_texts_have_no_answers(rest: RunningFront) -> None:
    assert rest.post(CLASSIFY, {"texts": []}).body == {"predictions": []}


# Errors

GOOD = json.dumps({"texts": ["apple"]}).encode()


@pytest.mark.parametrize(
    ("body", "headers", "status", "complaint"),
    [
        (b"", JSON, 400, "not JSON"),
        (b"{", JSON, 400, "not JSON"),
        (GOOD + b"x", JSON, 400, "more than one value"),
        (b'{"texts": ["\xff"]}', JSON, 400, "not UTF-8"),
        (GOOD.decode().encode("utf-16"), JSON, 400, "not UTF-8"),
        (b"[" * 100_000, JSON, 400, "nested too deeply"),
        (b'{"texts": ' + b"[" * 200 + b"]" * 200 + b"}", JSON, 400, "nested too deeply"),
        (b'{"texts": ["a"], "texts": ["b"]}', JSON, 400, "occurs twice"),
        (b'{"texts": [' + b"9" * 5000 + b"]}", JSON, 400, "not JSON"),
        (b"[]", JSON, 422, "must be a JSON object"),
        (b"null", JSON, 422, "must be a JSON object"),
        ({}, JSON, 422, "texts: Field required"),
        ({"texts": "apple"}, JSON, 422, "texts: Input should be a valid list"),
        ({"texts": ["apple"], "topk": 3}, JSON, 422, "unknown field; known are: texts, top_k, decisions"),
        ({"texts": ["apple"], "decisions": "yes"}, JSON, 422, "decisions: "),
        ({"texts": ["apple"], "top_k": "3"}, JSON, 422, "top_k: "),
        ({"texts": ["apple"], "top_k": True}, JSON, 422, "top_k: "),
        ({"texts": ["apple"], "top_k": 0}, JSON, 422, "top_k must be one number from 1 to "),
        ({"texts": ["apple"], "top_k": 10_000}, JSON, 422, "top_k must be one number from 1 to "),
        ({"texts": ["apple"], "top_k": 2**40}, JSON, 422, "top_k must be a whole number"),
        ({"texts": ["apple"] * 65}, JSON, 413, "65 texts, over the limit of 64"),
        (GOOD, {}, 415, "application/json"),
        (GOOD, {"Content-Type": "text/plain"}, 415, "application/json"),
        (GOOD, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (GOOD, {"Content-Type": "application/json; charset=gbk"}, 415, "UTF-8"),
        (gzip.compress(GOOD, mtime=0), {**JSON, "Content-Encoding": "gzip"}, 415, "uncompressed"),
    ],
)
def test_a_bad_body_is_refused(
    rest: RunningFront, body: Any, headers: dict[str, str], status: int, complaint: str
) -> None:
    answer = rest.post(CLASSIFY, body, headers)
    assert answer.status == status, answer.data
    assert complaint in answer.body["error"]
    assert answer.body["error_type"] == "Validation"
    assert "row" not in answer.body


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "text is missing"),
        (True, "text is true or false"),
        (["a"], "text is a list"),
        ({"a": 1}, "text is an object"),
        (float("nan"), "text is missing"),
        (float("inf"), "text is inf"),
        ("", "empty once cleaned"),
        ("<p> </p>", "empty once cleaned"),
        ("\ud800", "lone surrogates"),
        ("长" * 11_000, "over the limit of 32768"),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_a_bad_text_is_named_by_its_row(rest: RunningFront, text: Any, complaint: str, before: int) -> None:
    """The same rule for values as in files and in the client."""
    answer = rest.post(CLASSIFY, {"texts": ["apple"] * before + [text] + ["pear"] * before})
    assert (answer.status, answer.body["row"]) == (422, before)
    assert complaint in answer.body["error"]


def test_json_in_other_spellings_is_read(rest: RunningFront) -> None:
    for body in (b"\xef\xbb\xbf" + GOOD, b"\n " + GOOD + b"\r\n", json.dumps({"texts": ["\U0001f34e 苹果"]}).encode()):
        assert rest.post(CLASSIFY, body, {"Content-Type": "Application/JSON; charset=UTF-8"}).status == 200


def test_the_largest_texts_fit(rest: RunningFront) -> None:
    assert rest.post(CLASSIFY, {"texts": ["长" * 10_922] * 64}).status == 200  # escaped: 4.2 MB


def test_a_huge_upload_is_refused_unread(rest: RunningFront) -> None:
    """By its announced length, before any of it is sent; or once it is too long."""
    head = "POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", rest.port), timeout=120) as connection:
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", rest.port), timeout=120) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        parts = iter([b"10000\r\n" + b" " * 65536 + b"\r\n"] * (100 * LIMIT // 65536))
        with suppress(OSError):  # the front has closed the connection
            for part in parts:
                connection.sendall(part)
        assert len([*parts]) > 10 * LIMIT // 65536
    assert rest.post(CLASSIFY, GOOD).status == 200


def test_unknown_paths_methods_and_parameters(rest: RunningFront) -> None:
    answer = rest.ask("GET", "/v1/nothing")
    assert (answer.status, answer.body["error"]) == (404, "Not Found")
    answer = rest.ask("GET", CLASSIFY)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    for path, known in ((CLASSIFY + "?top_k=3", "none here"), (STREAM + "?topk=3", "known are: top_k")):
        answer = rest.post(path, GOOD, JSON if path.startswith(CLASSIFY + "?") else NDJSON)
        assert answer.status == 422
        assert known in answer.body["error"]


def test_a_server_that_is_down_is_told_at_once(tmp_path: Path, unused: str) -> None:
    with front(unused, tmp_path) as rest:
        for path, headers in ((CLASSIFY, JSON), (STREAM, NDJSON)):
            answer = rest.post(path, GOOD, headers)
            assert (answer.status, answer.body["error_type"]) == (503, "Unhealthy")
            assert answer.headers["retry-after"] == "1"
            assert unused not in answer.body["error"]  # callers are not told the server's address
        assert rest.post("/predict", {"inputs": "apple"}).status == 503
        assert [rest.ask("GET", path).status for path in ("/v1/health", "/health", "/info")] == [503] * 3
        assert rest.ask("GET", "/v1/health/live").body == {"status": "live", "version": None}
        assert any(unused in row["why"] for row in rest.logged() if row["status"] == 503)


@pytest.fixture
def unused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"127.0.0.1:{closed.getsockname()[1]}"


def test_a_server_that_is_slow_is_a_timeout(server: Server, tmp_path: Path) -> None:
    with front(server.url, tmp_path, "--timeout", 0.5) as rest, server.held():
        answer = rest.post(CLASSIFY, {"texts": [long_text(20_000)]})
        assert (answer.status, answer.body["error"]) == (504, "the server did not answer in time")


def test_a_full_queue_is_too_many_requests(short: Server, tmp_path: Path) -> None:
    with front(short.url, tmp_path, "--timeout", 60) as rest, ThreadPoolExecutor(32) as pool:

        def ask(number: int) -> int:
            answer = rest.post(CLASSIFY, {"texts": [long_text(21_000 + 64 * number + row) for row in range(64)]})
            assert answer.status == 200 or answer.headers["retry-after"] == "1"
            return answer.status

        with short.held():
            calls = [pool.submit(ask, number) for number in range(32)]
            wait_for(lambda: sum(call.done() for call in calls) >= 24)
            health = rest.ask("GET", "/v1/health")
        assert {call.result() for call in calls} == {200, 429}
        assert (health.status, health.body) == (200, {"status": "ready", "version": None})  # busy, but well


def test_no_more_than_the_limit_is_in_flight() -> None:
    limit = Limit(1, "1 requests")
    with limit.one(), pytest.raises(Fault, match="in flight already") as caught, limit.one():
        pass
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    with limit.one():
        pass


def test_a_bug_is_answered_and_logged_without_a_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise KeyError(CANARY)

    monkeypatch.setattr(AsyncClassifier, "classify", broken)
    with fake_server() as fake, caplog.at_level("INFO", "aisle.rest"):
        status, body = asyncio.run(in_process(fake.url, GOOD))
    assert (status, body["error_type"]) == (500, "Backend")
    assert "KeyError (test_rest.py:" in json.loads(caplog.messages[-1])["why"]
    assert "f00dcafe" not in caplog.text


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SECONDS", 0.2)
    with fake_server() as fake:
        status, body = asyncio.run(in_process(fake.url, None))
    assert (status, "did not arrive" in body["error"]) == (408, True)


# Health, log, signals


def test_health(rest: RunningFront) -> None:
    answer = rest.ask("GET", "/v1/health")
    assert (answer.status, answer.body) == (200, {"status": "ready", "version": 1})
    assert rest.ask("GET", "/v1/health/live").status == 200


def test_the_log_has_each_request_but_no_text(server: Server, tmp_path: Path) -> None:
    with front(server.url, tmp_path) as rest:
        rest.post(CLASSIFY, {"texts": [CANARY]})
        rest.post(CLASSIFY, {"texts": [CANARY, " "], CANARY: 1})
        rest.post(f"/{CANARY.split()[0]}?q=f00dcafe", {"texts": [CANARY]})
        rest.post(STREAM, f'"{CANARY}"\n{{{CANARY}\n'.encode(), NDJSON)
        rows = wait_for(lambda: len(found := rest.logged()) == 4 and found)
        assert [(row["call"], row["status"]) for row in rows] == [
            ("POST /v1/classify", 200),
            ("POST /v1/classify", 422),
            ("POST -", 404),
            ("POST /v1/classify/stream", 200),
        ]
        assert all(row["bytes_out"] > 0 and row["milliseconds"] > 0 for row in rows)
        assert "f00dcafe" not in rest.log.read_text()


def test_a_stop_completes_what_is_in_flight(server: Server, tmp_path: Path) -> None:
    with front(server.url, tmp_path) as rest, ThreadPoolExecutor(1) as pool:
        before = server.tokenized()
        with server.held():
            call = pool.submit(rest.post, CLASSIFY, {"texts": [long_text(20_001)]})
            server.wait_for_texts(before + 1)
            rest.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not _connects(rest.port))
            assert not call.done()
        assert call.result().status == 200
        assert rest.process.wait(60) == 0
        assert "Traceback" not in rest.log.read_text()


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=30).close()
    except OSError:
        return False
    return True


def test_several_workers_over_https(server: Server, tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    own.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    own.private_key_pem.write_to_path(tmp_path / "tls.key")
    options = ("--workers", 2, "--tls-cert", tmp_path / "tls.crt", "--tls-key", tmp_path / "tls.key")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with front(server.url, tmp_path, *options) as rest:
        connection = http.client.HTTPSConnection("localhost", rest.port, timeout=120, context=trusting)
        connection.request("POST", CLASSIFY, GOOD, JSON)
        assert connection.getresponse().status == 200
        connection.close()
    assert rest.process.returncode == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--url", "http://localhost:8001"), "a gRPC address has no http://"),
        (("--host", " "), "--host is empty"),
        (("--tls-cert", "pyproject.toml"), "both --tls-cert and --tls-key"),
        (("--tls-cert", "pyproject.toml", "--tls-key", "pyproject.toml"), "pyproject.toml"),
        (("--port", "{port}"), "choose another --host or --port"),
        (("--host", "nowhere.invalid"), "choose another --host or --port"),
    ],
)
def test_bad_options_are_one_line(rest: RunningFront, options: tuple[str, ...], complaint: str) -> None:
    done = aisle("rest", *(each.format(port=rest.port) for each in options))
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Tokens


def basic(token: str) -> dict[str, str]:
    return {**JSON, "Authorization": "Basic " + base64.b64encode(token.encode()).decode()}


def test_callers_of_a_gateway_bring_their_own_tokens(server: Server, tmp_path: Path) -> None:
    with gateway(tmp_path / "envoy", [int(server.url.partition(":")[2])], refill="3600s") as entry:
        env = {"AISLE_TLS_CA": str(entry.tls.root_certificates), "AISLE_TOKEN": TOKENS["catalogue"]}
        with front(entry.url, tmp_path, env=env) as rest:
            body = {"texts": [CANARY]}
            assert rest.ask("GET", "/v1/health").body == {"status": "ready", "version": 1}
            for headers in (basic(TOKENS["search"]), {**JSON, "Authorization": f"Bearer {TOKENS['search']}"}):
                assert rest.post(CLASSIFY, body, headers).status == 200
                assert rest.post("/predict", {"inputs": CANARY}, headers).status == 200
                assert len(rest.post(STREAM, b'"a"\n"b"\n', {**headers, **NDJSON}).data.splitlines()) == 2
            strangers = ["search:guessed", "nobody:" + TOKENS["search"].partition(":")[2]]
            refused = [basic(each) for each in strangers]
            refused += [JSON, {**JSON, "Authorization": "Basic !"}, {**JSON, "Authorization": "Digest x"}]
            for headers in refused:  # the front's own token is not for callers
                answer = rest.post(CLASSIFY, body, headers)
                assert (answer.status, answer.body["error_type"]) == (401, "Unauthorized")
                assert answer.headers["www-authenticate"].startswith("Basic ")
                assert rest.post(STREAM, b'"a"\n', {**headers, **NDJSON}).status == 401

            flood = [rest.post(CLASSIFY, body, basic(TOKENS["greedy"])) for _ in range(401)]
            assert {each.status for each in flood} == {200, 429}
            assert flood[-1].headers["retry-after"] == "1"
            assert rest.post(CLASSIFY, body, basic(TOKENS["search"])).status == 200  # each client has its own limit

            names = {row["client"] for row in rest.logged()}
            assert names == {None, "search", "greedy"}
            told = rest.log.read_text() + entry.log
            assert not any(secret in told for secret in ("f00dcafe", *(t.partition(":")[2] for t in TOKENS.values())))
        with front(entry.url, tmp_path, env={**env, "AISLE_TOKEN": ""}) as rest:
            answer = rest.ask("GET", "/v1/health")
            assert (answer.status, "AISLE_TOKEN" in answer.body["error"]) == (503, True)


def test_a_token_is_not_sent_without_tls() -> None:
    with pytest.raises(InputError, match="only over TLS"):
        AsyncClassifier("localhost:1").with_token("a:b")


# Traces


def test_the_callers_trace_is_continued() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with fake_server() as fake:
        seen: list[str] = []
        fake.behave = lambda method, context: seen.extend(
            value for name, value in context.invocation_metadata() if name == "traceparent" and method == "ModelInfer"
        )
        assert asyncio.run(in_process(fake.url, GOOD, (b"traceparent", parent.encode())))[0] == 200
        assert [each.split("-")[1] for each in seen] == [parent.split("-")[1]]


async def in_process(url: str, body: bytes | None, *headers: tuple[bytes, bytes]) -> tuple[int, Any]:
    """Send one request to an application in this process; None for a body that never arrives."""
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    app = create_app(Upstream(url))
    scope = {"type": "http", "method": "POST", "path": CLASSIFY, "query_string": b"", "http_version": "1.1"}
    async with app.router.lifespan_context(app):
        await AccessLog(app)({**scope, "headers": [(b"content-type", b"application/json"), *headers]}, receive, send)
    return messages[0]["status"], json.loads(messages[1]["body"])


# The description


def test_the_description_is_valid_and_has_an_example_that_works(rest: RunningFront) -> None:
    description = rest.ask("GET", "/openapi.json").body
    validate(description)
    content = description["paths"][CLASSIFY]["post"]["requestBody"]["content"]["application/json"]
    assert rest.post(CLASSIFY, content["schema"]["example"]).status == 200
    assert set(description["paths"]) == {
        CLASSIFY, STREAM, "/v1/health", "/v1/health/live", "/predict", "/", "/health", "/info",
    }  # fmt: skip


def test_the_page_loads_nothing_from_elsewhere(rest: RunningFront) -> None:
    page = rest.ask("GET", "/docs")
    html = page.data.decode()
    assert page.status == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", html)
    assert '"validatorUrl": null' in html
    loaded = re.findall(r"""(?:src|href)=["'](?!data:)([^"']+)""", html) + re.findall(r"url: '([^']+)'", html)
    assert len(loaded) == 3  # script, style and description
    for path in loaded:
        found = rest.ask("GET", f"/{path}")
        assert (found.status, len(found.data) > 1000) == (200, True)
    style = rest.ask("GET", "/docs/assets/swagger-ui.css").data.decode()
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style)


@pytest.mark.long
def test_schemathesis_finds_nothing(rest: RunningFront, tmp_path: Path) -> None:
    """Requests that fit the description and requests that do not, of every route, with all checks."""
    settings = Path(__file__).with_name("schemathesis.toml")
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(settings), "run"]
    command += [f"{rest.url}/openapi.json", "--seed", "1", "--max-examples", "60", "--no-color"]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout
