"""Triton's `product_classifier` while a candidate is tried: hands each request to the live version or the candidate.

Which of them answers is decided by the text, so that the same text meets the same version every time. The output
`version` [n, 1] names the one that answered. What happened is told to the supervisor over a socket that may lose it:
nothing here waits for anybody but the version that answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import zlib
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = {key: each["string_value"] for key, each in json.loads(args["model_config"])["parameters"].items()}
        self.live, self.candidate = parameters["live"], parameters["candidate"]
        self.share, self.shadow = float(parameters["share"]), parameters["shadow"] == "1"
        self.tap = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.tap.setblocking(False)
        self.address = parameters["tap"]

    async def execute(self, requests: list[Any]) -> list[Any]:
        return await asyncio.gather(*map(self.answer, requests))

    async def answer(self, request: Any) -> Any:
        inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in ("text", "top_k")]
        inputs = [each for each in inputs if each is not None]
        text = bytes(inputs[0].as_numpy()[0, 0])
        tried = zlib.crc32(text) < self.share * 2**32
        response = await self.ask(self.candidate if tried else self.live, inputs, request)
        if tried and response.has_error() and response.error().code() != pb_utils.TritonError.INVALID_ARG:
            # The candidate's failures are nobody's.
            tried, response = False, await self.ask(self.live, inputs, request)
        if response.has_error():
            return pb_utils.InferenceResponse(error=response.error())
        outputs = {each.name(): each for each in response.output_tensors()}
        if self.shadow:
            category = outputs["category"].as_numpy()[0, 0].decode()
            self.tell({"text": text.decode(), "category": category})
        version = int((self.candidate if tried else self.live).rpartition("_v")[2])
        rows = np.full((len(inputs[0].as_numpy()), 1), version, np.int32)
        return pb_utils.InferenceResponse([*outputs.values(), pb_utils.Tensor("version", rows)])

    async def ask(self, model: str, inputs: list[Any], caller: Any) -> Any:
        """Hand what the caller asked to a model, with its trace and how long it waits."""
        start = time.perf_counter()
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=["category", "confidence"],
            inputs=inputs,
            trace=caller.trace(),
            parameters=json.loads(caller.parameters()),
        )
        response = await request.async_exec()
        failed = response.has_error() and response.error().code() != pb_utils.TritonError.INVALID_ARG
        self.tell({"model": model, "failed": failed, "seconds": time.perf_counter() - start})
        return response

    def tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens, or not fast enough
            self.tap.sendto(json.dumps(event).encode(), self.address)
