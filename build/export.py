"""Export the graph to ONNX in its final precision: TensorRT is strongly typed and takes all types from the graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from aisle.build.graph import PackedEncoder, WithEmbeddings
from aisle.preprocess.pack import Packed, pack

# It warns that operators of torchvision, which no graph of ours has, are left out.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}


def export(graph: PackedEncoder, max_tokens: int, path: Path) -> None:
    """Write the graph over packed rows as ONNX, with dynamic numbers of rows, width and texts.

    Its output, [texts, labels + hidden], holds the logits and, after them, the embeddings.
    """
    example = pack(np.arange(5 + 3 + max_tokens), np.array([5, 3, max_tokens]), max_tokens)
    example = example._replace(input_ids=example.input_ids % graph.word.num_embeddings)
    rows, width, texts = (torch.export.Dim(name, min=1, max=2**16) for name in ("rows", "width", "texts"))
    per_token = {0: rows, 1: width}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            WithEmbeddings(graph).eval(),
            tuple(map(torch.from_numpy, example)),
            path,
            dynamo=True,
            opset_version=20,
            input_names=list(Packed._fields),
            output_names=["outputs"],
            dynamic_shapes=(per_token, per_token, per_token, {0: texts}),
            external_data=False,
        )
