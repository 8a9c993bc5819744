"""Streams: each message is answered exactly once and in order, whoever is killed, cut off or overloaded."""

from __future__ import annotations

import io
import json
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fastavro
import pytest
import trustme
from confluent_kafka import KafkaError
from confluent_kafka import Message as KafkaMessage

from aisle.client import Classifier, ClassifierError, Failure, InvalidText, Prediction
from aisle.client.wire import Models
from aisle.deploy.server.triton import free_ports
from aisle.deploy.stream import kafka
from aisle.deploy.stream.asking import TRIES, Asker
from aisle.deploy.stream.figures import DESCRIPTIONS, Figures
from aisle.deploy.stream.formats import reader_of
from aisle.deploy.stream.paths import check_fields, parse_all
from aisle.deploy.stream.settings import KafkaOptions, read_properties, split_registry
from aisle.deploy.stream.stream import Route, outputs_of
from aisle.deploy.stream.transport import Message
from aisle.deploy.stream.worker import StreamOptions, classify_topic
from aisle.errors import InputError, ServerError

from .brokers import Broker, Mock, Proxy, Topics, mock_cluster
from .conftest import Server, aisle, series, wait_for
from .fake import fake_server

READ_JSON, READ_DEBEZIUM = (reader_of(name, {}, "in") for name in ("json", "debezium"))
FAST = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 500, "socket.timeout.ms": 4000}  # so that tests wait less

SMALL_MESSAGES = {"message.max.bytes": 2000}


def options_for(broker: Topics | Proxy, url: str, name: str = "w1", topic: str = "in", **more: Any) -> StreamOptions:
    properties = {"bootstrap.servers": broker.address, **FAST, **more.pop("properties", {})}
    topics = KafkaOptions(topic, f"{topic}.out", f"{topic}.dead", topic, name, properties)
    return replace(StreamOptions(topics, ["$.text"], url=url, metrics=("127.0.0.1", free_ports(1)[0])), **more)


@contextmanager
def streaming(options: StreamOptions) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run a worker in a thread; yield what stops it and returns its counts."""
    stopping = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(classify_topic, options, stopping)

        def stop() -> dict[str, Any]:
            stopping.set()
            return worker.result(60)

        try:
            yield stop
        finally:
            stopping.set()


def sources(messages: list[KafkaMessage]) -> list[str]:
    """Return which message each one answers: topic/partition/offset."""
    return [header(each, "aisle.source") for each in messages]


def header(message: KafkaMessage, name: str) -> str:
    found: Any = dict(message.headers() or ())
    return str(found[name].decode())


def assert_once_and_in_order(messages: list[KafkaMessage], number: int) -> None:
    """Check that so many messages are answered once, and those of a key in their order."""
    found = sources(messages)
    assert len(found) == len({*found}) == number
    last: dict[Any, int] = {}
    for message, source in zip(messages, found, strict=True):
        offset = int(source.rpartition("/")[2])
        assert offset > last.get(message.key(), -1)
        last[message.key()] = offset


def product(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


# What is read of a message


@pytest.mark.parametrize(
    ("paths", "message", "text"),
    [
        (["$.product.title"], {"product": {"title": "apple"}}, "apple"),
        (["$['product name'][1]"], {"product name": ["a", "b"]}, "b"),
        (['$["标题"]'], {"标题": "苹果"}, "苹果"),
        (["$"], "apple", "apple"),
        (
            ["$.标题", "brand=$.maker.name"],
            {"标题": "苹果", "maker": {"name": "佳沃"}},
            {"标题": "苹果", "brand": "佳沃"},
        ),
        (["$.title", "$.brand"], {"title": "apple"}, {"title": "apple"}),
        (["$.title"], {"title": None}, Failure("the message has no text at $.title")),
        (["$.titles[2]"], {"titles": ["a"]}, Failure("the message has no text at $.titles[2]")),
        (["$.a.b"], {"a": "x"}, Failure("the message has no text at $.a.b")),
        (["$.a", "$.b"], [], Failure("the message has no text at $.a, $.b")),
    ],
)
def test_texts_are_found_by_their_paths(paths: list[str], message: object, text: object) -> None:
    assert READ_JSON(parse_all(paths), json.dumps(message).encode()) == text


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "open", "not UTF-8", "deep"])
def test_what_is_not_json_is_a_failure(raw: bytes) -> None:
    assert READ_JSON(parse_all(["$.text"]), raw) == Failure("the message is not JSON")


@pytest.mark.parametrize("paths", [["title"], ["$title"], ["$.a..b"], ["$.a[*]"], ["$.a[-1]"], [""], ["$.a", "$.b.a"]])
def test_a_wrong_path_is_refused(paths: list[str]) -> None:
    with pytest.raises(InputError, match="--text"):
        parse_all(paths)


def test_paths_lead_to_the_fields_of_the_model() -> None:
    two = parse_all(["$.title", "brand=$.maker"])
    for fields in (["title", "brand"], None):
        check_fields(two, fields)
    check_fields(two[:1], ["title", "brand"])
    for fields, complaint in (([], "give one path"), (["title", "origin"], "origin=")):
        with pytest.raises(InputError, match=complaint):
            check_fields(two, fields)


def test_events_of_debezium() -> None:
    paths = parse_all(["$.title"])
    row = {"before": None, "after": {"title": "apple"}, "op": "u"}
    for event in (row, {"schema": {}, "payload": row}):
        assert READ_DEBEZIUM(paths, json.dumps(event).encode()) == "apple"
    delete = {"before": {"title": "apple"}, "after": None, "op": "d"}
    assert READ_DEBEZIUM(paths, json.dumps(delete).encode()) is None
    assert READ_DEBEZIUM(paths, None) is None
    assert "change event" in READ_DEBEZIUM(paths, b'{"title": "apple"}').message
    assert "no text" in READ_DEBEZIUM(paths, b'{"op": "c", "after": {}}').message


# The file of settings


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("# SASL\nbootstrap.servers = a:1\n\nsasl.password=x=y \n", "utf-8")
    assert read_properties(file, None) == {"bootstrap.servers": "a:1", "sasl.password": "x=y"}
    assert read_properties(file, "b:2")["bootstrap.servers"] == "b:2"
    assert read_properties(None, None) == {"bootstrap.servers": "localhost:9092"}
    for line, complaint in (("geheim4711", "line 1 is not"), ("isolation.level=geheim4711", "remove isolation.level")):
        file.write_text(line, "utf-8")
        with pytest.raises(InputError, match=complaint) as error:
            read_properties(file, None)
        assert "geheim4711" not in str(error.value)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_properties(file, None)


# Bad input


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with mock_cluster() as cluster:
        for topic in ("in", "in.out", "in.dead"):
            cluster.create(topic)
        yield cluster


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing", "in.out"], "has no topic nothing; create it"),
        (["in", "in"], "three different topics"),
        (["in", "in.out", "--text", "title"], "--text title: give the text's path"),
        (["in", "in.out", "--brokers", "127.0.0.1:1"], "no broker answers at 127.0.0.1:1"),
        (["in", "in.out", "--format", "protobuf"], "choose from json, avro, debezium, debezium-avro"),
        (["in", "in.out", "--text", "$.a", "--text", "$.b"], "give one path"),
        (["in", "in.out", "--config", "wrong.properties"], "No such configuration property"),
    ],
)
def test_bad_input_is_one_line(
    mock: Mock, arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "START_SECONDS", 2)
    monkeypatch.chdir(tmp_path)
    Path("wrong.properties").write_text("sasl.pasword=x\n", "utf-8")
    text = [] if "--text" in arguments else ["--text", "$.text"]
    brokers = [] if "--brokers" in arguments else ["--brokers", mock.address]
    with fake_server() as server:
        done = aisle("stream", *arguments, *text, *brokers, "--dead-letters", "in.dead", "--url", server.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_rights_are_one_line(mock: Mock) -> None:
    mock.fail(22, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
    with fake_server() as server:
        done = aisle(
            "stream", "in", "in.out", "--text", "$.text", "--dead-letters", "in.dead", *access(mock, server.url)
        )
    assert done.returncode == 2
    assert "authorization failed; give this client the right" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def access(broker: Topics | Proxy, url: str) -> list[str]:
    return ["--brokers", broker.address, "--url", url, "--metrics-port", str(free_ports(1)[0])]


def test_a_name_that_is_taken_ends_the_worker(mock: Mock) -> None:
    mock.fail(11, KafkaError.FENCED_INSTANCE_ID)
    with fake_server() as server:
        done = aisle(
            "stream", "in", "in.out", "--text", "$.text", "--dead-letters", "in.dead", *access(mock, server.url)
        )
    assert done.returncode == 1
    assert "give each its own --instance" in done.stderr


# A server that fails


class Transport:
    """Counts the pauses; a stream's other needs are not met."""

    def __init__(self) -> None:
        self.pauses = 0

    def poll(self) -> None: ...

    def pause(self, seconds: float) -> None:
        self.pauses += 1


class Failing:
    """A classifier whose engine fails for one text, and whose model loses its decisions."""

    def __init__(self, bad: str = "", status: str = "INTERNAL") -> None:
        self.bad, self.status, self.decide, self.version = bad, status, False, 1

    def stream(self, texts: list[str], *, decisions: bool) -> Iterator[Prediction]:
        if decisions and not self.decide:
            raise InvalidText("this version has no decisions")
        if self.bad in texts:
            raise ClassifierError(self.status, "no finite logits")
        for text in texts:
            yield Prediction((text,), (0.5,), self.version, decision="accept" if decisions else None)

    def models(self) -> Models:
        return Models({}, self.decide, multi_label=self.version > 2)

    def probe(self, *, bulk: bool) -> None: ...


def asker(classifier: Any, transport: Any) -> Asker:
    return Asker(classifier, transport, Figures(), threading.Event())


def test_a_text_that_breaks_the_server_is_a_failure_and_the_others_are_answered() -> None:
    texts = [f"text {number}" for number in range(100)]
    transport = Transport()
    answers = asker(Failing("text 40"), transport).ask(texts)
    assert [each.category if isinstance(each, Prediction) else each for each in answers] == [
        *texts[:40],
        Failure("INTERNAL: no finite logits"),
        *texts[41:],
    ]
    assert transport.pauses == TRIES - 1


def test_a_server_that_does_not_allow_requests_ends_the_stream() -> None:
    with pytest.raises(ClassifierError):
        asker(Failing("text", "UNAUTHENTICATED"), Transport()).ask(["text"])


def test_decisions_come_and_go_with_the_model() -> None:
    classifier = Failing("-")
    ask = asker(classifier, Transport()).ask

    def decisions() -> list[str | None]:
        return [each.decision for each in ask(["a"]) if isinstance(each, Prediction)]

    assert decisions() == [None]
    classifier.decide, classifier.version = True, 2
    assert decisions() == [None]  # the answer tells that another version is live
    assert decisions() == ["accept"]
    classifier.decide = False
    assert decisions() == [None]


def test_a_multi_label_model_gives_lists() -> None:
    classifier = Failing("-")
    asking = asker(classifier, Transport())
    messages = [Message(None, b'{"text": "a"}', (), "in", 0, 0)]
    route = Route(READ_JSON, parse_all(["$.text"]), "out", "dead")

    def value() -> Any:
        (output,) = outputs_of(messages, ["a"], asking.ask(["a"]), route, asking)
        return json.loads(output.value or b"")

    assert value() == {"category": "a", "confidence": 0.5, "version": 1}
    classifier.version = 3  # after a rollout
    assert value() == {"categories": ["a"], "confidences": [0.5], "version": 3}


# The answers


def test_a_topic_is_classified_until_a_signal(mock: Mock, server: Server, classifier: Classifier) -> None:
    """The whole command: answers, dead letters, tombstones, metrics, and one object at the end."""
    for topic in ("plain", "plain.out", "plain.dead"):
        mock.create(topic)
    texts = [f"usb c cable {number}m" for number in range(100)]
    bad = [(b"bad", b"no JSON"), (b"bad", b'{"text": ""}'), (b"bad", b'{"text": {"a": 1}}'), (b"gone", None)]
    mock.write("plain", [*((f"k{i}".encode(), product(text)) for i, text in enumerate(texts)), *bad])
    options = [*access(mock, server.url), "--dead-letters", "plain.dead", "--json"]
    command = [sys.executable, "-m", "aisle", "stream", "plain", "plain.out", "--text", "$.text", *map(str, options)]
    seen: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
        try:
            seen["out"], seen["dead"] = mock.read("plain.out", 101), mock.read("plain.dead", 3)
            seen["metrics"] = series(f"127.0.0.1:{options[5]}")
        finally:
            worker.send_signal(signal.SIGTERM)
            out, err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    counts = json.loads(out)
    assert [counts[name] for name in ("messages", "classified", "passed_on", "dead_letters")] == [104, 100, 1, 3]
    answers = {each.key(): each.value() for each in seen["out"]}
    assert answers.pop(b"gone") is None
    for number, expected in enumerate(classifier.classify(texts, decisions=True)):
        answer = json.loads(answers[f"k{number}".encode()])
        assert (answer["category"], answer["version"]) == (expected.category, expected.version)
        assert answer["confidence"] == pytest.approx(expected.confidence, abs=1e-4)
        assert answer["decision"] == expected.decision
    reasons = [header(each, "aisle.reason") for each in seen["dead"]]
    assert [each.value() for each in seen["dead"]] == [value for _, value in bad[:3]]
    assert "not JSON" in reasons[0]
    assert "empty" in reasons[1]
    names = {name.partition("{")[0] for name in seen["metrics"]}
    assert names >= {*DESCRIPTIONS} - {"aisle_stream_refusals_total"}
    assert seen["metrics"]['aisle_stream_messages_total{result="classified"}'] == 100
    assert {value for name, value in seen["metrics"].items() if name.startswith("aisle_stream_lag")} == {0}


def test_a_key_that_is_too_large_does_not_stop_the_stream(mock: Mock) -> None:
    for topic in ("keys", "keys.out", "keys.dead"):
        mock.create(topic, 1)
    mock.write("keys", [(b"k" * 5000, product("a")), (b"k" * 5000, None), (b"small", product("b"))])
    with fake_server() as fake, streaming(options_for(mock, fake.url, topic="keys", properties=SMALL_MESSAGES)) as stop:
        answers, dead = mock.read("keys.out", 1), mock.read("keys.dead", 2)
        counts = stop()
    assert [each.key() for each in answers] == [b"small"]
    assert [(each.key(), each.value(), header(each, "aisle.source")) for each in dead] == [
        (None, None, "keys/0/0"),
        (None, None, "keys/0/1"),
    ]
    assert (counts["classified"], counts["dead_letters"]) == (1, 2)


EPOCH_IS_OLD, GENERATION_IS_OLD = 47, 22
FAILURES = [
    (
        24,
        [EPOCH_IS_OLD],
        1,
    ),  # partitions are not added: the producer is of no more use, and the messages are read again
    (28, [GENERATION_IS_OLD], 1),  # the offsets are refused: the transaction is aborted and repeated
    (26, [KafkaError.COORDINATOR_NOT_AVAILABLE] * 3, 0),  # the end of the transaction is asked for until it is done
]


@pytest.mark.parametrize(("request_kind", "errors", "aborted"), FAILURES)
def test_a_transaction_that_fails_is_repeated(mock: Mock, request_kind: int, errors: list[int], aborted: int) -> None:
    topic = f"again-{request_kind}"
    for each in (topic, f"{topic}.out", f"{topic}.dead"):
        mock.create(each)
    mock.write(topic, [(b"a", product("apple")), (b"b", b"bad")])
    mock.fail(request_kind, *errors)
    with fake_server() as server, streaming(options_for(mock, server.url, topic=topic)) as stop:
        assert {*sources(mock.read(f"{topic}.out", 1))} == {f"{topic}/0/0"}
        mock.write(topic, [(b"a", product("pear"))])
        wait_for(lambda: len({*sources(mock.read(f"{topic}.out", 2))}) == 2)
        counts = stop()
    assert (counts["messages"], counts["aborted"]) == (3, aborted)


def test_the_broker_is_reached_over_tls(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "kafka").write_text(f"security.protocol=ssl\nssl.ca.location={tmp_path}/ca.pem\n", "utf-8")
    broker.create("safe", "safe.out", "safe.dead")
    broker.write("safe", [(b"k", product("apple"))])
    proxy = Proxy(broker.address, context)
    with fake_server() as server:
        properties = read_properties(tmp_path / "kafka", proxy.address)
        with streaming(options_for(proxy, server.url, topic="safe", properties=properties)) as stop:
            assert len(broker.read("safe.out", 1)) == 1
            assert stop()["classified"] == 1
        monkeypatch.setattr(kafka, "START_SECONDS", 2)
        (tmp_path / "kafka").write_text("security.protocol=ssl\n", "utf-8")
        options = ["--config", tmp_path / "kafka", "--brokers", proxy.address, "--url", server.url]
        done = aisle("stream", "safe", "safe.out", "--dead-letters", "safe.dead", "--text", "$.text", *options)
    assert done.returncode == 2
    assert "ssl.… lines" in done.stderr


@pytest.mark.long
def test_a_worker_that_is_killed_twice_answers_each_message_once(
    broker: Broker, server: Server, tmp_path: Path
) -> None:
    """Killed with -9 in the middle of its work, and started again at once under the same name."""
    broker.create("drill", "drill.out", "drill.dead")
    count = 3000
    broker.write("drill", [(f"k{i % 40}".encode(), product(f"usb c cable {i}")) for i in range(count)])
    (tmp_path / "kafka").write_text("".join(f"{name}={value}\n" for name, value in FAST.items()), "utf-8")
    options = [*access(broker, server.url), "--dead-letters", "drill.dead", "--config", tmp_path / "kafka", "--json"]
    command = [sys.executable, "-m", "aisle", "stream", "drill", "drill.out", "--text", "$.text", *map(str, options)]
    for least in (1, count // 2, count):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            try:
                answers = broker.read("drill.out", least, 180)
                worker.send_signal(signal.SIGTERM if least == count else signal.SIGKILL)
                worker.communicate(timeout=60)
            finally:
                worker.kill()
        assert len(answers) >= least
    assert_once_and_in_order(broker.read("drill.out", count), count)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    started = Broker(tmp_path_factory.mktemp("broker"))
    yield started
    started.stop()


# Avro and the schema registry

PRODUCT = {"type": "record", "name": "Product", "fields": [{"name": "title", "type": ["null", "string"]}]}
EVENT = {
    "type": "record",
    "name": "Envelope",
    "fields": [{"name": "op", "type": "string"}, {"name": "after", "type": ["null", PRODUCT]}],
}


@pytest.fixture
def registry() -> Iterator[str]:
    """A schema registry over HTTP with the schemas 1 and 2; /broken answers 500."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            schema = {"/schemas/ids/1": PRODUCT, "/schemas/ids/2": EVENT}.get(self.path.partition("?")[0])
            broken = self.path.startswith("/broken")
            told = {"schema": json.dumps(schema)} if schema else {"error_code": 40403, "message": "no such schema"}
            body = json.dumps(told).encode()
            self.send_response(200 if schema else 500 if broken else 404)
            self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def framed(number: int, schema: dict[str, Any], value: Any) -> bytes:
    """Return a message as Confluent's serializer writes it."""
    body = io.BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(schema), value)
    return b"\0" + number.to_bytes(4) + body.getvalue()


def test_avro_is_read_by_the_schema_that_each_message_names(registry: str) -> None:
    paths = parse_all(["$.title"])
    plain, event = (reader_of(name, {"url": registry}, "in") for name in ("avro", "debezium-avro"))
    assert plain(paths, framed(1, PRODUCT, {"title": "红富士苹果"})) == "红富士苹果"
    assert plain(paths, None) is None
    assert event(paths, framed(2, EVENT, {"op": "u", "after": {"title": "pear"}})) == "pear"
    assert event(paths, framed(2, EVENT, {"op": "d", "after": None})) is None
    for raw, reason in [
        (framed(1, PRODUCT, {"title": None}), "no text at"),
        (framed(9, PRODUCT, {"title": "a"}), "the registry has no schema 9"),
        (framed(1, PRODUCT, {"title": "a" * 100})[:20], "not of its schema"),
        (b'{"title": "a"}', "not Avro with the id of a schema"),
        (b"\0", "not Avro with the id of a schema"),
        (b"", "not Avro with the id of a schema"),
    ]:
        found = plain(paths, raw)
        assert isinstance(found, Failure)
        assert reason in found.message
    assert "change event" in event(paths, framed(1, PRODUCT, {"title": "a"})).message


@pytest.mark.long
def test_a_registry_that_is_away_loses_nothing(mock: Mock, registry: str) -> None:
    """The worker ends with an error, and the message is still there for the next start."""
    for topic in ("avro", "avro.out", "avro.dead"):
        mock.create(topic, 1)
    mock.write("avro", [(b"a", framed(1, PRODUCT, {"title": "apple"})), (b"b", b"no Avro"), (b"c", None)])
    away = {"url": f"{registry}/broken", "max.retries": "0"}
    with fake_server() as server:
        options = replace(options_for(mock, server.url, topic="avro"), text=["$.title"], format="avro", registry=away)
        with pytest.raises(ServerError, match=r"the schema registry at 127\.0\.0\.1:\d+ answered 500"):
            classify_topic(options, threading.Event())
        gone = replace(options, registry={"url": "http://user:secret@127.0.0.1:9", "max.retries": 0})
        with pytest.raises(ServerError, match=r"the schema registry at 127\.0\.0\.1:9 cannot be reached"):
            classify_topic(gone, threading.Event())
        with streaming(replace(options, registry={"url": registry})) as stop:
            answers, dead = mock.read("avro.out", 2), mock.read("avro.dead", 1)
            counts = stop()
    assert [(each.key(), each.value() is None) for each in answers] == [(b"a", False), (b"c", True)]
    assert [each.value() for each in dead] == [b"no Avro"]
    assert [counts[name] for name in ("classified", "passed_on", "dead_letters")] == [1, 1, 1]


def test_the_registry_is_named_in_the_file(tmp_path: Path, registry: str) -> None:
    (tmp_path / "kafka").write_text(f"linger.ms=5\nschema.registry.url={registry}\n", "utf-8")
    assert split_registry(read_properties(tmp_path / "kafka", "b:1")) == (
        {"linger.ms": "5", "bootstrap.servers": "b:1"},
        {"url": registry},
    )
    done = aisle("stream", "in", "out", "--text", "$.text", "--format", "avro")
    assert (done.returncode, "needs the line schema.registry.url=" in done.stderr) == (2, True)
    access = {"credentials.source": "STATIC_TOKEN", "token": "123", "logical.cluster": "1", "identity.pool.id": "2"}
    digits = {f"bearer.auth.{name}": value for name, value in access.items()}
    assert reader_of("avro", {"url": registry, **digits}, "in") is not None  # a secret of digits is no number
    with pytest.raises(InputError, match=r"Avro needs the line schema\.registry\.url=https://HOST:PORT"):
        reader_of("avro", {}, "in")
    with pytest.raises(InputError, match=r"^--config: one of the lines schema\.registry\.… is wrong: "):
        reader_of("avro", {"url": registry, "no.such.thing": "1"}, "in")
