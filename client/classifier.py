"""The blocking client."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

import aisle.client.wire as wire
from aisle.client.connection import Connection
from aisle.client.protocol import IN_FLIGHT, Embedding, Failure, InvalidText, Prediction, Text
from aisle.client.tracing import request_span

Request = Any  # sends a batch: (texts, wanted, bulk=False) -> list of answers


class _Transport:
    """The connection of one process to the server: a channel, and threads for concurrent requests."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.infer = channel.unary_unary(wire.INFER)
        self.config = channel.unary_unary(wire.CONFIG)
        self.threads = ThreadPoolExecutor(8 * IN_FLIGHT, "aisle-client")
        self.closing = threading.Event()

    def close(self) -> None:
        self.closing.set()
        self.channel.close()
        self.threads.shutdown(cancel_futures=True)


class Classifier(Connection):
    """Classifies product texts on an Aisle server. One instance may be shared by threads, and by forked processes.

    with Classifier("localhost:8001") as classifier:
        for prediction in classifier.classify(["蓝牙耳机 降噪", "usb c cable 2m"]):
            print(prediction.category, prediction.confidence)
    """

    _transports: dict[int, _Transport]  # by process

    @property
    def _transport(self) -> _Transport:
        transport = self._transports.get(os.getpid())
        if transport is not None:
            return transport
        if self._closed:
            raise RuntimeError("this classifier is closed")
        made = _Transport(self._connect(grpc))
        transport = self._transports.setdefault(os.getpid(), made)  # without a lock, which a fork could leave locked
        if transport is not made:  # another thread was first
            made.close()
        return transport

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection of this process, and cancel its requests."""
        self._closed = True
        if transport := self._transports.pop(os.getpid(), None):
            transport.close()

    def classify(
        self, texts: Iterable[Text], top_k: int | None = None, *, decisions: bool = False, attributes: bool = False
    ) -> list[Prediction]:
        """Return the predictions for `texts`, in the same order. Long lists are sent as several concurrent requests.

        Args:
            top_k: the number of categories for each text, the most probable first. By default one; of a multi-label
                model, those that reach their thresholds.
            decisions: also fill in `decision`, `decided`, `prediction_set` and `energy`.
            attributes: also fill in `attributes`, of a model that was trained with `--also`.

        Raises:
            TypeError: `texts` is a single string, a table or a mapping; or `decisions` or `attributes` is neither True
                nor False.
            InvalidText: a text cannot be classified, `top_k` is out of range, or the model lacks what is asked for. The
                message and `row` name the text's row in `texts`, counted from 0.
            Unavailable: no server answered.
            Overloaded: the server's queue is full. Only `stream` retries then.
            UnknownVersion: the requested version is not loaded.
            ClassifierError: the server failed, or took longer than the timeout.
        """
        wire.check_list(texts)
        return self._ask(texts, wire.wanted_categories(top_k, decisions, attributes), self._classify_batch)

    def embed(self, texts: Iterable[Text], *, size: int | None = None) -> npt.NDArray[np.float32]:
        """Return the embeddings [texts, size] of `texts`, each of length 1, in the same order.

        The inner product of two embeddings is their cosine similarity. Compare only embeddings of the same model.

        Args:
            size: keep only so many numbers of each embedding, which saves memory and time. A model that was trained
                with `--contrastive` is made for this.

        Raises:
            ClassifierError: another version went live meanwhile; or as `classify`.
            TypeError, InvalidText, Unavailable, Overloaded, UnknownVersion: as `classify`. InvalidText also if the
                version has no embeddings, or shorter ones than `size`.
        """
        return self.embed_with_version(texts, size=size)[0]

    def embed_with_version(
        self, texts: Iterable[Text], *, size: int | None = None
    ) -> tuple[npt.NDArray[np.float32], int]:
        """Return the embeddings of `texts`, as `embed` does, and the version that made them; 0 without texts."""
        wire.check_list(texts)
        found: list[Embedding] = self._ask(texts, wire.wanted_embedding(size), self._embed_batch)
        return wire.matrix(found), found[0].version if found else 0

    def stream_embeddings(
        self, texts: Iterable[Text | None], *, size: int | None = None
    ) -> Iterator[Embedding | Failure]:
        """Yield the embedding of each text, in the same order and in constant memory; otherwise as `stream`."""
        wire.check_list(texts)
        return self._stream(texts, wire.wanted_embedding(size), self._embed_batch)

    def _ask(self, texts: Iterable[Text], wanted: wire.Wanted, request: Request) -> list[Any]:
        """Return the answers to all texts; `request` sends a batch of them."""
        batches = list(_chunks(texts, self.max_batch))
        if len(batches) == 1:  # in the caller's own thread, which costs least
            try:
                first: list[Any] = request(batches[0], wanted)
            except InvalidText as error:
                raise wire.located(error) from None
            return first
        answers: list[Any] = []
        try:
            for batch in self._pipeline(batches, wanted, request):
                answers += batch
        except InvalidText as error:
            raise wire.with_row(error, len(answers)) from None
        return answers

    def stream(
        self,
        texts: Iterable[Text | None],
        top_k: int | None = None,
        *,
        decisions: bool = False,
        attributes: bool = False,
    ) -> Iterator[Prediction | Failure]:
        """Yield an answer for each text, in the same order and in constant memory.

        A text that the server refuses gets a `Failure`; the other texts of its batch are classified as usual.

        Raises:
            TypeError: as `classify`, at the call itself.
            InvalidText: `top_k` is out of range, or the model lacks what is asked for.
            Unavailable, Overloaded, ClassifierError: as `classify`, but after more retries. If a gateway refuses a
                client over its limit, the request is sent again after the time that the gateway gives.
        """
        wire.check_list(texts)
        wire.check_top_k(top_k)
        return self._stream(texts, wire.wanted_categories(top_k, decisions, attributes), self._classify_batch)

    def _stream(self, texts: Iterable[Text | None], wanted: wire.Wanted, request: Request) -> Iterator[Any]:
        each = partial(self._ask_each, request)
        for batch in self._pipeline(_chunks(texts, self._fetch_max_batch(bulk=True)), wanted, each):
            yield from batch

    def probe(
        self, top_k: int | None = None, *, decisions: bool = False, attributes: bool = False, bulk: bool = False
    ) -> None:
        """Classify one word, to check that the server answers and has at least `top_k` categories.

        Args:
            decisions: check that it has decisions too.
            attributes: check that it has attributes too.
            bulk: wait as long as `stream` does.
        """
        wanted = wire.wanted_categories(top_k, decisions, attributes)
        wire.predictions(self._infer([b"probe"], wanted, bulk), wanted)

    @property
    def max_batch(self) -> int:
        """The server's limit of texts in one request."""
        return self._fetch_max_batch()

    def fingerprints(self, *, bulk: bool = False) -> dict[int, str]:
        """Return the fingerprint of the model behind each version that answers now, by version number.

        Two servers can use the same number for different models. The result is empty if the server does not tell.

        Args:
            bulk: wait for a server as `stream` does.
        """
        return self.models(bulk=bulk).fingerprints

    def has_decisions(self) -> bool:
        """Return whether the model that answers now has decisions."""
        return self.models().has_decisions

    def models(self, *, bulk: bool = False) -> wire.Models:
        """Return what the server tells of the versions that answer now, in one call."""
        answer = self._fetch_config(bulk)
        self._max_batch = self._checked_max_batch(answer)  # so that it needs no further call
        return wire.models(answer)

    def _fetch_max_batch(self, bulk: bool = False) -> int:
        if self._max_batch is None:
            self._max_batch = self._checked_max_batch(self._fetch_config(bulk))
        return self._max_batch

    def _fetch_config(self, bulk: bool) -> bytes:
        request, transport = wire.config_request(self._version), self._transport
        return self._with_retries(
            transport, lambda: transport.config(request, timeout=self._timeout, metadata=self._token), bulk
        )

    def _pipeline(self, batches: Iterable[list[Any]], wanted: wire.Wanted, request: Any) -> Iterator[Any]:
        """Yield the answers to the batches in order, with up to IN_FLIGHT concurrent requests."""
        pending: deque[Future[Any]] = deque()
        threads = self._transport.threads
        try:
            for batch in batches:
                context = copy_context()  # so that the caller's trace continues in the thread
                pending.append(threads.submit(context.run, request, batch, wanted))
                if len(pending) == IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _classify_batch(self, texts: Sequence[Any], wanted: wire.Wanted, bulk: bool = False) -> list[Prediction]:
        raw = wire.to_utf8_list(texts)
        answers = wire.predictions(self._infer(raw, wanted, bulk), wanted)
        if self._log:
            self._log.record(wire.plain(raw), answers)
        return answers

    def _embed_batch(self, texts: Sequence[Any], wanted: wire.Wanted, bulk: bool = False) -> list[Embedding]:
        return wire.embeddings(self._infer(wire.to_utf8_list(texts), wanted, bulk), wanted.size)

    def _infer(self, raw: list[bytes], wanted: wire.Wanted, bulk: bool) -> bytes:
        request, transport = wire.request_of(raw, wanted, self._version), self._transport
        with request_span(len(raw)) as headers:
            metadata = (*self._token, *headers.items())
            return self._with_retries(
                transport,
                lambda: wire.check_outputs(
                    transport.infer(self._stamped(request, bulk), timeout=self._timeout, metadata=metadata)
                ),
                bulk,
            )

    def _ask_each(self, request: Request, texts: list[Any], wanted: wire.Wanted) -> list[Any]:
        """Send a batch that may contain missing or bad texts."""
        answers, good = wire.check_texts(texts)
        found = iter(self._ask_halves(request, good, wanted))
        return [next(found) if answer is None else answer for answer in answers]

    def _ask_halves(self, request: Request, texts: list[bytes], wanted: wire.Wanted) -> list[Any]:
        """Send a batch. If it is refused, send its halves, until each bad text is alone."""
        if not texts:
            return []
        try:
            return [*request(texts, wanted, bulk=True)]
        except InvalidText as error:
            if len(texts) == 1:
                return [wire.failure(error)]
        middle = len(texts) // 2
        return self._ask_halves(request, texts[:middle], wanted) + self._ask_halves(request, texts[middle:], wanted)

    def _with_retries(self, transport: _Transport, call: Callable[[], bytes], bulk: bool) -> bytes:
        since = time.monotonic()
        for attempt in itertools.count():
            try:
                answer = call()
            except grpc.RpcError as error:
                seconds = self._seconds_to_wait(error, attempt, bulk, since)
                if transport.closing.wait(seconds):
                    raise RuntimeError("this classifier was closed") from None
            else:
                self._note_answer()
                return answer
        raise AssertionError


def _chunks(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, size)):
        yield chunk
