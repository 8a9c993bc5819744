"""Triton's `tokenizer`: text [n, 1] to `input_ids` [n, longest of the request] and `lengths` [n, 1]."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.deploy.observe import Metrics
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.encode import Encoder


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.encode = Encoder(Path(args["model_repository"], args["model_version"], "tokenizer.json"))
        self.metrics = Metrics(args["model_version"], "aisle_texts_total", "aisle_texts_truncated_total")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode the texts of all requests in one call; a bad text fails its own request alone."""
        texts: list[str] = []
        spans: list[slice | str] = []  # of `texts`, or what is wrong with the request
        found: Counter[str] = Counter()
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()[:, 0]
            try:
                prepared = prepare_rows(rows, found)
            except TextError as error:
                spans.append(str(error))
                self.metrics.add("aisle_texts_rejected_total", reason=error.reason)
            else:
                spans.append(slice(len(texts), len(texts) + len(prepared)))
                texts += prepared

        if texts:
            input_ids, lengths, truncated = self.encode(texts)
            self.metrics.add("aisle_texts_total", len(texts))
            self.metrics.add("aisle_texts_truncated_total", truncated)
            for kind, count in found.items():
                self.metrics.add("aisle_personal_data_total", count, kind=kind)
        responses = []
        for span in spans:
            if isinstance(span, str):
                refusal = pb_utils.TritonError(span, pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=refusal))
                continue
            own = np.ascontiguousarray(input_ids[span, : lengths[span].max()])
            tensors = [pb_utils.Tensor("input_ids", own), pb_utils.Tensor("lengths", lengths[span])]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses

    def finalize(self) -> None:
        self.metrics.close()


def prepare_rows(rows: Any, found: Counter[str]) -> list[str]:
    """Prepare the texts of one request, counting in `found` the personal data that gave way, by kind.

    Raises:
        TextError: naming the first bad row.
    """
    prepared = []
    for number, raw in enumerate(rows):
        try:
            prepared.append(prepare(raw, found))
        except TextError as error:
            where = f"row {number}: " if len(rows) > 1 else ""
            raise TextError(error.reason, f"{where}{error}") from None
    return prepared
