"""A classifier on transformers, for the peers: it maps texts to their most probable categories."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier:
    def __init__(self, checkpoint: str, settings: dict[str, Any]) -> None:
        """Load a checkpoint. Settings: `dtype` of torch, `threads` per operation, and `compile` for torch.compile."""
        torch.set_num_threads(settings["threads"])
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
        model = model.to(getattr(torch, settings["dtype"]))
        self.names = model.config.id2label
        self.model = torch.compile(model, dynamic=True) if settings["compile"] else model

    def __call__(self, texts: list[str]) -> list[str]:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            best = self.model(**inputs).logits.argmax(1)
        return [self.names[number] for number in best.tolist()]
