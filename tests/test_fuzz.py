"""Arbitrary input for the real server: it neither crashes nor hangs, and answers other callers as before.

AISLE_FUZZ=5000 tries that many examples of each kind, at random; without it, the same few are tried each time.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from aisle.client import Classifier
from aisle.client.protocol import CHANNEL
from aisle.preprocess.clean import prepare
from aisle.preprocess.values import TextError

from .conftest import Server

EXAMPLES = int(os.environ.get("AISLE_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # after a failure of the server, smaller examples prove nothing
    suppress_health_check=list(HealthCheck),
)
SECONDS = 30.0  # a call that takes longer hangs, even on a busy machine
INFER = "/inference.GRPCInferenceService/ModelInfer"
Request = service_pb2.ModelInferRequest
Message = Any  # a Request, whose class has no types
Send = Callable[[bytes], tuple[grpc.StatusCode, str | bytes]]


@pytest.fixture(scope="module")
def send(server: Server) -> Iterator[Send]:
    """Send bytes as a ModelInfer call; return its status and its answer or message."""
    with grpc.insecure_channel(server.url, CHANNEL) as channel:
        call = channel.unary_unary(INFER)
        compressions = itertools.cycle((None, grpc.Compression.Gzip, grpc.Compression.Deflate))

        def once(message: bytes) -> tuple[grpc.StatusCode, str | bytes]:
            try:
                return grpc.StatusCode.OK, call(message, timeout=SECONDS, compression=next(compressions))
            except grpc.RpcError as error:
                return error.code(), error.details()

        yield once


@pytest.fixture(scope="module", autouse=True)
def neighbour(server: Server) -> Iterator[None]:
    """A caller beside, whose answers must not change and whose calls must not fail.

    It asks again, as the client does by itself, when a string tensor cut short has failed the batch that it was in.
    """
    texts = ["红富士苹果 5斤装", "手机壳 磨砂防摔", "wireless earbuds case", "婴儿奶粉 " * 30]
    wrong: list[object] = []
    answered = 0
    done = threading.Event()

    def ask() -> None:
        nonlocal answered
        with Classifier(server.url, timeout=SECONDS) as classifier:
            expected = classifier.classify(texts, top_k=3)
            for number in itertools.count(1):
                if done.wait(0.02):
                    return
                i = number % len(texts)
                try:  # the spaces make each text one that the response cache has not seen
                    got = classifier.classify([texts[i] + " " * number], top_k=3)[0]
                except Exception as error:
                    wrong.append(error)
                    continue
                if got.categories != expected[i].categories or not np.allclose(
                    got.confidences, expected[i].confidences, atol=1e-4
                ):
                    wrong.append((texts[i], expected[i], got))
                answered += 1

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    done.set()
    thread.join()
    assert not wrong
    assert answered
    log = server.log.read_text("utf-8", "replace")
    assert "stub" not in log.lower()  # no Python model was restarted


def test_a_broken_tensor_of_one_caller_does_not_fail_another(send: Send, server: Server) -> None:
    """Both are in one batch, which Triton fails as a whole; the other caller still gets its answer."""
    broken = Request(model_name="product_classifier", raw_input_contents=[struct.pack("<I", 9)])
    broken.inputs.add(name="text", datatype="BYTES", shape=[1, 1])
    with Classifier(server.url, timeout=SECONDS) as classifier, ThreadPoolExecutor(8) as pool:
        vandals = [pool.submit(send, broken.SerializeToString()) for _ in range(100)]
        for i in range(50):
            assert classifier.classify([f"苹果 {i}斤装"])
        assert {each.result()[0] for each in vandals} == {grpc.StatusCode.INVALID_ARGUMENT}


BIDI = "\u202e\u2066\u2069\u200f\u061c"
TEXTS = (
    st.one_of(
        st.text(),
        st.text("红富士苹果5斤装abc <>&;#x0!\u0000\u200b\u0301" + BIDI),
        st.sampled_from(
            ["\ud800", "好\udfff", "\x00", "a\x00b", BIDI, "\U0010ffff", "e" + "\u0301" * 500, "👩‍👩‍👧‍👦" * 50]
        ),
        st.sampled_from(["a", "长", "&amp;", "<!--", "<b ", "&#", "1", "@a.", " ", "\x00", "\u0301"]).flatmap(
            lambda unit: st.sampled_from([2**10, 2**15, 2**20]).map(lambda size: unit * (size // len(unit.encode())))
        ),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary()
)


def request_of(texts: list[bytes], top_k: int | None) -> Message:
    request = Request(model_name="product_classifier")
    request.inputs.add(name="text", datatype="BYTES", shape=[len(texts), 1]).contents.bytes_contents.extend(texts)
    if top_k is not None:
        k = request.inputs.add(name="top_k", datatype="INT32", shape=[len(texts), 1])
        k.contents.int_contents.extend([top_k] * len(texts))
    return request


def strings(raw: bytes) -> Iterator[bytes]:
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        yield raw[4 : 4 + size]
        raw = raw[4 + size :]


def is_fit(text: bytes) -> bool:
    try:
        prepare(text)
    except TextError:
        return False
    return True


@fuzz
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), top_k=st.none() | st.sampled_from([1, 3, 0, -1, 2**31 - 1]))
def test_any_texts(send: Send, server: Server, texts: list[bytes], top_k: int | None) -> None:
    """Texts that `prepare` accepts are classified; all others are refused, and messages do not contain the text."""
    status, answer = send(request_of(texts, top_k).SerializeToString())
    k = 1 if top_k is None else top_k
    if not all(map(is_fit, texts)) or not 1 <= k <= server.labels:
        assert status == grpc.StatusCode.INVALID_ARGUMENT
        assert "text" in answer or "top_k" in answer
        return
    assert status == grpc.StatusCode.OK, answer
    response = service_pb2.ModelInferResponse.FromString(answer)
    outputs = {each.name: raw for each, raw in zip(response.outputs, response.raw_output_contents, strict=True)}
    confidences = np.frombuffer(outputs["confidence"], np.float32).reshape(len(texts), k)
    assert len(list(strings(outputs["category"]))) == confidences.size
    assert ((confidences > 0) & (confidences <= 1)).all()
    assert (confidences.sum(axis=1) <= 1 + 1e-5).all()


NUMBERS = st.sampled_from([0, 1, -1, 2, 64, 65, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63)]) | st.integers(-5, 5)
NAMES = st.sampled_from(
    ["text", "top_k", "input_ids", "lengths", "logits", "category", "", "x", "../x", "好", "a" * 5000]
)
DATATYPES = st.sampled_from(["BYTES", "INT32", "INT64", "FP32", "FP16", "BOOL", "UINT8", "", "NONE", "bytes"])
# Not `classification`: asked of a string tensor it ends Triton (division by zero), so the gateway refuses it.
PARAMETERS = st.sampled_from(
    ["sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_size", "x"]
) | st.sampled_from(
    ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "triton_enable_empty_final_response"]
)
# Bytes of string tensors: wrong lengths and truncated lengths.
RAW = st.one_of(
    st.binary(max_size=64),
    st.binary(max_size=8).flatmap(
        lambda text: st.sampled_from([len(text), 0, 2**31 - 1, 2**32 - 1]).map(
            lambda size: struct.pack("<I", size) + text
        )
    ),
    st.lists(NUMBERS.map(lambda number: number % 2**32), max_size=130).map(lambda ns: struct.pack(f"<{len(ns)}I", *ns)),
)


def valid_request(model: str, labels: int) -> Message:
    """Return a valid request with two texts."""
    if model != "encoder":
        request = request_of(["红富士苹果 5斤装".encode(), b"usb c cable"], None if model == "tokenizer" else 2)
        request.model_name = model
        return request
    request = Request(model_name=model)
    request.inputs.add(name="input_ids", datatype="INT32", shape=[2, 4]).contents.int_contents.extend(range(8))
    request.inputs.add(name="lengths", datatype="INT32", shape=[2, 1]).contents.int_contents.extend([4, 3])
    request.inputs.add(name="top_k", datatype="INT32", shape=[2, 1]).contents.int_contents.extend([2, 2])
    request.inputs.add(name="return_logits", datatype="BOOL", shape=[2, 1]).contents.bool_contents.extend([True] * 2)
    return request


def set_parameter(draw: st.DrawFn, parameters: object) -> None:
    value = parameters[draw(PARAMETERS)]  # type: ignore[index]
    kind = draw(st.sampled_from(["int64_param", "bool_param", "string_param"]))
    setattr(value, kind, draw({"int64_param": NUMBERS, "bool_param": st.booleans(), "string_param": NAMES}[kind]))


FIELDS: dict[str, st.SearchStrategy[object]] = {
    "bytes_contents": TEXTS,
    "int_contents": st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 10),
    "int64_contents": NUMBERS,
    "fp32_contents": st.floats(width=32),
    "bool_contents": st.booleans(),
}


def mutate(draw: st.DrawFn, request: Message) -> None:
    """Change one thing about a request: its values more often than its frame, where Triton itself finds it out."""
    change = draw(st.sampled_from(["values"] * 6 + ["size"] * 3 + ["raw"] * 3 + FRAME))
    tensor = draw(st.sampled_from(list(request.inputs))) if request.inputs else request.inputs.add()
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    match change:
        case "values" if filled:
            values = getattr(tensor.contents, filled[0])
            values[draw(st.integers(0, len(values) - 1))] = draw(FIELDS[filled[0]])
        case "size" if filled:  # more or fewer of them, and a shape that says so
            width, values = draw(st.integers(0, 40)), getattr(tensor.contents, filled[0])
            kept = list(values[:width])
            values[:] = (kept + draw(st.lists(FIELDS[filled[0]], min_size=width, max_size=width)))[:width] * 2
            tensor.shape[:] = [2, width]
        case "raw":
            for each in request.inputs:
                if draw(st.integers(0, 3)):
                    each.ClearField("contents")
            raw = draw(st.lists(RAW, min_size=len(request.inputs), max_size=len(request.inputs) + 1))
            request.raw_input_contents[:] = raw
        case "contents":
            field = draw(st.sampled_from(list(FIELDS)))
            getattr(tensor.contents, field)[:] = draw(st.lists(FIELDS[field], max_size=130))
        case "shape":
            tensor.shape[:] = draw(st.lists(NUMBERS, max_size=4))
        case "type":
            tensor.datatype = draw(DATATYPES)
        case "name":
            tensor.name = draw(NAMES)
        case "drop":
            request.inputs.remove(tensor)
        case "again":
            request.inputs.add().CopyFrom(tensor)
        case "output":
            output = request.outputs.add(name=draw(NAMES))
            if draw(st.booleans()):
                set_parameter(draw, output.parameters)
        case "target":
            request.model_name = draw(st.sampled_from([request.model_name, "", "..", "nobody"]))
            request.model_version = draw(st.sampled_from(["", "1", "2", "-1", "0", "x", "9" * 1000]))
            request.id = draw(NAMES)
        case _:
            set_parameter(draw, draw(st.sampled_from([request.parameters, tensor.parameters])))


FRAME = ["contents", "shape", "type", "name", "drop", "again", "output", "target", "parameter"]
MODELS = (
    *("product_classifier", "product_decisions", "product_attributes", "product_embeddings", "tokenizer", "encoder"),
)
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


@st.composite
def requests(draw: st.DrawFn, labels: int) -> bytes:
    """Return a request with some errors."""
    request = valid_request(draw(st.sampled_from(MODELS)), labels)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        mutate(draw, request)
    message: bytes = request.SerializeToString()
    return message


@fuzz
@given(data=st.data())
def test_any_request(send: Send, server: Server, data: st.DataObject) -> None:
    """Errors are refused as the caller's, without an exception in a Python model, which would fail its batch."""
    status, answer = send(data.draw(requests(server.labels)))
    assert status == grpc.StatusCode.OK or status in REFUSED, answer


@st.composite
def damaged(draw: st.DrawFn, labels: int) -> bytes:
    """Return the bytes of a request, some of them changed, cut out or put between."""
    message = bytearray(valid_request(draw(st.sampled_from(MODELS)), labels).SerializeToString())
    for _ in range(draw(st.integers(1, 8))):
        where = draw(st.integers(0, len(message)))
        message[where : where + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(message)


@fuzz
@given(data=st.data())
def test_any_bytes(send: Send, server: Server, data: st.DataObject) -> None:
    status, answer = send(data.draw(damaged(server.labels) | st.binary(max_size=300)))
    unreadable = status == grpc.StatusCode.INTERNAL and answer == "Unable to parse request"
    assert unreadable or status == grpc.StatusCode.OK or status in REFUSED, answer
