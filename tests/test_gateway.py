"""The gateway: allowed clients, limits and allowed calls."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from aisle.client import Classifier, ClassifierError, InvalidText
from aisle.client.status import retry_after

from .conftest import Server, aisle, wait_for
from .gateway import SHIPPED, TOKENS, Gateway, admit, gateway

CANARY = "f00dcafe 红富士苹果"  # must not be in a log
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def entry(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder, port = tmp_path_factory.mktemp("gateway") / "envoy", int(server.url.partition(":")[2])
    with gateway(folder, [port], refill="3600s") as running:
        yield running


@pytest.fixture(scope="module")
def channel(entry: Gateway) -> Iterator[grpc.Channel]:
    assert entry.tls.root_certificates
    with grpc.secure_channel(entry.url, grpc.ssl_channel_credentials(entry.tls.root_certificates.read_bytes())) as each:
        yield each


def metadata(name: str) -> list[tuple[str, str]]:
    return [("authorization", "Basic " + base64.b64encode(TOKENS[name].encode()).decode())]


def status(channel: grpc.Channel, method: str, message: bytes, name: str = "search") -> grpc.StatusCode:
    return channel.unary_unary(method).future(message, metadata=metadata(name), timeout=30).code()


def question(text: str = CANARY) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="product_classifier")
    request.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(text.encode())
    return request


def test_a_known_client_gets_the_servers_answers(entry: Gateway, classifier: Classifier) -> None:
    texts = [CANARY, "手机壳 磨砂防摔"] * 50
    with Classifier(entry.url, tls=entry.tls, token=TOKENS["search"], timeout=60) as through:
        assert [a.category for a in through.classify(texts)] == [a.category for a in classifier.classify(texts)]
        with pytest.raises(InvalidText, match="empty once cleaned"):
            through.classify([" "])


def test_the_commands_read_their_token_from_the_environment(entry: Gateway) -> None:
    known = {"AISLE_TLS_CA": str(entry.tls.root_certificates), "AISLE_TOKEN": TOKENS["catalogue"]}
    done = aisle("classify", CANARY, "--url", entry.url, "--json", env=known)
    assert json.loads(done.stdout)["predictions"][0]["categories"]
    done = aisle("classify", CANARY, "--url", entry.url, env={**known, "AISLE_TOKEN": "search:guessed"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("aisle: UNAUTHENTICATED: ")
    done = aisle("classify", CANARY, "--url", entry.url, env={"AISLE_TOKEN": TOKENS["catalogue"]})
    assert done.returncode == 2
    assert "only over TLS" in done.stderr


@pytest.mark.parametrize("token", ["", "search:guessed", "nobody:" + TOKENS["search"].partition(":")[2]])
def test_unknown_clients_are_refused(entry: Gateway, token: str) -> None:
    with Classifier(entry.url, tls=entry.tls, token=token) as stranger, pytest.raises(ClassifierError) as caught:
        stranger.classify([CANARY])
    assert caught.value.status == "UNAUTHENTICATED"


def test_clients_change_without_a_restart(entry: Gateway) -> None:
    with Classifier(entry.url, tls=entry.tls, token=TOKENS["late"]) as late:
        with pytest.raises(ClassifierError, match="UNAUTHENTICATED"):
            late.classify([CANARY])
        admit(entry.folder, "search", "catalogue", "greedy", "late")

        def admitted() -> bool:
            with contextlib.suppress(ClassifierError):
                return bool(late.classify([CANARY]))
            return False

        wait_for(admitted)


CLOSED = "RepositoryIndex RepositoryModelUnload SystemSharedMemoryRegister LogSettings TraceSetting ModelStatistics"


@pytest.mark.parametrize("call", [*CLOSED.split(), "ModelStreamInfer", "ServerMetadata"])
def test_only_calls_for_classification_are_passed_on(channel: grpc.Channel, call: str) -> None:
    assert status(channel, f"/inference.GRPCInferenceService/{call}", b"") == grpc.StatusCode.UNIMPLEMENTED


def test_health_needs_no_token(channel: grpc.Channel) -> None:
    assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"


def test_the_ensembles_steps_and_extensions_are_closed(channel: grpc.Channel, server: Server) -> None:
    good = question()
    assert status(channel, INFER, good.SerializeToString()) == grpc.StatusCode.OK
    bad = [b"", b"\xff" * 20, good.SerializeToString()[:-1], b"\x0b" + good.SerializeToString()]
    for model in ("tokenizer", "encoder", ""):
        request = question()
        request.model_name = model
        bad.append(request.SerializeToString())
        bad.append(good.SerializeToString() + request.SerializeToString())  # of two names, the last one counts
    for name in ("classification", "shared_memory_region", "x"):
        request = question()
        request.outputs.add(name="confidence").parameters[name].int64_param = 1
        bad.append(request.SerializeToString())
    for raw in (b"\x02\x00\x00\x00a", b"\x00\x00", b"\xff" * 4, b"\x01\x00\x00\x00ab"):  # wrong lengths
        request = question()
        request.inputs[0].ClearField("contents")
        request.raw_input_contents.append(raw)
        bad.append(request.SerializeToString())
    crash = question()
    crash.outputs.add(name="category").parameters["classification"].int64_param = 1  # would crash Triton
    bad.append(crash.SerializeToString())
    for message in bad:
        assert status(channel, INFER, message) == grpc.StatusCode.INVALID_ARGUMENT, message
    compressed = channel.unary_unary(INFER).future(
        good.SerializeToString() * 3, metadata=metadata("search"), compression=grpc.Compression.Gzip
    )
    assert compressed.code() == grpc.StatusCode.INVALID_ARGUMENT
    plain = question()
    plain.outputs.add(name="category")
    plain.parameters["x"].int64_param = 1
    plain.id = "any"
    assert status(channel, INFER, plain.SerializeToString()) == grpc.StatusCode.OK


def test_large_messages_are_refused(channel: grpc.Channel) -> None:
    texts = service_pb2.ModelInferRequest(model_name="product_classifier")
    texts.inputs.add(name="text", datatype="BYTES", shape=[64, 1]).contents.bytes_contents.extend([b"a" * 2**15] * 64)
    assert status(channel, INFER, texts.SerializeToString(), "catalogue") == grpc.StatusCode.OK
    assert status(channel, INFER, question("a" * 5_000_000).SerializeToString()) == grpc.StatusCode.UNKNOWN


def test_each_client_has_its_own_limit(channel: grpc.Channel) -> None:
    """A client over its limit is refused; meanwhile another one is answered."""
    call, message = channel.unary_unary(INFER), question().SerializeToString()
    flood = [call.future(message, metadata=metadata("greedy"), timeout=60) for _ in range(500)]
    assert status(channel, INFER, message, "catalogue") == grpc.StatusCode.OK
    assert Counter(each.code() for each in flood) == {grpc.StatusCode.OK: 400, grpc.StatusCode.RESOURCE_EXHAUSTED: 100}
    refused = [each for each in flood if each.code() == grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert {retry_after(each) for each in refused} == {1.0}  # when to try again


def test_callers_cannot_choose_their_name(entry: Gateway, channel: grpc.Channel) -> None:
    """Log and limits ignore a name that a caller invents."""
    call = channel.unary_unary("/grpc.health.v1.Health/Check")
    probes = [call.future(b"", metadata=[("x-aisle-client", f"made-up-{i}")], timeout=60) for i in range(150)]
    assert {each.code() for each in probes} == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert "made-up" not in entry.log


def test_the_log_has_client_and_status_but_no_text(entry: Gateway, channel: grpc.Channel, server: Server) -> None:
    status(channel, INFER, question().SerializeToString(), "catalogue")

    def logged() -> list[dict[str, Any]]:
        return [json.loads(line) for line in entry.log.splitlines() if line.startswith("{")]

    call = {"client": "catalogue", "grpc_status": "OK", "call": INFER}
    wait_for(lambda: any(call.items() <= line.items() for line in logged()))
    lines = logged()
    assert {line["client"] for line in lines} <= {None, *TOKENS}
    secrets = [token.partition(":")[2] for token in TOKENS.values()]
    for log in (entry.log, server.log.read_text("utf-8", "replace")):
        assert "f00dcafe" not in log
        assert not any(secret in log for secret in secrets)


def test_the_example_makes_valid_tokens() -> None:
    lines = (SHIPPED / "clients.example.yaml").read_text().splitlines()
    recipe = "\n".join(line[4:] for line in lines if line.startswith("#   "))
    token, line = subprocess.run(["sh", "-c", recipe], capture_output=True, text=True, check=True).stdout.splitlines()
    name, _, secret = token.partition(":")
    assert len(secret) == 64
    assert line == f"{name}:{{SHA}}{base64.b64encode(hashlib.sha1(secret.encode()).digest()).decode()}"
