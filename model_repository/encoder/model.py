"""Triton's `encoder`: `input_ids` [n, longest] and `lengths` [n, 1] of many requests to `logits` [n, labels]."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.build.engine import load_engine
from aisle.deploy.observe import Metrics


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.engine = load_engine(folder, args["model_instance_device_id"])
        counters = "tokens_useful", "tokens_computed", "engine_seconds", "engine_batches"
        self.metrics = Metrics(args["model_version"], *(f"aisle_{name}_total" for name in counters))
        spec = self.engine.spec
        self.metrics.set(
            "aisle_model_info", 1, target=spec.target, precision=spec.precision, checkpoint=spec.checkpoint
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Drop each request's padding, run all texts as one batch, hand each request its own logits."""
        tokens, lengths = [], []
        for request in requests:
            input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            length = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()
            tokens.append(input_ids[np.arange(input_ids.shape[1]) < length])
            lengths.append(length[:, 0])
        work: defaultdict[str, float] = defaultdict(float)
        logits = self.engine(np.concatenate(tokens), np.concatenate(lengths), work)
        for name, value in work.items():
            self.metrics.add(f"aisle_{name}_total", value)
        parts = np.split(logits, np.cumsum([len(length) for length in lengths])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", part)]) for part in parts]

    def finalize(self) -> None:
        self.metrics.close()
