"""A gRPC endpoint with scripted answers, for behaviour that a healthy server does not show."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

CONFIG = service_pb2.ModelConfigResponse(
    config=model_config_pb2.ModelConfig(
        name="product_classifier",
        max_batch_size=64,
        parameters={"fingerprint_1": model_config_pb2.ModelParameter(string_value="a1")},
    )
).SerializeToString()
Behave = Callable[[str, Any], None]


class Fake:
    """Answers every text with its own length, and counts the calls; `behave` may delay or abort one."""

    def __init__(self) -> None:
        self.behave: Behave = lambda method, context: None
        self.calls: list[str] = []
        self.url = ""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method.rpartition("/")[2]

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append(method)
            self.behave(method, context)
            return CONFIG if method == "ModelConfig" else _infer(request, context)

        return grpc.unary_unary_rpc_method_handler(answer)


def _infer(message: bytes, context: grpc.ServicerContext) -> bytes:
    request = service_pb2.ModelInferRequest.FromString(message)
    texts, raw = [], request.raw_input_contents[0]
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    for row, text in enumerate(texts):
        if not text:
            where = f"row {row}: " if len(texts) > 1 else ""
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{where}text is empty once cleaned")
    names = [str(len(text)).encode() for text in texts]
    answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
    answer.outputs.add(name="category", datatype="BYTES", shape=[len(texts), 1])
    answer.outputs.add(name="confidence", datatype="FP32", shape=[len(texts), 1])
    answer.raw_output_contents.append(b"".join(struct.pack("<I", len(name)) + name for name in names))
    answer.raw_output_contents.append(struct.pack(f"<{len(texts)}f", *[0.5] * len(texts)))
    return bytes(answer.SerializeToString())


@contextmanager
def fake_server() -> Iterator[Fake]:
    fake = Fake()
    endpoint = grpc.server(futures.ThreadPoolExecutor(8))
    handler = type("Handler", (grpc.GenericRpcHandler,), {"service": lambda self, details: fake.service(details)})
    endpoint.add_generic_rpc_handlers((handler(),))
    fake.url = f"127.0.0.1:{endpoint.add_insecure_port('127.0.0.1:0')}"
    endpoint.start()
    yield fake
    endpoint.stop(None)


@contextmanager
def silent_socket() -> Iterator[str]:
    """Accept connections, and never answer."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    kept.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    for each in kept:
        each.close()
