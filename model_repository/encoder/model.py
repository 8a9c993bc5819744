"""Triton's `encoder`: `input_ids` [n, longest] and `lengths` [n, 1] of many requests to `logits` [n, labels]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.build.engine import load_engine


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.engine = load_engine(folder, args["model_instance_device_id"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Drop each request's padding, run all texts as one batch, hand each request its own logits."""
        texts = [tokens_and_lengths(request) for request in requests]
        # A caller that goes past the tokenizer may send anything: only its own requests fail.
        fit = [True] * len(texts) if self.fit(*joined(texts)) else [self.fit(*each) for each in texts]
        good = [each for each, ok in zip(texts, fit, strict=True) if ok]
        if good:
            logits = self.engine(*joined(good))
            parts = iter(np.split(logits, np.cumsum([len(lengths) for _, lengths in good])[:-1]))
        return [respond(next(parts)) if ok else refuse() for ok in fit]

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


Texts = tuple[Any, Any]  # token ids end to end [sum of lengths], lengths [texts]


def tokens_and_lengths(request: Any) -> Texts:
    input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()
    return input_ids[np.arange(input_ids.shape[1]) < lengths], lengths[:, 0]


def joined(texts: list[Texts]) -> Texts:
    return np.concatenate([tokens for tokens, _ in texts]), np.concatenate([lengths for _, lengths in texts])


def respond(logits: Any) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)])


def refuse() -> Any:
    message = "input_ids and lengths must be what the tokenizer makes; send texts to product_classifier"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
