"""server.py CHECKPOINT PORT SETTINGS: FastAPI and ONNX Runtime, with fused BERT subgraphs and dynamic INT8."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # this folder would hide the package of the same name

import numpy as np
import onnxruntime
from service import serve
from tokenizers import Tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def int8(checkpoint: Path) -> Path:
    """Return the checkpoint as an INT8 graph. It is made once and then kept beside the weights."""
    kept = checkpoint / "onnxruntime-int8.onnx"
    if kept.exists() and kept.stat().st_mtime > (checkpoint / "model.safetensors").stat().st_mtime:
        return kept
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    example = torch.ones(2, 8, dtype=torch.long)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(input_ids, attention_mask, token_type_ids).logits

    with tempfile.TemporaryDirectory() as folder:
        plain, fused = Path(folder, "plain.onnx"), Path(folder, "fused.onnx")
        axes = {name: {0: "texts", 1: "tokens"} for name in INPUTS} | {"logits": {0: "texts"}}
        torch.onnx.export(
            Logits().eval(),
            (example, example, example * 0),
            str(plain),
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        config = model.config
        optimizer = optimize_model(
            str(plain), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        )
        print("fused:", optimizer.get_fused_operator_statistics(), flush=True)
        optimizer.save_model_to_file(str(fused))
        part = kept.with_suffix(".part")
        quantize_dynamic(
            str(fused),
            str(part),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # the type of the fused operators' outputs
        )
        part.replace(kept)
    return kept


def main() -> None:
    checkpoint, port, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    session = onnxruntime.InferenceSession(str(int8(checkpoint)), options, providers=["CPUExecutionProvider"])
    given = {each.name for each in session.get_inputs()}
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_padding()
    names = json.loads((checkpoint / "labels.json").read_text("utf-8"))

    def predict(texts: list[str]) -> list[str]:
        encodings = tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": [each.ids for each in encodings],
            "attention_mask": [each.attention_mask for each in encodings],
            "token_type_ids": [each.type_ids for each in encodings],
        }
        feed = {name: np.array(rows, np.int64) for name, rows in inputs.items() if name in given}
        return [names[number] for number in session.run(None, feed)[0].argmax(1)]

    serve(predict, port, settings)


main()
