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
from aisle.deploy.late import Callers
from aisle.deploy.observe import Metrics

# Tokens of a batch, about: more make the engine no faster and let the first of them wait for the last.
TOKENS = 4096
COUNTERS = "tokens_useful", "tokens_computed", "engine_seconds", "engine_batches", "texts_late"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.engine = load_engine(folder, args["model_instance_device_id"])
        self.metrics = Metrics(args["model_version"], *(f"aisle_{name}_total" for name in COUNTERS))
        self.callers = Callers()
        spec = self.engine.spec
        self.metrics.show("aisle_model_info", target=spec.target, precision=spec.precision, checkpoint=spec.checkpoint)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what waited as batches of some TOKENS tokens, in order of arrival; each is answered once it is done.

        No request waits for others to arrive: while the engine is busy they queue, and all of them come here next.
        """
        texts = [unpadded(request) for request in requests]
        # A caller that goes past the tokenizer may send anything: only its own requests fail.
        fit = [True] * len(texts) if self.fit(*joined(texts)) else [self.fit(*each) for each in texts]
        responses = [None if ok else refuse() for ok in fit]
        good = [number for number, ok in enumerate(fit) if ok]
        spans = batches([len(texts[number][0]) for number in good]) if good else []
        for span in spans:
            gone = {number for number in good[span] if self.callers.gone(requests[number].parameters())}
            logits = iter(self.run([texts[number] for number in good[span] if number not in gone]))
            for number in good[span]:
                answer = self.drop(texts[number]) if number in gone else next(logits)
                if span is spans[-1]:
                    responses[number] = answer
                else:
                    requests[number].get_response_sender().send(answer, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
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

    def run(self, texts: Sequence[Texts]) -> list[Any]:
        """Run the texts of several requests as one batch, and hand each request its own logits."""
        if not texts:
            return []
        work: defaultdict[str, float] = defaultdict(float)
        logits = self.engine(*joined(texts), work)
        for name, value in work.items():
            self.metrics.add(f"aisle_{name}_total", value)
        ends = np.cumsum([len(lengths) for _, lengths in texts])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", part)]) for part in np.split(logits, ends[:-1])]

    def drop(self, texts: Texts) -> Any:
        """Answer a request that nobody waits for any more, without computing it."""
        self.metrics.add("aisle_texts_late_total", len(texts[1]))
        message = "the caller had left before its turn came"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.CANCELLED))

    def finalize(self) -> None:
        self.metrics.close()


Texts = tuple[Any, Any]  # token ids end to end [sum of lengths], lengths [texts]


def unpadded(request: Any) -> Texts:
    input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()
    if len(input_ids) == 1:
        return input_ids[0], lengths[0]
    return input_ids[np.arange(input_ids.shape[1]) < lengths], lengths[:, 0]


def joined(texts: Sequence[Texts]) -> Texts:
    return np.concatenate([tokens for tokens, _ in texts]), np.concatenate([lengths for _, lengths in texts])


def batches(tokens: Sequence[int]) -> list[slice]:
    """Divide requests of so many tokens each into runs of about equally many, TOKENS at most where they are small."""
    ends = np.cumsum(tokens)
    count = -(-int(ends[-1]) // TOKENS)
    middles = ends - np.asarray(tokens) / 2
    numbers = (middles * count / ends[-1]).astype(int)
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(tokens)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def refuse() -> Any:
    message = "input_ids and lengths must be what the tokenizer makes; send texts to product_classifier"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
