"""Triton's `labeler`: `logits` [n, labels] and `top_k` to `category` and `confidence` [n, k], most probable first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        labels = json.loads(Path(args["model_repository"], args["model_version"], "labels.json").read_text("utf-8"))
        self.labels = np.array([label.encode() for label in labels], np.object_)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
        if logits.shape[1] != len(self.labels):  # a caller went past the encoder
            return refuse(f"logits must be [n, {len(self.labels)}]; send texts to product_classifier")
        top_k = pb_utils.get_input_tensor_by_name(request, "top_k")
        wanted = {1} if top_k is None else set(top_k.as_numpy().ravel().tolist())
        k = wanted.pop()
        if wanted or not 1 <= k <= len(self.labels):
            got = sorted({k, *wanted})
            return refuse(f"top_k must be one number from 1 to {len(self.labels)} in every row; got {got}")
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("category", self.labels[best]),
                pb_utils.Tensor("confidence", np.take_along_axis(probabilities, best, axis=1)),
            ]
        )


def refuse(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
