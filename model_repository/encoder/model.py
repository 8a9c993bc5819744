"""Triton's `encoder`: `input_ids` [n, longest] and `lengths` [n, 1] of many requests to `logits` [n, labels]."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.build.engine import load_engine
from aisle.build.tensorrt import MAX_TEXTS
from aisle.deploy.batcher import Batcher, Waiting
from aisle.deploy.late import Callers
from aisle.deploy.observe import Metrics

# Tokens of a batch on a CPU: more make the engine next to no faster, and let a call wait longer for the batch before.
TOKENS = 2048
# Of a batch of files: 3 or 4 % slower, and a call that comes in between waits half as long.
TOKENS_OF_FILES = 1024
PATIENCE = 10.0  # seconds
COUNTERS = (
    "tokens_useful",
    "tokens_computed",
    "engine_seconds",
    "engine_batches",
    "engine_failures",
    "queue_seconds",
    "queue_requests",
    "requests_refused",
    "texts_late",
)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.engine = load_engine(folder, args["model_instance_device_id"])
        self.metrics = Metrics(args["model_version"], *(f"aisle_{name}_total" for name in COUNTERS))
        self.callers = Callers()
        spec = self.engine.spec
        self.metrics.show("aisle_model_info", target=spec.target, precision=spec.precision, checkpoint=spec.checkpoint)
        longest = json.loads(args["model_config"])["parameters"]["max_queue_size"]["string_value"]
        all_texts = MAX_TEXTS * spec.max_tokens
        on_cpu = spec.target == "openvino"
        self.batcher = Batcher(
            self.compute,
            self.answer,
            self.gone,
            tokens=TOKENS if on_cpu else all_texts,
            tokens_of_files=TOKENS_OF_FILES if on_cpu else all_texts,
            texts=MAX_TEXTS,
            longest_queue=int(longest),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Queue the requests; the batcher's thread answers them, so that the next can come in the meantime.

        A lone small one that finds the engine idle is answered here.
        """
        responses: list[Any] = [None] * len(requests)
        for number, request in enumerate(requests):
            tokens, lengths = unpadded(request)
            if not self.fit(tokens, lengths):
                # A caller that goes past the tokenizer may send anything.
                refuse(request, "INVALID_ARG", UNFIT)
                continue
            waiting = Waiting(request, tokens, lengths, '"patient"' in request.parameters())
            if len(requests) == 1 and (logits := self.batcher.at_once(waiting)) is not None:
                responses[number] = self.answered(waiting, logits)
            elif not self.batcher.put(waiting):
                self.metrics.add("aisle_requests_refused_total")
                refuse(request, "UNAVAILABLE", "Exceeds maximum queue size")
        return responses

    def fit(self, tokens: Any, lengths: Any) -> bool:
        """Tell whether these are token ids, as many as the lengths say, of texts that the engine can pack."""
        spec = self.engine.spec
        return bool(
            lengths.min() >= 1
            and lengths.max() <= spec.max_tokens
            and lengths.sum() == len(tokens)
            and tokens.min() >= 0
            and (not spec.vocabulary or tokens.max() < spec.vocabulary)
        )

    def gone(self, waiting: Waiting) -> bool:
        """Tell whether the caller has left; one that does not say how long it waits does so for `PATIENCE`."""
        parameters = waiting.request.parameters()
        return self.callers.gone(parameters) if '"wait_us"' in parameters else waiting.age > PATIENCE

    def compute(self, tokens: Any, lengths: Any) -> Any:
        work: defaultdict[str, float] = defaultdict(float)
        try:
            logits = self.engine(tokens, lengths, work)
        except Exception:
            self.metrics.add("aisle_engine_failures_total")
            raise
        for name, value in work.items():
            self.metrics.add(f"aisle_{name}_total", value)
        return logits

    def answer(self, waiting: Waiting, found: Any) -> None:
        if isinstance(found, TimeoutError):
            self.metrics.add("aisle_texts_late_total", len(waiting.lengths))
            refuse(waiting.request, "CANCELLED", "the caller had left before its turn came")
        elif isinstance(found, Exception):
            refuse(waiting.request, "INTERNAL", f"the engine failed: {found}")
        else:
            send(waiting.request, self.answered(waiting, found))

    def answered(self, waiting: Waiting, logits: Any) -> Any:
        self.metrics.add("aisle_queue_seconds_total", waiting.waited)
        self.metrics.add("aisle_queue_requests_total")
        return pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)])

    def finalize(self) -> None:
        self.batcher.close()
        self.metrics.close()


UNFIT = "input_ids and lengths must be what the tokenizer makes; send texts to product_classifier"


def unpadded(request: Any) -> tuple[Any, Any]:
    """Return the token ids of a request's texts end to end, [sum of lengths], and the lengths, [texts]."""
    input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()
    if len(input_ids) == 1:
        return input_ids[0], lengths[0]
    return input_ids[np.arange(input_ids.shape[1]) < lengths], lengths[:, 0]


def refuse(request: Any, status: str, message: str) -> None:
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, status))
    send(request, pb_utils.InferenceResponse(error=error))


def send(request: Any, response: Any) -> None:
    request.get_response_sender().send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
