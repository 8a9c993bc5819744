"""Triton's `product_classifier` while a candidate is tried: hands each request to the live version or the candidate.

Which of them answers is decided by the text, so that the same text meets the same version every time. The output
`version` [n, 1] names the one that answered. What happened is told to the supervisor over a socket that may lose it:
nothing here waits for anybody but the version that answers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Requests under way at once, each in a thread that waits: more than two encoders on a CPU let wait, so that they, who
# know what they bear, refuse what is too much.
THREADS = 512


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = {key: each["string_value"] for key, each in json.loads(args["model_config"])["parameters"].items()}
        self.live, self.candidate = parameters["live"], parameters["candidate"]
        self.share, self.shadow = float(parameters["share"]), parameters["shadow"] == "1"
        self.tap = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.tap.setblocking(False)
        self.address = parameters["tap"]
        self.threads = ThreadPoolExecutor(THREADS, "router")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Hand each request to a thread, which sends its answer when it has one: none waits for the others."""
        for request in requests:
            self.threads.submit(self.send, request)
        return [None] * len(requests)

    def send(self, request: Any) -> None:
        try:
            response = self.answer(request)
        except Exception as error:  # whoever is not answered would wait for ever
            response = failure(pb_utils.TritonError(f"the router failed: {error}"))
        request.get_response_sender().send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request: Any) -> Any:
        inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in ("text", "top_k")]
        inputs = [each for each in inputs if each is not None]
        text = bytes(inputs[0].as_numpy()[0, 0])
        tried = zlib.crc32(text) < self.share * 2**32
        response = self.ask(self.candidate if tried else self.live, inputs, request)
        if tried and response.has_error() and response.error().code() != pb_utils.TritonError.INVALID_ARG:
            # The candidate's failures are nobody's.
            tried, response = False, self.ask(self.live, inputs, request)
        if response.has_error():
            return failure(response.error())
        outputs = {each.name(): each for each in response.output_tensors()}
        if self.shadow:
            category = outputs["category"].as_numpy()[0, 0].decode()
            self.tell({"text": text.decode(), "category": category})
        version = int((self.candidate if tried else self.live).rpartition("_v")[2])
        rows = np.full((len(inputs[0].as_numpy()), 1), version, np.int32)
        return pb_utils.InferenceResponse([*outputs.values(), pb_utils.Tensor("version", rows)])

    def ask(self, model: str, inputs: list[Any], caller: Any) -> Any:
        """Hand what the caller asked to a model, with its trace and how long it waits."""
        start = time.perf_counter()
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=["category", "confidence"],
            inputs=inputs,
            trace=caller.trace(),
            parameters=json.loads(caller.parameters()),
        )
        response = request.exec()
        failed = response.has_error() and response.error().code() != pb_utils.TritonError.INVALID_ARG
        self.tell({"model": model, "failed": failed, "seconds": time.perf_counter() - start})
        return response

    def tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens, or not fast enough
            self.tap.sendto(json.dumps(event).encode(), self.address)

    def finalize(self) -> None:
        self.threads.shutdown()


def failure(error: Any) -> Any:
    return pb_utils.InferenceResponse(error=error)
