"""The asyncio client."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, Self, TypeVar

from tritonclient.grpc import InferenceServerException
from tritonclient.grpc.aio import InferenceServerClient

from aisle.client.protocol import (
    CALLS,
    IN_FLIGHT,
    MISSING,
    MODEL,
    Connection,
    Failure,
    InvalidText,
    Prediction,
    Text,
    inputs,
    predictions,
)
from aisle.client.tracing import request_span

T = TypeVar("T")


class AsyncClassifier(Connection):
    """The asyncio twin of `Classifier`: the same arguments, results and errors.

    Any number of calls may be made at once: those over `CALLS` wait for others to be answered.
    """

    _transport = InferenceServerClient

    @cached_property
    def _under_way(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(CALLS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()

    async def classify(self, texts: Sequence[Text], top_k: int = 1) -> list[Prediction]:
        """Return the predictions of `texts`, in their order; see `Classifier.classify`."""

        async def request(batch: list[Any]) -> list[Prediction]:
            return await self._request(batch, top_k)

        return [prediction async for prediction in self._pipeline(texts, request)]

    async def stream(
        self, texts: Iterable[Text | None] | AsyncIterable[Text | None], top_k: int = 1
    ) -> AsyncGenerator[Prediction | Failure, None]:
        """Yield an answer for each of any number of texts, in their order; see `Classifier.stream`.

        Texts are drawn only as answers are taken, so a slow reader slows the reading of `texts`. Close it (`aclose`, or
        `contextlib.aclosing`) where it is left early, so that requests under way end.
        """

        async def request(batch: list[Any]) -> list[Prediction | Failure]:
            answers = iter(await self._halving([text for text in batch if text is not None], top_k))
            return [MISSING if text is None else next(answers) for text in batch]

        async with aclosing(self._pipeline(texts, request)) as pipeline:
            async for answer in pipeline:
                yield answer

    async def _pipeline(
        self, texts: Iterable[Any] | AsyncIterable[Any], request: Callable[[list[Any]], Coroutine[Any, Any, list[T]]]
    ) -> AsyncGenerator[T, None]:
        """Yield the answers to the texts in order, with up to IN_FLIGHT requests under way."""
        pending: deque[asyncio.Task[list[T]]] = deque()
        try:
            async for batch in _chunks(texts, await self.max_batch()):
                pending.append(asyncio.create_task(request(batch)))
                if len(pending) == IN_FLIGHT:
                    for answer in await pending.popleft():
                        yield answer
            while pending:
                for answer in await pending.popleft():
                    yield answer
        finally:
            for task in pending:
                task.cancel()

    async def _halving(self, texts: list[Text], top_k: int) -> list[Prediction | Failure]:
        """Classify a batch; where it is refused, halve it until each bad text stands alone."""
        if not texts:
            return []
        try:
            return [*await self._request(texts, top_k, patient=True)]
        except InvalidText as error:
            if len(texts) == 1:
                return [Failure(str(error))]
        middle = len(texts) // 2
        return [*await self._halving(texts[:middle], top_k), *await self._halving(texts[middle:], top_k)]

    async def max_batch(self) -> int:
        """How many texts the server takes in one request."""
        if self._max_batch is None:
            config = await self._retrying(lambda: self._client.get_model_config(MODEL, self._version))
            self._max_batch = max(1, config.config.max_batch_size)
        return self._max_batch

    async def _request(self, texts: Sequence[Text], top_k: int, patient: bool = False) -> list[Prediction]:
        tensors = inputs(texts, top_k)
        with request_span(len(texts)) as headers:
            result = await self._retrying(
                lambda: self._client.infer(
                    MODEL,
                    tensors,
                    self._version,
                    headers=headers,
                    **self._limits(patient),
                ),
                patient,
            )
        answers = predictions(result)
        if self._log:
            self._log.record(texts, answers)
        return answers

    async def _retrying(self, call: Any, patient: bool = False) -> Any:
        for attempt in itertools.count():
            try:
                async with self._under_way:
                    return await call()
            except InferenceServerException as error:
                seconds = self._seconds_to_wait(error, attempt, patient)
            await asyncio.sleep(seconds)


async def _chunks(texts: Iterable[Any] | AsyncIterable[Any], size: int) -> AsyncIterator[list[Any]]:
    chunk = []
    async for text in texts if isinstance(texts, AsyncIterable) else _drawn(texts):
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _drawn(texts: Iterable[Any]) -> AsyncIterator[Any]:
    for text in texts:
        yield text
