"""Public types of the client: predictions, errors and TLS, and the limits that both clients share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from aisle.errors import InputError, ServerError

Text = str | bytes | Mapping[str, object]  # the last: the fields of a product, such as title and brand
MODEL = "product_classifier"
DECISIONS_MODEL = "product_decisions"  # the same, with decisions
ATTRIBUTES_MODEL = "product_attributes"  # the same, with decisions and attributes
EMBEDDINGS_MODEL = "product_embeddings"  # over the same encoder
IN_FLIGHT = 4  # concurrent requests of one call: enough to keep the server's queue filled
CALLS = 64  # concurrent requests of one asyncio client; others wait here and leave room in the server's queue
BULK_RETRIES = 20  # they take about a minute
PATIENCE = 60.0  # seconds after which the client gives up on a server that never answered
CHANNEL = [
    # No limit on the size of messages, as in Triton, so that a batch of long texts fits.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # If the name has several addresses, each request goes to the next server that is reachable.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    # Reconnect within seconds of a server's return; by default gRPC waits longer after each attempt.
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Channels to one address share a connection by default. After a fork, the child would share its parent's.
    ("grpc.use_local_subchannel_pool", 1),
]


class Attribute(NamedTuple):
    """What a further head of the model says of a text."""

    value: str  # the most probable one
    confidence: float  # its probability


@dataclass(frozen=True)
class Prediction:
    """The most probable categories of one text, best first, and their probabilities.

    A multi-label model that is asked without `top_k` gives the categories that reach their thresholds. These may be
    none: then `category` is empty and `confidence` is 0. Its probabilities do not sum to 1.
    """

    categories: tuple[str, ...]
    confidences: tuple[float, ...]
    version: int = 0  # of the model that answered
    unknown: float = 0.0  # share of the text's tokens that the model does not know
    # The following are None unless decisions were asked for.
    decision: str | None = None  # accept, review or unknown
    decided: str | None = None  # the accepted category; its parent if only that is sure; otherwise ""
    prediction_set: tuple[str, ...] | None = None  # categories, one of which is correct at the fitted rate
    energy: float | None = None  # the higher, the less the text resembles those of known categories
    # By name, such as the brand; None unless attributes were asked for.
    attributes: Mapping[str, Attribute] | None = field(default=None, hash=False)

    @property
    def category(self) -> str:
        return self.categories[0] if self.categories else ""

    @property
    def confidence(self) -> float:
        return self.confidences[0] if self.confidences else 0.0


@dataclass(frozen=True)
class Embedding:
    """What the model's encoder makes of a text: a vector of length 1. The inner product of two is their similarity."""

    values: npt.NDArray[np.float32]  # [size]
    version: int  # of the model; vectors of different models cannot be compared


@dataclass(frozen=True)
class Failure:
    """Takes the place of a `Prediction` if the server refused one text of many."""

    message: str


MISSING = Failure("text is missing; send a string")


@dataclass(frozen=True)
class TLS:
    """PEM files: the authority to trust (by default the system's); the client's key and certificate for mutual TLS."""

    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None

    @staticmethod
    def from_environment() -> TLS | None:
        """Read AISLE_TLS_CA, AISLE_TLS_KEY and AISLE_TLS_CERT; AISLE_TLS=1 alone trusts the system's authorities."""
        ca, key, chain = (
            Path(name) if (name := os.environ.get(f"AISLE_TLS_{each}")) else None for each in ("CA", "KEY", "CERT")
        )
        return TLS(ca, key, chain) if ca or key or chain or os.environ.get("AISLE_TLS") == "1" else None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials.

        Raises:
            InputError: a file cannot be read, or only one of key and certificate is given.
        """
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InputError("mutual TLS needs both the private key and the certificate")
        return grpc.ssl_channel_credentials(
            *map(_pem, (self.root_certificates, self.private_key, self.certificate_chain))
        )


def _pem(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


class ClassifierError(ServerError):
    """The server answered with an error. `status` is gRPC's name for it, such as DEADLINE_EXCEEDED.

    `wait` is the number of seconds after which the server asks to try again; 0 if it does not say.
    """

    def __init__(self, status: str, message: str, wait: float = 0.0) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.wait = wait


class InvalidText(InputError):
    """The server cannot classify the request (INVALID_ARGUMENT); the message says what to change.

    `row` is the row of the bad text in the caller's list, counted from 0; None if no single text is at fault.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class Unavailable(ClassifierError):
    """No server answered, after all retries."""


class Overloaded(ClassifierError):
    """The server's queue is full, so it refused the request immediately. Try again later."""


class UnknownVersion(ClassifierError, InputError):
    """The version that `model_version` names is not loaded."""
