"""server.py CHECKPOINT PORT SETTINGS: LitServe and transformers."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # this folder would shadow the package of the same name

import litserve
from transformer import Classifier


class API(litserve.LitAPI):
    def __init__(self, checkpoint: str, settings: dict[str, Any]) -> None:
        # Without batches LitServe passes one text, with batches a list.
        super().__init__(max_batch_size=settings["batch"], batch_timeout=0.01 if settings["batch"] > 1 else 0.0)
        self.checkpoint, self.settings = checkpoint, settings

    def setup(self, device: str) -> None:
        self.classify = Classifier(self.checkpoint, self.settings)
        self.classify(["warm-up", "a longer text to warm up with"])

    def decode_request(self, request: dict[str, str]) -> str:
        return request["text"]

    def predict(self, texts: Any) -> Any:
        return self.classify(texts) if self.settings["batch"] > 1 else self.classify([texts])[0]

    def encode_response(self, category: str) -> dict[str, str]:
        return {"category": category}


if __name__ == "__main__":
    checkpoint, port, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    server = litserve.LitServer(
        API(checkpoint, settings), accelerator="cpu", workers_per_device=settings["workers"], timeout=False
    )
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
