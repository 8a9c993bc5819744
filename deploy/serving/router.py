"""Triton's `product_classifier`, `product_decisions` and `product_attributes` during a trial.

Each request is routed to the live version or to the candidate.

A hash of the first text selects the version, so that the same request always goes to the same version. The output
`version` [n, 1] is the number of the version that answered. Metrics are sent to the supervisor in datagrams, which may
get lost, so the router waits only for the version that answers.
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

# Largest number of requests in flight; each has a waiting thread. It is larger than the queues of two encoders on a
# CPU, so that the limits of the encoders decide what is refused.
THREADS = 512


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: each["string_value"] for key, each in config["parameters"].items()}
        self.outputs = [each["name"] for each in config["output"] if each["name"] != "version"]
        self.live, self.candidate = parameters["live"], parameters["candidate"]
        self.share, self.shadow = float(parameters["share"]), parameters["shadow"] == "1"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.trial_socket = parameters["trial_socket"]
        self.threads = ThreadPoolExecutor(THREADS, "router")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Give each request to a thread, which sends its answer. No request waits for another."""
        for request in requests:
            self.threads.submit(self.send, request)
        return [None] * len(requests)

    def send(self, request: Any) -> None:
        try:
            response = self.answer(request)
        except Exception as error:  # a caller without an answer would wait forever
            response = failure(pb_utils.TritonError(f"the router failed: {error}"))
        request.get_response_sender().send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request: Any) -> Any:
        inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in ("text", "top_k")]
        inputs = [each for each in inputs if each is not None]
        text = bytes(inputs[0].as_numpy()[0, 0])
        is_canary = zlib.crc32(text) < self.share * 2**32
        response = self.infer(self.candidate if is_canary else self.live, inputs, request)
        if is_canary and response.has_error() and response.error().code() != pb_utils.TritonError.INVALID_ARG:
            # Callers do not see the candidate's failures.
            is_canary, response = False, self.infer(self.live, inputs, request)
        if response.has_error():
            return failure(response.error())
        outputs = {each.name(): each for each in response.output_tensors()}
        if self.shadow:
            category = outputs["category"].as_numpy()[0, 0].decode()
            self.report({"text": text.decode(), "category": category})
        version = int((self.candidate if is_canary else self.live).rpartition("_v")[2])
        rows = np.full((len(inputs[0].as_numpy()), 1), version, np.int32)
        return pb_utils.InferenceResponse([*outputs.values(), pb_utils.Tensor("version", rows)])

    def infer(self, model: str, inputs: list[Any], caller: Any) -> Any:
        """Run a model on the caller's inputs, with the caller's trace and parameters."""
        start = time.perf_counter()
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=self.outputs,
            inputs=inputs,
            trace=caller.trace(),
            parameters=json.loads(caller.parameters()),
        )
        response = request.exec()
        failed = response.has_error() and response.error().code() != pb_utils.TritonError.INVALID_ARG
        self.report({"model": model, "failed": failed, "seconds": time.perf_counter() - start})
        return response

    def report(self, event: dict[str, Any]) -> None:
        """Send an event to the supervisor's TrialMonitor; drop it if nobody receives it."""
        with contextlib.suppress(OSError):  # there is no receiver, or its buffer is full
            self.socket.sendto(json.dumps(event).encode(), self.trial_socket)

    def finalize(self) -> None:
        self.threads.shutdown()


def failure(error: Any) -> Any:
    return pb_utils.InferenceResponse(error=error)
