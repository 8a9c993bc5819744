"""Triton's `labeler`: `logits` [n, labels] and `top_k` to `category` and `confidence` [n, k], most probable first."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.deploy.observe import Metrics


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.names = json.loads(Path(args["model_repository"], args["model_version"], "labels.json").read_text("utf-8"))
        self.labels = np.array([name.encode() for name in self.names], np.object_)
        self.metrics = Metrics(args["model_version"], "aisle_confidence_sum", "aisle_confidence_count")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Rank the categories of all texts at once; a bad `top_k` fails its own request alone."""
        wanted = [self.wanted(request) for request in requests]
        logits = [
            pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
            for request, k in zip(requests, wanted, strict=True)
            if isinstance(k, int)
        ]
        if logits:
            best, confidence = top(np.concatenate(logits), max(k for k in wanted if isinstance(k, int)))
            self.count(best[:, 0], confidence[:, 0])
        responses, row, sizes = [], 0, iter(map(len, logits))
        for k in wanted:
            if isinstance(k, str):
                refusal = pb_utils.TritonError(k, pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=refusal))
                continue
            rows = slice(row, row + next(sizes))
            category = pb_utils.Tensor("category", self.labels[best[rows, :k]])
            tensors = [category, pb_utils.Tensor("confidence", np.ascontiguousarray(confidence[rows, :k]))]
            responses.append(pb_utils.InferenceResponse(tensors))
            row = rows.stop
        return responses

    def wanted(self, request: Any) -> int | str:
        """Return how many categories a request asks for, or what is wrong with it."""
        if pb_utils.get_input_tensor_by_name(request, "logits").shape()[1] != len(self.names):
            # A caller went past the encoder.
            return f"logits must be [n, {len(self.names)}]; send texts to product_classifier"
        tensor = pb_utils.get_input_tensor_by_name(request, "top_k")
        values = [1] if tensor is None else np.unique(tensor.as_numpy()).tolist()
        if len(values) > 1 or not 1 <= values[0] <= len(self.names):
            return f"top_k must be one number from 1 to {len(self.names)} in every row; got {values}"
        return int(values[0])

    def count(self, best: Any, confidence: Any) -> None:
        self.metrics.add_confidences(confidence)
        for index, count in Counter(best.tolist()).items():
            self.metrics.add("aisle_categories_total", count, category=self.names[index])

    def finalize(self) -> None:
        self.metrics.close()


def top(logits: Any, k: int) -> tuple[Any, Any]:
    """Return the places and softmax probabilities, each [texts, k], of the k largest of `logits` [texts, labels]."""
    if k == 1:
        best = logits.argmax(axis=1)[:, None]
    else:
        # All of thousands of labels are sorted only if all are wanted.
        best = np.argpartition(-logits, min(k, logits.shape[1] - 1), axis=1)[:, :k]
        best.sort(axis=1)  # equal ones in the order of the labels
        order = np.argsort(-np.take_along_axis(logits, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return best, np.take_along_axis(powers, best, axis=1) / powers.sum(axis=1, keepdims=True)
