"""Triton's `encoder`: `input_ids` [n, longest] and `lengths` [n, 1] of many requests to `logits` [n, labels]."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.build.engine import load_engine
from aisle.deploy.observe import Metrics

# Tokens of a batch, about: more make the engine no faster and let the first of them wait for the last.
TOKENS = 4096
COUNTERS = "tokens_useful", "tokens_computed", "engine_seconds", "engine_batches"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.engine = load_engine(folder, args["model_instance_device_id"])
        self.metrics = Metrics(args["model_version"], *(f"aisle_{name}_total" for name in COUNTERS))
        spec = self.engine.spec
        self.metrics.show("aisle_model_info", target=spec.target, precision=spec.precision, checkpoint=spec.checkpoint)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what waited as batches of some TOKENS tokens, in order of arrival; each is answered once it is done.

        No request waits for others to arrive: while the engine is busy they queue, and all of them come here next.
        """
        texts = [unpadded(request) for request in requests]
        spans = batches([len(tokens) for tokens, _ in texts])
        responses: list[Any] = []
        for number, span in enumerate(spans, start=1):
            answers = self.run(texts[span])
            if number == len(spans):
                return responses + answers
            for request, answer in zip(requests[span], answers, strict=True):
                request.get_response_sender().send(answer, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            responses += [None] * len(answers)
        return responses

    def run(self, texts: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Run the texts of several requests as one batch, and hand each request its own logits."""
        work: defaultdict[str, float] = defaultdict(float)
        tokens, lengths = zip(*texts, strict=True)
        logits = self.engine(np.concatenate(tokens), np.concatenate(lengths), work)
        for name, value in work.items():
            self.metrics.add(f"aisle_{name}_total", value)
        ends = np.cumsum([len(own) for own in lengths])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", part)]) for part in np.split(logits, ends[:-1])]

    def finalize(self) -> None:
        self.metrics.close()


def unpadded(request: Any) -> tuple[Any, Any]:
    """Return the tokens of a request's texts, end to end, and the texts' lengths."""
    input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()
    if len(input_ids) == 1:
        return input_ids[0], lengths[0]
    return input_ids[np.arange(input_ids.shape[1]) < lengths], lengths[:, 0]


def batches(tokens: Sequence[int]) -> list[slice]:
    """Divide requests of so many tokens each into runs of about equally many, TOKENS at most where they are small."""
    ends = np.cumsum(tokens)
    count = -(-int(ends[-1]) // TOKENS)
    middles = ends - np.asarray(tokens) / 2
    numbers = (middles * count / ends[-1]).astype(int)
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(tokens)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
