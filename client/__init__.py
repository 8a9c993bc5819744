"""The thin gRPC client: `Classifier`, `AsyncClassifier` for asyncio, and the classification of whole files."""

from aisle.client.aio import AsyncClassifier
from aisle.client.classifier import Classifier
from aisle.client.protocol import (
    TLS,
    Attribute,
    ClassifierError,
    Embedding,
    Failure,
    InvalidText,
    Overloaded,
    Prediction,
    Unavailable,
    UnknownVersion,
)
from aisle.client.traffic import TrafficLog

__all__ = [
    "TLS",
    "AsyncClassifier",
    "Attribute",
    "Classifier",
    "ClassifierError",
    "Embedding",
    "Failure",
    "InvalidText",
    "Overloaded",
    "Prediction",
    "TrafficLog",
    "Unavailable",
    "UnknownVersion",
]
