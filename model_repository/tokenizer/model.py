"""Triton's `tokenizer`: text [n, 1] to `input_ids` [n, longest of the request] and `lengths` [n, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.encode import Encoder


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.encode = Encoder(Path(args["model_repository"], args["model_version"], "tokenizer.json"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode the texts of all requests in one call; a bad text fails its own request alone."""
        texts: list[str] = []
        spans: list[slice | str] = []  # of `texts`, or what is wrong with the request
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()[:, 0]
            try:
                prepared = prepare_rows(rows)
            except TextError as error:
                spans.append(str(error))
            else:
                spans.append(slice(len(texts), len(texts) + len(prepared)))
                texts += prepared

        if texts:
            input_ids, lengths = self.encode(texts)
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


def prepare_rows(rows: Any) -> list[str]:
    """Prepare the texts of one request.

    Raises:
        TextError: naming the first bad row.
    """
    prepared = []
    for number, raw in enumerate(rows):
        try:
            prepared.append(prepare(raw))
        except TextError as error:
            where = f"row {number}: " if len(rows) > 1 else ""
            raise TextError(error.reason, f"{where}{error}") from None
    return prepared
