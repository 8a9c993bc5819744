"""Triton's `tokenizer`: maps `text` [n, 1] to `input_ids` [n, longest], `lengths` [n, 1] and `unknown` [n, 1]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.deploy.serving.metrics import Metrics
from aisle.preprocess.clean import prepare
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.fields import PARAMETER, from_json, read_fields
from aisle.preprocess.values import TextError
from aisle.preprocess.vocabulary import MANY_UNKNOWN


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.tokenize = TextTokenizer.of_version(folder)
        self.fields = read_fields(folder)
        counters = ("aisle_texts_total", "aisle_texts_truncated_total", "aisle_texts_unknown_total")
        self.metrics = Metrics(args["model_version"], args["model_instance_name"], *counters)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Tokenize the texts of all requests in one call. A bad text fails only its own request."""
        texts: list[str] = []
        spans: list[slice | str] = []  # the request's part of `texts`, or its error message
        found: Counter[str] = Counter()
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()[:, 0]
            try:
                prepared = prepare_rows(rows, found, self.fields if PARAMETER in request.parameters() else None)
            except TextError as error:
                spans.append(str(error))
                self.metrics.add("aisle_texts_rejected_total", reason=error.reason)
            else:
                spans.append(slice(len(texts), len(texts) + len(prepared)))
                texts += prepared

        if texts:
            input_ids, lengths, truncated, unknown = self.tokenize(texts)
            self.count(len(texts), truncated, unknown, found)
        responses = []
        for span in spans:
            if isinstance(span, str):
                refusal = pb_utils.TritonError(span, pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=refusal))
                continue
            own = np.ascontiguousarray(input_ids[span, : lengths[span].max()])
            tensors = {"input_ids": own, "lengths": lengths[span], "unknown": unknown[span]}
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(*each) for each in tensors.items()]))
        return responses

    def count(self, texts: int, truncated: int, unknown: Any, found: Counter[str]) -> None:
        """Count texts, given the share of unknown tokens of each, [texts, 1], and replaced personal data by kind."""
        self.metrics.add("aisle_texts_total", texts)
        self.metrics.add("aisle_texts_truncated_total", truncated)
        self.metrics.add("aisle_texts_unknown_total", int((unknown >= MANY_UNKNOWN).sum()))
        for kind, count in found.items():
            self.metrics.add("aisle_personal_data_total", count, kind=kind)

    def finalize(self) -> None:
        self.metrics.close()


def prepare_rows(rows: Any, found: Counter[str], fields: Sequence[str] | None = None) -> list[str]:
    """Prepare the texts of one request; count the replaced personal data in `found`, by kind.

    Args:
        fields: if not None, texts that start with "{" are JSON objects of these fields.

    Raises:
        TextError: a row is bad; the message names the first one.
    """
    prepared = []
    for number, raw in enumerate(rows):
        try:
            if fields is not None and raw.startswith(b"{"):
                raw = from_json(raw, fields)
            prepared.append(prepare(raw, found))
        except TextError as error:
            where = f"row {number}: " if len(rows) > 1 else ""
            raise TextError(error.reason, f"{where}{error}") from None
    return prepared
