"""The asyncio client."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, Self, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

import aisle.client.wire as wire
from aisle.client.connection import Connection
from aisle.client.fork import claim_asyncio
from aisle.client.protocol import CALLS, IN_FLIGHT, Embedding, Failure, InvalidText, Prediction, Text
from aisle.client.tracing import request_span

T = TypeVar("T")
Texts = Iterable[Any] | AsyncIterable[Any]
Request = Callable[[list[Any]], Coroutine[Any, Any, list[T]]]  # sends a batch of texts


class _Transport:
    """The connection of one event loop to the server."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.infer = channel.unary_unary(wire.INFER)
        self.config = channel.unary_unary(wire.CONFIG)
        self.slots = asyncio.Semaphore(CALLS)
        self.process = os.getpid()


class AsyncClassifier(Connection):
    """`Classifier` for asyncio: the same arguments, results and errors.

    Any number of calls may run concurrently; calls beyond `CALLS` wait for earlier ones. An instance can be made at
    module level and used in several event loops. It cannot be used in a child process that was forked after the first
    call.
    """

    _transports: dict[asyncio.AbstractEventLoop, _Transport]

    @property
    def _transport(self) -> _Transport:
        """The connection of the running event loop."""
        loop = asyncio.get_running_loop()
        transport = self._transports.get(loop)
        if transport is None or transport.process != os.getpid():
            if self._closed:
                raise RuntimeError("this classifier is closed")
            claim_asyncio()
            for closed in [each for each in self._transports if each.is_closed()]:
                del self._transports[closed]
            transport = self._transports[loop] = _Transport(self._connect(grpc.aio))
        return transport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection of the running event loop, and cancel its requests."""
        self._closed = True
        if transport := self._transports.pop(asyncio.get_running_loop(), None):
            await transport.channel.close()

    async def classify(
        self, texts: Iterable[Text], top_k: int | None = None, *, decisions: bool = False, attributes: bool = False
    ) -> list[Prediction]:
        """Return the predictions for `texts`, in the same order; see `Classifier.classify`."""
        wanted = wire.wanted_categories(top_k, decisions, attributes)
        return await self._ask(texts, lambda batch: self._classify_batch(batch, wanted))

    async def embed(self, texts: Iterable[Text], *, size: int | None = None) -> npt.NDArray[np.float32]:
        """Return the embeddings [texts, size] of `texts`, in the same order; see `Classifier.embed`."""
        wanted = wire.wanted_embedding(size)
        return wire.matrix(await self._ask(texts, lambda batch: self._embed_batch(batch, wanted)))

    async def _ask(self, texts: Iterable[Text], request: Request[T]) -> list[T]:
        """Return the answers to all texts; `request` sends a batch of them."""
        wire.check_list(texts)
        if isinstance(texts, AsyncIterable):
            raise TypeError("give a list of texts; stream takes an asynchronous iterator")
        texts = list(texts)
        if len(texts) <= await self.max_batch():
            try:
                return await request(texts) if texts else []
            except InvalidText as error:
                raise wire.located(error) from None
        found: list[T] = []
        try:
            async with aclosing(self._pipeline(texts, request, await self.max_batch())) as pipeline:
                async for answers in pipeline:
                    found += answers
        except InvalidText as error:
            raise wire.with_row(error, len(found)) from None
        return found

    def stream(
        self,
        texts: Iterable[Text | None] | AsyncIterable[Text | None],
        top_k: int | None = None,
        *,
        decisions: bool = False,
        attributes: bool = False,
    ) -> AsyncGenerator[Prediction | Failure, None]:
        """Yield an answer for each text, in the same order; see `Classifier.stream`.

        It reads `texts` only as fast as its answers are consumed. If you stop early, close it (`aclose`, or
        `contextlib.aclosing`), so that its requests end.
        """
        wire.check_list(texts)
        wire.check_top_k(top_k)
        return self._stream(texts, wire.wanted_categories(top_k, decisions, attributes))

    async def _stream(self, texts: Texts, wanted: wire.Wanted) -> AsyncGenerator[Prediction | Failure, None]:
        async def request(batch: list[Any]) -> list[Prediction | Failure]:
            answers, good = wire.check_texts(batch)
            found = iter(await self._classify_halves(good, wanted))
            return [next(found) if answer is None else answer for answer in answers]

        async with aclosing(self._pipeline(texts, request, await self.max_batch(bulk=True))) as pipeline:
            async for batch in pipeline:
                for answer in batch:
                    yield answer

    async def _pipeline(self, texts: Texts, request: Request[T], size: int) -> AsyncGenerator[list[T], None]:
        """Yield the answers to batches of `size` texts in order, with up to IN_FLIGHT concurrent requests."""
        pending: deque[asyncio.Task[list[T]]] = deque()
        try:
            async for batch in _chunks(texts, size):
                pending.append(asyncio.create_task(request(batch)))
                if len(pending) == IN_FLIGHT:
                    yield await pending.popleft()
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()

    async def _classify_halves(self, texts: list[bytes], wanted: wire.Wanted) -> list[Prediction | Failure]:
        """Classify a batch. If it is refused, classify its halves, until each bad text is alone."""
        if not texts:
            return []
        try:
            return [*await self._classify_batch(texts, wanted, bulk=True)]
        except InvalidText as error:
            if len(texts) == 1:
                return [wire.failure(error)]
        middle = len(texts) // 2
        return [
            *await self._classify_halves(texts[:middle], wanted),
            *await self._classify_halves(texts[middle:], wanted),
        ]

    async def has_decisions(self) -> bool:
        """Return whether the model that answers now has decisions."""
        return wire.models(await self._fetch_config(bulk=False)).has_decisions

    async def max_batch(self, bulk: bool = False) -> int:
        """The server's limit of texts in one request."""
        if self._max_batch is None:
            self._max_batch = self._checked_max_batch(await self._fetch_config(bulk))
        return self._max_batch

    async def category_counts(self) -> dict[int, int]:
        """Return the number of categories of each version that answers now; empty if the server does not tell."""
        return wire.category_counts(await self._fetch_config(bulk=False))

    async def _fetch_config(self, bulk: bool) -> bytes:
        question, transport = wire.config_request(self._version), self._transport
        return await self._with_retries(
            transport, lambda: transport.config(question, timeout=self._timeout, metadata=self._token), bulk
        )

    async def _classify_batch(self, texts: list[Any], wanted: wire.Wanted, bulk: bool = False) -> list[Prediction]:
        raw = wire.to_utf8_list(texts)
        answers = wire.predictions(await self._infer(raw, wanted, bulk), wanted)
        if self._log:
            self._log.record(wire.plain(raw), answers)
        return answers

    async def _embed_batch(self, texts: list[Any], wanted: wire.Wanted) -> list[Embedding]:
        return wire.embeddings(await self._infer(wire.to_utf8_list(texts), wanted, bulk=False), wanted.size)

    async def _infer(self, raw: list[bytes], wanted: wire.Wanted, bulk: bool) -> bytes:
        request, transport = wire.request_of(raw, wanted, self._version), self._transport
        with request_span(len(raw)) as headers:
            metadata = (*self._token, *headers.items())

            async def ask() -> bytes:
                stamped = self._stamped(request, bulk)
                return wire.check_outputs(await transport.infer(stamped, timeout=self._timeout, metadata=metadata))

            return await self._with_retries(transport, ask, bulk)

    async def _with_retries(self, transport: _Transport, call: Callable[[], Awaitable[bytes]], bulk: bool) -> bytes:
        since = time.monotonic()
        for attempt in itertools.count():
            try:
                async with transport.slots:
                    answer = await call()
            except grpc.RpcError as error:
                seconds = self._seconds_to_wait(error, attempt, bulk, since)
                await asyncio.sleep(seconds)
            else:
                self._note_answer()
                return answer
        raise AssertionError


async def _chunks(texts: Texts, size: int) -> AsyncIterator[list[Any]]:
    chunk = []
    async for text in texts if isinstance(texts, AsyncIterable) else _as_async(texts):
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _as_async(texts: Iterable[Any]) -> AsyncIterator[Any]:
    for text in texts:
        yield text
