"""What goes over the wire and what comes back: shared by the blocking client and its asyncio twin."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from tritonclient.grpc import InferenceServerException, InferInput
from tritonclient.grpc.auth import BasicAuth

from aisle.errors import InputError, ServerError

if TYPE_CHECKING:
    from aisle.client.traffic import TrafficLog

Text = str | bytes
MODEL = "product_classifier"
IN_FLIGHT = 4  # requests of one caller under way at once: enough to keep the server's queue from running dry
CALLS = 64  # of one asyncio client under way at once; the others wait here: the server's queue is for everyone
PATIENT_RETRIES = 20  # about a minute and a half
CHANNEL = [
    # Triton's own limits: messages of any size, so that a batch of long texts fits.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Where the name has several addresses, each is a server, and each request goes to the next that is reachable.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
]
# Triton's Python backend says so to a whole batch if a string tensor in it is cut short; ours never is, another's was.
SPOILT = "incomplete string data"
LOST = "but got 0 inputs for model"  # said of the labeler where an encoder that hangs came back with nothing


@dataclass(frozen=True)
class Prediction:
    """The most probable categories of one text, best first, and their probabilities."""

    categories: tuple[str, ...]
    confidences: tuple[float, ...]
    version: int = 0  # of the model that answered

    @property
    def category(self) -> str:
        return self.categories[0]

    @property
    def confidence(self) -> float:
        return self.confidences[0]


@dataclass(frozen=True)
class Failure:
    """Stands in the place of a `Prediction` where the server refused one text of many."""

    message: str


MISSING = Failure("text is missing; send a string")


@dataclass(frozen=True)
class TLS:
    """PEM files: the authority to trust (the system's by default) and, for mutual TLS, the client's own pair."""

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

    def arguments(self) -> dict[str, Any]:
        """Return what tritonclient calls these."""
        files = {
            "root_certificates": self.root_certificates,
            "private_key": self.private_key,
            "certificate_chain": self.certificate_chain,
        }
        for path in files.values():
            if path is not None and not path.is_file():
                raise InputError(f"{path}: no such file")
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InputError("mutual TLS needs both the private key and the certificate")
        return {"ssl": True, **{name: str(path) for name, path in files.items() if path is not None}}


class ClassifierError(ServerError):
    """The server answered with an error; `status` is gRPC's name for it, as DEADLINE_EXCEEDED."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status


class InvalidText(InputError):
    """The server cannot classify what was sent (INVALID_ARGUMENT); the message says what to change."""


class Unavailable(ClassifierError):
    """No server answered, after all retries."""


class Overloaded(ClassifierError):
    """More requests were waiting than the server lets, which it said at once. Ask again later."""


def inputs(texts: Sequence[str | bytes], top_k: int) -> list[InferInput]:
    """Return the request's tensors: `text` BYTES [n, 1] and, unless it is 1, `top_k` INT32 [n, 1].

    Raises:
        InvalidText: a string holds lone surrogates and so has no UTF-8 form, or `top_k` is no 32-bit number.
    """
    try:
        raw = [text.encode() if isinstance(text, str) else text for text in texts]
    except UnicodeEncodeError:
        raise InvalidText("text is not valid Unicode: it holds lone surrogates; remove them") from None
    text = InferInput("text", [len(raw), 1], "BYTES")
    text.set_data_from_numpy(np.array(raw, np.object_).reshape(-1, 1))
    if top_k == 1:
        return [text]
    if not -(2**31) <= top_k < 2**31:
        raise InvalidText(f"top_k must be from 1 to the number of categories; got {top_k}")
    k = InferInput("top_k", [len(raw), 1], "INT32")
    k.set_data_from_numpy(np.full((len(raw), 1), top_k, np.int32))
    return [text, k]


def predictions(result: Any) -> list[Prediction]:
    """Read `category` and `confidence`, both [n, k], and which version answered.

    That is the version of the response or, while a candidate answers some requests, what the output `version` says.
    """
    categories = result.as_numpy("category")
    confidences = result.as_numpy("confidence")
    tried = result.as_numpy("version")
    version = int(result.get_response().model_version if tried is None else tried[0, 0])
    return [
        Prediction(tuple(name.decode() for name in names), tuple(values), version)
        for names, values in zip(categories, confidences.tolist(), strict=True)
    ]


def translate(error: InferenceServerException) -> Exception:
    """Return the exception that callers see."""
    status = str(error.status() or "").removeprefix("StatusCode.")
    message = str(error.message() or "").removeprefix(f"in ensemble '{MODEL}', ")  # the caller named it
    passing = any(each in message for each in (SPOILT, LOST, "is not healthy", "has no available versions"))
    if status == "INVALID_ARGUMENT" and not passing:
        return InvalidText(message)
    if "Exceeds maximum queue size" in message:
        return Overloaded(status, message)
    # A step's process has died and is being started again; the last model is being unloaded by a server that stops.
    if status == "UNAVAILABLE" or passing:
        return Unavailable(status, message)
    return ClassifierError(status, message)


class Connection:
    """What the blocking client and its asyncio twin share: how to reach the server, and when to ask again."""

    _transport: ClassVar[Any]  # tritonclient's class

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = 10.0,
        retries: int = 4,
        tls: TLS | None = None,
        token: str = "",
        model_version: str = "",
        log: TrafficLog | None = None,
    ) -> None:
        """Name the server; the first call connects.

        Args:
            url: host:port of its gRPC endpoint. Where the name has several addresses, as that of a headless service,
                requests take turns among them; `ipv4:10.0.0.1:8001,10.0.0.2:8001` lists them.
            timeout: seconds that one request may take.
            retries: how often a request is sent again when no server answers (UNAVAILABLE); nothing else is retried.
            tls: encrypt the connection.
            token: ``NAME:SECRET``, which a gateway that tells clients apart knows this one by.
            model_version: the version to ask for; by default the server's latest.
            log: gets a line for each answer; whoever opened it closes it.

        Raises:
            InputError: a file of `tls` is missing, or `token` is of another form or would travel in the clear.
        """
        if token and ":" not in token:
            raise InputError("the token must be NAME:SECRET")
        if token and tls is None:
            raise InputError("a token is sent over TLS alone; name the server's authority (AISLE_TLS_CA)")
        self._timeout = timeout
        self._wait_us = max(1, int(timeout * 1e6))
        self._name = secrets.token_hex(8)
        self._retries = retries
        self._version = model_version
        self._log = log
        self._client = self._transport(url, channel_args=CHANNEL, **(tls.arguments() if tls else {}))
        if token:
            self._client.register_plugin(BasicAuth(*token.split(":", 1)))
        self._max_batch: int | None = None

    @classmethod
    def from_environment(cls, url: str, *, timeout: float = 10.0, log: TrafficLog | None = None) -> Self:
        """Connect as the commands do: TLS as `TLS.from_environment`, the token from AISLE_TOKEN.

        Raises:
            InputError: as the constructor.
        """
        token = os.environ.get("AISLE_TOKEN", "")
        return cls(url, timeout=timeout, tls=TLS.from_environment(), token=token, log=log)

    def _limits(self, patient: bool) -> dict[str, Any]:
        """Return what tritonclient's `infer` is told of the time that a request may take, from now on.

        A request that waits longer is dropped by the encoder before its turn: it is told when the request was sent, by
        a clock that need not be the server's.
        """
        parameters = {"caller": self._name, "sent_us": time.time_ns() // 1000, "wait_us": self._wait_us}
        if patient:
            parameters["patient"] = True  # computed when no call that someone waits for is left
        return {"client_timeout": self._timeout, "parameters": parameters}

    def _seconds_to_wait(self, error: InferenceServerException, attempt: int, patient: bool = False) -> float:
        """Return how long to wait before the next try, or raise what the caller shall see.

        Exponential backoff with full jitter; `attempt` counts from 0. A server that is overloaded is left alone by
        callers who wait for their answer: their retries would be the next overload. Whole files can wait for it, and
        for one that is being started again.
        """
        translated = translate(error)
        late = isinstance(translated, ClassifierError) and translated.status == "DEADLINE_EXCEEDED"
        again = isinstance(translated, Unavailable) or (patient and (late or isinstance(translated, Overloaded)))
        if not again or attempt >= (
            max(self._retries, PATIENT_RETRIES) if patient and self._retries else self._retries
        ):
            raise translated from None
        return random.uniform(0, min(8.0 if patient else 2.0, 0.1 * 2**attempt))
